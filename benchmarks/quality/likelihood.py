"""Log-likelihood probes inside the engine: follow a given text and look at the distributions.

A logits processor makes the engine continue a prompt with given tokens and compares, at every
step, the whole next-token distribution with a reference. Works in engines that run in this
process, since the numbers are handed over in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

PROBE = "kvc_probe"


@dataclass
class Probe:
    """One prompt's forced continuation.

    Attributes:
        continuation: [T] token ids that the engine is made to emit.
        reference: [T, V] float32 log-probabilities to compare with; None = record them.
        recorded: step to [V] float32 log-probabilities, if there is no reference.
        kl: step to KL(reference || engine) in nats.
        nll: step to minus the log-probability of the continuation's token, in nats.
    """

    continuation: list[int]
    reference: torch.Tensor | None = None
    recorded: dict[int, torch.Tensor] = field(default_factory=dict)
    kl: dict[int, float] = field(default_factory=dict)
    nll: dict[int, float] = field(default_factory=dict)

    def look(self, step: int, logits: torch.Tensor) -> None:
        """Take in the logits [V] of one step."""
        log_probs = logits.float().log_softmax(dim=-1)
        self.nll[step] = -float(log_probs[self.continuation[step]])
        if self.reference is None:
            self.recorded[step] = log_probs
            return
        wanted = self.reference[step]
        self.kl[step] = float((wanted.exp() * (wanted - log_probs)).sum())


PROBES: dict[str, Probe] = {}


class FollowProbe(LogitsProcessor):
    """Serves requests whose extra_args name a probe in `PROBES`."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[str, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides the token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch's rows."""
        process_dict_updates(self._rows, batch_update, self._row)

    @staticmethod
    def _row(params: Any, _: Any, output_ids: list[int]) -> tuple[str, list[int]] | None:
        name = (params.extra_args or {}).get(PROBE)
        return None if name is None else (name, output_ids)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Look at the probed rows, then leave them one token."""
        for row, (name, output_ids) in self._rows.items():
            probe = PROBES[name]
            # A chunk that does not reach the prompt's end is sampled in vain at step 0; the
            # last look at a step is the one that counts.
            step = len(output_ids)
            if step >= len(probe.continuation):
                continue
            probe.look(step, logits[row])
            logits[row] = float("-inf")
            logits[row, probe.continuation[step]] = 0.0
        return logits
