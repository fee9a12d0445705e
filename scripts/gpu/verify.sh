#!/usr/bin/env bash
# GPU verification for people with time: tests and timings of kernels, then of engines. For a quarter of
# an hour, or a machine without network, there is fifteen.sh.
#
#   scripts/gpu/verify.sh [OUT [STEP...]]    OUT: folder for the JSON (default: benchmarks/results/gpu)
#
# Steps: `tests` and `timings` of kernels, `engines` (end-to-end tests), `serving` (against stock
# vLLM); all of them by default. And `tuning` of the decode kernel's tiles and splits; and `compile`
# (registers and spills of every kernel), which needs no GPU.
# Needs torch with CUDA, triton, pytest, hypothesis and setuptools in $PYTHON (default: python3). The
# package is installed from this folder into a temporary one, as pip does it: with nvcc in $CUDA_HOME,
# $PATH or /usr/local/cuda the kernels of csrc/cuda are built, and then tested and timed too.
# KVC_WHEEL names a wheel of it to take instead. KVC_TEST_LIMIT is the time after which tests are
# stopped, such as 500s; the JSON then has those that have ended. With pytest-xdist they share the cores.
# Engines need vLLM and a model folder, KVC_MODEL (see scripts/build_model.py); if that has a tokenizer
# but no weights, tests of the real model are left out. They are timed with random weights of the 8B
# shape. KVC_COMMIT names the commit where there is no git.
# Exit status 1 if a test failed; the benchmarks run all the same, and the JSON says so.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-python3}"
out="${1:-$root/benchmarks/results/gpu}"
steps=("${@:2}")
[[ ${#steps[@]} -gt 0 ]] || steps=(tests timings engines serving)
for step in "${steps[@]}"; do
  case "$step" in
    tests | timings | tuning | compile | engines | serving) ;;
    *) echo "no such step: $step" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"

"$python" - <<'PY'
import torch
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__)
PY

stage="$(mktemp -d)"
trap 'rm -rf "$stage"' EXIT
"$python" -m pip install -q --no-deps --no-build-isolation --target "$stage/site" "${KVC_WHEEL:-$root}"
export PYTHONPATH="$stage/site${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_DEFAULT_FP_FUSION=1
cd "$root"
status=0

has_nvcc() {
  PATH="${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin" command -v nvcc >/dev/null
}

# run_pytest NAME ARGUMENT...: pytest, whose counts go to NAME.json.
run_pytest() {
  local pytest=("$python" -P -m pytest -q -p no:cacheprovider --junit-xml="$stage/$1.xml")
  # Stopped like this, pytest still writes its report.
  [[ -z "${KVC_TEST_LIMIT:-}" ]] || pytest=(timeout --signal=INT "$KVC_TEST_LIMIT" "${pytest[@]}")
  local code=0
  "${pytest[@]}" "${@:2}" || { code=$?; status=1; }
  if [[ ! -f "$stage/$1.xml" ]]; then
    echo "$1: pytest did not get as far as a report" >&2
    return
  fi
  "$python" -P scripts/gpu/test_report.py "$stage/$1.xml" "$code" "$out/$1.json"
}

run_tests() {
  local workers=()
  # More contexts than this only crowd the GPU.
  if "$python" -P -c 'import xdist' 2>/dev/null; then
    workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  fi
  run_pytest kernel_tests tests/kernels -m "not slow and not emulated" ${workers[@]+"${workers[@]}"}
}

run_timings() {
  local native=()
  if [[ -f "$stage/site/vllm_kvcompress/_native_cuda.so" ]] || has_nvcc; then
    native=(--native)
  else
    echo "no nvcc: csrc/cuda is not timed"
  fi
  # FlexAttention is compiled anew for every case.
  "$python" -P benchmarks/timing/gpu_kernels.py --out "$out/kernels.json" ${native[@]+"${native[@]}"} \
    --shapes Llama-3.1-8B --prompts 4096 32768 --batches 1 32 256 \
    --peers "torch SDPA" "FlashAttention (vLLM)" FlashInfer xformers || status=1
  "$python" -P benchmarks/timing/gpu_kernels.py --out "$out/kernels_tp8.json" ${native[@]+"${native[@]}"} \
    --shapes "Llama-3.1-70B TP8" --prompts 32768 --batches 32 --kept 1024 4096 || status=1
}

run_tuning() {
  "$python" -P scripts/gpu/tune_decode.py --out "$out/decode_tuning.json" || status=1
}

run_compile() {
  if has_nvcc; then
    "$python" -P scripts/gpu/compile_csrc.py --json "$out/compiled_csrc.json" || status=1
  else
    echo "no nvcc: csrc/cuda is not compiled"
  fi
  "$python" -P scripts/gpu/compile_kernels.py --out "$out/compiled.json" >"$stage/compiled.txt" ||
    { status=1; tail -n 20 "$stage/compiled.txt"; }
}

# Whether engines can run; says why not.
has_engines() {
  "$python" -P -c 'import vllm' && [[ -n "${KVC_MODEL:-}" ]] && return
  echo "no vLLM, or no KVC_MODEL: $1 left out"
  return 1
}

run_engines() {
  has_engines "end-to-end tests" || return 0
  local names=(modes model_shapes stress mixed_layers)
  if compgen -G "$KVC_MODEL/*.safetensors" >/dev/null; then
    names+=(one_shot compression methods off server)
  else
    echo "no weights in KVC_MODEL: tests of the real model left out"
  fi
  local files=(tests/integration/test_{backends,cuda_backend,cuda_one_shot}.py) name
  for name in "${names[@]}"; do files+=("tests/e2e/test_$name.py"); done
  run_pytest engine_tests "${files[@]}"
}

serving() {
  "$python" -P benchmarks/serving/measure.py --model configs/models/llama-3.1-8b --dummy \
    --tokenizer "$KVC_MODEL" --out "$out/serving_$1" "${@:2}" || status=1
}

run_serving() {
  has_engines "serving benchmark" || return 0
  # What nothing evicted costs, and what a small pool gains.
  serving equal --variants stock span@0 span@0.875 --inputs 2000 --pools auto --prompts 128
  serving small --variants stock span@0.875 span@0.984 --inputs 6000 --pools 8 --prompts 64
}

for step in "${steps[@]}"; do "run_$step"; done
exit "$status"
