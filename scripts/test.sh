#!/usr/bin/env bash
# Runs the whole test suite; arguments go to pytest. The e2e tests find their model in KVC_MODEL.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$KVC_ROOT"

# A second Triton, which pipelines loops in another way: kernels must compile well with both.
other_triton=3.6.0
other_folder="$KVC_ROOT/.cache/triton-$other_triton"
if [[ ! -d "$other_folder" ]]; then
  rm -rf "$other_folder.part"
  if "$KVC_PYTHON" -m pip install -q --no-deps --target "$other_folder.part" \
    "triton==$other_triton"; then
    mv "$other_folder.part" "$other_folder"
  else
    echo "[test] no Triton $other_triton to be had: its tests are skipped" >&2
  fi
fi

# -P keeps the repository root off sys.path: vLLM probes for a top-level triton_kernels package.
pytest=("$KVC_PYTHON" -P -m pytest)
if [[ $# -gt 0 ]]; then
  exec "${pytest[@]}" "$@"
fi
status=0
# Tests share the cores by file; two engines at a time, each with half of them.
OMP_NUM_THREADS=1 "${pytest[@]}" tests/unit tests/kernels tests/integration -n auto --dist loadfile ||
  status=$?
OMP_NUM_THREADS=$((($(nproc) + 1) / 2)) VLLM_CPU_OMP_THREADS_BIND=nobind \
  "${pytest[@]}" tests/e2e -n 2 --dist loadfile || status=$?
exit "$status"
