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
# Tests without an engine share the cores by file; an engine takes them all.
OMP_NUM_THREADS=1 "${pytest[@]}" tests/unit tests/kernels tests/integration -n auto --dist loadfile ||
  status=$?
"${pytest[@]}" tests/e2e || status=$?
exit "$status"
