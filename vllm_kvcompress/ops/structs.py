"""What ops take together: the pool, rows of a batch, prompts in it, and how logits are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvcompress.ops.pages import PageOrder


@dataclass(frozen=True)
class Pool:
    """The paged KV pool of layers that share it.

    Attributes:
        pages: [num_pages, b, 2 d], contiguous: page `(block * L + layer) * H + head` holds the keys
            and values of b tokens of one head.
        num_layers: L.
        num_kv_heads: H.
        order: of the elements inside a page; None = plain: token after token, a token's key before
            its value (vLLM's layout BLHNC on CUDA).
        key_scale, value_scale: [L * H] float32, what stored keys and values are multiplied by;
            None = 1.
    """

    pages: torch.Tensor
    num_layers: int
    num_kv_heads: int
    order: PageOrder | None = None
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @property
    def num_streams(self) -> int:
        """S = L * H, a block's pages; streams are (layer, KV head), layer first."""
        return self.num_layers * self.num_kv_heads

    @property
    def block_size(self) -> int:
        """b, tokens per page."""
        return self.pages.shape[1]

    @property
    def head_size(self) -> int:
        """d."""
        return self.pages.shape[2] // 2


@dataclass(frozen=True)
class Rows:
    """Rows of a batch, R of them.

    Attributes:
        descriptors: [R, ROW_FIELDS] int32, see `RowDescriptor`.
        block_table: [R, W] int32 block ids, in the columns that the descriptors say. Entries of
            evicted blocks and of older regions are not read.
        page_offsets: [R, S + 1] int32, first virtual page of every stream of the newest region. Not
            read for rows without one.
        query_start_loc: [R + 1] int32, first token of each row in this step, and the end.
    """

    descriptors: torch.Tensor
    block_table: torch.Tensor
    page_offsets: torch.Tensor | None = None
    query_start_loc: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.descriptors)


@dataclass(frozen=True)
class Prompts:
    """Prompts that are still dense in their pages, R of them, to be scored.

    Attributes:
        rows: `seq_len` is the tokens that are there, `first_kept_block` is not read; their regions
            may be there already.
        num_rated: [R] int32, the first tokens of each that get a score, at most `seq_len`.
        num_candidates: [R] int32, the first tokens of each that compete, at most num_rated.
        max_rated, max_candidates: greatest number of each.
    """

    rows: Rows
    num_rated: torch.Tensor
    num_candidates: torch.Tensor
    max_rated: int
    max_candidates: int


@dataclass(frozen=True)
class Logits:
    """How attention makes logits of products of queries and keys.

    Attributes:
        scale: factor on the products; a number, or one for each of n layers: [n] float32.
        soft_cap: squash logits into (-cap, cap) by tanh; 0 = not. A number or [n] float32.
        sinks: [n, Hq] or [Hq] float32 (or as the query), a logit per head that no key belongs to,
            -inf in a layer that has none; None = no layer has any.
    """

    scale: float | torch.Tensor
    soft_cap: float | torch.Tensor = 0.0
    sinks: torch.Tensor | None = None
