"""GRPO as an objective of the trainer (report 5.2.2): sample, judge, compare within groups, step.

One batch of rollouts serves ``minibatches * epochs`` optimizer steps. The trainer calls
:meth:`GRPO.accumulate` a step; when the batch is used up, a new one is sampled from the weights of that
moment. All of it is a function of the weights, the recipe and how many prompts were drawn, and what is left
of a batch goes into the checkpoint: a resumed run is bit-equal.

Of many ranks each answers and scores some of the prompts and hears of the others' answers; the batch is then
the same on all, and each passes over some of its rows.

Shapes: P prompts, G answers a prompt, S = P G answers, X tokens of prompt and answer, T tokens an answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv3.config.grpo import GRPORecipe
from dsv3.evaluate.rewards import Rewards, Scores
from dsv3.model import DeepSeekV3
from dsv3.parallel.world import World
from dsv3.serve.params import SamplingParams
from dsv3.train.grpo.batch import Batch
from dsv3.train.grpo.completions import Completions, Group
from dsv3.train.grpo.logprobs import Scored, answer_mask, score
from dsv3.train.grpo.losses import Whole, advantages, deviation, policy_loss, without_signal
from dsv3.train.grpo.prompts import Prompt, Prompts, columns_of
from dsv3.train.grpo.rollouts import Answer, Rollouts, pad
from dsv3.train.grpo.routing import replay
from dsv3.train.grpo.seen import Seen
from dsv3.train.schedules import Extent
from dsv3.train.trainer import Accumulated, Callback, Trainer


class GRPO(Callback):
    """The objective; as a callback it keeps its place in the prompts and an unfinished batch.

    ``reference``: the model the KL is measured to; None with ``policy.beta`` 0.
    """

    def __init__(
        self,
        recipe: GRPORecipe,
        rollouts: Rollouts,
        prompts: Prompts,
        rewards: Rewards,
        completions: Completions,
        reference: DeepSeekV3 | None,
    ):
        self.recipe, self.rollouts, self.prompts = recipe, rollouts, prompts
        self.rewards, self.completions, self.reference = rewards, completions, reference
        self.extent = Extent("samples", recipe.steps * recipe.batch.sequences, 1)
        self.serial = 0  # prompts drawn so far
        self.batch: Batch | None = None
        self.used = 0  # steps the batch has served
        self.drafted = self.accepted = 0  # tokens of the last rollouts, of all ranks
        options = recipe.rollouts
        self.steps_a_batch = options.minibatches * options.epochs
        self.params = SamplingParams(
            max_tokens=options.max_tokens, temperature=options.temperature, n=options.answers, logprobs=0
        )

    def accumulate(self, trainer: Trainer, sequences: int) -> Accumulated:
        """See :class:`dsv3.train.trainer.Objective`."""
        started = time.perf_counter()
        metrics: dict[str, Any] = {}
        if self.batch is None:
            metrics |= self._sample(trainer)
        assert self.batch is not None
        first = self.used % self.recipe.rollouts.minibatches * sequences
        loss, passed = self._passes(trainer, self.batch, torch.arange(first, first + sequences))
        tokens = int(self.batch.length_S[first : first + sequences].sum())
        self.used += 1
        if self.used == self.steps_a_batch:
            self.batch, self.used = None, 0
        metrics |= passed | {"num_tokens": trainer.state.tokens + tokens}
        metrics["step_time"] = time.perf_counter() - started
        return Accumulated(loss, tokens, metrics)

    def _passes(self, trainer: Trainer, batch: Batch, rows: Tensor) -> tuple[float, dict[str, Any]]:
        """Forward and backward of a step's answers, those of similar length together."""
        policy = self.recipe.policy
        answers_S = (batch.length_S - batch.prompt_S)[rows]
        whole = Whole(len(rows), int(answers_S.sum()), self.recipe.rollouts.max_tokens)
        loss, seen = 0.0, Seen()
        for chosen in self._own(trainer.world, batch, rows):
            part = batch.pick(chosen).to(trainer.device)
            mask_ST = answer_mask(part.prompt_S, part.length_S)
            with replay(trainer.model, part.routes_STLK):
                scored = self._score(trainer.model, part)
                old_ST = scored.logp_ST.detach() if part.old_ST is None else part.old_ST
                terms = policy_loss(
                    policy, scored.logp_ST, old_ST, mask_ST, part.advantages_S, whole, part.reference_ST,
                    drift_ST=part.sampled_ST - scored.plain_ST,
                )  # fmt: skip
                terms.loss.backward()
            loss += float(terms.loss.detach())
            seen.token("entropy", scored.entropy_ST, mask_ST)
            if terms.kl_ST is not None:
                seen.token("kl", terms.kl_ST, mask_ST)
            seen.clip("low", terms.low_SL, mask_ST)
            seen.clip("high", terms.high_SL, mask_ST)
            seen.clip("region", terms.low_SL | terms.high_SL, mask_ST)
            if policy.off_policy is not None:
                seen.add("off_policy_dropped", float(terms.dropped_S.sum()), len(chosen))
            if self.used == 0:  # later steps have moved the policy
                seen.difference(scored.plain_ST, part.sampled_ST, mask_ST)
        return sum(row[0] for row in trainer.world.gather([loss])), seen.metrics(trainer.world)

    def _own(self, world: World, batch: Batch, rows: Tensor) -> tuple[Tensor, ...]:
        """Micro batches of the answers that this rank works on, those of similar length together."""
        order = rows[batch.length_S[rows].argsort(stable=True)]
        return order[world.data_rank :: world.data_size].split(
            self.recipe.batch.micro_sequences // world.data_size
        )

    def _score(self, model: DeepSeekV3, part: Batch) -> Scored:
        return score(
            model, part.tokens_SX, part.prompt_S, part.length_S, self.recipe.rollouts.temperature,
            self.rollouts.engine.vocab_size,
        )  # fmt: skip

    def _sample(self, trainer: Trainer) -> dict[str, Any]:
        """A new batch of rollouts from the weights as they are; what it was like."""
        started = time.perf_counter()
        groups, drawn, zero = self._groups(trainer)
        rewards_PG = torch.stack([group.rewards_G for group in groups])
        advantages_PG = advantages(rewards_PG, self.recipe.policy.scale)
        answers = [answer for group in groups for answer in group.answers]
        prompts = [group.prompt for group in groups for _ in group.answers]
        batch = Batch(
            tokens_SX=pad([p.ids + a.tokens for p, a in zip(prompts, answers)], torch.int64),
            prompt_S=torch.tensor([len(prompt.ids) for prompt in prompts]),
            length_S=torch.tensor([len(p.ids) + len(a.tokens) for p, a in zip(prompts, answers)]),
            advantages_S=advantages_PG.flatten(),
            sampled_ST=pad([answer.logprobs for answer in answers], torch.float32),
            routes_STLK=self._routes(answers),
        )
        if self.steps_a_batch > 1:  # else the first step's own log-probabilities are the old ones
            batch = replace(batch, old_ST=self._frozen_scores(trainer, trainer.model, batch))
        if self.reference is not None:
            batch = replace(batch, reference_ST=self._frozen_scores(trainer, self.reference, batch))
        self.batch, self.used = batch, 0
        self.completions.write(trainer, groups, advantages_PG)
        scored = {
            name: torch.tensor([float("nan") if s is None else s for g in groups for s in g.scores[name]])
            for name in groups[0].scores
        }
        lengths = torch.tensor([float(len(answer.tokens)) for answer in answers])
        ended = lengths[torch.tensor([answer.whole for answer in answers])]
        metrics = {
            "reward": _number(rewards_PG.nanmean()),
            "reward_std": _number(deviation(rewards_PG.flatten())),
            "frac_reward_zero_std": zero,
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/mean_terminated_length": float(ended.mean()) if len(ended) else 0.0,
            "completions/clipped_ratio": 1 - len(ended) / len(answers),
            "prompts_drawn": drawn,
            "rollout_time": time.perf_counter() - started,
        }
        if self.drafted:
            metrics["draft_acceptance"] = self.accepted / self.drafted
        metrics |= self.completions.take_metrics()
        for name, values in scored.items():
            metrics[f"rewards/{name}/mean"] = _number(values.nanmean())
            metrics[f"rewards/{name}/std"] = _number(deviation(values))
        return metrics

    def _groups(self, trainer: Trainer) -> tuple[list[Group], int, float]:
        """The batch's groups, how many prompts were drawn for them, and the share without a signal.

        With ``policy.redraw`` groups that teach nothing give way to new ones, as long as draws are left.
        """
        wanted = self.recipe.rollout_prompts
        kept: list[Group] = []
        spare: list[Group] = []
        drawn = 0
        for _ in range(1 + self.recipe.policy.redraw):
            fresh = self._judged(trainer, wanted - len(kept))
            drawn += len(fresh)
            flat = without_signal(torch.stack([group.rewards_G for group in fresh])).tolist()
            kept += [group for group, nothing in zip(fresh, flat) if not nothing]
            spare += [group for group, nothing in zip(fresh, flat) if nothing]
            if len(kept) == wanted:
                break
        # In the order they were drawn: minibatches get their share of groups without a signal.
        groups = sorted(kept + spare[: wanted - len(kept)], key=lambda group: group.prompt.serial)
        return groups, drawn, len(spare) / drawn

    def _judged(self, trainer: Trainer, count: int) -> list[Group]:
        """``count`` new groups: every rank answers and scores some of them, and tells the others."""
        world, first = trainer.world, self.serial
        self.serial += count
        own = [self.prompts(first + number) for number in range(world.data_rank, count, world.data_size)]
        found = self.rollouts.generate(
            [prompt.ids for prompt in own],
            self.params,
            [prompt.serial for prompt in own],
            self.recipe.seed,
        )
        scores = self._scores(trainer, own, found) if own else Scores([], {}, [])
        told = {
            "answers": [[answer.plain() for answer in answers] for answers in found],
            "total": scores.total,
            "by_function": scores.by_function,
            "extra": self.completions.take_extra(len(scores.total)),
            "logged": self.completions.take_logged(),
            "drafted": self.rollouts.drafted,
            "accepted": self.rollouts.accepted,
        }
        size, groups, self.drafted, self.accepted = self.params.n, [], 0, 0
        for rank, heard in enumerate(world.exchange(told)):
            self.drafted += heard["drafted"]
            self.accepted += heard["accepted"]
            for name, values in heard["logged"].items():
                for value in values:
                    self.completions.log_metric(name, value)
            for number, answers in enumerate(heard["answers"]):
                rows = slice(number * size, (number + 1) * size)
                groups.append(
                    Group(
                        self.prompts(first + rank + number * world.data_size),
                        list(map(Answer.of_plain, answers)),
                        torch.tensor([float("nan") if x is None else x for x in heard["total"][rows]]),
                        {name: values[rows] for name, values in heard["by_function"].items()},
                        {name: values[rows] for name, values in heard["extra"].items()},
                    )
                )
        return sorted(groups, key=lambda group: group.prompt.serial)

    def _scores(self, trainer: Trainer, prompts: list[Prompt], found: list[list[Answer]]) -> Scores:
        """The reward functions, called as TRL calls them."""
        pairs = [(prompt, answer) for prompt, answers in zip(prompts, found) for answer in answers]
        return self.rewards(
            prompts=[prompt.columns["prompt"] for prompt, _ in pairs],
            completions=[prompt.completion(answer.text) for prompt, answer in pairs],
            completion_ids=[answer.tokens for _, answer in pairs],
            trainer_state=trainer.state,
            log_extra=self.completions.log_extra,
            log_metric=self.completions.log_metric,
            **columns_of(prompts, self.params.n),
        )

    def _routes(self, answers: Sequence[Answer]) -> Tensor | None:
        routes = [answer.routes for answer in answers if answer.routes is not None]
        if not routes:
            return None
        # Padding goes to the first K experts: they must differ, and nobody reads what comes of it.
        chosen = torch.arange(routes[0].shape[-1], dtype=torch.int16)
        found = chosen.repeat(len(routes), max(map(len, routes)), routes[0].shape[1], 1)
        for row, own in zip(found, routes):
            row[: len(own)] = own.cpu()
        return found

    @torch.no_grad()
    def _frozen_scores(self, trainer: Trainer, model: DeepSeekV3, batch: Batch) -> Tensor:
        """Log-probabilities of every answer under ``model``, in micro batches, ``[S, T]`` on the CPU."""
        found = torch.zeros_like(batch.sampled_ST)
        for rows in self._own(trainer.world, batch, torch.arange(len(batch.length_S))):
            part = batch.pick(rows).to(trainer.device)
            with replay(model, part.routes_STLK):
                logp_ST = self._score(model, part).logp_ST.cpu()
            found[rows, : logp_ST.shape[1]] = logp_ST
        return trainer.world.add(found.to(trainer.device)).cpu()

    def on_checkpoint(self, trainer: Trainer) -> dict[str, Tensor]:
        """Prompts drawn, and the batch in use."""
        place = {"grpo/place": torch.tensor([self.serial, self.used])}
        return place | (self.batch.tensors() if self.batch is not None else {})

    def on_resume(self, trainer: Trainer, tensors: dict[str, Tensor]) -> None:
        """Go on where the checkpoint was written."""
        self.serial, self.used = tensors["grpo/place"].tolist()
        self.batch = Batch.of_tensors(tensors)


def _number(value: Tensor) -> float | None:
    """A float; None (JSON has no nan) where there is nothing to average."""
    found = float(value)
    return found if math.isfinite(found) else None
