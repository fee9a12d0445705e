#!/usr/bin/env bash
# Long prompts through one small pool: full cache against compressed. Arguments go to demo.py.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$KVC_PYTHON" "$KVC_ROOT/scripts/demo.py" "$@"
