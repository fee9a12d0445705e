"""What happens to a prompt once: scores, selection and compaction."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from gpu import native
from gpu.shapes import ModelShape

from timing.case import Case, new_pool, normal, prepare, shuffled_table
from vllm_kvcompress import ops

# Rows of the compiled ops.
NATIVE = "vllm-kvcompress C++"
WINDOW = 16
# As span has it.
PLAN = ops.WindowPlan(
    reduce="defensive", near_tokens=8, group_reduce="max", floor_at_mean=True, span_kernel=11
)


class Prompt:
    """One prompt in a pool, with room for what is kept of it.

    Attributes:
        region: blocks that are kept, per layer and KV head.
        num_entries: pages that compete in each of them.
        page_scores: [1, S, num_entries] float32.
    """

    def __init__(
        self, shape: ModelShape, prompt_len: int, kept_fraction: float, device: torch.device
    ) -> None:
        b, d, num_kv_heads = shape.block_size, shape.head_size, shape.num_kv_heads
        self.shape, self.prompt_len, self.device = shape, prompt_len, device
        prompt_blocks = prompt_len // b
        self.region = max(1, int(prompt_blocks * kept_fraction))
        num_blocks = prompt_blocks + self.region
        self.pool = new_pool(shape, num_blocks, device)
        self.table = shuffled_table(1, num_blocks, device)
        row = ops.RowDescriptor(prompt_len, self.region, prompt_blocks, prompt_blocks)
        self.rows = self.ints([row])
        num_layers = shape.num_layers
        query = (1, num_layers, WINDOW, shape.num_heads, d)
        self.query = normal(*query, device=device, dtype=shape.dtype)
        self.lse = torch.full(query[:-1], 10.0, device=device)
        self.root = normal(num_layers, num_kv_heads, d, d, device=device, dtype=shape.dtype)
        # The engine keeps these; made in a call they would be launches.
        self.scale = torch.full((num_layers,), d**-0.5, device=device)
        self.num_rated = prompt_len - WINDOW
        num_parts = ops.num_score_parts(self.num_rated, PLAN.mean_kernel)
        self.part_sums = torch.zeros(1, shape.num_streams, num_parts, device=device)
        self.num_candidates = self.num_rated // b * b
        self.num_entries = self.num_candidates // b
        numbers = (self.ints([self.num_rated]), self.ints([self.num_candidates]))
        most = (self.num_rated, self.num_candidates)
        self.op_rows = ops.Rows(self.rows, self.table)
        self.prompts = ops.Prompts(self.op_rows, *numbers, *most)
        self.paged = ops.Pool(self.pool, num_layers, num_kv_heads)
        self.entries = self.ints([self.num_entries])
        self.page_scores = torch.rand(1, shape.num_streams, self.num_entries, device=device)
        self.total = self.ints([[self.num_kept_pages]])
        self.sure = torch.ones_like(self.total)

    def ints(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        """Numbers as int32."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    @property
    def num_kept_pages(self) -> int:
        """Of all layers and KV heads."""
        return self.region * self.shape.num_streams

    @property
    def kept_bytes(self) -> int:
        """Of all that is kept."""
        return self.num_kept_pages * self.shape.block_size * self.shape.token_bytes

    @property
    def key_bytes(self) -> int:
        """All layers' keys, or values."""
        return self.shape.num_streams * self.prompt_len * self.shape.token_bytes // 2

    def score(self, with_lse: bool) -> torch.Tensor:
        """All layers' scores of keys."""
        return ops.window_scores(
            self.query,
            self.paged,
            self.prompts,
            0,
            ops.Logits(self.scale),
            PLAN,
            lse=self.lse if with_lse else None,
            part_sums=self.part_sums,
        )

    def effect(self) -> torch.Tensor:
        """How much values move the outputs of all layers."""
        return ops.paged_value_effect(self.root, self.paged, self.prompts, 0)

    def join(self, scores: torch.Tensor, effect: torch.Tensor) -> torch.Tensor:
        """All layers' scores of pages."""
        return ops.join_scores(
            scores,
            self.prompts,
            PLAN,
            effect=effect,
            page_reduce="mean",
            page_size=self.shape.block_size,
            num_kv_heads=self.shape.num_kv_heads,
            part_sums=self.part_sums,
        )

    def select(self, with_native: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets and indices of what all streams keep."""
        backend = native if with_native else ops
        counts = backend.joint_page_counts(self.page_scores, self.entries, self.total, self.sure)
        scores = (self.page_scores, self.entries, counts, self.num_kept_pages)
        return backend.select_entries(*scores)

    def compact(
        self, selection: tuple[torch.Tensor, torch.Tensor], with_native: bool = False
    ) -> None:
        """Copy what is kept into the region."""
        ops.compact(
            self.paged,
            self.op_rows,
            *selection,
            max_region_blocks=self.region,
            backend="native" if with_native else "triton",
        )

    def native_select_and_compact(self) -> None:
        """Both by the compiled op that does both."""
        counts = native.joint_page_counts(self.page_scores, self.entries, self.total, self.sure)
        native.select_and_compact(
            self.page_scores,
            self.entries,
            counts,
            self.num_kept_pages,
            self.pool,
            self.rows,
            self.table,
            max_region_blocks=self.region,
        )


def prompt_cases(
    shape: ModelShape,
    prompt_len: int,
    kept_fraction: float,
    device: torch.device,
    with_native: bool,
) -> Iterator[Case]:
    """Everything that happens to a prompt; `with_native` adds the compiled ops as peers."""
    prompt = Prompt(shape, prompt_len, kept_fraction, device)
    # The whole first: it is what a prompt costs. Parts are made when it is their turn.
    for case in itertools.chain(
        [_whole_case(prompt)],
        _score_cases(prompt),
        _select_cases(prompt, with_native),
        _move_cases(prompt, with_native),
    ):
        case.label = f"prompt {prompt_len}" + (f", {case.label}" if case.label else "")
        case.extra = {"prompt_len": prompt_len}
        yield case


def _score_cases(prompt: Prompt) -> Iterator[Case]:
    num_layers = prompt.shape.num_layers
    for with_lse in (True, False):
        yield Case(
            "window_scores",
            f"lse {'given' if with_lse else 'computed'}",
            lambda with_lse=with_lse: prompt.score(with_lse),
            prompt.key_bytes * (1 if with_lse else 2),
            num_layers,
        )
    yield Case("paged_value_effect", "", prompt.effect, prompt.key_bytes, num_layers)
    scores = prepare(lambda: prompt.score(True), prompt.device)
    effect = prepare(prompt.effect, prompt.device)
    num_bytes = 4 * (scores.numel() + effect.numel())
    yield Case("join_scores", "", lambda: prompt.join(scores, effect), num_bytes, num_layers)


def _select_cases(prompt: Prompt, with_native: bool) -> Iterator[Case]:
    scores, num_kept = prompt.page_scores, prompt.num_kept_pages
    peers = {"torch.topk": lambda: lambda: scores.flatten().topk(num_kept)}
    if with_native:
        peers[NATIVE] = lambda: lambda: prompt.select(with_native=True)
    label = f"{prompt.region} of {prompt.num_entries} pages"
    yield Case("select", label, prompt.select, 2 * 4 * scores.numel(), peers=peers)
    if with_native:
        yield Case(
            "select and compact",
            label,
            lambda: prompt.compact(prompt.select()),
            2 * 4 * scores.numel() + 2 * prompt.kept_bytes,
            peers={NATIVE: lambda: prompt.native_select_and_compact},
        )


def _move_cases(prompt: Prompt, with_native: bool) -> Iterator[Case]:
    pool, num_kept, device = prompt.pool, prompt.num_kept_pages, prompt.device
    selection = prepare(prompt.select, device)
    generator = torch.Generator().manual_seed(1)
    source = torch.randperm(pool.shape[0], generator=generator)[:num_kept].to(device)
    target = torch.empty(num_kept, *pool.shape[1:], dtype=pool.dtype, device=device)
    bits, out = pool.view(torch.uint8), target.view(torch.uint8)
    gather = {"index_select": lambda: lambda: torch.index_select(bits, 0, source, out=out)}
    peers = dict(gather)
    if with_native:
        peers[NATIVE] = lambda: lambda: prompt.compact(selection, with_native=True)
    num_bytes = 2 * prompt.kept_bytes
    yield Case("compact", "all layers", lambda: prompt.compact(selection), num_bytes, peers=peers)
    flat, moved = pool.flatten(1), target.flatten(1)
    order = torch.arange(num_kept, device=device)
    yield Case(
        "move_entries",
        f"{num_kept} pages",
        lambda: ops.move_entries(flat, source, moved, order),
        num_bytes,
        peers=gather,
    )


def _whole_case(prompt: Prompt) -> Case:
    """Compaction of a prompt in one graph, as the engine does it."""

    def compress() -> None:
        prompt.join(prompt.score(True), prompt.effect())
        prompt.compact(prompt.select())

    return Case("compress a prompt", "", compress, 2 * prompt.key_bytes + 2 * prompt.kept_bytes)
