"""The engine samples from the parameters in training, as they are now; routing can be taken along."""

from __future__ import annotations

import copy

import pytest
import torch

from dsv3.config.fp8 import FP8Section
from dsv3.model import DeepSeekV3
from dsv3.quant import fp8
from dsv3.serve.params import SamplingParams
from dsv3.train.grpo import logprobs
from dsv3.train.grpo.logprobs import CHUNK_ELEMENTS, answer_mask, score
from dsv3.train.grpo.rollouts import Answer, Rollouts, pad
from dsv3.train.grpo.routing import replay, routed_layers
from tests.model.build import tiny_model

PROMPTS = [list(range(3, 40)), [*list(range(3, 36)), 7, 9], [11, 12]]  # the first two share two blocks
SAMPLED = SamplingParams(max_tokens=12, temperature=1, n=3, logprobs=0, ignore_eos=True)


def rollouts_of(model: DeepSeekV3, **options) -> Rollouts:
    return Rollouts(model, None, 56, options.pop("max_batch", 8), **options)  # type: ignore[arg-type]


@pytest.fixture
def model() -> DeepSeekV3:
    return tiny_model(num_nextn_predict_layers=1)


@torch.no_grad()
def nudge(model: DeepSeekV3) -> None:
    draw = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=draw)


def scored(model: DeepSeekV3, found: list[list[Answer]], temperature: float = 1.0):
    """The answers under the model as training reads them, and the engine's own numbers."""
    rows = [(prompt, answer) for prompt, answers in zip(PROMPTS, found) for answer in answers]
    tokens_SX = pad([prompt + answer.tokens for prompt, answer in rows], torch.int64)
    prompt_S = torch.tensor([len(prompt) for prompt, _ in rows])
    length_S = torch.tensor([len(prompt) + len(answer.tokens) for prompt, answer in rows])
    told_ST = pad([answer.logprobs for _, answer in rows], torch.float32)
    vocab = model.config.vocab_size
    return score(model, tokens_SX, prompt_S, length_S, temperature, vocab), told_ST


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("drafts", [0, 1])
def test_an_update_reaches_the_next_rollouts(model: DeepSeekV3, kind: str, drafts: int) -> None:
    if kind == "bf16":
        model.model.embed_tokens.compute_dtype = torch.bfloat16
    if kind == "fp8":
        fp8.apply(model, FP8Section())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rollouts = rollouts_of(model, draft_tokens=drafts)
    before = rollouts.generate(PROMPTS, SAMPLED, [0, 1, 2], seed=1)
    nudge(model)
    after = rollouts.generate(PROMPTS, SAMPLED, [0, 1, 2], seed=1)
    assert [a.tokens for a in before[0]] != [a.tokens for a in after[0]]
    with torch.no_grad():
        training, told_ST = scored(model, after)
    # Random weights of a few units width: a rounding sends tokens to other experts.
    assert (training.plain_ST - told_ST).abs().mean() < {"fp32": 1e-5, "bf16": 0.3, "fp8": 0.6}[kind]
    # A fresh engine over a copy of the weights as they are now writes the same.
    fresh = rollouts_of(copy.deepcopy(model), draft_tokens=drafts).generate(
        PROMPTS, SAMPLED, [0, 1, 2], seed=1
    )
    assert [[a.tokens for a in group] for group in fresh] == [[a.tokens for a in group] for group in after]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    if drafts:
        assert rollouts.drafted > 0


def test_what_is_drawn_depends_on_the_prompts_number_alone(model: DeepSeekV3) -> None:
    rollouts = rollouts_of(model)
    together = rollouts.generate(PROMPTS, SAMPLED, [0, 1, 2], seed=1)
    (alone,) = rollouts.generate(PROMPTS[2:], SAMPLED, [2], seed=1)
    assert [a.tokens for a in together[2]] == [a.tokens for a in alone]
    (other,) = rollouts.generate(PROMPTS[2:], SAMPLED, [3], seed=1)
    assert [a.tokens for a in other] != [a.tokens for a in alone]
    assert len({tuple(a.tokens) for a in alone}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_those_of_the_whole_logits(
    model: DeepSeekV3, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rollouts_of(model).generate(PROMPTS, SAMPLED, [0, 1, 2], seed=3)
    for group in found:  # answers of other lengths than their neighbours'
        group[1] = Answer(group[1].tokens[:5], group[1].logprobs[:5], "", True, None)
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 7 * model.config.vocab_size)
    got, _ = scored(model, found, temperature)
    rows = [(prompt, answer) for prompt, answers in zip(PROMPTS, found) for answer in answers]
    for s, (prompt, answer) in enumerate(rows):
        logits = model(torch.tensor([prompt + answer.tokens]), mtp=False).logits_BTV[0].detach().double()
        for t, token in enumerate(answer.tokens):
            logs = (logits[len(prompt) + t - 1] / temperature).log_softmax(-1)
            assert float(got.logp_ST[s, t].detach()) == pytest.approx(float(logs[token]), abs=1e-4)
            assert float(got.entropy_ST[s, t]) == pytest.approx(float(-(logs.exp() * logs).sum()), abs=1e-4)
            assert float(got.plain_ST[s, t]) == pytest.approx(answer.logprobs[t], abs=1e-4)
        assert not got.logp_ST[s, len(answer.tokens) :].any()
    whole = torch.autograd.grad(got.logp_ST.sum(), model.lm_head.weight)[0]
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", CHUNK_ELEMENTS)
    again = torch.autograd.grad(scored(model, found, temperature)[0].logp_ST.sum(), model.lm_head.weight)[0]
    torch.testing.assert_close(whole, again, rtol=1e-4, atol=1e-4)


def test_answer_mask_covers_answers() -> None:
    assert answer_mask(torch.tensor([3, 1]), torch.tensor([4, 4])).tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("max_batch", [8, 2])
def test_recorded_experts_are_those_training_would_choose(model: DeepSeekV3, max_batch: int) -> None:
    rollouts = rollouts_of(model, draft_tokens=1, record=True, max_batch=max_batch)
    found = rollouts.generate(PROMPTS, SAMPLED, [0, 1, 2], seed=1)
    for prompt, answers in zip(PROMPTS, found):
        for answer in answers:
            ids = (prompt + answer.tokens)[:-1]
            chosen = own_choices(model, ids)
            assert answer.routes is not None and answer.routes.shape == (len(ids), len(chosen), 3)
            for number, wanted in enumerate(chosen):
                assert torch.equal(answer.routes[:, number].long().sort()[0], wanted.sort()[0])


def own_choices(model: DeepSeekV3, ids: list[int]) -> list[torch.Tensor]:
    """Experts of every token by layer, in one plain pass."""
    found: list[torch.Tensor] = []
    hooks = [
        moe.gate.register_forward_hook(lambda gate, arguments, routing: found.append(routing.indices_NK))
        for moe in routed_layers(model)
    ]
    with torch.no_grad():
        model(torch.tensor([ids]), mtp=False)
    for hook in hooks:
        hook.remove()
    return found


def test_replay_trains_on_the_recorded_experts_and_leaves_nothing_behind(model: DeepSeekV3) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    free = model(ids, mtp=False).logits_BTV
    own = torch.stack([torch.stack(own_choices(model, row.tolist()), dim=1) for row in ids])
    with replay(model, own.to(torch.int16)):
        same = model(ids, mtp=False).logits_BTV
    torch.testing.assert_close(same, free, rtol=1e-5, atol=1e-5)
    other = (own + 1) % model.config.n_routed_experts
    with replay(model, other.to(torch.int16)):
        output = model(ids, mtp=False)
        for number, layer in enumerate(sorted(output.router)):
            wanted = torch.bincount(other[:, :, number].flatten(), minlength=16)
            assert torch.equal(output.router[layer].load_E, wanted)
        output.logits_BTV.sum().backward()
    assert (output.logits_BTV - free).abs().max() > 1e-3
    assert routed_layers(model)[0].gate.weight.grad is not None  # gates of the replayed experts learn
    torch.testing.assert_close(model(ids, mtp=False).logits_BTV, free)
