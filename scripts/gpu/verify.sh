#!/usr/bin/env bash
# GPU verification in one command: tests and timings of kernels, then of engines.
#
#   scripts/gpu/verify.sh [OUT]        OUT: folder for the JSON (default: benchmarks/results/gpu)
#
# Needs torch with CUDA, triton, pytest, hypothesis and setuptools in $PYTHON (default: python3). The
# package is installed from this folder into a temporary one, as pip does it: with nvcc in $CUDA_HOME,
# $PATH or /usr/local/cuda the kernels of csrc/cuda are built, and then tested and timed too.
# Where vLLM is installed, and KVC_MODEL is a model folder (see scripts/build_model.py), engines are
# tested, and timed with random weights of the 8B shape.
# KVC_COMMIT names the commit where there is no git.
# Exit status 1 if a test failed; the benchmarks run all the same, and the JSON says so.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-python3}"
out="${1:-$root/benchmarks/results/gpu}"
mkdir -p "$out"

"$python" - <<'PY'
import torch
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__)
PY

stage="$(mktemp -d)"
trap 'rm -rf "$stage"' EXIT
"$python" -m pip install -q --no-deps --no-build-isolation --target "$stage/site" "$root"
export PYTHONPATH="$stage/site${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_DEFAULT_FP_FUSION=1
cd "$root"

status=0
native=()
if PATH="${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin" command -v nvcc >/dev/null; then
  native=(--native)
  "$python" -P scripts/gpu/compile_csrc.py --json "$out/compiled_csrc.json" || status=1
else
  echo "no nvcc: csrc/cuda is not built, its GPU tests are skipped and it is not timed"
fi
"$python" -P -m pytest tests/kernels -q -p no:cacheprovider --junit-xml="$out/tests.xml" || status=1
"$python" -P scripts/gpu/compile_kernels.py --out "$out/compiled.json" >"$stage/compiled.txt" ||
  { status=1; tail -n 20 "$stage/compiled.txt"; }
"$python" -P scripts/bench_kernels.py --out "$out/kernels.json" ${native[@]+"${native[@]}"} \
  --shapes Llama-3.1-8B --prompts 4096 32768 --batches 1 32 256
"$python" -P scripts/bench_kernels.py --out "$out/kernels_tp8.json" ${native[@]+"${native[@]}"} \
  --shapes "Llama-3.1-70B TP8" --prompts 32768 --batches 32 --kept 1024 4096

if "$python" -P -c 'import vllm' && [[ -n "${KVC_MODEL:-}" ]]; then
  e2e=(tests/e2e/test_{modes,model_shapes,stress,one_shot,mixed_layers,compression,methods,off,server}.py)
  "$python" -P -m pytest tests/integration/test_cuda_{backend,one_shot}.py "${e2e[@]}" -q \
    -p no:cacheprovider --junit-xml="$out/engine_tests.xml" || status=1
  serving() {
    "$python" -P scripts/bench_serving.py --model configs/models/llama-3.1-8b --dummy \
      --tokenizer "$KVC_MODEL" --out "$out/serving_$1" "${@:2}" || status=1
  }
  # What nothing evicted costs, and what a small pool gains.
  serving equal --variants stock span@0 span@0.875 --inputs 2000 --pools auto --prompts 128
  serving small --variants stock span@0.875 span@0.984 --inputs 6000 --pools 8 --prompts 64
else
  echo "no vLLM, or no KVC_MODEL: no engine is tested or timed"
fi

"$python" - "$out" "$status" <<'PY'
import json, sys, xml.etree.ElementTree as tree
from pathlib import Path
out, status = Path(sys.argv[1]), int(sys.argv[2])
suite = tree.parse(out / "tests.xml").getroot().find("testsuite")
counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
run = json.loads((out / "kernels.json").read_text())["run"]
(out / "verify.json").write_text(json.dumps({"run": run, **counts, "passed": status == 0}) + "\n")
(out / "tests.xml").unlink()
print(counts)
PY
exit "$status"
