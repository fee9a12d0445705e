# shellcheck shell=bash
# What fifteen.sh asks of the benchmarks, and prepare.sh compiles beforehand; sourced by both.

# A real step's decoding, the compaction of a long prompt, Triton beside C++.
TIMINGS=(--shapes Llama-3.1-8B --batches 1 32 256 --kept 1024 4096 --prompts 32768 --pool-gib 40)
# Two points at which tiles, warps and stages are varied.
TUNING=(--shape Llama-3.1-8B --batches 1 32 --kept 1024)
# Scripts that record their launches, for fill_triton_cache.py.
# shellcheck disable=SC2034
FILL_CACHE=(
  "scripts/gpu/warm_up_launches.py"
  "scripts/gpu/check_real_size.py --count"
  "scripts/gpu/tune_decode.py --count"
  "benchmarks/timing/gpu_kernels.py --count ${TIMINGS[*]} --peers"
)
