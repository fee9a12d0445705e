#!/usr/bin/env bash
# Checks the sources: ruff, ruff's format and mypy, in the versions of the extra "dev".
# With --fix ruff mends and formats first. The tools lie in .cache, not in the environment that they
# look at, which may be somebody else's (KVC_VENV; see setup.sh).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$KVC_ROOT"

mapfile -t pins < <("$KVC_PYTHON" -c 'import pathlib, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
print(*project["optional-dependencies"]["dev"], sep="\n")')
tools="$KVC_ROOT/.cache/lint-$(printf '%s\n' "${pins[@]}" | sha256sum | cut -c1-16)"
if [[ ! -f "$tools/installed" ]]; then
  rm -rf "$KVC_ROOT"/.cache/lint-*
  kvc_step "installing ${pins[*]}" bash -c \
    '"$0" -m venv "$1" && "$1/bin/python" -m pip install "${@:2}" && touch "$1/installed"' \
    "$KVC_PYTHON" "$tools" "${pins[@]}"
fi

if [[ "${1:-}" == --fix ]]; then
  "$tools/bin/ruff" check --fix .
  "$tools/bin/ruff" format .
fi
status=0
"$tools/bin/ruff" check . || status=1
"$tools/bin/ruff" format --check . || status=1
"$tools/bin/mypy" --python-executable "$KVC_PYTHON" || status=1
exit "$status"
