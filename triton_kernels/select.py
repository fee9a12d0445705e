"""From scores to what every stream keeps, without the host: radix selection over float bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .paging import UNALIGNED

_TILE = 1024
# Entries that a stream may have, in bits; a constant, so that longer prompts compile nothing.
_RANK_BITS = 24
# Streams that one program looks at, where there are not more; a constant, so that as many layers as
# happen to be known compile nothing.
_STREAMS = 1024
# Four digits of eight bits; see `_order_key`.
NUM_DIGITS = tl.constexpr(4)


@triton.jit
def _order_key(scores):
    """uint32 in the order of float32; NaN equals -inf, and -0 equals 0."""
    bits = (scores + 0.0).to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return tl.where(scores == scores, key, 0x007FFFFF)


@triton.jit
def _load_keys(row_ptr, entries, num_entries, IN_FOURS: tl.constexpr):
    """(keys, mask) of a row's entries; IN_FOURS where rows start at multiples of 16 bytes."""
    mask = entries < num_entries
    is_loaded = mask
    if IN_FOURS:
        # A thread reads 16 aligned bytes at once, with up to three entries past the last.
        is_loaded = entries < tl.cdiv(num_entries, 4) * 4
    scores = tl.load(row_ptr + entries, mask=is_loaded, other=float("-inf"))
    return _order_key(scores), mask


@triton.jit
def _digit(keys, index: tl.constexpr):
    return ((keys >> (24 - 8 * index)) & 0xFF).to(tl.int32)


@triton.jit
def _count_from(
    row_ptr,
    num_entries,
    prefix,
    DIGIT: tl.constexpr,
    TILE: tl.constexpr,
    IN_FOURS: tl.constexpr,
):
    """Entries of a row whose key is at least `prefix` followed by each value of a digit.

    Returns:
        ([256] counts, count of those above the prefix).
    """
    histogram = tl.zeros([256], tl.int32)
    above = 0
    for first in range(0, num_entries, TILE):
        entries = first + tl.arange(0, TILE)
        keys, mask = _load_keys(row_ptr, entries, num_entries, IN_FOURS)
        if DIGIT == 0:
            is_candidate = mask
        else:
            start = (keys >> (32 - 8 * DIGIT)).to(tl.int64)
            is_candidate = mask & (start == prefix)
            above += tl.sum((mask & (start > prefix)).to(tl.int32), axis=0)
        # Digits of other entries count in no bin.
        histogram += tl.histogram(_digit(keys, DIGIT), 256, mask=is_candidate)
    return above + tl.cumsum(histogram, axis=0, reverse=True), above


@triton.jit
def _chosen_digit(counts, wanted):
    """Greatest digit from which on there are at least `wanted`, given counts for every digit."""
    return tl.maximum(tl.sum((counts >= wanted).to(tl.int32), axis=0) - 1, 0)


@triton.jit(do_not_specialize=["streams_per_group"], do_not_specialize_on_alignment=UNALIGNED)
def _joint_digit_kernel(
    row_counts_ptr,
    group_counts_ptr,
    scores_ptr,
    num_entries_ptr,
    totals_ptr,
    guaranteed_ptr,
    stride_request,
    stride_stream,
    streams_per_group,
    PAGE_SIZE: tl.constexpr,
    DIGIT: tl.constexpr,
    TILE: tl.constexpr,
    IN_FOURS: tl.constexpr,
):
    """Add one stream's counts for one digit to its group's; see `joint_page_counts`."""
    stream = tl.program_id(0)
    request = tl.program_id(1)
    num_groups = tl.num_programs(0) // streams_per_group
    group = request * num_groups + stream // streams_per_group
    num_entries = tl.load(num_entries_ptr + request)
    total = tl.load(totals_ptr + group) * PAGE_SIZE
    guaranteed = tl.load(guaranteed_ptr + group)
    digits = tl.arange(0, 256)
    group_ptr = group_counts_ptr + group.to(tl.int64) * (NUM_DIGITS * 256)
    prefix = tl.zeros([], tl.int64)
    for earlier in tl.static_range(0, DIGIT):
        counts = tl.load(group_ptr + earlier * 256 + digits)
        prefix = prefix * 256 + _chosen_digit(counts, total)
    row_ptr = (
        scores_ptr + request.to(tl.int64) * stride_request + stream.to(tl.int64) * stride_stream
    )
    counts, above = _count_from(row_ptr, num_entries, prefix, DIGIT, TILE, IN_FOURS)
    if DIGIT == NUM_DIGITS - 1:
        # From each digit on, and above the last one.
        row_counts_ptr += (request * tl.num_programs(0) + stream).to(tl.int64) * 257
        tl.store(row_counts_ptr + digits, counts)
        tl.store(row_counts_ptr + 256, above)
    tl.atomic_add(group_ptr + DIGIT * 256 + digits, tl.maximum(counts, guaranteed))


@triton.jit
def _shared_by_rank(base, extra, wanted, STEPS: tl.constexpr):
    """How many of `extra` equal entries each row gets when `wanted` of them are taken in all.

    A row's equal entries have the ranks base, base + 1, ...; lower ranks go first, then lower rows.
    """
    rank = 0
    for step in tl.static_range(0, STEPS):
        higher = rank + (1 << (STEPS - 1 - step))
        taken = tl.sum(tl.minimum(tl.maximum(higher - base, 0), extra), axis=0)
        rank = tl.where(taken <= wanted, higher, rank)
    sure = tl.minimum(tl.maximum(rank - base, 0), extra)
    is_open = ((base <= rank) & (rank < base + extra)).to(tl.int32)
    place = tl.cumsum(is_open, axis=0) - is_open
    return sure + tl.where(place < wanted - tl.sum(sure, axis=0), is_open, 0)


@triton.jit
def _whole_pages(counts, in_group, total, PAGE_SIZE: tl.constexpr, STEPS: tl.constexpr):
    """Pages near `counts / PAGE_SIZE`, at least one each, that sum to total: largest remainder."""
    pages = tl.where(in_group, tl.maximum(counts // PAGE_SIZE, 1), 0)
    missing = total - tl.sum(pages, axis=0)
    # Too few: one more for those with the largest remainders. Threshold by bisection.
    remainder = tl.where(in_group, counts - pages * PAGE_SIZE, -PAGE_SIZE)
    low = 0
    for step in tl.static_range(0, 8):
        higher = low + (128 >> step)
        low = tl.where(tl.sum((remainder >= higher).to(tl.int32), axis=0) >= missing, higher, low)
    over = (remainder > low).to(tl.int32)
    tie = (remainder == low).to(tl.int32)
    place = tl.cumsum(tie, axis=0) - tie
    more = over + tl.where(place < missing - tl.sum(over, axis=0), tie, 0)
    # Too many, since every stream has a page: taken where a page is farthest above its share. A
    # stream's page number s is s * PAGE_SIZE - counts above it.
    surplus = -missing
    depth = 0
    for step in tl.static_range(0, STEPS):
        # Greatest depth at which fewer than `surplus` pages lie less deep.
        deeper = depth + (1 << (STEPS - 1 - step))
        first = tl.maximum((counts - deeper + PAGE_SIZE) // PAGE_SIZE, 2)
        shallower = tl.where(in_group, tl.maximum(pages - first + 1, 0), 0)
        depth = tl.where(tl.sum(shallower, axis=0) < surplus, deeper, depth)
    first = tl.maximum((counts - depth + PAGE_SIZE) // PAGE_SIZE, 2)
    sure = tl.where(in_group, tl.maximum(pages - first + 1, 0), 0)
    at_depth = counts - depth
    tie = in_group & (at_depth % PAGE_SIZE == 0) & (at_depth // PAGE_SIZE >= 2)
    tie = (tie & (at_depth // PAGE_SIZE <= pages)).to(tl.int32)
    place = tl.cumsum(tie, axis=0) - tie
    fewer = sure + tl.where(place < surplus - tl.sum(sure, axis=0), tie, 0)
    return pages + tl.where(missing > 0, more, 0) - tl.where(missing < 0, fewer, 0)


@triton.jit(do_not_specialize=["streams_per_group"], do_not_specialize_on_alignment=UNALIGNED)
def _share_pages_kernel(
    num_pages_ptr,
    row_counts_ptr,
    group_counts_ptr,
    totals_ptr,
    guaranteed_ptr,
    streams_per_group,
    PAGE_SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    TILE_S: tl.constexpr,
):
    """Settle one group of streams whose counts per digit are known."""
    group = tl.program_id(0)
    total = tl.load(totals_ptr + group)
    guaranteed = tl.load(guaranteed_ptr + group)
    digits = tl.arange(0, 256)
    group_ptr = group_counts_ptr + group.to(tl.int64) * (NUM_DIGITS * 256)
    last_counts = tl.load(group_ptr + (NUM_DIGITS - 1) * 256 + digits)
    digit = _chosen_digit(last_counts, total * PAGE_SIZE)
    stream = tl.arange(0, TILE_S)
    in_group = stream < streams_per_group
    row = group.to(tl.int64) * streams_per_group + stream
    row_ptr = row_counts_ptr + row * 257 + digit
    at_least = tl.load(row_ptr, mask=in_group, other=0)
    more_than = tl.load(row_ptr + 1, mask=in_group, other=0)
    base = tl.where(in_group, tl.maximum(more_than, guaranteed), 0)
    extra = tl.where(in_group, tl.maximum(at_least, guaranteed), 0) - base
    wanted = total * PAGE_SIZE - tl.sum(base, axis=0)
    counts = base + _shared_by_rank(base, extra, wanted, STEPS)
    if PAGE_SIZE > 1:
        counts = _whole_pages(counts, in_group, total, PAGE_SIZE, STEPS)
    tl.store(num_pages_ptr + row, counts, mask=in_group)


def _is_in_fours(scores: torch.Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes."""
    return all(start % 4 == 0 for start in (scores.data_ptr() // 4, *scores.stride()[:2]))


def joint_page_counts(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    total_pages: torch.Tensor,
    guaranteed: torch.Tensor,
    num_pages: torch.Tensor,
    *,
    page_size: int,
) -> None:
    """See `ops.joint_page_counts`."""
    num_requests, num_streams, _ = scores.shape
    num_groups = total_pages.shape[1]
    if num_requests == 0:
        return
    streams_per_group = num_streams // num_groups
    counts = {"dtype": torch.int32, "device": scores.device}
    row_counts = torch.empty(num_requests * num_streams, 257, **counts)
    group_counts = torch.zeros(num_requests * num_groups, NUM_DIGITS.value, 256, **counts)
    for digit in range(NUM_DIGITS.value):
        _joint_digit_kernel[(num_streams, num_requests)](
            row_counts,
            group_counts,
            scores,
            num_entries,
            total_pages,
            guaranteed,
            scores.stride(0),
            scores.stride(1),
            streams_per_group,
            PAGE_SIZE=page_size,
            DIGIT=digit,
            TILE=_TILE,
            IN_FOURS=_is_in_fours(scores),
            num_warps=4,
        )
    _share_pages_kernel[(num_requests * num_groups,)](
        num_pages,
        row_counts,
        group_counts,
        total_pages,
        guaranteed,
        streams_per_group,
        PAGE_SIZE=page_size,
        STEPS=_RANK_BITS,
        TILE_S=triton.next_power_of_2(max(streams_per_group, _STREAMS)),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["indices_stride"], do_not_specialize_on_alignment=UNALIGNED)
def _select_kernel(
    indices_ptr,
    offsets_ptr,
    scores_ptr,
    num_entries_ptr,
    num_pages_ptr,
    stride_request,
    stride_stream,
    indices_stride,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    IN_FOURS: tl.constexpr,
    TILE_S: tl.constexpr,
):
    """One stream's best entries in ascending order, and where they start among its request's."""
    stream = tl.program_id(0)
    request = tl.program_id(1)
    num_streams = tl.num_programs(0)
    num_entries = tl.load(num_entries_ptr + request)
    streams = tl.arange(0, TILE_S)
    request_pages_ptr = num_pages_ptr + request * num_streams
    before = tl.load(request_pages_ptr + streams, mask=streams < stream, other=0)
    first_page = tl.sum(before, axis=0)
    num_pages = tl.load(request_pages_ptr + stream)
    request_offsets_ptr = offsets_ptr + request * (num_streams + 1)
    tl.store(request_offsets_ptr + stream, first_page)
    if stream == num_streams - 1:
        tl.store(request_offsets_ptr + num_streams, first_page + num_pages)
    wanted = num_pages * PAGE_SIZE
    if wanted == 0:
        return
    row_ptr = (
        scores_ptr + request.to(tl.int64) * stride_request + stream.to(tl.int64) * stride_stream
    )
    threshold = tl.zeros([], tl.int64)
    num_above = 0
    for digit in tl.static_range(0, NUM_DIGITS):
        counts, above = _count_from(row_ptr, num_entries, threshold, digit, TILE, IN_FOURS)
        chosen = _chosen_digit(counts, wanted)
        threshold = threshold * 256 + chosen
        greater = tl.sum(tl.where(tl.arange(0, 256) == chosen + 1, counts, 0), axis=0)
        num_above = tl.where(chosen == 255, above, greater)
    # Equal entries: the first ones.
    num_equal = wanted - num_above
    out_ptr = indices_ptr + request.to(tl.int64) * indices_stride + first_page * PAGE_SIZE
    num_written = 0
    num_tied = 0
    for first in range(0, num_entries, TILE):
        entries = first + tl.arange(0, TILE)
        keys, mask = _load_keys(row_ptr, entries, num_entries, IN_FOURS)
        is_equal = (mask & (keys.to(tl.int64) == threshold)).to(tl.int32)
        tie_rank = num_tied + tl.cumsum(is_equal, axis=0) - is_equal
        is_above = (mask & (keys.to(tl.int64) > threshold)).to(tl.int32)
        is_kept = is_above + tl.where(tie_rank < num_equal, is_equal, 0)
        place = num_written + tl.cumsum(is_kept, axis=0) - is_kept
        tl.store(out_ptr + place, entries, mask=is_kept == 1)
        num_written += tl.sum(is_kept, axis=0)
        num_tied += tl.sum(is_equal, axis=0)


def select_entries(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    page_offsets: torch.Tensor,
    indices: torch.Tensor,
    *,
    page_size: int,
) -> None:
    """See `ops.select_entries`."""
    num_requests, num_streams, _ = scores.shape
    if num_requests == 0:
        return
    _select_kernel[(num_streams, num_requests)](
        indices,
        page_offsets,
        scores,
        num_entries,
        num_pages,
        scores.stride(0),
        scores.stride(1),
        indices.stride(0),
        PAGE_SIZE=page_size,
        TILE=_TILE,
        IN_FOURS=_is_in_fours(scores),
        TILE_S=triton.next_power_of_2(max(num_streams, _STREAMS)),
        num_warps=4,
    )
