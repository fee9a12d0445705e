"""A `vllm serve` process, and vLLM's own load generator against it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_VLLM = (sys.executable, "-P", "-m", "vllm.entrypoints.cli.main")
_LOG_TAIL = 3000
_POLL_S = 0.5


class ServerError(RuntimeError):
    """The server did not start, or died."""


@dataclass
class Gauges:
    """What the server's gauges said while a workload ran.

    Attributes:
        running, kv_use: one value per poll; requests, and the fraction of the pool in use.
    """

    running: list[float] = field(default_factory=list)
    kv_use: list[float] = field(default_factory=list)


class Server:
    """One running server.

    Args:
        port: on 127.0.0.1.
        process: of the server.
        log: its output.
    """

    def __init__(self, port: int, process: subprocess.Popen, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._process = process
        self._log = log

    def wait(self, timeout_s: float) -> None:
        """Until it answers.

        Raises:
            ServerError: with the end of its log, if it does not.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"the server stopped:\n{self._log.read_text()[-_LOG_TAIL:]}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            time.sleep(1)
        raise ServerError(f"no answer in {timeout_s} s:\n{self._log.read_text()[-_LOG_TAIL:]}")

    def metrics(self) -> dict[str, float]:
        """vLLM's gauges and counters, summed over their labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        values: dict[str, float] = {}
        for name, value in re.findall(r"^(vllm:\w+)(?:\{.*\})? (\S+)$", text, re.M):
            values[name] = values.get(name, 0.0) + float(value)
        return values

    @contextlib.contextmanager
    def watch(self) -> Iterator[Gauges]:
        """Poll the gauges until the block ends."""
        gauges, stop = Gauges(), threading.Event()

        def poll() -> None:
            while not stop.wait(_POLL_S):
                with contextlib.suppress(OSError):
                    values = self.metrics()
                    gauges.running.append(values["vllm:num_requests_running"])
                    gauges.kv_use.append(values["vllm:kv_cache_usage_perc"])

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield gauges
        finally:
            stop.set()
            thread.join()


@contextlib.contextmanager
def serve(model: str, flags: list[str], log: Path, timeout_s: float) -> Iterator[Server]:
    """Start `vllm serve` and stop it after the block, with all its processes.

    Args:
        model: folder or name.
        flags: further arguments.
        log: where its output goes.
        timeout_s: to wait for its first answer.

    Raises:
        ServerError: if it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*_VLLM, "serve", model, "--host", "127.0.0.1", "--port", str(port), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            server = Server(port, process, log)
            server.wait(timeout_s)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_workload(
    server: Server,
    model: str,
    tokenizer: str,
    input_len: int,
    output_len: int,
    num_prompts: int,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Send random prompts all at once with `vllm bench serve`.

    Returns:
        Its result, and preemptions, peak_running and mean_kv_use while it ran.

    Raises:
        ServerError: if a request failed.
    """
    name = f"result-{input_len}-{seed}.json"
    command = [*_VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.url]
    command += ["--model", model, "--tokenizer", tokenizer, "--dataset-name", "random"]
    command += ["--random-input-len", str(input_len), "--random-output-len", str(output_len)]
    command += ["--num-prompts", str(num_prompts), "--seed", str(seed), "--ignore-eos"]
    command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99"]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", name]
    command += ["--disable-tqdm", "--temperature", "0"]
    before = server.metrics()
    with server.watch() as gauges:
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise ServerError(f"the load generator stopped:\n{run.stdout}{run.stderr[-_LOG_TAIL:]}")
    result = json.loads((folder / name).read_text())
    if result["completed"] != num_prompts:
        raise ServerError(f"{num_prompts - result['completed']} of {num_prompts} requests failed")
    key = "vllm:num_preemptions_total"
    result["preemptions"] = server.metrics()[key] - before[key]
    result["peak_running"] = max(gauges.running, default=0.0)
    result["mean_kv_use"] = sum(gauges.kv_use) / max(1, len(gauges.kv_use))
    return result
