#!/usr/bin/env bash
# Runs the whole test suite; arguments go to pytest. The e2e tests find their model in KVC_MODEL.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$KVC_ROOT"
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
