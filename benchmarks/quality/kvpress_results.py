"""kvpress' own answers to the same prompts, scored here and put into the same tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quality.plan import FULL_METHOD, PROSE_TASK, Prompt
from quality.scoring import score
from quality.store import Store

ENGINE = "kvpress"


def add_kvpress_results(
    store: Store,
    path: Path,
    prompts: Sequence[Prompt],
    common: Mapping[str, Any],
) -> int:
    """Add the rows of a results file of `kvpress_runner.py` that are not there yet.

    Args:
        store: where results go.
        path: the runner's output.
        prompts: that were exported for it.
        common: fields of every row but the engine.

    Returns:
        How many rows were added.

    Raises:
        SystemExit: if a row belongs to a prompt that is not among `prompts`.
    """
    by_id = {f"{p.sample.task}/{p.sample.sample_id}": p for p in prompts}
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    full = {
        (row["mode"], row["id"]): row["token_ids"]
        for row in raw
        if row["kind"] == "answer" and row["press"] == FULL_METHOD
    }
    added = []
    for row in raw:
        key = {
            **common,
            "engine": ENGINE,
            "block_size": 1,
            "method": row["press"],
            "ratio": row["ratio"],
            "mode": row["mode"],
        }
        if row["kind"] == "likelihood":
            key |= {"task": PROSE_TASK, "sample_id": row["id"]}
            values = {"kl": row["kl"], "nll": row["nll"], "meta": {}, "suffix_tokens": 0}
        else:
            if row["id"] not in by_id:
                raise SystemExit(f"{path}: prompt {row['id']!r} is not one of this run's")
            prompt = by_id[row["id"]]
            sample = prompt.sample
            suffix = prompt.rendered.num_suffix_tokens if row["mode"] == "agnostic" else 0
            key |= {"task": sample.task, "sample_id": sample.sample_id}
            is_full = row["press"] == FULL_METHOD
            reference = None if is_full else full.get((row["mode"], row["id"]))
            values = {
                "meta": dict(sample.meta),
                "text": row["text"],
                "token_ids": row["token_ids"],
                "score": score(sample, row["text"], row["token_ids"], reference),
                "suffix_tokens": suffix,
            }
        if not store.has(**key):
            sizes = {name: row[name] for name in ("prompt_len", "kept_tokens")}
            added.append({**key, **values, **sizes})
    store.add(added)
    return len(added)
