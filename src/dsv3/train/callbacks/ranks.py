"""What a run over many processes should not hide: slow ranks, broken ranks, and where tokens travel."""

from __future__ import annotations

from statistics import median

import torch

from dsv3.parallel.traffic import Traffic
from dsv3.train.run import RunFolder
from dsv3.train.trainer import Callback, StepReport, Trainer

SLOW = 1.5  # times the median rank's own work
WINDOW = 20  # steps that are looked at together


class Ranks(Callback):
    """Names slow ranks and those whose part of the loss is not finite; counts what goes between nodes.

    A rank's own work is the time of its steps without what it waited for rows of other ranks and for their
    gradients: a slow rank makes the others wait, and waits for nobody. On a GPU, where a wait returns at
    once, this sees the host's side only.
    """

    def __init__(self, run: RunFolder, traffic: dict[str, Traffic]):
        self.run, self.traffic = run, traffic
        self.own = 0.0
        self.waited = 0.0

    def on_start(self, trainer: Trainer) -> None:
        """Count waiting from here on, and say what rows travel by."""
        for carrier in sorted({traffic.carrier for traffic in self.traffic.values()}):
            self.run.log(f"tokens travel to experts by {carrier}")
        self.waited = trainer.world.waited

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Sum up; every ``WINDOW`` steps compare the ranks and note the traffic."""
        step, waited = trainer.state.step, trainer.world.waited
        self.own += max(0.0, report.seconds - (waited - self.waited))
        self.waited = waited
        if broken := report.metrics.get("ranks_not_finite"):
            named = ", ".join(map(str, broken))
            self.run.log(f"step {step}: rank {named} has a part of the loss that is not finite")
        if step % WINDOW:
            return
        own = [row[0] for row in trainer.world.gather([self.own])]
        usual = median(own)
        for rank, seconds in enumerate(own):
            if seconds > SLOW * usual:
                self.run.log(
                    f"step {step}: rank {rank} is slow, {seconds / WINDOW:.3f} s a step of its own work; "
                    f"the median rank takes {usual / WINDOW:.3f}"
                )
        self.own = 0.0
        if trainer.world.layout.expert > 1:
            self.note_traffic(trainer)

    def note_traffic(self, trainer: Trainer) -> None:
        """A line of metrics: nodes a token visits, and bytes between nodes."""
        world = trainer.world
        counts = torch.zeros(3 + world.layout.expert, dtype=torch.float64)  # also on a stage without experts
        for traffic in self.traffic.values():
            between, least = traffic.bytes_between_nodes()
            found = torch.cat((between[None], least[None], traffic.visits_X)).cpu()
            counts[: len(found)] += found
            traffic.clear()
        between, least, *nodes = (sum(column) for column in zip(*world.gather(counts.tolist())))
        self.run.metric(
            {
                "step": trainer.state.step,
                "nodes_a_token": sum(n * count for n, count in enumerate(nodes)) / max(1, sum(nodes)),
                "nodes_a_token_most": max((n for n, count in enumerate(nodes) if count), default=0),
                "bytes_between_nodes_a_step": between / WINDOW,
                "bytes_with_one_copy_a_node": least / WINDOW,
            }
        )
