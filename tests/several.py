"""Programs started in several processes that find each other, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def started(worker: Path, *arguments: object, processes: int) -> None:
    """`python WORKER ARGUMENTS` in so many processes at once, each with its rank in the environment."""
    place = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = []
    for rank in range(processes):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {name: str(value) for name, value in ({"RANK": rank, "LOCAL_RANK": rank} | place).items()}
        command = [sys.executable, str(worker), *map(str, arguments)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    try:
        for process in running:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in running:  # one that waits for another which failed would wait for ever
            process.kill()
            process.communicate()
