#!/usr/bin/env bash
# Regenerates tests/data/kvpress with kvpress 0.5.5, whose transformers is too old for vLLM's.
#
# Creates .venv-kvpress when it is missing; arguments go to kvpress_reference.py. Then writes
# the answers for the end-to-end test, which needs the model of scripts/setup.sh. Environment:
#   PYTHON             interpreter for the new environment (default: python3)
#   KVC_KVPRESS_VENV   existing environment with kvpress, instead of .venv-kvpress
#   KVC_MODEL          folder of SmolLM2-135M-Instruct (default: .cache/models/smollm2)
#   KVC_TORCH_INDEX    PyTorch's index of CPU builds, asked when pip's own index has none
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
wanted="0.5.5"
venv="${KVC_KVPRESS_VENV:-$root/.venv-kvpress}"
python="$venv/bin/python"

if [[ ! -x "$python" ]]; then
  if [[ -n "${KVC_KVPRESS_VENV:-}" ]]; then
    echo "[kvpress] error: KVC_KVPRESS_VENV ($venv) has no bin/python" >&2
    exit 1
  fi
  echo "[kvpress] creating .venv-kvpress (a few minutes)"
  "${PYTHON:-python3}" -m venv "$venv"
  echo '*' >"$venv/.gitignore"
fi
if [[ -z "${KVC_KVPRESS_VENV:-}" && ! -f "$venv/.installed-$wanted" ]]; then
  index=()
  [[ -z "${KVC_TORCH_INDEX:-}" ]] || index=(--extra-index-url "$KVC_TORCH_INDEX")
  # The plain version may be the CUDA build, which works on a CPU too.
  "$python" -m pip install --quiet "torch==2.13.0+cpu" "${index[@]}" ||
    "$python" -m pip install --quiet "torch==2.13.0"
  "$python" -m pip install --quiet "kvpress==$wanted"
  touch "$venv/.installed-$wanted"
fi
"$python" "$root/benchmarks/quality/kvpress_reference.py" --version "$wanted" "$@"
model="${KVC_MODEL:-$root/.cache/models/smollm2}"
if [[ -f "$model/config.json" ]]; then
  "$python" "$root/benchmarks/quality/kvpress_answers.py" --model "$model"
else
  echo "[kvpress] answers.json not written: no model at $model; scripts/setup.sh makes it" >&2
  exit 1
fi
