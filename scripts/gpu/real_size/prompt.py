"""One long prompt scored, selected and compacted in a pool of many GiB, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu.real_size.decode import no_host_sync
from gpu.real_size.judge import Verdict
from gpu.real_size.rows import NULL_BLOCK, Rows, block_of, block_sums, deal_blocks, fill_pool
from gpu.shapes import ModelShape

from vllm_kvcompress import ops
from vllm_kvcompress.ops import native

WINDOW, NEAR_TOKENS, POOL_KERNEL, SPAN_KERNEL = 16, 8, 5, 11
PLAN = ops.WindowPlan(
    reduce="defensive",
    near_tokens=NEAR_TOKENS,
    mean_kernel=POOL_KERNEL,
    group_reduce="max",
    floor_at_mean=True,
    span_kernel=SPAN_KERNEL,
)
# Of the prompt's pages, those that are kept, and what each stream is sure of.
KEPT, GUARANTEED = 0.125, 2
# float32 roundings of the largest score allowed on top of twice torch's own error in float32: a
# tensor core truncates where it adds, and a logit's error is a weight's relative one.
ULPS = 128


def window_weights(
    query: torch.Tensor, key: torch.Tensor, scale: float, num_rated: int, near_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[H, g, w, num_rated] attention of the last w queries, and their [H, g, w] natural lse.

    Args:
        query: [H, g, w, d], key: [H, n, d], of the type to compute in.
        scale: factor on the products.
        num_rated: keys with a weight.
        near_tokens: keys up to a query's own that count as 0.
    """
    window, num_keys = query.shape[2], key.shape[1]
    logits = query.flatten(1, 2) @ key.mT * scale
    logits = logits.unflatten(1, query.shape[1:3])
    position = torch.arange(num_keys - window, num_keys, device=key.device)
    age = position[:, None] - torch.arange(num_keys, device=key.device)
    logits.masked_fill_(age < 0, float("-inf"))
    lse = logits.logsumexp(dim=-1)
    weights = (logits - lse[..., None]).exp_().masked_fill_(age < near_tokens, 0.0)
    return weights[..., :num_rated], lse


def defensive(weights: torch.Tensor) -> torch.Tensor:
    """[H, n]: each query's weights mean-pooled, brought back to their sum, and the largest."""
    flat = weights.flatten(0, 2)[:, None]
    pooled = F.avg_pool1d(flat, POOL_KERNEL, stride=1, padding=POOL_KERNEL // 2)
    pooled *= flat.sum(dim=-1, keepdim=True) / pooled.sum(dim=-1, keepdim=True)
    return pooled.view(weights.shape[0], -1, weights.shape[-1]).amax(dim=1)


def joined_pages(
    scores: torch.Tensor, effect: torch.Tensor, num_candidates: int, page_size: int
) -> torch.Tensor:
    """[H, pages] what `join_scores` is asked for in this file, of [H, G, n] scores."""
    joined = scores.amax(dim=1)
    joined = joined.maximum(joined.mean(dim=1, keepdim=True))
    joined = joined * (effect / effect.sum(dim=0).clamp(min=torch.finfo(torch.float32).tiny))
    widened = F.max_pool1d(joined, SPAN_KERNEL, stride=1, padding=SPAN_KERNEL // 2)
    pages = widened[:, :num_candidates].unflatten(1, (-1, page_size))
    return pages.square().mean(dim=2).sqrt()


def joint_counts(scores: torch.Tensor, total: int, guaranteed: int) -> torch.Tensor:
    """[S] entries that each of [S, N] streams gets of a total; ties by rank, then by stream."""
    ranked = scores.sort(dim=1, descending=True).values
    ranked[:, :guaranteed] = float("inf")
    order = ranked.T.flatten().sort(descending=True, stable=True).indices[:total]
    return (order % scores.shape[0]).bincount(minlength=scores.shape[0])


def best_entries(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Best entries of each of [S, N] streams, one stream after another, each ascending."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))
    return (rank < counts[:, None]).nonzero()[:, 1]


@dataclass
class PromptCases:
    """Cases of one prompt, that go on from each other in order."""

    shape: ModelShape
    pool: torch.Tensor
    prompt_len: int

    def run(self) -> Iterator[tuple[str, Callable[[], Verdict]]]:
        """(name, what to run) of each case, in order."""
        name = f"prompt of {self.prompt_len}"
        yield f"{name}, compressed without a host sync", self.compressed
        yield f"{name}, scores of sampled layers", self.scores
        yield f"{name}, selection", self.selection
        yield f"{name}, selection and compaction by tokens", self.tokens
        device_type = self.pool.device.type
        if native.is_installed(device_type):
            yield f"{name}, compiled selection and compaction", self.compiled

    def prepare(self) -> None:
        """Fill the pool: the prompt's blocks numbers, its region and the rest NaN."""
        shape, pool = self.shape, self.pool
        b, device = shape.block_size, pool.device
        generator = torch.Generator().manual_seed(3)
        num_blocks = -(-self.prompt_len // b)
        boundary = self.prompt_len // b
        self.region = max(1, int(boundary * KEPT))
        prompt_ids, region_ids = deal_blocks(pool.shape[0] // shape.num_streams, 2, 1, generator)
        table = torch.full((1, num_blocks + self.region + 16), NULL_BLOCK, dtype=torch.int32)
        columns = torch.arange(num_blocks)
        columns += torch.where(columns >= boundary, self.region, 0)
        table[0, columns] = prompt_ids[:num_blocks].int()
        row = ops.RowDescriptor(self.prompt_len, self.region, boundary, boundary)
        rows = torch.tensor([row], dtype=torch.int32)
        offsets = torch.zeros(1, shape.num_streams + 1, dtype=torch.int32)
        starts = torch.tensor([0, 1], dtype=torch.int32)
        dense = Rows(rows, offsets, table, starts, 1, b)
        # As long as the region is nobody's, it is NaN.
        fill_pool(pool, [dense], seed=3)
        table[0, boundary : boundary + self.region] = region_ids[: self.region].int()
        self.region_ids = region_ids[: self.region]
        self.rows = dense.to(device)
        self.num_rated = self.prompt_len - WINDOW
        self.num_candidates = self.num_rated // b * b
        self.total = self.region * shape.num_streams

        def int32(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.rated, self.candidates = int32(self.num_rated), int32(self.num_candidates)
        self.entries = int32(self.num_candidates // b)
        self.totals, self.sure = int32(self.total)[None], int32(GUARANTEED)[None]
        on_device = torch.Generator(device).manual_seed(4)
        size = (1, shape.num_layers, WINDOW, shape.num_heads, shape.head_size)
        self.query = torch.randn(size, generator=on_device, device=device).mul_(1.5).to(shape.dtype)
        size = (shape.num_layers, shape.num_kv_heads, shape.head_size, shape.head_size)
        self.root = torch.randn(size, generator=on_device, device=device).to(shape.dtype)
        size = (1, shape.num_streams, ops.score_width(self.num_candidates // b))
        self.page_scores = torch.full(size, float("nan"), device=device)
        layers = (0, shape.num_layers // 2, shape.num_layers - 1)
        self.sampled = list(dict.fromkeys(layers))

    @property
    def paged(self) -> ops.Pool:
        """The pool as ops take it."""
        return ops.Pool(self.pool, self.shape.num_layers, self.shape.num_kv_heads)

    @property
    def prompts(self) -> ops.Prompts:
        """The prompt as ops take it."""
        most = (self.num_rated, self.num_candidates)
        return ops.Prompts(self.rows.op_rows, self.rated, self.candidates, *most)

    def window_scores(
        self,
        query: torch.Tensor,
        layer: int,
        plan: ops.WindowPlan = PLAN,
        **sums: torch.Tensor | None,
    ) -> torch.Tensor:
        """Scores of the layers that the queries are of, from `layer` on."""
        return ops.window_scores(
            query,
            self.paged,
            self.prompts,
            layer,
            ops.Logits(self.shape.head_size**-0.5),
            plan,
            **sums,
        )

    def score(self) -> None:
        """Page scores of all layers, and what they are made of."""
        num_parts = ops.num_score_parts(self.num_rated, POOL_KERNEL)
        size = (1, self.shape.num_streams, num_parts)
        part_sums = torch.empty(size, dtype=torch.float32, device=self.pool.device)
        self.window = self.window_scores(self.query, 0, part_sums=part_sums)
        self.effect = ops.paged_value_effect(self.root, self.paged, self.prompts, 0)
        pages = ops.join_scores(
            self.window,
            self.prompts,
            PLAN,
            effect=self.effect,
            page_reduce="rms",
            page_size=self.shape.block_size,
            num_kv_heads=self.shape.num_kv_heads,
            part_sums=part_sums,
        )
        self.page_scores[..., : pages.shape[2]] = pages

    def of_layer(self, streams: torch.Tensor, layer: int) -> torch.Tensor:
        """[H, ...] of one layer, of [1, S, ...]."""
        num_heads = self.shape.num_kv_heads
        return streams[0, layer * num_heads : (layer + 1) * num_heads]

    def compressed(self) -> Verdict:
        """All steps on the device; copies are compared to the bit with where they came from."""
        self.prepare()
        before = block_sums(self.pool, self.shape.num_streams)
        with no_host_sync(self.pool.device):
            self.score()
            self.counts = ops.joint_page_counts(
                self.page_scores, self.entries, self.totals, self.sure
            )
            self.selected = ops.select_entries(
                self.page_scores, self.entries, self.counts, self.total
            )
            self.compact(*self.selected, granularity="page")
        verdict = Verdict()
        used = self.page_scores[..., : self.num_candidates // self.shape.block_size]
        verdict.expect(bool(used.isfinite().all()), "scores are not finite")
        self.check_copies(verdict, *self.selected, "page", before)
        highest = int(self.rows.block_table.max()) + 1
        verdict.facts |= {
            "highest_element": highest * self.shape.num_streams * self.pool[0].numel() - 1,
            "region_blocks": self.region,
        }
        return verdict

    def compact(
        self, offsets: torch.Tensor, indices: torch.Tensor, granularity: str, **options: Any
    ) -> None:
        """`ops.compact` of this prompt."""
        ops.compact(
            self.paged,
            self.rows.op_rows,
            offsets,
            indices,
            max_region_blocks=self.region,
            granularity=granularity,
            **options,
        )

    def check_copies(
        self,
        verdict: Verdict,
        offsets: torch.Tensor,
        indices: torch.Tensor,
        granularity: str,
        before: torch.Tensor,
    ) -> None:
        """The region holds what was selected, nothing else has changed; then the region is NaN."""
        b, num_streams, table = self.shape.block_size, self.shape.num_streams, self.rows.block_table
        device, boundary = self.pool.device, self.prompt_len // b
        virtual = torch.arange(self.total, device=device)
        stream = torch.searchsorted(offsets[0, 1:].long(), virtual, right=True)
        block = table[0, boundary + virtual // num_streams].long()
        target = block * num_streams + virtual % num_streams
        words = self.pool.view(torch.int16)
        got = words[target]
        if granularity == "page":
            token = indices[0, : self.total, None].long() * b + torch.arange(b, device=device)
        else:
            token = indices[0, : self.total * b].long().view(-1, b)
        source = table[0, token // b].long() * num_streams + stream[:, None]
        num_equal = 0
        for part in range(0, self.total, 8192):
            want = words[source[part : part + 8192], token[part : part + 8192] % b]
            num_equal += int((got[part : part + 8192] == want).flatten(1).all(dim=1).sum())
        wrong = self.total - num_equal
        verdict.expect(wrong == 0, f"{wrong} of {self.total} pages are not what was selected")
        for region_block in self.region_ids.tolist():
            block_of(self.pool, region_block, num_streams).fill_(float("nan"))
        after = block_sums(self.pool, num_streams)
        num_changed = int((after != before).sum())
        verdict.expect(num_changed == 0, f"{num_changed} blocks outside the region were written")
        verdict.facts["pages_copied"] = self.total

    def entries_of(self, layer: int) -> torch.Tensor:
        """[H, n, 2 d] keys and values of one layer's heads, by token."""
        shape, b = self.shape, self.shape.block_size
        token = torch.arange(self.prompt_len, device=self.pool.device)
        column = token // b + torch.where(token // b >= self.prompt_len // b, self.region, 0)
        head = torch.arange(shape.num_kv_heads, device=self.pool.device)[:, None]
        block = self.rows.block_table[0, column].long()
        return self.pool[block * shape.num_streams + layer * shape.num_kv_heads + head, token % b]

    def scores(self) -> Verdict:
        """Window scores (all reductions), value effects and page scores against float64."""
        verdict = Verdict()
        shape, d = self.shape, self.shape.head_size
        for layer in self.sampled:
            entries = self.entries_of(layer)
            query = self.query[0, layer].unflatten(1, (shape.num_kv_heads, shape.group))
            query = query.permute(1, 2, 0, 3)
            want: dict[str, list[torch.Tensor]] = {}
            for wide in (torch.float64, torch.float32):
                key, value = entries[..., :d].to(wide), entries[..., d:].to(wide)
                arguments = (query.to(wide), key, d**-0.5, self.num_rated)
                weights, lse = window_weights(*arguments, NEAR_TOKENS)
                effect = (value[:, : self.num_rated] @ self.root[layer].to(wide)).norm(dim=2)
                steps = {"defensive": defensive(weights), "effect": effect, "lse": lse}
                del weights
                weights, _ = window_weights(*arguments, 0)
                steps |= {"mean": weights.mean(dim=2), "max": weights.amax(dim=2)}
                mine = (self.of_layer(x, layer).to(wide) for x in (self.window, self.effect))
                steps["pages"] = joined_pages(*mine, self.num_candidates, shape.block_size)
                for name, tensor in steps.items():
                    want.setdefault(name, []).append(tensor)
            self.compare_scores(verdict, layer, want)
        verdict.facts["layers"] = self.sampled
        return verdict

    def compare_scores(
        self, verdict: Verdict, layer: int, want: dict[str, list[torch.Tensor]]
    ) -> None:
        """What the kernels make of one layer, beside [in float64, in float32] of each name."""
        lse = want["lse"][0].permute(2, 0, 1).flatten(1)[None].float().contiguous()
        query, window = self.query[:, layer], self.of_layer(self.window, layer)

        def alone(plan: ops.WindowPlan, lse: torch.Tensor | None = None) -> torch.Tensor:
            return self.window_scores(query, layer, plan, lse=lse)[0]

        verdict.expect_equal(alone(PLAN), window, f"layer {layer}, scored alone")
        num_pages = self.num_candidates // self.shape.block_size
        got = {
            "defensive": window.amax(dim=1),
            "defensive, lse given": alone(PLAN, lse).amax(dim=1),
            "mean": alone(ops.WindowPlan(reduce="mean")),
            "max, lse given": alone(ops.WindowPlan(reduce="max"), lse),
            "effect": self.of_layer(self.effect, layer),
            "pages": self.of_layer(self.page_scores, layer)[:, :num_pages],
        }
        for name, scores in got.items():
            exact, same = want[name.partition(",")[0]]
            what = f"layer {layer}, {name}"
            verdict.compare(scores, exact, same, torch.float32, ULPS, what)

    def selection(self) -> Verdict:
        """Counts and entries are exactly torch's, made from the kernels' own page scores."""
        verdict = Verdict()
        scores = self.page_scores[0, :, : self.num_candidates // self.shape.block_size]
        counts = joint_counts(scores, self.total, GUARANTEED)
        offsets, indices = self.selected
        verdict.expect_equal(self.counts[0], counts.int(), "page counts")
        verdict.expect_equal(offsets[0, 1:], counts.cumsum(0).int(), "page offsets")
        verdict.expect_equal(offsets[0, :1], torch.zeros_like(offsets[0, :1]), "first offset")
        want = best_entries(scores, counts).int()
        verdict.expect_equal(indices[0, : self.total], want, "entries")
        verdict.facts |= {"streams": len(counts), "entries": scores.shape[1]}
        return verdict

    def tied_token_scores(self) -> torch.Tensor:
        """[1, S, tokens] of which few are different."""
        size = (1, self.shape.num_streams, ops.score_width(self.num_candidates))
        generator = torch.Generator(self.pool.device).manual_seed(5)
        scores = torch.rand(size, generator=generator, device=self.pool.device)
        return scores.mul_(1000).floor_().div_(1000)

    def select_tokens(self, scores: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        """Page counts, offsets and tokens."""
        b = self.shape.block_size
        sure = self.sure * b
        counts = ops.joint_page_counts(
            scores, self.candidates, self.totals, sure, page_size=b, backend=backend
        )
        chosen = ops.select_entries(
            scores, self.candidates, counts, self.total, page_size=b, backend=backend
        )
        return counts, *chosen

    def tokens(self) -> Verdict:
        """Single tokens, many of them tied, in whole pages of each stream."""
        verdict = Verdict()
        b = self.shape.block_size
        scores = self.tied_token_scores()
        before = block_sums(self.pool, self.shape.num_streams)
        with no_host_sync(self.pool.device):
            counts, offsets, indices = self.select_tokens(scores, "triton")
            self.compact(offsets, indices, granularity="token")
        rated = scores[0, :, : self.num_candidates]
        shares = joint_counts(rated, self.total * b, GUARANTEED * b).tolist()
        upper = self.num_candidates // b
        want = ops.apportion([share / b for share in shares], self.total, 1, upper)
        want = torch.tensor(want, device=counts.device)
        verdict.expect_equal(counts[0], want.int(), "page counts")
        verdict.expect_equal(offsets[0, 1:], want.cumsum(0).int(), "page offsets")
        entries = best_entries(rated, want * b).int()
        verdict.expect_equal(indices[0, : self.total * b], entries, "tokens")
        self.check_copies(verdict, offsets, indices, "token", before)
        return verdict

    def compiled(self) -> Verdict:
        """The compiled ops select and copy the same as Triton's, by pages and by tokens."""
        verdict = Verdict()
        problem = native.problem(self.pool.device.type)
        verdict.expect(problem is None, f"{problem}")
        if problem is not None:
            return verdict
        before = block_sums(self.pool, self.shape.num_streams)
        counts = ops.joint_page_counts(
            self.page_scores, self.entries, self.totals, self.sure, backend="native"
        )
        arguments = (self.page_scores, self.entries, counts)
        pages = ops.select_entries(*arguments, self.total, backend="native")
        self.expect_same(
            verdict, (self.counts, *self.selected), (counts, *pages), self.total, "page"
        )
        self.compact(*pages, granularity="page", backend="native")
        self.check_copies(verdict, *pages, "page", before)
        both = ops.select_and_compact(
            *arguments,
            self.paged,
            self.rows.op_rows,
            max_region_blocks=self.region,
            backend="native",
        )
        self.expect_same(verdict, self.selected, both, self.total, "in one launch, page")
        self.check_copies(verdict, *both, "page", before)
        scores, num_tokens = self.tied_token_scores(), self.total * self.shape.block_size
        tokens = self.select_tokens(scores, "native")
        mine = self.select_tokens(scores, "triton")
        self.expect_same(verdict, mine, tokens, num_tokens, "token")
        self.compact(*tokens[1:], granularity="token", backend="native")
        self.check_copies(verdict, *tokens[1:], "token", before)
        return verdict

    def expect_same(
        self,
        verdict: Verdict,
        mine: tuple[torch.Tensor, ...],
        other: tuple[torch.Tensor, ...],
        num_entries: int,
        what: str,
    ) -> None:
        """Counts, offsets and the first entries are equal; those past the last are undefined."""
        *mine, my_entries = mine
        *other, entries = other
        for one, two, name in zip(mine, other, ("counts", "offsets")[-len(mine) :], strict=True):
            verdict.expect_equal(two, one, f"{what} {name}")
        chosen = (entries[0, :num_entries], my_entries[0, :num_entries])
        verdict.expect_equal(*chosen, f"{what} entries")
