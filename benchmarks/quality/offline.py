"""The served engine inside this process: many methods over one set of prompts.

Prompts stay in the engine's prefix cache, so that each method computes only the window of a
prompt that another method has seen (all of it if the method needs every query).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

FULL = {"method": "snapkv", "ratio": 0.0}


@dataclass(frozen=True)
class Answer:
    """What one prompt gave.

    Attributes:
        token_ids: generated ids.
        text: the same, decoded.
        prompt_len: tokens of the prompt.
        kept_tokens: prompt tokens kept per KV head and layer on average.
    """

    token_ids: tuple[int, ...]
    text: str
    prompt_len: int
    kept_tokens: float


@dataclass(frozen=True)
class Likelihood:
    """What one passage's continuation gave.

    Attributes:
        kl: mean KL divergence from the full cache per token, in nats.
        nll: mean negative log-likelihood of the continuation per token, in nats.
        prompt_len, kept_tokens: as in `Answer`.
    """

    kl: float
    nll: float
    prompt_len: int
    kept_tokens: float


class _Nowhere:
    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass


class _Counter(tqdm):
    """Stands for vLLM's bar: shows nothing, and tells how many requests have ended."""

    def __init__(self, *args: Any, ended: Callable[[int], None], **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "file": _Nowhere()})
        self._ended = ended

    def update(self, n: float | None = 1) -> bool | None:
        """As tqdm's."""
        # A bar around an iterable is of prompts that are read, not of requests that ended.
        if self.iterable is None:
            self._ended(int(n or 0))
        return super().update(n)


class OfflineEngine:
    """One in-process engine whose method can be changed.

    Args:
        model: folder or hub name.
        block_size: tokens per page.
        max_model_len: longest prompt plus output, in tokens.
        cache_gib: size of the KV pool, GiB; all prompts should fit it.
        dtype: of the model.
    """

    def __init__(
        self,
        model: str,
        block_size: int,
        max_model_len: int,
        cache_gib: float,
        dtype: str = "auto",
        **engine_args: Any,
    ) -> None:
        # Read by vLLM when it is imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from quality.likelihood import FollowProbe
        from vllm_kvcompress import LLM

        self.block_size = block_size
        self._llm = LLM(
            model,
            # Rows as wide, and the scheduler as fit, as any later setting needs.
            kv_compress="snapkv",
            kv_compress_ratio=0.01,
            kv_compress_options={"suffix_tokens": 1},
            block_size=block_size,
            max_model_len=max_model_len,
            kv_cache_memory_bytes=int(cache_gib * 2**30),
            dtype=dtype,
            enforce_eager=True,
            logits_processors=[FollowProbe],
            **engine_args,
        )
        self.tokenizer = self._llm.get_tokenizer()
        self._references: dict[int, list[torch.Tensor]] = {}

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: Sequence[int],
        setting: dict[str, Any],
        ended: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Greedy answers under a setting (as for `KVCompressConfig.from_dict`).

        `ended` is told how many more prompts are answered, while others are still going.
        """
        from vllm import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=n) for n in max_new_tokens]
        outputs, kept = self._run(prompts, params, setting, ended)
        return [
            Answer(tuple(o.outputs[0].token_ids), o.outputs[0].text, len(o.prompt_token_ids), k)
            for o, k in zip(outputs, kept, strict=True)
        ]

    def likelihoods(
        self,
        passages: Sequence[tuple[list[int], list[int]]],
        setting: dict[str, Any],
        ended: Callable[[int], None] | None = None,
    ) -> list[Likelihood]:
        """KL and NLL of the passages' continuations (context ids, continuation ids).

        `ended` is told how many more passages are done.
        """
        key = hash(tuple(map(str, passages)))
        if key not in self._references:
            recorded = self._probe(passages, FULL, None)[0]
            self._references[key] = [
                torch.stack([probe.recorded[step] for step in range(len(probe.continuation))])
                for probe in recorded
            ]
        probes, kept = self._probe(passages, setting, self._references[key], ended)
        return [
            Likelihood(_mean(p.kl), _mean(p.nll), len(context), k)
            for p, k, (context, _) in zip(probes, kept, passages, strict=True)
        ]

    def _probe(
        self,
        passages: Any,
        setting: dict,
        references: Any,
        ended: Callable[[int], None] | None = None,
    ) -> tuple[list, list[float]]:
        from vllm import SamplingParams

        from quality.likelihood import PROBE, PROBES, Probe

        PROBES.clear()
        params = []
        for i, (_, continuation) in enumerate(passages):
            name = str(i)
            PROBES[name] = Probe(continuation, references[i] if references else None)
            params.append(
                SamplingParams(
                    temperature=0,
                    max_tokens=len(continuation),
                    ignore_eos=True,
                    detokenize=False,
                    extra_args={PROBE: name},
                )
            )
        outputs, kept = self._run([context for context, _ in passages], params, setting, ended)
        for output, (_, continuation) in zip(outputs, passages, strict=True):
            assert list(output.outputs[0].token_ids) == list(continuation)
        return list(PROBES.values()), kept

    def _run(
        self,
        prompts: Any,
        params: Any,
        setting: dict,
        ended: Callable[[int], None] | None = None,
    ) -> tuple[list, list[float]]:
        self._llm.kv_compress_reconfigure(**setting)
        bar = False if ended is None else functools.partial(_Counter, ended=ended)
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=bar
        )
        records = self._llm.kv_compress_stats()["requests"][-len(outputs) :]
        by_id = {record["request_id"]: record for record in records}
        return outputs, [by_id[output.request_id]["kept_tokens"] for output in outputs]

    def kept_per_head(self) -> list[list[list[int]] | None]:
        """[request][layer][head] kept tokens of the requests so far, oldest first."""
        return [r["kept_per_head"] for r in self._llm.kv_compress_stats()["requests"]]


def _mean(by_step: dict[int, float]) -> float:
    return sum(by_step.values()) / len(by_step) if by_step else float("nan")
