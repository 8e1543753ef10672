"""Held-out text while training: bits per byte and MTP acceptance, and samples to look at."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from dsv3.config.train import SamplesSection, ValidationSection
from dsv3.data.loader import Batch
from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluate.held_out import HeldOut, evaluate, in_bytes
from dsv3.evaluate.sample import generate
from dsv3.parallel.world import World
from dsv3.train.callbacks.repeated import Repeated
from dsv3.train.run import RunFolder
from dsv3.train.trainer import Callback, Trainer


class Validation(Repeated):
    """Reads the same held-out sequences every ``validation.every`` steps and at the end.

    ``seconds``: what the last reading took. A loss at or below ``validation.target`` ends the run.
    """

    def __init__(self, run: RunFolder, rows: Batch, byte_lengths: Tensor, options: ValidationSection):
        super().__init__(options.every)
        self.run, self.options = run, options
        self.rows, self.byte_lengths = rows, byte_lengths
        self.last: HeldOut | None = None
        self.seconds = 0.0

    def read(self, trainer: Trainer) -> None:
        """Evaluate; a line of metrics and one for people."""
        started = time.monotonic()
        trainer.model.eval()
        length = trainer.recipe.sequence_length
        if trainer.pipeline is None:
            found = evaluate(trainer.model, self.rows, self.byte_lengths, length)
        else:
            found = in_bytes(trainer.pipeline.read(self.rows), self.rows, self.byte_lengths, length)
        trainer.model.train()
        self.last = found
        self.seconds = time.monotonic() - started
        self.run.metric(
            {
                "step": trainer.state.step,
                "tokens": trainer.state.tokens,
                "validation_loss": found.loss,
                "validation_bits_per_byte": found.bits_per_byte,
                "mtp_acceptance": found.acceptance,
            }
        )
        accepted = ", ".join(f"{share:.1%}" for share in found.acceptance)
        self.run.log(
            f"step {trainer.state.step}: held-out {found.bits_per_byte:.3f} bits per byte"
            + (f", MTP acceptance {accepted}" if accepted else "")
        )
        self._compare(trainer, found.loss)

    def _compare(self, trainer: Trainer, loss: float) -> None:
        """End the run where its target is reached; of many processes the first one's loss counts."""
        target = self.options.target
        loss = trainer.world.gather([loss])[0][0]
        trainer.state.reached = target is not None and loss <= target
        if target is not None and trainer.finished:
            which = "is at" if trainer.state.reached else "has not come down to"
            self.run.log(f"step {trainer.state.step}: held-out loss {loss:.4f} {which} the target {target:g}")

    def on_start(self, trainer: Trainer) -> None:
        """A run that goes on after its target was reached: the target may be another now."""
        if trainer.state.reached:
            self.measure(trainer)


class Samples(Repeated):
    """Continues the recipe's prompts every ``samples.every`` steps and at the end.

    ``encode``: the token ids a prompt stands for.
    """

    def __init__(
        self,
        run: RunFolder,
        tokenizer: Tokenizer,
        options: SamplesSection,
        encode: Callable[[str], list[int]],
    ):
        super().__init__(options.every)
        self.run, self.tokenizer, self.options, self.encode = run, tokenizer, options, encode

    def read(self, trainer: Trainer) -> None:
        """One line of ``samples.jsonl`` a prompt."""
        options, tokenizer = self.options, self.tokenizer
        trainer.model.eval()
        for prompt in options.prompts:
            made = generate(
                trainer.model,
                self.encode(prompt) or [tokenizer.bos_id],
                options.tokens,
                options.temperature,
                trainer.recipe.seed,
                stop={tokenizer.eos_id},
                vocab_size=tokenizer.vocab_size,
            )
            text = tokenizer.decode(made, skip_special=True)
            self.run.sample({"step": trainer.state.step, "prompt": prompt, "text": text})
        trainer.model.train()


def beside(run: RunFolder, world: World, validation: Validation, samples: Samples) -> list[Callback]:
    """The two, as far as the run's layout lets a model write text on its side."""
    found: list[Callback] = [validation]
    if world.size > 1:  # all ranks would have to write the same text in step
        run.log("many processes write no samples: dsv3 generate shows what the model can do")
    else:
        found.append(samples)
    return found
