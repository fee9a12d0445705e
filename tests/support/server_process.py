"""`vllm serve` as a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

_STARTUP_S = 400


class Server:
    """A server that answers on a port of this machine, and what it has printed."""

    def __init__(self, process: subprocess.Popen, port: int, log: Path) -> None:
        self.process, self.port, self._log = process, port, log

    def output(self) -> str:
        """Everything printed so far."""
        return self._log.read_text()

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as response:
            text = response.read().decode()
        values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.M)
        assert values, f"no metric {name}"
        return sum(map(float, values))


@contextlib.contextmanager
def serving(arguments: Sequence[str], folder: Path, **environment: str) -> Iterator[Server]:
    """A server on a free port, started, ready, and ended with the block.

    Args:
        arguments: of `vllm serve`, without the port.
        folder: where its log goes.
        environment: variables beside this process's own.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "vllm.entrypoints.cli.main", "serve", *arguments, "--port", str(port)]
    path = folder / "log"
    with path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    server = Server(process, port, path)
    try:
        deadline = time.monotonic() + _STARTUP_S
        while True:
            assert process.poll() is None, server.output()[-3000:]
            assert time.monotonic() < deadline, server.output()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
