"""Goes through methods, ratios and modes on one engine and stores every sample's result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from quality.offline import FULL, OfflineEngine
from quality.plan import FULL_METHOD, PROSE_TASK, Prompt
from quality.progress import RunProgress
from quality.scoring import score
from quality.settings import Method
from quality.store import Store


class Evaluation:
    """A run on the offline engine.

    Args:
        engine: whose method is changed between settings.
        store: where results go; what is there is skipped.
        prompts: of all tasks.
        passages: (context ids, continuation ids) for likelihoods.
        common: fields of every row: engine, model, block_size, seed.
    """

    def __init__(
        self,
        engine: OfflineEngine,
        store: Store,
        prompts: Sequence[Prompt],
        passages: Sequence[tuple[list[int], list[int]]],
        common: dict[str, Any],
    ) -> None:
        self.engine = engine
        self.store = store
        self.prompts = prompts
        self.passages = passages
        self.common = common
        self._full_ids: dict[tuple[str, str], tuple[int, ...]] = {}

    def run(self, methods: Iterable[Method], ratios: Sequence[float], modes: Sequence[str]) -> None:
        """The full cache, then every method at every ratio in every mode."""
        settings = [
            (method, ratio, mode) for method in methods for ratio in ratios for mode in modes
        ]
        counts = [self._num_missing(m.label, ratio, mode) for m, ratio, mode in settings]
        num_full = sum(self._num_missing(FULL_METHOD, 0.0, mode) for mode in modes)
        if "aware" not in modes:
            num_full += self._num_passages(FULL_METHOD, 0.0)
        self._progress = RunProgress(num_full, sum(counts), 1 + len(settings))
        self._progress.start("full cache", num_full, is_full=True)
        for mode in modes:
            # The full cache gives the same in both modes, but its rows stand beside each.
            self._answers(FULL_METHOD, 0.0, mode, lambda suffix: FULL)
        self._likelihoods(FULL_METHOD, 0.0, FULL)
        self._remember_full_answers()
        self._progress.finish()
        for (method, ratio, mode), count in zip(settings, counts, strict=True):
            self._progress.start(f"{method.label} at {ratio:.4g}, {mode}", count)
            self._one(method, ratio, mode)
            self._progress.finish()

    def _one(self, method: Method, ratio: float, mode: str) -> None:
        def setting(suffix: int) -> dict[str, Any]:
            return method.setting(ratio, suffix)

        self._answers(method.label, ratio, mode, setting)
        if mode == "aware":
            self._likelihoods(method.label, ratio, setting(0))

    def _num_missing(self, label: str, ratio: float, mode: str) -> int:
        """Prompts, and passages in mode 'aware', that a setting has no rows for."""
        key = {**self.common, "method": label, "ratio": ratio, "mode": mode}
        return len(self._missing(key)) + (mode == "aware") * self._num_passages(label, ratio)

    def _num_passages(self, label: str, ratio: float) -> int:
        """Passages to compute: all if one is missing, since they go through together."""
        key = {**self.common, "method": label, "ratio": ratio, "mode": "aware", "task": PROSE_TASK}
        names = [f"passage-{i}" for i in range(len(self.passages))]
        return 0 if all(self.store.has(**key, sample_id=name) for name in names) else len(names)

    def _missing(self, key: dict[str, Any]) -> list[Prompt]:
        return [
            prompt
            for prompt in self.prompts
            if not self.store.has(**key, task=prompt.sample.task, sample_id=prompt.sample.sample_id)
        ]

    def _answers(
        self, label: str, ratio: float, mode: str, setting: Callable[[int], dict[str, Any]]
    ) -> None:
        key = {**self.common, "method": label, "ratio": ratio, "mode": mode}

        def suffix(prompt: Prompt) -> int:
            return prompt.rendered.num_suffix_tokens if mode == "agnostic" else 0

        missing = sorted(self._missing(key), key=suffix)
        # The compaction point is the engine's, so prompts of one suffix length go together.
        for num_suffix, group in groupby(missing, key=suffix):
            batch = list(group)
            start = time.monotonic()
            answers = self.engine.generate(
                [prompt.rendered.token_ids for prompt in batch],
                [prompt.sample.max_new_tokens for prompt in batch],
                setting(num_suffix),
                self._progress.advance,
            )
            elapsed = time.monotonic() - start
            self.store.add(
                {
                    **key,
                    "task": prompt.sample.task,
                    "sample_id": prompt.sample.sample_id,
                    "meta": dict(prompt.sample.meta),
                    "text": answer.text,
                    "token_ids": list(answer.token_ids),
                    "score": score(
                        prompt.sample,
                        answer.text,
                        answer.token_ids,
                        self._full_ids.get((prompt.sample.task, prompt.sample.sample_id)),
                    ),
                    "prompt_len": answer.prompt_len,
                    "suffix_tokens": num_suffix,
                    "kept_tokens": answer.kept_tokens,
                    "batch_s": round(elapsed, 3),
                }
                for prompt, answer in zip(batch, answers, strict=True)
            )

    def _remember_full_answers(self) -> None:
        for row in self.store.rows:
            is_ours = all(row[name] == value for name, value in self.common.items())
            if is_ours and row["method"] == FULL_METHOD and row["task"] != PROSE_TASK:
                self._full_ids[row["task"], row["sample_id"]] = tuple(row["token_ids"])

    def _likelihoods(self, label: str, ratio: float, setting: dict[str, Any]) -> None:
        key = {**self.common, "method": label, "ratio": ratio, "mode": "aware", "task": PROSE_TASK}
        names = [f"passage-{i}" for i in range(len(self.passages))]
        if not self._num_passages(label, ratio):
            return
        results = self.engine.likelihoods(self.passages, setting, self._progress.advance)
        self.store.add(
            {
                **key,
                "sample_id": name,
                "meta": {"length": result.prompt_len},
                "kl": result.kl,
                "nll": result.nll,
                "prompt_len": result.prompt_len,
                "suffix_tokens": 0,
                "kept_tokens": result.kept_tokens,
            }
            for name, result in zip(names, results, strict=True)
            if not self.store.has(**key, sample_id=name)
        )
