"""Decode attention of all layers: eager, and replayed from a captured graph, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from gpu.real_size.judge import Verdict, attend
from gpu.real_size.rows import Rows, deal_blocks, draw_rows, fill_pool, tokens_at
from gpu.shapes import ModelShape

from vllm_kvcompress import ops

NUM_SAMPLES = 64
# Heads of each group whose queries look for one token: the first, the region's last, the last.
NUM_SEEKING = 3
# Of the weight that a sought token must get about; it is drawn to be 0.9.
SOUGHT = (0.5, 1.5)
# bfloat16 roundings allowed on top of twice the error of torch in the same type.
ULPS = 1
# Of the pool, that rows own; the rest is NaN.
OWNED = 0.75


@contextmanager
def no_host_sync(device: torch.device) -> Iterator[None]:
    """Whatever waits for the device raises an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass
class Step:
    """Everything that a captured decode step reads and writes, at fixed addresses.

    Attributes:
        shape: of the model.
        pool: [pages, b, 2 d].
        rows: descriptors of R rows.
        query: [L, R, Hq, d].
        out: like query.
        work: how programs share the step; `share_work` writes it.
        key_scale, value_scale: [S] float32, for fp8; None = 1.
    """

    shape: ModelShape
    pool: torch.Tensor
    rows: Rows
    query: torch.Tensor
    out: torch.Tensor
    work: ops.DecodeWork
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @property
    def scale(self) -> float:
        """Factor on the products."""
        return self.shape.head_size**-0.5

    def entries(
        self, row: torch.Tensor, stream: torch.Tensor, index: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., d] float32 keys and values of tokens, given as in `Rows.places`."""
        stored = tokens_at(self.pool, *rows.places(row, stream, index)).float()
        key, value = stored.split(self.shape.head_size, dim=-1)
        if self.key_scale is None or self.value_scale is None:
            return key, value
        return key * self.key_scale[stream][..., None], value * self.value_scale[stream][..., None]


def share_work(step: Step) -> None:
    """Share the step's tiles among programs, at the same addresses as before."""
    rows = step.rows
    ops.decode_work(
        rows.op_rows,
        num_kv_heads=step.shape.num_kv_heads,
        block_size=rows.block_size,
        out=step.work,
    )


def decode_layers(step: Step) -> None:
    """Attention of all layers into `step.out`."""
    shape, scales = step.shape, (step.key_scale, step.value_scale)
    pool = ops.Pool(step.pool, shape.num_layers, shape.num_kv_heads, None, *scales)
    for layer in range(step.shape.num_layers):
        ops.ragged_decode(
            step.query[layer],
            pool,
            step.rows.op_rows,
            layer,
            ops.Logits(step.scale),
            work=step.work,
            out=step.out[layer],
        )


def capture(step: Step) -> Callable[[], None]:
    """The replay of a graph of `decode_layers`; without a GPU, a plain call."""
    if step.pool.device.type != "cuda":
        return lambda: decode_layers(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_layers(step)
    return graph.replay


def eager(step: Step) -> torch.Tensor:
    """What `decode_layers` gives now, with NaN where it writes nothing."""
    with no_host_sync(step.pool.device):
        step.out.fill_(float("nan"))
        share_work(step)
        decode_layers(step)
    return step.out.clone()


def sought_tokens(step: Step, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[3, R', S, d] keys and values of tokens that a group's first heads look for; [R', S] tokens.

    R' are the rows that have a query.
    """
    device = step.pool.device
    row = torch.arange(rows.num_active, device=device)[:, None]
    stream = torch.arange(rows.num_streams, device=device)[None]
    region, num_tokens = (x[: rows.num_active] for x in rows.num_tokens())
    row, stream = row.expand_as(region), stream.expand_as(region)
    wanted = (torch.zeros_like(region), (region - 1).clamp(min=0), num_tokens - 1)
    entries = [step.entries(row, stream, index, rows) for index in wanted]
    key, value = (torch.stack(part) for part in zip(*entries, strict=True))
    return key, value, num_tokens


def seek(step: Step, rows: Rows, seed: int) -> None:
    """Random queries, but for the heads that look for one token each."""
    shape = step.shape
    generator = torch.Generator(step.pool.device).manual_seed(seed)
    step.query.normal_(generator=generator)
    key, _, num_tokens = sought_tokens(step, rows)
    # Such a logit gets about 0.9 of the weight among others that are near 0.
    logit = num_tokens.float().log() + 2.5
    factor = logit / (key.square().sum(dim=-1) * step.scale)
    sought = (key * factor[..., None]).to(step.query.dtype)
    # [3, R', L, H, d] to [L, R', H, 3, d].
    sought = sought.unflatten(2, (shape.num_layers, shape.num_kv_heads)).permute(2, 1, 3, 0, 4)
    by_group = step.query.unflatten(2, (shape.num_kv_heads, shape.group))
    by_group[:, : rows.num_active, :, :NUM_SEEKING] = sought


def check_sought(verdict: Verdict, step: Step, rows: Rows, out: torch.Tensor) -> None:
    """Every stream of every row found the tokens that its first query heads look for."""
    _, value, _ = sought_tokens(step, rows)
    by_group = out.unflatten(2, (step.shape.num_kv_heads, step.shape.group))
    found = by_group[:, : rows.num_active, :, :NUM_SEEKING].permute(3, 1, 0, 2, 4).flatten(2, 3)
    share = (found.float() * value).sum(dim=-1) / value.square().sum(dim=-1)
    is_found = (share > SOUGHT[0]) & (share < SOUGHT[1])
    num_lost = int((~is_found).sum())
    verdict.expect(num_lost == 0, f"{num_lost} of {share.numel()} sought tokens not found")
    verdict.facts["num_sought"] = share.numel()


def owner_of_last_block(rows: Rows) -> tuple[int, int]:
    """(row, stream) that owns the last page of the highest block in any region."""
    its = ops.RowDescriptor(*rows.rows[: rows.num_active].long().T[..., None])
    column = torch.arange(rows.block_table.shape[1], device=rows.rows.device)[None]
    is_region = (column >= its.region_column) & (column < its.region_column + its.num_region_blocks)
    blocks = torch.where(is_region, rows.block_table[: rows.num_active], -1)
    row, column = divmod(int(blocks.argmax()), blocks.shape[1])
    virtual = (column - int(its.region_column[row]) + 1) * rows.num_streams - 1
    ends = rows.page_offsets[row, 1:]
    return row, int((ends <= virtual).sum())


def samples(rows: Rows) -> list[tuple[int, int]]:
    """(row, stream) pairs spread over both, the highest addresses among them."""
    highest_tail = int(rows.block_table[: rows.num_active].amax(dim=1).argmax())
    chosen = [
        owner_of_last_block(rows),
        (highest_tail, rows.num_streams - 1),
        (rows.num_active - 1, rows.num_streams - 1),
        (0, 0),
    ]
    # A step that shares no factor with most numbers of streams visits all layers and heads.
    for i in range(NUM_SAMPLES - len(chosen)):
        chosen.append((i * 7 % rows.num_active, i * 37 % rows.num_streams))
    return list(dict.fromkeys(chosen))


def check_samples(verdict: Verdict, step: Step, rows: Rows, out: torch.Tensor) -> None:
    """Sampled streams against attention in float64 over the keys gathered from their pages."""
    shape, device = step.shape, step.pool.device
    lens = rows.num_tokens()[1]
    highest = 0
    for row, stream in samples(rows):
        layer, head = divmod(stream, shape.num_kv_heads)
        index = torch.arange(int(lens[row, stream]), device=device)
        where = (torch.full_like(index, row), torch.full_like(index, stream), index)
        last_page = int(rows.places(*where)[0].max())
        highest = max(highest, (last_page + 1) * step.pool[0].numel() - 1)
        key, value = step.entries(*where, rows)
        heads = slice(head * shape.group, (head + 1) * shape.group)
        query = step.query[layer, row, heads]
        got = out[layer, row, heads]
        exact, same = (
            attend(query, key, value, step.scale, dtype) for dtype in (torch.float64, out.dtype)
        )
        # Seeking heads give large numbers, whose roundings would hide errors of the others.
        for part, which in (
            (slice(NUM_SEEKING), "seeking"),
            (slice(NUM_SEEKING, None), "random"),
        ):
            what = f"row {row}, layer {layer}, KV head {head}, {which}, {len(index)} tokens"
            verdict.compare(got[part], exact[part], same[part], out.dtype, ULPS, what)
    verdict.facts["highest_element"] = highest


def judge(step: Step, rows: Rows, out: torch.Tensor) -> Verdict:
    """Everything that can be said of one step's output."""
    verdict = Verdict()
    active, idle = out[:, : rows.num_active], out[:, rows.num_active :]
    verdict.expect(bool(active.isfinite().all()), "NaN was read or something left unwritten")
    verdict.expect(bool(idle.isnan().all()), "rows without a query were written")
    check_sought(verdict, step, rows, out)
    check_samples(verdict, step, rows, out)
    lens = rows.num_tokens()[1][: rows.num_active]
    verdict.facts |= {
        "rows": rows.rows.shape[0],
        "kept_tokens_mean": math.floor(float(lens.float().mean())),
        "kept_tokens_max": int(lens.max()),
    }
    return verdict


@dataclass
class DecodeCases:
    """Cases of one pool and batch: two steps of different rows, that lie in the pool together."""

    shape: ModelShape
    pool: torch.Tensor
    batch: int
    max_blocks: int

    def run(self) -> Iterator[tuple[str, Callable[[], Verdict]]]:
        """(name, what to run) of each case, in order."""
        name = f"batch {self.batch}" + (", fp8" if self.pool.element_size() == 1 else "")
        yield f"decode, {name}", self.first_step
        yield f"decode, {name}, graph replayed with other rows", self.replayed

    def first_step(self) -> Verdict:
        """Fill the pool, and judge the first step."""
        shape, pool = self.shape, self.pool
        generator = torch.Generator().manual_seed(self.batch)
        num_blocks = pool.shape[0] // shape.num_streams
        num_idle = [min(1, self.batch // 4), min(2, self.batch // 3)]
        hands = [
            hand[: self.max_blocks * (self.batch - idle)]
            for hand, idle in zip(
                deal_blocks(num_blocks, 2, OWNED, generator), num_idle, strict=True
            )
        ]
        num_rows = [self.batch - idle for idle in num_idle]
        width = 10 * max(len(hand) // n for hand, n in zip(hands, num_rows, strict=True))
        on_host = [
            draw_rows(self.batch, idle, shape, hand, width, generator)
            for hand, idle in zip(hands, num_idle, strict=True)
        ]
        num_nan = fill_pool(pool, on_host, seed=self.batch)
        self.steps = [rows.to(pool.device) for rows in on_host]
        size = (shape.num_layers, self.batch, shape.num_heads, shape.head_size)
        query = torch.empty(size, dtype=shape.dtype, device=pool.device)
        scales = None
        if pool.element_size() == 1:
            scales = torch.linspace(0.25, 2.0, shape.num_streams, device=pool.device)
        self.step = Step(
            shape=shape,
            pool=pool,
            rows=self.steps[0].clone(),
            query=query,
            out=torch.empty_like(query),
            work=ops.new_decode_work(
                self.batch,
                num_layers=shape.num_layers,
                num_kv_heads=shape.num_kv_heads,
                group=shape.group,
                head_size=shape.head_size,
                pool_dtype=pool.dtype,
                device=pool.device,
            ),
            key_scale=scales,
            value_scale=None if scales is None else scales.flip(0),
        )
        seek(self.step, self.steps[0], seed=1)
        self.first_out = eager(self.step)
        verdict = judge(self.step, self.steps[0], self.first_out)
        verdict.facts |= {
            "programs": len(self.step.work.tickets),
            "pool_gib": round(pool.nbytes / 2**30, 2),
            "nan_blocks": num_nan,
            "blocks": num_blocks,
        }
        return verdict

    def replayed(self) -> Verdict:
        """Capture the first step, give it the second one's rows, and the first one's again."""
        step = self.step
        first, second = self.steps
        query = step.query.clone()
        replay = capture(step)
        step.rows.copy_from(second)
        seek(step, second, seed=2)
        got = self._replay(replay)
        verdict = judge(step, second, got)
        verdict.expect_equal(got, eager(step), "replay and eager call")
        step.rows.copy_from(first)
        step.query.copy_(query)
        verdict.expect_equal(self._replay(replay), self.first_out, "replay of the first rows")
        return verdict

    def _replay(self, replay: Callable[[], None]) -> torch.Tensor:
        """The output of a replay; the work is shared anew outside the graph."""
        with no_host_sync(self.pool.device):
            self.step.out.fill_(float("nan"))
            share_work(self.step)
            replay()
        return self.step.out.clone()
