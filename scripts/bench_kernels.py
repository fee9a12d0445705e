"""Time the Triton kernels on a GPU against the memory floor, torch and other libraries.

    python scripts/bench_kernels.py --out kernels.json                 (on a GPU)
    python scripts/bench_kernels.py --count --out counts.json          (anywhere)

Every row has p20, p50 and p80 in microseconds, the bytes that the work must move, the GB/s
reached, the bandwidth of a plain copy measured in the same run, and the ratio of the two. Peers
run on the same number of kept tokens where they are installed: torch's SDPA and FlexAttention, and
FlashAttention through vLLM, FlashInfer and xformers on pages. `--count` runs nothing: it lists
launches and bytes. Caches are flushed before each repetition. `--native` times csrc/cuda beside the
Triton kernels, built for this GPU if it is not installed.

What is timed is the replay of a captured graph, so that calls of many launches do not measure
Python; `timed` says 'eager' where a call could not be captured. The JSON is written anew after
every case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

# Counting launches needs no GPU, and so kernels that load without one.
if "--count" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import machine
import torch
import triton
from gpu import native
from gpu.peers import PEERS, decode_peers
from gpu.recording import record
from gpu.shapes import ModelShape, read_shapes

from vllm_kvcompress import ops

# Rows of the compiled ops.
NATIVE = "vllm-kvcompress C++"
TAIL_TOKENS = 100
WINDOW = 16


@dataclass
class Case:
    """One thing to time.

    Attributes:
        name: of the op.
        label: what it is asked for.
        run: one call.
        num_bytes: that any implementation must move.
        peers: other ways to do the same, by name.
        extra: more fields of the row.
    """

    name: str
    label: str
    run: Callable[[], Any]
    num_bytes: int
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def ragged_pages(mean_pages: int, num_streams: int, seed: int) -> torch.Tensor:
    """[num_streams] int64 pages of every stream, uneven as joint budgets are; mean as asked."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(num_streams, generator=generator).exp()
    total = mean_pages * num_streams
    pages = (weights / weights.sum() * (total - num_streams)).long() + 1
    pages[: total - int(pages.sum())] += 1
    return pages


def prepare(run: Callable[[], Any], device: torch.device) -> Any:
    """What a call returns; on the meta device without running its kernels."""
    if device.type != "meta":
        return run()
    returned: list[Any] = []
    record(lambda: returned.append(run()))
    return returned[0]


def decode_case(
    shape: ModelShape,
    batch: int,
    kept: int,
    device: torch.device,
    num_layers: int,
    peers: Sequence[str],
) -> Case:
    """A batch of compressed requests, `kept` tokens per KV head in the region and a tail."""
    b, d = shape.block_size, shape.head_size
    num_streams = num_layers * shape.num_kv_heads
    region = kept // b
    tail_blocks = triton.cdiv(TAIL_TOKENS, b)
    width = region + tail_blocks
    num_blocks = batch * width
    pool = torch.empty(num_blocks * num_streams, b, 2 * d, dtype=torch.bfloat16, device=device)
    pool = pool.normal_().to(shape.pool_dtype)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
    table = order.view(batch, width).to(torch.int32).to(device)
    offsets = torch.zeros(batch, num_streams + 1, dtype=torch.int32)
    for r in range(batch):
        offsets[r, 1:] = ragged_pages(region, num_streams, r).cumsum(0)
    # Boundary 0: the row is the region, then the tail.
    rows = torch.tensor([[TAIL_TOKENS, region, 0, 0]] * batch, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    query = torch.randn(batch, shape.num_heads, d, device=device).to(shape.dtype)
    out = torch.empty_like(query)
    layer = num_layers - 1
    first = layer * shape.num_kv_heads
    pages = offsets[:, first + shape.num_kv_heads] - offsets[:, first]
    num_tokens = int(pages.sum()) * b + batch * shape.num_kv_heads * TAIL_TOKENS
    num_bytes = num_tokens * shape.token_bytes + 2 * query.numel() * query.element_size()
    offsets = offsets.to(device)

    def run() -> torch.Tensor:
        return ops.ragged_decode(
            query,
            pool,
            rows,
            offsets,
            table,
            starts,
            layer=layer,
            num_kv_heads=shape.num_kv_heads,
            scale=d**-0.5,
            out=out,
        )

    mean_tokens = num_tokens // (batch * shape.num_kv_heads)
    return Case(
        "ragged_decode",
        f"batch {batch}, {kept} kept",
        run,
        num_bytes,
        decode_peers(peers, shape, batch, mean_tokens, device) if device.type == "cuda" else {},
        {"batch": batch, "kept_tokens": kept, "layers_in_pool": num_layers},
    )


def prompt_cases(
    shape: ModelShape,
    prompt_len: int,
    kept_fraction: float,
    device: torch.device,
    num_layers: int,
    with_native: bool,
) -> Iterator[Case]:
    """Scores, selection and compaction of one prompt; `with_native` adds the compiled ops."""
    b, d, num_heads = shape.block_size, shape.head_size, shape.num_kv_heads
    num_streams = num_layers * num_heads
    prompt_blocks = prompt_len // b
    region = max(1, int(prompt_blocks * kept_fraction))
    num_blocks = prompt_blocks + region
    pool = torch.empty(num_blocks * num_streams, b, 2 * d, dtype=torch.bfloat16, device=device)
    pool = pool.normal_().to(shape.pool_dtype)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
    table = order[None].to(torch.int32).to(device)
    rows = torch.tensor([[prompt_len, region, prompt_blocks, 0]], dtype=torch.int32, device=device)
    query = torch.randn(1, num_layers, WINDOW, shape.num_heads, d, device=device).to(shape.dtype)
    lse = torch.full(query.shape[:-1], 10.0, device=device)
    num_rated = prompt_len - WINDOW
    candidates = num_rated // b * b
    rated = torch.tensor([num_rated], dtype=torch.int32, device=device)
    num_candidates = torch.tensor([candidates], dtype=torch.int32, device=device)
    root = torch.randn(num_layers, num_heads, d, d, device=device).to(shape.dtype)
    part_sums = torch.zeros(1, num_streams, ops.num_score_parts(num_rated, 5), device=device)
    scales = torch.ones(num_streams, device=device)
    scale = torch.full((num_layers,), d**-0.5, device=device)
    prompt = (rows, table, rated, num_rated)
    key_bytes = num_streams * prompt_len * shape.token_bytes // 2
    label = f"prompt {prompt_len}"
    extra = {"prompt_len": prompt_len, "layers_in_pool": num_layers}

    def score(with_lse: bool) -> torch.Tensor:
        return ops.window_scores(
            query,
            pool,
            *prompt,
            layer=0,
            num_layers=num_layers,
            num_kv_heads=num_heads,
            scale=scale,
            key_scale=scales,
            reduce="defensive",
            near_tokens=8,
            lse=lse if with_lse else None,
            part_sums=part_sums,
        )

    def effect() -> torch.Tensor:
        return ops.paged_value_effect(
            pool, root, *prompt, layer=0, num_layers=num_layers, value_scale=scales
        )

    def join(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return ops.join_scores(
            scores,
            rated,
            num_candidates,
            candidates,
            group_reduce="max",
            floor_at_mean=True,
            effect=values,
            span_kernel=11,
            page_reduce="mean",
            page_size=b,
            num_kv_heads=num_heads,
            part_sums=part_sums,
        )

    for with_lse in (True, False):
        yield Case(
            "window_scores",
            f"{label}, lse {'given' if with_lse else 'computed'}",
            lambda with_lse=with_lse: score(with_lse),
            key_bytes * (1 if with_lse else 2),
            extra=extra,
        )
    yield Case("paged_value_effect", label, effect, key_bytes, extra=extra)
    scores = prepare(lambda: score(True), device)
    values = prepare(effect, device)
    score_bytes = 4 * (scores.numel() + values.numel())
    yield Case("join_scores", label, lambda: join(scores, values), score_bytes, extra=extra)

    num_entries = candidates // b
    page_scores = torch.rand(1, num_streams, num_entries, device=device)
    entries = torch.tensor([num_entries], dtype=torch.int32, device=device)
    total = torch.tensor([[region * num_streams]], dtype=torch.int32, device=device)
    sure = torch.ones_like(total)

    def select() -> tuple[torch.Tensor, torch.Tensor]:
        counts = ops.joint_page_counts(page_scores, entries, total, sure)
        return ops.select_entries(page_scores, entries, counts, region * num_streams)

    def native_select() -> tuple[torch.Tensor, torch.Tensor]:
        counts = native.joint_page_counts(page_scores, entries, total, sure)
        return native.select_entries(page_scores, entries, counts, region * num_streams)

    select_bytes = 2 * page_scores.numel() * 4
    peers: dict[str, Callable[[], Any]] = {
        "torch.topk": lambda: page_scores.flatten().topk(region * num_streams)
    }
    if with_native:
        peers[NATIVE] = native_select
    what = f"{label}, {region} of {num_entries} pages"
    yield Case("select", what, select, select_bytes, peers, extra)
    selection = prepare(select, device)

    def compact() -> None:
        ops.compact(pool, rows, table, *selection, max_region_blocks=region)

    kept_bytes = region * num_streams * b * shape.token_bytes
    generator = torch.Generator().manual_seed(1)
    source = torch.randperm(pool.shape[0], generator=generator)[: region * num_streams].to(device)
    target = torch.empty(region * num_streams, *pool.shape[1:], dtype=pool.dtype, device=device)
    gathered, out = pool.view(torch.uint8), target.view(torch.uint8)
    peers = {"index_select": lambda: torch.index_select(gathered, 0, source, out=out)}
    if with_native:
        peers[NATIVE] = lambda: native.compact(
            pool, rows, table, *selection, max_region_blocks=region
        )
    yield Case("compact", f"{label}, all layers", compact, 2 * kept_bytes, peers, extra)
    flat, moved = pool.flatten(1), target.flatten(1)
    order = torch.arange(len(source), device=device)
    yield Case(
        "move_entries",
        f"{label}, {len(source)} pages",
        lambda: ops.move_entries(flat, source, moved, order),
        2 * kept_bytes,
        {"index_select": peers["index_select"]},
        extra,
    )

    def native_both() -> None:
        counts = native.joint_page_counts(page_scores, entries, total, sure)
        native.select_and_compact(
            page_scores,
            entries,
            counts,
            region * num_streams,
            pool,
            rows,
            table,
            max_region_blocks=region,
        )

    def select_then_compact() -> None:
        ops.compact(pool, rows, table, *select(), max_region_blocks=region)

    if with_native:
        num_bytes = select_bytes + 2 * kept_bytes
        peers = {NATIVE: native_both}
        yield Case("select and compact", what, select_then_compact, num_bytes, peers, extra)

    def everything() -> None:
        join(score(True), effect())
        select()
        compact()

    all_bytes = 2 * key_bytes + score_bytes + 2 * kept_bytes
    yield Case("compress a prompt", label, everything, all_bytes, extra=extra)


def store_case(shape: ModelShape, batch: int, device: torch.device) -> Case:
    """New tokens of one step into one layer's pages."""
    num_tokens, d = batch, shape.head_size
    pool = torch.zeros(
        batch * shape.num_streams, shape.block_size, 2 * d, dtype=shape.pool_dtype, device=device
    )
    key = torch.randn(num_tokens, shape.num_kv_heads, d, device=device).to(shape.dtype)
    slots = torch.arange(num_tokens, dtype=torch.int64, device=device) * shape.block_size
    options = {"layer": 0, "num_layers": shape.num_layers}
    num_bytes = 2 * key.numel() * (key.element_size() + pool.element_size())
    return Case(
        "store_tokens",
        f"batch {batch}",
        lambda: ops.store_tokens(key, key, pool, slots, **options),
        num_bytes,
        extra={"batch": batch},
    )


def cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Case]]:
    """(shape's name, case) of everything asked for, one pool at a time."""
    shapes = read_shapes()
    for name in arguments.shapes:
        shape = shapes[name]
        num_layers = min(shape.num_layers, arguments.layers or shape.num_layers)
        for batch in arguments.batches:
            for kept in arguments.kept:
                num_bytes = batch * (kept + TAIL_TOKENS) * num_layers
                num_bytes *= shape.num_kv_heads * shape.token_bytes
                if num_bytes > arguments.pool_gib * 2**30:
                    print(f"{name}: batch {batch} x {kept} tokens is more than the pool, left out")
                    continue
                case = decode_case(shape, batch, kept, device, num_layers, arguments.peers)
                yield name, case
            yield name, store_case(shape, batch, device)
        for prompt_len in arguments.prompts:
            num_bytes = 2 * prompt_len * num_layers * shape.num_kv_heads * shape.token_bytes
            if num_bytes > arguments.pool_gib * 2**30:
                print(f"{name}: a prompt of {prompt_len} tokens is more than the pool, left out")
                continue
            for case in prompt_cases(
                shape,
                prompt_len,
                arguments.kept_fraction,
                device,
                num_layers,
                arguments.native,
            ):
                yield name, case


def captured(run: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    """(what to time, how): the replay of a graph of one call, or the call itself.

    What the call returns stays in the graph's own memory until the replay is dropped.
    """
    # Compiles, and takes memory that is not to be taken in the capture.
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception as error:
        print(f"not captured: {type(error).__name__}: {error}")
        torch.cuda.synchronize()
        return run, "eager"
    return graph.replay, "graph"


def time_us(run: Callable[[], Any]) -> dict[str, Any]:
    """p20, p50 and p80 of a call, in microseconds, L2 flushed before each."""
    timed, how = captured(run)
    quantiles = triton.testing.do_bench(timed, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])
    times = zip(("p20_us", "p50_us", "p80_us"), (1000 * q for q in quantiles), strict=True)
    return {**dict(times), "timed": how}


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a plain copy of 1 GiB, read and written bytes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / time_us(lambda: target.copy_(source))["p50_us"] / 1000


def matmul_rate(device: torch.device) -> float:
    """bf16 TFLOP/s of a square product of 8192."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * 8192**3 / time_us(lambda: a @ a)["p50_us"] / 1e6


def prefill_us(shape: ModelShape, prompt_len: int, tflops: float) -> float:
    """Prefill of a prompt at a matrix rate: 2 x parameters x tokens, and causal attention."""
    linear = 2 * shape.num_parameters * prompt_len
    attention = 2 * shape.num_layers * shape.num_heads * shape.head_size * prompt_len**2
    return (linear + attention) / tflops / 1e6


def environment() -> dict[str, Any]:
    """Device, driver, versions, commit and command of this run."""
    return {
        "command": machine.command(),
        "commit": machine.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        **(machine.device() if torch.cuda.is_available() else {}),
    }


def counted_row(name: str, case: Case) -> dict[str, Any]:
    """Bytes and launches of a case that does not run."""
    names = [launch.name for launch in record(case.run)]
    counts = {kernel: names.count(kernel) for kernel in dict.fromkeys(names)}
    launches = ", ".join(f"{n} {kernel}" for kernel, n in counts.items())
    print(f"{name:20} {case.name:18} {case.label:34} {case.num_bytes / 1e6:10.2f} MB  {launches}")
    return {"launches": counts, "num_launches": len(names)}


def timed_rows(
    name: str, case: Case, shape: ModelShape, copy_gbs: float, tflops: float
) -> Iterator[dict[str, Any]]:
    """The case's row, and one per peer."""
    for who, run in {"vllm-kvcompress": case.run, **case.peers}.items():
        times = time_us(run)
        gbs = case.num_bytes / times["p50_us"] / 1000
        row = {"by": who, **times, "gb_per_s": gbs, "of_copy": gbs / copy_gbs}
        if case.name == "compress a prompt":
            prefill = prefill_us(shape, case.extra["prompt_len"], tflops)
            row["of_prefill"] = times["p50_us"] / prefill
        share = f", {row['of_prefill']:.2%} of prefill" if "of_prefill" in row else ""
        print(
            f"{name:20} {case.name:18} {case.label:34} {who:22} {times['p50_us']:10.1f} us "
            f"{gbs:7.0f} GB/s = {row['of_copy']:.0%} of copy{share}",
            flush=True,
        )
        yield row


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = read_shapes()
    models = ["Llama-3.1-8B", "Qwen3-8B", "Llama-3.1-70B TP8"]
    parser.add_argument("--shapes", nargs="+", choices=list(shapes), default=models)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--kept", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--prompts", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--kept-fraction", type=float, default=0.125, help="of a prompt")
    parser.add_argument("--layers", type=int, help="layers in the pool (default: the model's)")
    parser.add_argument("--pool-gib", type=float, default=40.0, help="largest pool to try")
    parser.add_argument("--count", action="store_true", help="bytes and launches only")
    parser.add_argument("--native", action="store_true", help="csrc/cuda too")
    parser.add_argument(
        "--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="of decode attention"
    )
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    arguments = parser.parse_args()
    if arguments.count and arguments.native:
        parser.error("--native has nothing to count: its launches are not Triton's")
    if arguments.count:
        # Nothing runs, so nothing is allocated either.
        device, copy_gbs, tflops = torch.device("meta"), 0.0, 0.0
    elif not torch.cuda.is_available():
        parser.error("needs a CUDA device (or --count)")
    else:
        device = torch.device("cuda")
        if arguments.native:
            with TemporaryDirectory() as folder:
                native.load_here(Path(folder))
        copy_gbs, tflops = copy_bandwidth(device), matmul_rate(device)
        print(f"copy {copy_gbs:.0f} GB/s, matmul {tflops:.0f} TFLOP/s")
    run = environment()
    if not arguments.count:
        run |= {"copy_gb_per_s": copy_gbs, "matmul_tflops": tflops}
    rows = []
    for name, case in cases(arguments, device):
        common = {"shape": name, "op": case.name, "case": case.label, **case.extra}
        common["num_bytes"] = case.num_bytes
        if arguments.count:
            rows.append({**common, **counted_row(name, case)})
        else:
            rows += [
                {**common, **row} for row in timed_rows(name, case, shapes[name], copy_gbs, tflops)
            ]
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"run": run, "rows": rows}, indent=1)
            arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
