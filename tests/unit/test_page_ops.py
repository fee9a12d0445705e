"""Ops on pages against loops written here, and every argument they must refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress import ops

ZEROS = torch.zeros


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def random_order(block_size, head_size, generator):
    offsets = torch.randperm(2 * block_size * head_size, generator=generator)
    return ops.PageOrder(*offsets.view(2, block_size, head_size))


def plain_order(block_size, head_size, generator=None):
    """Keys, then values, as a tensor [2, token, element] has them."""
    offsets = torch.arange(2 * block_size * head_size)
    return ops.PageOrder(*offsets.view(2, block_size, head_size))


def transposed_key_order(block_size, head_size, generator=None):
    """As vLLM's CPU kernel: keys [element, token], then values [token, element]."""
    offsets = torch.arange(2 * block_size * head_size).view(2, -1)
    keys = offsets[0].view(head_size, block_size).t().contiguous()
    return ops.PageOrder(keys, offsets[1].view(block_size, head_size))


def interleaved_order(block_size, head_size, generator=None):
    """A token's key, its value, the next token's key."""
    offsets = torch.arange(2 * block_size * head_size).view(block_size, 2, head_size)
    return ops.PageOrder(offsets[:, 0], offsets[:, 1])


ORDERS = (random_order, plain_order, transposed_key_order, interleaved_order)


def test_regular_orders_are_recognised(generator):
    assert random_order(4, 6, generator).key_strides is None
    assert plain_order(4, 6).value_strides == (24, 6, 1)
    assert transposed_key_order(4, 6).key_strides == (0, 1, 4)
    assert interleaved_order(4, 6).value_strides == (6, 12, 1)
    # The same first steps, but not regular.
    offsets = plain_order(4, 6).key_offsets.clone()
    offsets[3, 4:] = offsets[3, 4:].flip(0)
    assert ops.PageOrder(offsets, plain_order(4, 6).value_offsets).key_strides is None
    # Backwards is for the general way.
    assert ops.PageOrder(*(o.flip(0) for o in vars(plain_order(4, 6)).values())).key_strides is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make_order", ORDERS)
def test_pack_and_unpack_under_any_element_order(make_order, dtype, generator):
    block_size, head_size = 4, 6
    order = make_order(block_size, head_size, generator)
    assert (order.block_size, order.head_size) == (block_size, head_size)
    pool = torch.full((11, 2 * block_size * head_size), float("nan"), dtype=dtype)
    page_ids = torch.tensor([7, 0, 10])
    key = torch.randn(3 * block_size, head_size, generator=generator).to(dtype)
    value = torch.randn(3 * block_size, head_size, generator=generator).to(dtype)
    ops.pack_pages(pool, page_ids, key, value, order)
    for token in range(3 * block_size):
        page, place = page_ids[token // block_size], token % block_size
        for element in range(head_size):
            assert pool[page, order.key_offsets[place, element]] == key[token, element]
            assert pool[page, order.value_offsets[place, element]] == value[token, element]
    others = [page for page in range(11) if page not in page_ids.tolist()]
    assert pool[others].isnan().all()
    assert torch.equal(ops.unpack_pages(pool, page_ids, order, "key"), key)
    assert torch.equal(ops.unpack_pages(pool, page_ids, order, "value"), value)
    places = torch.tensor([3, 0, 1])
    rows = torch.tensor([3, 4, 9])
    gathered = ops.gather_tokens(pool, page_ids, places, order)
    assert torch.equal(gathered[0], key[rows]) and torch.equal(gathered[1], value[rows])


@pytest.mark.parametrize("make_order", ORDERS)
def test_unpack_several_streams(make_order, generator):
    order = make_order(4, 6, generator)
    pool = torch.randn(11, 48, generator=generator)
    page_ids = torch.tensor([[3, 9], [9, 1], [0, 0]])
    keys = ops.unpack_pages(pool, page_ids, order, "key")
    assert keys.shape == (3, 8, 6)
    for stream in range(3):
        for token in range(8):
            page = pool[page_ids[stream, token // 4]]
            assert torch.equal(keys[stream, token], page[order.key_offsets[token % 4]])


def test_pack_takes_views(generator):
    order = random_order(4, 6, generator)
    pool = torch.zeros(3, 48)
    both = torch.randn(4, 2, 6, generator=generator)
    ops.pack_pages(pool, torch.tensor([2]), both[:, 0], both[:, 1], order)
    assert torch.equal(pool[2, order.key_offsets], both[:, 0])
    assert torch.equal(pool[2, order.value_offsets], both[:, 1])


def test_copy_pages_moves_bits_and_nothing_else(generator):
    pool = torch.randn(9, 5, generator=generator)
    pool[6] = float("nan")
    before = pool.clone()
    ops.copy_pages(pool, torch.tensor([4, 6, 4]), torch.tensor([8, 0, 3]))
    expected = before[[6, 1, 2, 4, 4, 5, 6, 7, 4]]
    assert torch.equal(pool.view(torch.int32), expected.view(torch.int32))
    ops.copy_pages(pool, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(pool.view(torch.int32), expected.view(torch.int32))


def test_pages_past_2_to_the_31_elements():
    # Untouched memory of the 2 GiB pool is never backed by the system.
    page_elements = 2**12
    last = 2**31 // page_elements + 1
    pool = torch.empty((last + 1, page_elements), dtype=torch.int8)
    numbers = torch.arange(page_elements).remainder(127).to(torch.int8)
    pool[1] = numbers
    pool[0] = 0
    ops.copy_pages(pool, torch.tensor([1]), torch.tensor([last]))
    order = plain_order(8, page_elements // 16)
    first_half = ops.unpack_pages(pool, torch.tensor([last]), order, "key")
    assert torch.equal(first_half.flatten(), numbers[: page_elements // 2])
    assert not pool[0].any()


def test_region_page_ids():
    ids = ops.region_page_ids(torch.tensor([7, 2], dtype=torch.int32), 3)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [21, 22, 23, 6, 7, 8]
    assert ops.region_page_ids(torch.zeros(0, dtype=torch.int32), 3).numel() == 0
    # A 32-bit product would overflow.
    assert ops.region_page_ids(torch.tensor([2**30], dtype=torch.int32), 4).min() == 2**32


def test_ragged_page_table_example():
    table = ops.ragged_page_table(
        torch.tensor([14, 15, 16, 17]), torch.tensor([0, 1, 3]), torch.tensor([3]), 3
    )
    assert table.dtype == torch.int32
    assert table.tolist() == [[14, 6, 0], [15, 16, 7]]


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.lists(st.integers(0, 50), max_size=4, unique=True),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_ragged_page_table_against_loops(counts, tail_blocks, spare, random):
    num_streams = len(counts)
    ids = random.sample(range(1000, 2000), sum(counts))
    offsets = torch.tensor([sum(counts[:s]) for s in range(num_streams + 1)])
    width = max(counts) + len(tail_blocks) + spare
    expected = []
    for stream, count in enumerate(counts):
        start = sum(counts[:stream])
        row = ids[start : start + count]
        row += [block * num_streams + stream for block in tail_blocks]
        expected.append(row + [0] * (width - len(row)))
    actual = ops.ragged_page_table(
        torch.tensor(ids, dtype=torch.int64),
        offsets,
        torch.tensor(tail_blocks, dtype=torch.int32),
        width,
    )
    assert actual.tolist() == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.copy_pages(ZEROS(4, 2), torch.tensor([0, 1]), torch.tensor([2])),
            r"\(2,\) and \(1,\)",
        ),
        (
            lambda: ops.copy_pages(ZEROS(4, 2), torch.tensor([[0]]), torch.tensor([[2]])),
            r"\(1, 1\) and \(1, 1\)",
        ),
        (
            lambda: ops.ragged_page_table(
                torch.arange(3), torch.tensor([0, 1, 3]), torch.tensor([5]), 2
            ),
            "3 pages .*2",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("num_tokens", [3, 5], ids=["too_few", "too_many"])
@pytest.mark.parametrize("wrong", ["key", "value"])
def test_pack_refuses_tokens_that_do_not_fill_the_pages(num_tokens, wrong, generator):
    order = random_order(4, 6, generator)
    tokens = {"key": ZEROS(4, 6), "value": ZEROS(4, 6), wrong: ZEROS(num_tokens, 6)}
    with pytest.raises(ValueError, match=rf"\(4, 6\).*\({num_tokens}, 6\)"):
        ops.pack_pages(ZEROS(2, 48), torch.tensor([1]), **tokens, order=order)


@pytest.mark.parametrize(
    ("key_offsets", "value_offsets"),
    [
        pytest.param([[0, 1]], [[1, 2]], id="twice"),
        pytest.param([[0, 1]], [[2, 4]], id="hole"),
        pytest.param([[0, -1]], [[1, 2]], id="negative"),
    ],
)
def test_page_order_must_be_a_permutation(key_offsets, value_offsets):
    with pytest.raises(ValueError, match="not a permutation"):
        ops.PageOrder(torch.tensor(key_offsets), torch.tensor(value_offsets))
