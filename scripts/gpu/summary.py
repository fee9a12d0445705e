"""One page of plain text about what fifteen.sh ran, from OUT/part*.json, to OUT/summary.txt.

    python scripts/gpu/summary.py OUT

The exit status is a sum: 1 if a step of set-up did not pass, 2 for correctness, 4 for numbers, 8
for engines. A step that was left out for want of something did not pass. What cannot be read is a
line that says so, and hides nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EXIT_BITS = {"setup": 1, "correctness": 2, "numbers": 4, "engine": 8}
# The page has room for these.
MAX_FAILED_TESTS = 6


def exit_status(steps: list[dict[str, Any]]) -> int:
    """What failed, as a sum; see the module."""
    failed = {
        EXIT_BITS.get(step.get("kind", ""), EXIT_BITS["setup"])
        for step in steps
        if step.get("status") != "passed"
    }
    # A run that did nothing did not go well.
    return sum(failed) if steps else EXIT_BITS["setup"]


def readable(name: str, lines: Callable[..., Iterator[str]], *arguments: Any) -> list[str]:
    """The lines, as far as they can be read, and why no farther."""
    found = []
    try:
        for line in lines(*arguments):
            found.append(line)
    except Exception as error:
        found.append(f"{name}: not readable from here on: {type(error).__name__}: {error}")
    return found


def step_lines(step: dict[str, Any]) -> Iterator[str]:
    """A line for a step, and one for why it did not pass."""
    compiled = step["new_kernels"]
    kernels = f", {compiled} entries new in Triton's cache" if compiled else ""
    limit = f"{step['seconds']:.0f} of {step['limit_s']:.0f} s"
    yield f"{step['name']:14} {step['status']:9} {limit:>14}{kernels}"
    if step["error"]:
        yield f"    {step['error'][:110]}"


def machine_lines(found: dict[str, Any]) -> Iterator[str]:
    """What it is, and what loads there."""
    names = ("device", "driver", "python", "torch", "triton", "vllm", "commit")
    yield ", ".join(f"{name} {found[name]}" for name in names if found.get(name))
    for name in ("copy_gb_per_s", "total_gib"):
        if name in found:
            yield f"{name} {found[name]:.0f}"
    for name in ("library", "vllm_imports", "flash_attention", "vllm_ops"):
        if name in found:
            yield f"{name}: {found[name]}"
    if found.get("vllm_ops", "loads") != "loads":
        yield "WRONG: vLLM's compiled ops do not work here; engines say nothing of ours"


def test_lines(name: str, found: dict[str, Any]) -> Iterator[str]:
    """Counts of a pytest run, and some that failed."""
    counts = ", ".join(f"{found[key]} {key}" for key in ("tests", "failures", "errors", "skipped"))
    yield f"{name}: {counts}, {found['seconds']:.0f} s"
    if found.get("exit_status") is None:
        yield "    not over: the process ended before pytest did"
    for test in found["failed"][:MAX_FAILED_TESTS]:
        yield f"    {test}"
    for test in found.get("unfinished", ())[:MAX_FAILED_TESTS]:
        yield f"    not over: {test}"


def timing_lines(name: str, row: dict[str, Any]) -> Iterator[str]:
    """Microseconds and share of the copy's bandwidth of a case, or why there are none."""
    label = " ".join(str(row[key]) for key in ("op", "case", "by") if key in row)
    if not label:
        label = f"batch {row.get('batch')}, {row.get('kept_tokens')} kept, {row.get('tiles')}"
    if "p50_us" not in row:
        said = f"left out: {row['left_out']}" if "left_out" in row else row["error"]
        yield f"{name}: {label}: {said[:100]}"
        return
    share = f", {row['of_copy']:.0%} of copy" if "of_copy" in row else ""
    if "of_prefill" in row:
        share += f", {row['of_prefill']:.2%} of prefill"
    yield f"{name}: {label}: {row['p50_us']:.1f} us{share}"


def engine_lines(name: str, row: dict[str, Any]) -> Iterator[str]:
    """A measurement or a failure."""
    label = f"{name}: {row.get('engine', '')} {row['what']}".strip()
    if "batch" in row:
        label += f", batch {row['batch']}"
    if "error" in row:
        yield f"{label}: {row['error'][:100]}"
    elif row["what"] == "decode":
        yield (
            f"{label} x {row['prompt_len']}: {row['ms_per_output_token']:.2f} ms per token, "
            f"{row['output_tokens_per_s']:.0f} tokens/s, prefill {row['prefill_s']:.2f} s"
        )
    elif row["what"] == "against stock":
        yield (
            f"{label}: {row['compared']} log-probabilities, largest difference "
            f"{row['max_difference']:.4f}, of first tokens {row['first_difference']:.4f}"
        )
    elif row["what"] == "kernels":
        yield f"{label}: {row['launches_per_step']:.0f} launches per step"
    elif row["what"] == "kept":
        yield f"{label}: {row['kept_tokens']:.0f} of {row['prompt_len']} tokens per head"
    elif row["what"] == "compiled while serving":
        others = sum(row["others"].values())
        yield f"{label}: {len(row['ours'])} kernels of ours, {others} others"
    elif row["what"] == "start":
        yield f"{label}: {row['seconds']:.0f} s"


def checked_lines(name: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """How many rows there are, and some that are wrong."""
    wrong = [row for row in rows if row.get("ok") is False or "error" in row]
    yield f"{name}: {len(rows)} rows, {len(wrong)} wrong"
    yield from (f"    {json.dumps(row)[:110]}" for row in wrong[:MAX_FAILED_TESTS])


def result_lines(name: str, found: dict[str, Any]) -> Iterator[str]:
    """Key numbers of a step, by what kind of JSON it has written."""
    if "python" in found:
        yield from readable(name, machine_lines, found)
    elif "failures" in found:
        yield from readable(name, test_lines, name, found)
    elif name.startswith("engine"):
        for row in found["rows"]:
            yield from readable(name, engine_lines, name, row)
    elif any("p50_us" in row for row in found.get("rows", ())):
        for row in found["rows"]:
            yield from readable(name, timing_lines, name, row)
    elif "rows" in found:
        yield from readable(name, checked_lines, name, found["rows"])


def summary(parts: dict[str, dict[str, Any]]) -> str:
    """The page."""
    lines = []
    for name, part in parts.items():
        lines.append(f"== {name}")
        for step in part.get("steps", ()):
            lines += readable(str(step.get("name")), step_lines, step)
        lines.append("")
    for name, part in parts.items():
        lines.append(f"-- {name}")
        for step, found in part.get("results", {}).items():
            lines += readable(step, result_lines, step, found)
    return "\n".join(lines) + "\n"


def read_parts(out: Path) -> dict[str, dict[str, Any]]:
    """By name; one that cannot be read is a step of set-up that failed."""
    parts = {}
    for path in sorted(out.glob("part*.json")):
        try:
            parts[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parts[path.stem] = {"steps": [{"name": f"{path.name}: {error}", "kind": "setup"}]}
    return parts


def main() -> int:
    """See the module."""
    out = Path(sys.argv[1])
    parts = read_parts(out)
    text = summary(parts)
    (out / "summary.txt").write_text(text, encoding="utf-8")
    print(text, end="")
    steps = [step for part in parts.values() for step in part.get("steps", ())]
    status = exit_status(steps)
    print(f"exit status {status}")
    return status


if __name__ == "__main__":
    sys.exit(main())
