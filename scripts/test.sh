#!/usr/bin/env bash
# Runs the whole test suite; arguments go to pytest. The e2e tests find their model in KVC_MODEL.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$KVC_ROOT"
# -P keeps the repository root off sys.path: vLLM probes for a top-level triton_kernels package.
exec "$KVC_PYTHON" -P -m pytest "$@"
