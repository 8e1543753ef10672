"""Several processes for one test: they start together, run a function, and hand back what it returns as JSON.

Starting them costs seconds (each imports torch), so a function should run many cases.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_ranks(world: int, function: str, argument: Any = None, timeout: float = 150) -> list[Any]:
    """What ``module:function(argument)`` returned, by rank; fails with the output of all if one fails.

    ``world`` 0: one process that knows of no others.
    """
    with tempfile.TemporaryDirectory() as folder:
        common = {**os.environ, "OMP_NUM_THREADS": "1"}
        if world:
            common |= {
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
            }
        command = [sys.executable, "-m", "tests.parallel.ranks", function, json.dumps(argument), folder]
        processes, logs = [], []
        for rank in range(max(1, world)):
            log = open(Path(folder) / f"log-{rank}", "w+")  # noqa: SIM115
            logs.append(log)
            environment = {**common, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world else {})}
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        try:
            failed = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(failed):
            for log in logs:
                log.seek(0)
            text = "\n".join(f"--- rank {rank}\n{log.read()[-4000:]}" for rank, log in enumerate(logs))
            raise AssertionError(text)
        for log in logs:
            log.close()
        return [
            json.loads((Path(folder) / f"result-{rank}.json").read_text()) for rank in range(max(1, world))
        ]


def main() -> None:
    """In a rank's own process."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    function, argument, folder = sys.argv[1:]
    module, name = function.split(":")
    found = getattr(importlib.import_module(module), name)(json.loads(argument))
    (Path(folder) / f"result-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
