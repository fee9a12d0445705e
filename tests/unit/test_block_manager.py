"""Random operation sequences and named cases on vLLM's KVCacheManager with our manager in it.

`Machine.check` (tests/support) holds the invariants and runs after every operation.
"""

import pytest
from block_manager_driver import Driver
from block_manager_machine import Machine
from block_manager_setup import Setup, prompt_of

BUDGET = Setup(budget=64)
SETUPS = {
    "budget-16": BUDGET,
    "budget-16-async": Setup(budget=64, depth=1),
    "budget-16-async-deep": Setup(budget=80, window=24, depth=2, num_spare_blocks=20),
    "budget-16-smallest-pool": Setup(budget=64, num_spare_blocks=0),
    "budget-16-smallest-pool-async": Setup(budget=64, num_spare_blocks=0, depth=1),
    "budget-16-one-page": Setup(budget=24, window=8, depth=1),
    "budget-16-no-cache": Setup(budget=64, caching=False),
    "budget-16-no-cache-async": Setup(budget=64, caching=False, depth=1, num_spare_blocks=2),
    "budget-32": Setup(block_size=32, budget=96, window=32, max_model_len=448),
    "budget-32-async-watermark": Setup(
        block_size=32, budget=128, window=20, max_model_len=448, depth=1, watermark=0.1
    ),
    "ratio-16": Setup(ratio=0.5, window=20, num_spare_blocks=3, depth=1),
    "ratio-16-most-kept": Setup(ratio=0.08, window=5),
    "ratio-32-few-kept": Setup(block_size=32, ratio=0.9, max_model_len=448, depth=1),
    "ungated": Setup(budget=64, full_sequence_must_fit=False, num_spare_blocks=4, depth=1),
    "dense-retention": Setup(budget=64, retention=None, num_spare_blocks=4),
    "suffix-of-blocks": Setup(budget=64, suffix=48),
    "suffix-async": Setup(budget=64, suffix=37, depth=1),
    "suffix-async-deep": Setup(budget=80, window=24, suffix=21, depth=2, num_spare_blocks=20),
    "suffix-of-a-token-smallest-pool": Setup(budget=64, suffix=1, num_spare_blocks=0, depth=1),
    "suffix-ratio-no-cache": Setup(ratio=0.5, suffix=50, caching=False, num_spare_blocks=3),
    "suffix-32-ungated": Setup(
        block_size=32,
        ratio=0.6,
        suffix=70,
        max_model_len=448,
        full_sequence_must_fit=False,
        depth=1,
    ),
    "all-queries": Setup(budget=64, method="h2o"),
    "all-queries-async": Setup(ratio=0.5, method="expected-attention", depth=1),
    "one-shot": Setup(budget=64, one_shot_tokens=200),
    "one-shot-async-tight": Setup(ratio=0.75, one_shot_tokens=250, depth=1, num_spare_blocks=2),
    "one-shot-always": Setup(budget=64, one_shot_tokens=180, one_shot="always", depth=2),
    "one-shot-no-caching": Setup(budget=80, one_shot_tokens=200, caching=False),
    "one-shot-no-admission-check": Setup(
        budget=64, one_shot_tokens=200, full_sequence_must_fit=False, num_spare_blocks=4
    ),
    "one-shot-suffix": Setup(budget=64, one_shot_tokens=200, one_shot="always", suffix=30, depth=1),
    "one-shot-never": Setup(budget=64, one_shot_tokens=200, one_shot="never"),
    "all-queries-one-shot": Setup(budget=64, one_shot_tokens=200, method="h2o", depth=1),
    "all-queries-suffix": Setup(budget=64, method="h2o", suffix=30, depth=1, num_spare_blocks=4),
}
# What every random run must have come across.
EVENTS = {
    "refused",
    "compacted",
    "finished",
    "aborted mid prefill",
    "aborted mid decode",
    "preempted mid prefill",
    "preempted mid decode",
    "chunk ends in the last partial block",
    "last chunk below the window",
    "prompt of whole blocks",
    "reset",
    "chunk too short to begin",
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SETUPS)
def test_random_operations_keep_every_block_accounted_for(name: str, seed: int) -> None:
    machine = Machine(SETUPS[name], seed)
    try:
        Driver(machine).run(num_ops=6000)
    except BaseException:
        print(f"setup {name}: {machine.setup}\nseed {seed}, operation {machine.num_ops}:")
        print("\n".join(machine.log))
        raise
    expected = set(EVENTS)
    if machine.setup.caching:
        expected |= {"hit", "shared block"}
    if machine.setup.depth:
        expected |= {"scheduled before the compaction settled"}
    # By a suffix, or by what a preempted request had generated.
    expected |= {"chunk cut at the compaction point"}
    if machine.setup.suffix:
        expected |= {"preempted mid suffix"}
        if machine.setup.suffix > 1:
            expected |= {"aborted mid suffix", "suffix in several chunks"}
        if machine.setup.depth:
            expected |= {"suffix before the compaction settled"}
    if machine.setup.one_shot_tokens and machine.setup.one_shot != "never":
        expected |= {f"one-shot request: {way}" for way in ("one shot", "later")}
        expected |= {"resumed in one shot"}
        if machine.setup.caching and machine.setup.one_shot == "auto":
            expected |= {"one-shot request: dense"}
    else:
        assert not machine.seen["one-shot request: one shot"]
    if machine.setup.needs_all_queries:
        expected |= {"hit that may not be used"}
    else:
        expected |= {"chunk of one token before the window"}
    assert not [what for what in sorted(expected) if not machine.seen[what]]


# The cases below use budget 64, window 16, blocks of 16. A prompt of 100 tokens has 6 full
# blocks and one of 4 tokens; 5 blocks are compressed into 2, the last 20 tokens stay dense.


def test_one_shot_prefill_returns_the_compressed_blocks() -> None:
    machine = Machine(BUDGET)
    total = machine.num_free
    sequence = machine.add(prompt_of(0, 100))
    machine.run_and_settle((sequence, 100))
    assert total - machine.num_free == 7 + 2
    assert machine.nulls(sequence) == []
    machine.run_and_settle((sequence, 1))
    assert machine.nulls(sequence) == [0, 1, 2, 3, 4]
    assert total - machine.num_free == 7 + 2 - 5
    assert machine.hit(prompt_of(0, 100)) == 80
    again = machine.add(prompt_of(0, 100))
    machine.run_and_settle((again, 20))
    assert total - machine.num_free == 4 + 5 + 4 - 1 + 1


def test_nothing_is_freed_before_the_compaction_has_settled() -> None:
    machine = Machine(Setup(budget=64, depth=2))
    sequence = machine.add(prompt_of(0, 100))
    machine.run((sequence, 100))
    machine.run((sequence, 1))
    machine.run((sequence, 1))
    assert machine.nulls(sequence) == []
    machine.settle()
    assert machine.nulls(sequence) == []
    machine.run((sequence, 1))
    assert machine.nulls(sequence) == [0, 1, 2, 3, 4]


def test_abort_mid_prefill_gives_everything_back() -> None:
    machine = Machine(BUDGET)
    total = machine.num_free
    sequence = machine.add(prompt_of(0, 100))
    machine.run_and_settle((sequence, 50))
    assert total - machine.num_free == 4
    machine.abort(sequence)
    machine.check_empty()
    assert machine.hit(prompt_of(0, 100)) == 48


def test_abort_while_the_compaction_is_in_flight() -> None:
    machine = Machine(Setup(budget=64, depth=1))
    sequence = machine.add(prompt_of(0, 100))
    machine.run((sequence, 100))
    machine.run((sequence, 1))
    machine.abort(sequence)
    machine.settle()
    machine.settle()
    machine.check_empty()


@pytest.mark.parametrize("depth", [0, 1])
def test_preemption_at_the_finishing_step(depth: int) -> None:
    machine = Machine(Setup(budget=64, depth=depth))
    total = machine.num_free
    sequence = machine.add(prompt_of(0, 100))
    machine.run((sequence, 100))
    if depth == 0:
        machine.settle()
    machine.preempt(sequence)
    assert machine.num_free == total
    while machine.in_flight:
        machine.settle()
    # Its output was delivered, and the prompt is computed once more from its first token.
    assert sequence.request.num_tokens == 101
    machine.run_and_settle((sequence, 101))
    assert total - machine.num_free == 7 + 2
    machine.run_and_settle((sequence, 1))
    assert total - machine.num_free == 7 + 2 - 5


@pytest.mark.parametrize("num_first", [120, 110, 100])
def test_resumed_chunk_ends_at_the_compaction_point(num_first: int) -> None:
    machine = Machine(BUDGET)
    total = machine.num_free
    sequence = machine.add(prompt_of(0, 100))
    machine.run_and_settle((sequence, 100))
    for _ in range(19):
        machine.run_and_settle((sequence, 1))
    machine.preempt(sequence)
    assert sequence.request.num_tokens == 120
    machine.run_and_settle((sequence, num_first))
    assert sequence.num_slots == 100
    assert machine.nulls(sequence) == []
    assert total - machine.num_free == 7 + 2
    # What it had generated before is computed over what was kept.
    machine.run_and_settle((sequence, 20))
    assert machine.nulls(sequence) == [0, 1, 2, 3, 4]
    assert total - machine.num_free == 8 + 2 - 5


def test_prompt_of_whole_blocks_gets_its_region_with_the_last_token() -> None:
    machine = Machine(BUDGET)
    sequence = machine.add(prompt_of(0, 96))
    machine.run_and_settle((sequence, 94))
    assert len(machine.blocks(sequence)) == 6
    machine.run_and_settle((sequence, 2))
    assert len(machine.blocks(sequence)) == 6 + 3
    machine.run_and_settle((sequence, 1))
    assert len(machine.blocks(sequence)) == 7 + 3
    assert machine.nulls(sequence) == [0, 1, 2, 3, 4]
    # All six prompt blocks are in the cache, and the window still has to be computed.
    assert machine.hit(prompt_of(0, 200)) == 96
    assert machine.hit(prompt_of(0, 96)) == 80


def test_chunk_ending_inside_the_last_partial_block_brings_the_region() -> None:
    machine = Machine(BUDGET)
    sequence = machine.add(prompt_of(0, 100))
    machine.run_and_settle((sequence, 96))
    assert len(machine.blocks(sequence)) == 6
    machine.run_and_settle((sequence, 2))
    assert len(machine.blocks(sequence)) == 7 + 2
    row = list(sequence.row)
    machine.run_and_settle((sequence, 2))
    assert machine.nulls(sequence) == []
    assert sequence.row == row
    machine.run_and_settle((sequence, 1))
    assert machine.nulls(sequence) == [0, 1, 2, 3, 4]


def test_prompt_within_the_budget_stays_stock_and_caches_its_output() -> None:
    machine = Machine(BUDGET)
    sequence = machine.add(prompt_of(0, 64), family=0)
    machine.run_and_settle((sequence, 64))
    sequence.family = 0
    for _ in range(40):
        machine.run_and_settle((sequence, 1))
    assert len(machine.blocks(sequence)) == 7
    assert machine.nulls(sequence) == []
    assert machine.hit(sequence.tokens[:97]) == 80
    assert machine.hit(sequence.tokens + prompt_of(1, 60)) == 96


def test_output_of_a_compressed_request_is_never_found_in_the_cache() -> None:
    machine = Machine(BUDGET)
    sequence = machine.add(prompt_of(0, 100))
    machine.run_and_settle((sequence, 100))
    for _ in range(30):
        machine.run_and_settle((sequence, 1))
    assert machine.hit(sequence.tokens + prompt_of(1, 60)) == 96


def test_resume_computes_its_window_though_another_prompt_holds_its_output() -> None:
    machine = Machine(Setup(budget=64, num_spare_blocks=30))
    first = machine.add(prompt_of(0, 100))
    machine.run_and_settle((first, 100))
    for _ in range(60):
        machine.run_and_settle((first, 1))
    longer = machine.add([*first.tokens, *prompt_of(1, 40)])
    machine.run_and_settle((longer, longer.prompt_len - 96))
    machine.preempt(first)
    assert machine.admit(first, lambda hit: first.request.num_tokens - hit)
    assert machine.step[0].start <= 100 - 16


def test_refused_request_leaves_nothing_behind_when_aborted() -> None:
    machine = Machine(Setup(budget=64, num_spare_blocks=0))
    large = machine.add(prompt_of(0, 240))
    machine.run_and_settle((large, 240))
    refused = machine.add(prompt_of(1, 100))
    assert not machine.admit(refused, lambda _: 100)
    machine.abort(refused)
    machine.abort(large)
    machine.check_empty()


@pytest.mark.parametrize("retention", [0, None])
def test_admission_of_a_new_request_counts_its_region(retention: int | None) -> None:
    machine = Machine(Setup(budget=64, retention=retention))
    large = machine.add(prompt_of(1, 250))
    machine.run_and_settle((large, 240))
    small = machine.add(prompt_of(2, 64))
    machine.run_and_settle((small, 64))
    assert machine.num_free == 8
    # 100 tokens take a row of 7 + 2 blocks.
    sequence = machine.add(prompt_of(0, 100))
    assert not machine.admit(sequence, lambda _: 16)
    machine.abort(small)
    assert machine.admit(sequence, lambda _: 16)


def test_admission_of_a_resumed_request_counts_its_whole_row() -> None:
    machine = Machine(BUDGET)
    # 96 tokens: a region of 3 blocks, so 112 tokens take a row of 7 + 3.
    sequence = machine.add(prompt_of(0, 96))
    machine.run_and_settle((sequence, 96))
    for _ in range(15):
        machine.run_and_settle((sequence, 1))
    machine.preempt(sequence)
    assert sequence.request.num_tokens == 112
    large, small = machine.add(prompt_of(1, 250)), machine.add(prompt_of(2, 48))
    machine.run_and_settle((large, 240), (small, 48))
    assert machine.num_free == 9
    assert not machine.admit(sequence, lambda _: 16)


# With a suffix of 30, a prompt of 130 is compacted at 100 like a prompt of 100 without.

SUFFIX = Setup(budget=64, suffix=30)


def test_suffix_is_allocated_after_the_region_and_the_prompt_freed_before_its_end() -> None:
    machine = Machine(SUFFIX)
    total = machine.num_free
    sequence = machine.add(prompt_of(0, 130))
    # The scheduler ends the chunk at the compaction point, whatever its budget allows.
    machine.run_and_settle((sequence, 130))
    assert sequence.num_slots == 100
    assert total - machine.num_free == 7 + 2
    machine.run_and_settle((sequence, 20))
    assert machine.nulls(sequence) == [0, 1, 2, 3, 4]
    assert total - machine.num_free == 8 + 2 - 5
    machine.run_and_settle((sequence, 10))
    machine.run_and_settle((sequence, 1))
    assert total - machine.num_free == 9 + 2 - 5
    # The blocks of the suffix are no one else's: 6 blocks are found, and 5 before the window.
    assert machine.hit(prompt_of(0, 250)) == 96
    assert machine.hit(prompt_of(0, 130)) == 80


def test_suffix_in_flight_keeps_the_prompt_until_the_compaction_has_settled() -> None:
    machine = Machine(Setup(budget=64, suffix=30, depth=2))
    sequence = machine.add(prompt_of(0, 130))
    machine.run((sequence, 100))
    machine.run((sequence, 15))
    machine.run((sequence, 15))
    assert machine.nulls(sequence) == []
    machine.settle()
    machine.run((sequence, 1))
    assert machine.nulls(sequence) == [0, 1, 2, 3, 4]


def test_request_preempted_in_its_suffix_computes_everything_again() -> None:
    machine = Machine(SUFFIX)
    total = machine.num_free
    sequence = machine.add(prompt_of(0, 130))
    machine.run_and_settle((sequence, 100))
    machine.run_and_settle((sequence, 20))
    machine.preempt(sequence)
    assert machine.num_free == total
    machine.run_and_settle((sequence, 130))
    assert sequence.num_slots == 100
    machine.run_and_settle((sequence, 30))
    machine.run_and_settle((sequence, 1))
    assert total - machine.num_free == 9 + 2 - 5


@pytest.mark.parametrize("length", [30, 46, 94])
def test_prompt_that_is_dense_for_its_suffix_is_computed_in_one_chunk(length: int) -> None:
    machine = Machine(SUFFIX)
    sequence = machine.add(prompt_of(0, length))
    machine.run_and_settle((sequence, length))
    assert sequence.num_slots == length
    machine.run_and_settle((sequence, 1))
    assert machine.nulls(sequence) == []
    assert machine.hit(prompt_of(0, length)) == (length - 1) // 16 * 16


def test_scorer_of_all_queries_finds_no_prefix_of_a_prompt_it_compresses() -> None:
    machine = Machine(Setup(budget=64, method="h2o", num_spare_blocks=30))
    first = machine.add(prompt_of(0, 200))
    machine.run_and_settle((first, 200))
    assert machine.hit(prompt_of(0, 200)) == machine.hit(prompt_of(0, 65)) == 0
    # A prompt that stays dense is scored by nobody.
    assert machine.hit(prompt_of(0, 64)) == 48


def test_other_setting_between_requests() -> None:
    machine = Machine(Setup(budget=64, num_spare_blocks=30))
    sequence = machine.add(prompt_of(0, 100))
    machine.run_and_settle((sequence, 100))
    with pytest.raises(RuntimeError, match="1 requests still run under the old setting"):
        machine.manager.reconfigure(Setup(budget=64, suffix=30).config())
    assert machine.hit(prompt_of(0, 100)) == 80
    machine.abort(sequence)
    for setup, hit in (
        (Setup(budget=64, window=1), 96),
        (Setup(budget=64, suffix=30), 48),
        (Setup(budget=64, method="h2o"), 0),
        (Setup(budget=100), 96),
    ):
        machine.manager.reconfigure(setup.config())
        assert machine.manager.geometry == setup.spec().geometry
        assert machine.hit(prompt_of(0, 100)) == hit
