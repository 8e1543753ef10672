"""``torchrun -m tests.parallel.kills WHERE VERB ...``: dsv3, in which rank 1 dies inside a chosen collective.

At its fifth step and before any restart: when the others are in the collective already, or about to enter it.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def arm(where: str) -> None:
    """Let this process kill itself in ``where``."""
    import torch.distributed as dist

    from dsv3.parallel import experts, weights
    from dsv3.train.trainer import Trainer

    at = {"step": 0}
    step = Trainer.step

    def counted(self: Trainer) -> Any:
        at["step"] = self.state.step + 1
        return step(self)

    Trainer.step = counted  # type: ignore[method-assign]

    def dying(plain: Any, begun: bool) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if at["step"] < 5:
                return plain(*arguments, **options)
            if begun:
                plain(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    if where == "rows":  # sent, not waited for
        experts.Trip.start = dying(experts.Trip.start, begun=True)  # type: ignore[method-assign]
    elif where == "gradients":
        weights.reduce_scatter = dying(weights.reduce_scatter, begun=False)
    elif where == "weights":
        weights.all_gather = dying(weights.all_gather, begun=False)
    else:
        assert where == "stream"  # between pipeline stages
        dist.batch_isend_irecv = dying(dist.batch_isend_irecv, begun=True)


def main() -> None:
    """Arm rank 1, then run dsv3 with the other arguments."""
    from dsv3.cli.main import main as dsv3

    where = sys.argv.pop(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        arm(where)
    dsv3()


if __name__ == "__main__":
    main()
