"""Processes of this machine, a thread each, that run one benchmark's worker together over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dsv3.common.errors import Failure

TIMEOUT = 900.0  # seconds for all steps


def run_ranks(worker: str, job: dict[str, Any], ranks: int, what: str) -> list[Any]:
    """What ``python -m worker JOB RESULT`` of each rank wrote to RESULT, by rank.

    Raises :class:`Failure` naming ``what`` where a rank stops or none of them ends.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        processes = []
        for rank, result in enumerate(results):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [sys.executable, "-m", worker, json.dumps(job), str(result)]
            with open(result.with_suffix(".log"), "wb") as log:
                processes.append(subprocess.Popen(command, env=environment, stderr=log))
        try:
            for process in processes:
                process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Failure(f"{what}: no end after {TIMEOUT:.0f} s; try fewer ranks") from None
        finally:
            for process in processes:
                process.kill()
        for process, result in zip(processes, results):
            if process.returncode:
                said = result.with_suffix(".log").read_text(errors="replace").strip().splitlines()
                raise Failure(f"{what}: a rank stopped: {said[-1] if said else 'no message'}")
        return [json.loads(result.read_text(encoding="utf-8")) for result in results]
