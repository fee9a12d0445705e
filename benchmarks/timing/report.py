"""Rows of cases, printed and written as they come."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import torch
import triton
from gpu.recording import record
from gpu.shapes import ModelShape

from timing.case import Call, Case
from timing.clock import copy_bandwidth, free_bytes, matmul_rate, measure_on, prefill_us

OWN = "vllm-kvcompress"
# Of the memory that is free, for one peer.
MAX_SHARE = 0.9


def environment() -> dict[str, Any]:
    """Versions, commit, device and driver."""
    return {
        "commit": machine.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        **(machine.device() if torch.cuda.is_available() else {}),
    }


class Report:
    """Rows of a run; the file, if there is to be one, is written anew after each."""

    def __init__(self, out: Path | None, run: dict[str, Any]) -> None:
        self.out = out
        self.run = {"command": machine.command(), **environment(), **run}
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """One more row."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """All there is so far."""
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"run": self.run, "rows": self.rows}, indent=1)
            self.out.write_text(text + "\n", encoding="utf-8")


def counted_row(shape: ModelShape, case: Case) -> dict[str, Any]:
    """Bytes and launches of a case that does not run."""
    names = [launch.name for launch in record(case.run)]
    counts = {kernel: names.count(kernel) for kernel in dict.fromkeys(names)}
    launches = ", ".join(f"{n} {kernel}" for kernel, n in counts.items())
    print(f"{_title(shape, case)} {case.num_bytes / 1e6:10.2f} MB  {launches}")
    return {**_fields(shape, case), "launches": counts, "num_launches": len(names)}


class Timer:
    """Times cases on a device, beside what a copy and a matrix product reach there.

    Attributes:
        copy_gbs: GB/s of a plain copy, measured before all cases.
        is_dry: whether the times say nothing: plain calls on a CPU.
        limit_s: seconds after the start of the process; nothing is started later.
    """

    def __init__(self, device: torch.device, limit_s: float | None) -> None:
        self.device = device
        self.is_dry = device.type == "cpu"
        self.limit_s = limit_s if limit_s is not None else float("inf")
        self.measure = measure_on(device)
        self.copy_gbs, self.tflops = copy_bandwidth(device), matmul_rate(device)
        # On every row, which may be read without the rest.
        self.where = environment() | ({"dry_run": True} if self.is_dry else {})
        print(f"copy {self.copy_gbs:.0f} GB/s, matmul {self.tflops:.0f} TFLOP/s", flush=True)

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return machine.seconds_running() > self.limit_s

    def rows(self, shape: ModelShape, case: Case) -> Iterator[dict[str, Any]]:
        """The case's row, or its error, and one row per peer that takes its tensors."""
        yield from self._rows(shape, case, {OWN: lambda: case.run, **case.peers})

    def peer_rows(self, shape: ModelShape, case: Case) -> Iterator[dict[str, Any]]:
        """One row per peer with tensors of its own."""
        for who, build in case.later.items():
            yield from self._rows(shape, case, {who: lambda build=build: self._built(case, build)})

    def _built(self, case: Case, build: Call) -> Call:
        free = free_bytes(self.device)
        if case.num_bytes > MAX_SHARE * free:
            raise MemoryError(f"{case.num_bytes} bytes, of {free} that are free")
        return build()

    def _rows(
        self, shape: ModelShape, case: Case, ways: dict[str, Call]
    ) -> Iterator[dict[str, Any]]:
        for who, build in ways.items():
            if self.is_late:
                print(f"{_title(shape, case)} {who}: no time left")
                return
            try:
                row = self._row(shape, case, who, build())
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                outcome = "FAILED" if who == OWN else "left out"
                print(f"{_title(shape, case)} {who} {outcome}: {text}", flush=True)
                key = "error" if who == OWN else "left_out"
                row = {**_fields(shape, case), "by": who, key: text, **self.where}
            yield row

    def _row(self, shape: ModelShape, case: Case, who: str, run: Call) -> dict[str, Any]:
        times = self.measure(run)
        gbs = case.num_bytes / times["p50_us"] / 1000
        row = {
            **_fields(shape, case),
            "by": who,
            **times,
            "layer_p50_us": times["p50_us"] / case.num_layers,
            "gb_per_s": gbs,
            "of_copy": gbs / self.copy_gbs,
            **self.where,
        }
        layer = f" = {row['layer_p50_us']:8.1f} us a layer" if case.num_layers > 1 else " " * 22
        text = f"{times['p50_us']:10.1f} us{layer} {gbs:7.0f} GB/s = {row['of_copy']:.0%} of copy"
        if case.name == "compress a prompt":
            row["of_prefill"] = times["p50_us"] / prefill_us(
                shape, case.extra["prompt_len"], self.tflops
            )
            text += f", {row['of_prefill']:.2%} of prefill"
        print(f"{_title(shape, case)} {who:22} {text}", flush=True)
        return row


def _title(shape: ModelShape, case: Case) -> str:
    return f"{shape.name:20} {case.name:18} {case.label:34}"


def _fields(shape: ModelShape, case: Case) -> dict[str, Any]:
    return {
        "shape": shape.name,
        "op": case.name,
        "case": case.label,
        **case.extra,
        "layers_in_pool": shape.num_layers,
        "num_layers": case.num_layers,
        "num_bytes": case.num_bytes,
    }
