"""Request ids and prompt lengths of a step's rows, as vLLM's model runners know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_kvcompress.vllm_integration.worker.engine import RowNames


def rows_of_v1(runner: Any) -> RowNames:
    """Rows of Model Runner V1, whose batch is in the order of the step's."""
    batch = runner.input_batch

    def names(common: Any) -> tuple[Sequence[str], np.ndarray]:
        return batch.req_ids, batch.num_prompt_tokens[: batch.num_reqs]

    return names


def rows_of_v2(runner: Any) -> RowNames:
    """Rows of Model Runner V2, whose metadata has each row's place in the table of requests."""
    states = runner.req_states

    def names(common: Any) -> tuple[Sequence[str], np.ndarray]:
        places = common.req_idx
        ids = list(map(states.index_to_req_id.__getitem__, places.tolist()))
        return ids, states.prompt_len.np[places]

    return names
