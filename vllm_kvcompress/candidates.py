"""What may yet be kept of a prompt that has no blocks of its own (one-shot prefill).

Such a prompt is computed in a single step. A layer's keys and values exist only while that
layer runs, but what is kept of it may depend on layers still to come. So every layer leaves
behind all that can still be among the kept. Where layers have budgets of their own that is what
they will keep. Where all compete it is everything at first, and what cannot win any more is
dropped as layers come in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import RequestGeometry
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.policies import make_budgets
from vllm_kvcompress.policies.base import LayerScores
from vllm_kvcompress.policies.selection import Selection, entries_per_page, entry_scores

# What cannot win any more is dropped once this many times the region is held.
_MOST_HELD = 1.5


@dataclass(frozen=True)
class LayerPages:
    """Where the keys and values of one layer of a prompt are.

    Attributes:
        pool: [num_pages, page_elements].
        blocks: [n] int64 block ids in token order.
        pages_per_block: pages of one block.
        first: of a block's pages, the one of this layer's head 0.
    """

    pool: torch.Tensor
    blocks: torch.Tensor
    pages_per_block: int
    first: int

    def page_ids(self, blocks: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Page ids of block ids and heads, which broadcast."""
        return blocks * self.pages_per_block + self.first + heads


class Candidates:
    """Keys and values of one prompt that can still be among the kept.

    Args:
        config: validated setting.
        geometry: of the prompt.
        num_layers: L.
        order: element order of pages.
        backend: 'torch' or 'native', of the ops that select.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        geometry: RequestGeometry,
        num_layers: int,
        order: PageOrder,
        backend: str = "torch",
    ) -> None:
        self._config = config
        self._budgets = make_budgets(config)
        self._geometry = geometry
        self._num_layers = num_layers
        self._order = order
        self._backend = backend
        self._per_page = entries_per_page(config, geometry.block_size)
        self._scores: list[LayerScores] = []
        # Per layer: [m] int64 ascending, head * num_entries + entry; and [m, elements] of each.
        self._keys: list[torch.Tensor] = []
        self._data: list[torch.Tensor] = []

    @property
    def num_held(self) -> int:
        """Entries (pages, or tokens with granularity 'token') held now."""
        return sum(keys.numel() for keys in self._keys)

    def add(self, scores: LayerScores, pages: LayerPages) -> None:
        """Take what may be kept of the next layer.

        Args:
            scores: of all its candidate tokens.
            pages: where they are; only read.
        """
        layer = len(self._scores)
        self._scores.append(entry_scores(scores, self._config, self._geometry.block_size))
        first = self._scores[layer].first
        num_heads, num_entries = first.shape
        mean_pages = self._geometry.num_region_blocks
        if self._config.layers_compete:
            keys = torch.arange(first.numel())
        else:
            num_pages = self._budgets.share_layer(
                first, layer, self._num_layers, mean_pages, self._per_page, self._backend
            )
            keys = self._best(layer, num_pages * self._per_page)
        heads, entries = keys // num_entries, keys % num_entries
        ids = pages.page_ids(pages.blocks[entries // self._per_page], heads)
        self._keys.append(keys)
        if self._config.granularity == "page":
            self._data.append(pages.pool.index_select(0, ids))
        else:
            both = ops.gather_tokens(pages.pool, ids, entries % self._per_page, self._order)
            self._data.append(torch.cat(both, dim=1))
        num_kept = mean_pages * self._num_layers * num_heads * self._per_page
        if self._config.layers_compete and self.num_held > _MOST_HELD * num_kept:
            known = torch.stack([layer.first for layer in self._scores])
            bounds = self._budgets.most_entries(
                known, self._num_layers, mean_pages, self._per_page, self._backend
            )
            for i, counts in enumerate(bounds):
                self._narrow(i, self._best(i, counts))

    def _best(self, layer: int, counts: torch.Tensor) -> torch.Tensor:
        """Ascending keys of each head's best `counts` [H] entries, by either of two scores."""
        scores = self._scores[layer]
        is_wanted = torch.zeros(scores.first.shape, dtype=torch.bool)
        heads = torch.arange(len(counts)).repeat_interleave(counts)
        is_wanted[heads, ops.select_top(scores.first, counts, self._backend)] = True
        if scores.second is not None:
            is_wanted[heads, ops.select_top(scores.second, counts, self._backend)] = True
        return is_wanted.flatten().nonzero().flatten()

    def _narrow(self, layer: int, keys: torch.Tensor) -> None:
        """Drop a layer's entries that are not among `keys`."""
        is_kept = torch.isin(self._keys[layer], keys, assume_unique=True)
        self._keys[layer] = self._keys[layer][is_kept]
        self._data[layer] = self._data[layer][is_kept]

    def write(self, selection: Selection, pool: torch.Tensor, target: torch.Tensor) -> None:
        """Put what was selected over all layers into its pages.

        Args:
            selection: made from the scores given to `add`.
            pool: [num_pages, page_elements], written at `target`.
            target: [sum of pages] int64 page ids, stream after stream.

        Raises:
            RuntimeError: if something selected was dropped, which would be a defect here.
        """
        num_heads, num_entries = self._scores[0].first.shape
        per_layer = num_heads * num_entries
        held = torch.cat([layer * per_layer + keys for layer, keys in enumerate(self._keys)])
        counts = selection.num_pages.flatten() * self._per_page
        streams = torch.arange(self._num_layers * num_heads).repeat_interleave(counts)
        wanted = streams * num_entries + selection.indices
        where = torch.searchsorted(held, wanted).clamp(max=held.numel() - 1)
        if not torch.equal(held[where], wanted):
            raise RuntimeError("a candidate was dropped that is among the kept")
        data = torch.cat(self._data)[where]
        if self._config.granularity == "page":
            pool.index_copy_(0, target, data)
        else:
            key, value = data.chunk(2, dim=1)
            ops.pack_pages(pool, target, key, value, self._order)
