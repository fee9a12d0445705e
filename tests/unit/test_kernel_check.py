"""What the compile check reads from the compiler's output, and what it refuses."""

from __future__ import annotations

import pytest
from gpu.kernel_check import block_bytes, faults
from gpu.occupancy import MULTIPROCESSORS
from gpu.pipelining import LoopLoad, loop_loads
from gpu.sass import loop_stack_accesses

# A loop over tiles inside a loop over work, as Triton 3.6 and 3.9 print one with two stages ahead.
PIPELINED = """
#shared = #ttg.swizzled_shared<{vec = 8, perPhase = 1, maxPhase = 8, order = [1, 0]}>
module attributes {"ttg.num-warps" = 4 : i32} {
  tt.func public @k(%pool_ptr: !tt.ptr<bf16> {tt.divisibility = 16 : i32}, %table_ptr: !tt.ptr<i32>) {
    %0 = tt.load %table_ptr : !tt.ptr<i32> loc(#loc1)
    %base = tt.splat %pool_ptr : !tt.ptr<bf16> -> tensor<64x128x!tt.ptr<bf16>, #blocked> loc(#loc1)
    %ids = tt.splat %table_ptr : !tt.ptr<i32> -> tensor<64x!tt.ptr<i32>, #slice> loc(#loc1)
    scf.for %work = %c0 to %0 step %c1  : i32 {
      %query = tt.load %q : tensor<16x128x!tt.ptr<bf16>, #blocked> loc(#loc1)
      %key = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable> loc(#loc1)
      %block = ttg.local_alloc : () -> !ttg.memdesc<1x64xi32, #shared1, #smem, mutable> loc(#loc1)
      %acc:2 = scf.for %i = %c0 to %0 step %c64 iter_args(%a = %cst, %ptrs_9 = %base) -> (i32) : i32 {
        %wait = ttg.async_wait %t {num = NUM : i32} loc(#loc2)
        %1 = scf.if %cond -> (i32) {
          scf.yield %c0 : i32
        } else {
          scf.yield %c1 : i32
        }
        %ptrs = tt.addptr %ptrs_9, %n : tensor<64x128x!tt.ptr<bf16>, #blocked>, tensor<64x128xi32>
        %key_5 = ttg.memdesc_index %key[%1] : !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable> -> x
        %key_6 = ttg.async_copy_global_to_local %ptrs, %key_5 mask %m {contiguity = 8 : i32} : tensor<64x128x!tt.ptr<bf16>, #blocked> -> <64x128xbf16, #shared, #smem, mutable> loc(#loc3)
        %key_7 = ttg.async_commit_group tokens %key_6 loc(#loc3)
        %block_2 = ttg.memdesc_index %block[%c0] : !ttg.memdesc<1x64xi32, #shared1, #smem, mutable> -> y
        %block_3 = ttg.async_copy_global_to_local %ids, %block_2 mask %m : tensor<64x!tt.ptr<i32>, #slice> -> <64xi32, #shared1, #smem, mutable> loc(#loc3)
        %block_4 = ttg.async_commit_group tokens %block_3 loc(#loc3)
        scf.yield %a, %ptrs_9 : i32
      } loc(#loc2)
      %last = ttg.async_wait {num = 0 : i32} loc(#loc2)
    } loc(#loc1)
    tt.return
  }
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("num_left", "keys_ahead", "blocks_ahead"), [(0, 0, 0), (1, 0, 1), (2, 1, 1), (3, 1, 2)]
)
def test_copies_left_under_way_are_counted_per_load(num_left, keys_ahead, blocks_ahead):
    key, block = loop_loads(PIPELINED.replace("NUM", str(num_left)))
    assert key == LoopLoad(1, "key", "pool_ptr", "64x128xbf16", 16384, 2, 3, keys_ahead, 16)
    assert block == LoopLoad(1, "block", "table_ptr", "64xi32", 256, 4, 1, blocks_ahead, 4)


def test_the_layout_says_what_is_copied_at_once():
    text = PIPELINED.replace("NUM", "2").replace(" {contiguity = 8 : i32} :", " :")
    layout = (
        "#blocked = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [8, 4], order = [1, 0]}>"
    )
    assert [load.copy_bytes for load in loop_loads(layout + text)] == [8, 4]
    assert [load.copy_bytes for load in loop_loads(text)] == [2, 4]


def test_the_strictest_wait_counts():
    text = PIPELINED.replace("NUM", "2").replace(
        "        %ptrs =", "        %w = ttg.async_wait %t {num = 0 : i32}\n        %ptrs ="
    )
    assert loop_loads(text)[0].num_ahead == 0


def test_a_load_into_registers_has_no_buffer():
    text = """
    %p = tt.splat %scores_ptr : !tt.ptr<f32> -> tensor<1024x!tt.ptr<f32>, #blocked>
    scf.for %i = %c0 to %n step %c1024  : i32 {
      %scores_3 = tt.load %p, %m, %o : tensor<1024x!tt.ptr<f32>, #blocked> loc(#loc1)
      %one = tt.load %scores_ptr : !tt.ptr<f32> loc(#loc1)
    }
    """
    assert loop_loads(text) == [LoopLoad(0, "scores", "scores_ptr", "1024xf32", 4096, 4, 0, 0, 0)]


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "blocks"),
    [
        (152, 39168, 4, 3),
        (168, 72192, 4, 3),
        (128, 54656, 4, 4),
        (32, 0, 1, 32),
        (24, 0, 4, 16),
        # 117,760 with what the system takes: one fits, not two.
        (32, 116736, 4, 1),
        (32, 115712, 4, 2),
        (255, 0, 8, 1),
    ],
)
def test_blocks_of_a_multiprocessor(registers, shared_bytes, num_warps, blocks):
    assert MULTIPROCESSORS[90].blocks(registers, shared_bytes, num_warps) == blocks


def load(**fields) -> LoopLoad:
    usual = {"loop": 0, "name": "key", "source": "pool_ptr", "tile": "64x128xbf16"}
    usual |= {
        "num_bytes": 16384,
        "item_bytes": 2,
        "num_buffers": 2,
        "num_ahead": 1,
        "copy_bytes": 16,
    }
    return LoopLoad(**usual | fields)


def faults_of(
    kernel="ragged_decode_kernel", launch="", num_warps=4, loads=None, blocks=3, **others
):
    usual = {"stack_bytes": 0, "loop_stack_accesses": 0, "narrow_loads": 0}
    loads = [load()] if loads is None else loads
    return list(faults(kernel, launch, num_warps, loads, blocks, **usual | others))


def test_a_kernel_that_overlaps_has_no_fault():
    assert faults_of() == []
    assert faults_of(stack_bytes=8) == []
    assert faults_of(launch="as many queries as it takes", blocks=1) == []
    assert faults_of("defensive_scores_kernel", num_warps=8, blocks=1) == []
    assert faults_of("defensive_scores_kernel", num_warps=4, blocks=1) != []
    scores = load(source="scores_ptr", num_bytes=4096, num_buffers=0, num_ahead=0, copy_bytes=0)
    assert faults_of("select_kernel", loads=[scores], blocks=6) == []
    assert faults_of("decode_work_kernel", loads=[scores]) == []
    assert faults_of("widen_kernel", loads=[load(num_bytes=256, source="sums_ptr")]) == []


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"loads": [load(num_buffers=1)]}, "number of buffers 1"),
        ({"loads": [load(num_buffers=0, num_ahead=0)]}, "number of buffers 0"),
        ({"loads": [load(), load(name="value", num_ahead=0)]}, "value: nothing under way"),
        ({"loads": [load(copy_bytes=8)]}, "8 bytes at once, wanted 16"),
        ({"loads": [load(copy_bytes=4, item_bytes=1)]}, "4 bytes at once, wanted 8"),
        ({"loads": [load(num_bytes=4096)]}, "24576 bytes under way"),
        ({"loads": [load(source="table_ptr")]}, "no loop loads from pool_ptr"),
        ({"loads": []}, "no loop loads from pool_ptr"),
        ({"blocks": 2}, "2 blocks per multiprocessor, wanted 3"),
        ({"stack_bytes": 24}, "24 bytes of stack, at most 16"),
        ({"stack_bytes": 8, "loop_stack_accesses": 1}, "1 accesses to the stack in a loop"),
        ({"narrow_loads": 1}, "1 loads of one or two bytes"),
        ({"kernel": "new_kernel"}, "neither STREAMS nor NO_STREAMS"),
        ({"kernel": "compact_kernel", "loads": []}, "3 blocks per multiprocessor, wanted 4"),
    ],
)
def test_every_fault_is_found(changed, found):
    messages = faults_of(**changed)
    assert any(found in message for message in messages), messages


def test_the_loop_with_least_under_way_counts():
    loads = [load(), load(name="value"), load(loop=1, num_bytes=4096)]
    assert block_bytes(loads) == 2 * 4096
    assert block_bytes(loads[:2]) == 2 * 2 * 16384
    assert block_bytes([load(num_ahead=0)]) == 16384


# A loop in a loop, and the endless one after the end.
SASS = """
        /*0040*/                   STL [R1], R5 ;                  /* 0x0000000501007387 */
                                                                   /* 0x000fe20000100800 */
        /*0050*/                   MOV R2, 0x40 ;                  /* 0x0000000501007387 */
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R6, R4 ;
        /*0070*/              @!P6 BRA 0x50 ;
        /*0080*/                   LDL.LU R39, [R1+0x4] ;
        /*0090*/               @P1 BRA 0x20 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
"""


def test_the_stack_is_looked_for_in_innermost_loops():
    assert loop_stack_accesses(SASS) == 0
    assert loop_stack_accesses(SASS.replace("MOV R2, 0x40", "LDL R2, [R1]")) == 1
    assert loop_stack_accesses(SASS.replace("@!P6 BRA 0x50", "@!P6 BRA 0x90")) == 2
