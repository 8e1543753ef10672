"""Every preset against TRL's GRPOTrainer: same tokens, rewards and old log-probabilities, same gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from dsv3.config.grpo import PRESETS, PolicySection
from dsv3.config.recipe import validate
from dsv3.model import DeepSeekV3
from dsv3.train.grpo.logprobs import answer_mask, score
from dsv3.train.grpo.losses import Whole, advantages, policy_loss, without_signal
from dsv3.train.grpo.rollouts import pad
from tests.model.build import tiny_model
from tests.model.transformers_twin import to_twin, twin_of

trl = pytest.importorskip("trl", reason="TRL is the oracle here: pip install 'dsv3[dev]'")

VOCAB, GROUPS, G, LONGEST = 61, 3, 4, 9
# TRL's words for ours.
AVERAGES = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}


class Case:
    """Prompts and answers of all lengths, rewards with a flat group and a missing one, a moved policy."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)

        def some(count: int) -> list[int]:
            return torch.randint(3, VOCAB, (count,), generator=draw).tolist()

        def some_noise(shape: Sequence[int]) -> torch.Tensor:
            return torch.randn(tuple(shape), generator=draw)

        self.prompts = [some(3 + 2 * number) for number in range(GROUPS)]
        self.answers = [
            [*some(1 + int(torch.randint(LONGEST - 1, (1,), generator=draw))), 1] for _ in range(GROUPS * G)
        ]
        self.rewards: list[float | None] = [1, 0, 0.5, 0, 1, 1, 1, 1, 0, None, 0, 2]
        self.start = tiny_model(seed=3)
        self.moved = tiny_model(seed=3)
        with torch.no_grad():
            for parameter in self.moved.parameters():
                parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=draw)
        rows = [prompt for prompt in self.prompts for _ in range(G)]
        self.tokens_SX = pad([p + a for p, a in zip(rows, self.answers)], torch.int64)
        self.prompt_S = torch.tensor([len(prompt) for prompt in rows])
        self.length_S = torch.tensor([len(p) + len(a) for p, a in zip(rows, self.answers)])
        self.mask_ST = answer_mask(self.prompt_S, self.length_S)
        now = self.scored(self.moved, 1.0).detach()
        # Ratios beyond every clip on either side, and within.
        apart = torch.tensor([-0.5, 0.5, 0.0] * GROUPS * G)[: GROUPS * G, None]
        self.old_ST = now + (apart + 0.2 * some_noise(now.shape)) * self.mask_ST
        self.sampled_ST = now + 0.3 * some_noise(now.shape) * self.mask_ST

    def scored(self, model: DeepSeekV3, temperature: float) -> torch.Tensor:
        return score(model, self.tokens_SX, self.prompt_S, self.length_S, temperature, VOCAB).logp_ST


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.fixture(scope="module")
def saved(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference as a folder: TRL cannot make one of a model in memory."""
    folder = tmp_path_factory.mktemp("trl") / "model"
    twin_of(case.start).save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({str(number): number for number in range(VOCAB)}, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="1", pad_token="2", unk_token="0", padding_side="left"
    )


def trl_trainer(case: Case, saved: Path, policy: PolicySection, temperature: float, out: Path) -> Any:
    """A trainer that gets our answers instead of sampling, with the moved weights as its policy."""
    from datasets import Dataset

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [prompt for prompt in case.prompts for _ in range(G)],
            "completion_ids": case.answers,
            "logprobs": None,
        }

    arguments = trl.GRPOConfig(
        output_dir=str(out), per_device_train_batch_size=GROUPS * G, num_generations=G, use_cpu=True,
        bf16=False, use_bias_correction_kl=policy.unbiased_kl, max_completion_length=LONGEST,
        loss_type=AVERAGES[policy.average], report_to="none",
        importance_sampling_level=policy.ratio, scale_rewards=policy.scale, epsilon=policy.epsilon_low,
        epsilon_high=policy.epsilon_high, beta=policy.beta, temperature=temperature, num_iterations=2,
        off_policy_mask_threshold=policy.off_policy,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.GRPOTrainer(
            model=str(saved), args=arguments, processing_class=tokenizer(), rollout_func=rollout,
            reward_funcs=lambda prompts, completions, **_: case.rewards,
            train_dataset=Dataset.from_list([{"prompt": str(number)} for number in range(GROUPS * G)]),
        )  # fmt: skip
    missing, unexpected = trainer.model.load_state_dict(to_twin(dict(case.moved.state_dict())), strict=False)
    assert not unexpected and not missing
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("preset", [*PRESETS, "v3 of V3.2", "batch"])
def test_loss_gradients_and_metrics_are_trls(
    case: Case, saved: Path, tmp_path: Path, preset: str, temperature: float
) -> None:
    if temperature != 1 and preset not in ("v3", "dapo"):
        pytest.skip("temperature acts before the loss: two presets suffice")
    name, _, extra = preset.partition(" ")
    tree: dict[str, Any] = {"preset": name} if name in PRESETS else {"scale": name}
    policy = validate(PolicySection, tree | ({"off_policy": 0.02, "unbiased_kl": True} if extra else {}))

    theirs = trl_trainer(case, saved, policy, temperature, tmp_path)
    inputs = theirs._generate_and_score_completions([{"prompt": str(n)} for n in range(GROUPS * G)])
    inputs["old_per_token_logps"], inputs["sampling_per_token_logps"] = case.old_ST, case.sampled_ST
    wanted = theirs._compute_loss(theirs.model, inputs)
    wanted.backward()

    rewards_PG = torch.tensor([float("nan") if r is None else r for r in case.rewards]).view(GROUPS, G)
    advantages_S = advantages(rewards_PG, policy.scale).flatten()
    torch.testing.assert_close(advantages_S, inputs["advantages"], rtol=1e-5, atol=1e-6)
    scored = score(case.moved, case.tokens_SX, case.prompt_S, case.length_S, temperature, VOCAB)
    with torch.no_grad():
        reference_ST = case.scored(case.start, temperature) if policy.beta else None
    terms = policy_loss(
        policy, scored.logp_ST, case.old_ST, case.mask_ST, advantages_S,
        Whole(GROUPS * G, int(case.mask_ST.sum()), LONGEST), reference_ST,
        case.sampled_ST - scored.logp_ST.detach(),
    )  # fmt: skip
    case.moved.zero_grad(set_to_none=True)
    terms.loss.backward()
    torch.testing.assert_close(terms.loss, wanted.detach(), rtol=1e-4, atol=1e-6)
    assert abs(float(wanted)) > 1e-3

    ours = to_twin({name: p.grad for name, p in case.moved.named_parameters() if p.grad is not None})
    for key, parameter in theirs.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-4, atol=1e-4 * scale + 1e-8)

    def mean(flags: torch.Tensor) -> float:
        return float(flags.float().mean() if flags.shape[1] == 1 else flags[case.mask_ST].float().mean())

    told = {key: values[-1] for key, values in theirs._metrics["train"].items()}
    assert told["clip_ratio/low_mean"] == pytest.approx(mean(terms.low_SL))
    assert told["clip_ratio/high_mean"] == pytest.approx(mean(terms.high_SL))
    if (
        policy.scale != "batch"
    ):  # there TRL asks the batch's deviation; ours still counts groups that teach nothing
        assert told["frac_reward_zero_std"] == pytest.approx(float(without_signal(rewards_PG).float().mean()))
    assert told["entropy"] == pytest.approx(float(scored.entropy_ST[case.mask_ST].mean()), rel=1e-4)
    if policy.beta:
        assert terms.kl_ST is not None
        assert told["kl"] == pytest.approx(float(terms.kl_ST[case.mask_ST].mean()), rel=1e-4)
    if extra:
        assert terms.dropped_S.any()
    if name != "r1" and temperature == 1:
        assert terms.low_SL.any() and terms.high_SL.any()
