#!/usr/bin/env bash
# A GPU for fifteen minutes, without network: what is most worth knowing first. From a folder that
# prepare.sh made, wherever it lies:
#
#   bash .gpu/fifteen.sh [--dry-run] OUT [part1|part2]     default: both, at most 430 and 240 seconds
#
# Every step has a process and a limit of its own; whatever becomes of it, the next one runs. OUT gets
# part1.json and part2.json (steps and results, written anew every two seconds), part1.log, part2.log
# (the end of every step's output) and summary.txt, of all that OUT has. The exit status is a sum of
# what did not pass: 1 set-up, 2 correctness, 4 numbers, 8 engines. A limit on the whole of a part should
# be 30 seconds more than its own; whoever ends this script ends the step too.
#
# It takes what it finds: without vLLM's compiled parts the tests of the engine's side attend by torch;
# a CUDA library that does not load is built with nvcc. --dry-run runs every step on a CPU, tiny, from a
# folder of `prepare.sh --dry-run`, with the vLLM that is installed.
#
# PYTHON (default: python3) has torch, Triton, transformers, pytest with xdist and timeout, hypothesis,
# and the rest of what prepare.sh lists under THERE. KVC_UNPACKED is where the
# archives are unpacked (default: under $TMPDIR); the second part finds them there. KVC_STEPS names the
# steps to run (default: all); what is not known of the machine is looked up first.
set -uo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
is_dry= is_new=
[[ "${1:-}" != --dry-run ]] || { is_dry=1; shift; }
[[ $# -ge 1 ]] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d' >&2; exit 64; }
out="$1"
case "${2:-both}" in
  both) parts=(part1 part2) ;;
  part1 | part2) parts=("$2") ;;
  *) echo "no such part: $2" >&2; exit 64 ;;
esac
python="${PYTHON:-python3}"
mkdir -p "$out" || exit 64
out="$(cd "$out" && pwd)"
# Of an earlier run; the other part's stay, and other steps where only some are run again.
if [[ -z "${KVC_STEPS:-}" ]]; then
  for part in "${parts[@]}"; do rm -f "$out/$part".{json,log}; done
fi
id="$(sha256sum "$here/manifest.json" | cut -c1-16)" || exit 1
unpacked="${KVC_UNPACKED:-${TMPDIR:-/tmp}/kvcompress-$id}"
work="$unpacked/work"
start=$SECONDS

# All archives of the folder, checked and unpacked side by side, once.
unpack() {
  [[ ! -f "$unpacked/is_complete" ]] || return 0
  is_new=1
  mkdir -p "$unpacked" && "$python" -P - "$here" "$unpacked" <<'PY' && touch "$unpacked/is_complete"
import hashlib, json, sys, tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

here, target = map(Path, sys.argv[1:])
files = json.loads((here / "manifest.json").read_text())["files"]

def unpack(name):
    content = (here / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != files[name]["sha256"]:
        raise SystemExit(f"{name} is not what manifest.json says")
    with tarfile.open(here / name) as archive:
        archive.extractall(target / name.partition(".")[0], filter="data")

with ThreadPoolExecutor() as pool:
    list(pool.map(unpack, [name for name in files if name.endswith(".tar.xz")]))
PY
}

if ! unpack; then
  echo "setup: the archives of $here could not be unpacked" | tee "$out/summary.txt"
  exit 1
fi
repo="$unpacked/project/repo"
site="$unpacked/project/site"
tools="$repo/scripts/gpu"
mkdir -p "$work"
cd "$repo" || exit 1
# shellcheck source=scripts/gpu/plan.sh
source "$tools/plan.sh"

# The package before any other of its name, and no folder of the project itself.
export PYTHONPATH="$site:$unpacked/vllm"
export TRITON_DEFAULT_FP_FUSION=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CACHE_ROOT="$unpacked/project/vllm_cache"
KVC_COMMIT="$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["commit"])' "$here/manifest.json")"
export KVC_COMMIT
# One process talks to itself, on a machine that may have no other interface.
export VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo
if [[ -z "$is_dry" ]]; then
  export TRITON_CACHE_DIR="$unpacked/project/triton_cache"
  # A container without code for this GPU is then not looked at before somebody calls it.
  export CUDA_MODULE_LOADING=LAZY
  unset TRITON_INTERPRET
  # Archives have no compiled Python. Every process would compile vLLM anew; while the first ones run,
  # others do it once. Beside the sources: the machine's own packages keep what they have.
  if [[ -n "$is_new" ]]; then
    "$python" -P -m compileall -q -j 8 "$unpacked/vllm" "$site" "$repo" >/dev/null 2>&1 &
  fi
else
  export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
fi

# step NAME KIND LIMIT COMMAND...: see run_step.py. No step goes past the part's end.
step() {
  local name="$1" kind="$2" limit="$3" left=$((deadline - SECONDS))
  shift 3
  is_wanted "$name" || return 0
  [[ $kind == engine ]] || left=$((left - reserve))
  [[ $limit -le $left ]] || limit=$left
  if [[ $limit -lt 5 ]]; then
    left_out "$name" "$kind" "no time left in this part"
    return
  fi
  "$python" -P "$tools/run_step.py" --part "$out/$part.json" --work "$work" --kind "$kind" \
    --limit "$limit" --grace "${grace:-8}" "$name" -- "$@"
  summarize
}

# After every step: nobody knows whether there will be another.
summarize() { "$python" -P "$tools/summary.py" "$out" >/dev/null; }

# is_wanted NAME: whether $KVC_STEPS, if given, has it.
is_wanted() { [[ -z "${KVC_STEPS:-}" || " $KVC_STEPS " == *" $1 "* ]]; }

left_out() {
  is_wanted "$1" || return 0
  "$python" -P "$tools/run_step.py" --part "$out/$part.json" --work "$work" --kind "$2" --limit 0 \
    --left-out "$3" "$1"
  summarize
}

# run NAME KIND LIMIT SCRIPT ARGUMENT...: a step that is a script of this folder.
run() { step "$1" "$2" "$3" "$python" -P "${@:4}"; }

# tests NAME LIMIT ARGUMENT...: a step that is a run of pytest, whose workers take long to end.
tests() { grace=14 run "$1" correctness "$2" "$tools/run_tests.py" "${@:3}"; }

# said KEY: what first_look.py found; 'loads' means that it can be used.
said() {
  "$python" -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2], ""))' \
    "$work/machine.json" "$1" 2>/dev/null
}

result() { echo "$work/$1.json"; }

# Left out only if first_look.py was told why: where it came to no answer, the engine finds out.
engine() {
  local name="$1" limit="$2" imports
  shift 2
  imports="$(said vllm_imports)"
  if [[ -n "$imports" && "$imports" != loads ]]; then
    left_out "$name" engine "vLLM does not import: $imports"
  else
    run "$name" engine "$limit" "$tools/engine_run.py" "$@"
  fi
}

# Also where it is not asked for, if nobody has looked at this machine: the others go by its answers.
machine() {
  if [[ ! -s "$(result machine)" ]]; then
    KVC_STEPS="" run machine setup 100 "$tools/first_look.py" --site "$site" "$@"
  elif [[ $part == part1 ]]; then
    run machine setup 100 "$tools/first_look.py" --site "$site" "$@"
  fi
}

# What of csrc/cuda runs on a GPU; the rest of these files emulates one.
CSRC_TESTS=(tests/kernels/test_csrc_cuda.py tests/kernels/test_csrc_copies.py
  tests/kernels/test_csrc_gpu.py -m "not emulated and not slow")
# What is worth most first. The real-size step does what test_real_size.py does; the files that are
# not here run on a CPU.
KERNEL_TESTS=(tests/kernels/test_{ragged_decode,window_score,select,compact,slots}.py
  tests/kernels/test_tune_decode.py)

# The numbers behind the names are seconds, at most; few steps need all of theirs. The engine has at
# least $reserve, of the first part's 430.
part1() {
  ! is_wanted engine || reserve=115
  machine
  export KVC_RIG_ATTENTION=torch
  [[ "$(said flash_attention)" != loads ]] || KVC_RIG_ATTENTION=vllm
  # Scripts with a limit of their own end before they are interrupted, 8 seconds before the step's.
  run real_size correctness 80 "$tools/check_real_size.py" --out "$(result real_size)" --limit 58
  tests csrc_tests 32 "${CSRC_TESTS[@]}" -n 4
  tests triton_tests 56 "${KERNEL_TESTS[@]}" -m "not emulated and not slow" -n 8
  run timings numbers 55 benchmarks/timing/gpu_kernels.py --out "$(result timings)" --native --limit 38 \
    "${TIMINGS[@]}" --peers "FlashAttention (vLLM)"
  run tuning numbers 30 "$tools/tune_decode.py" --out "$(result tuning)" --limit 18 "${TUNING[@]}"
  tests rig 50 tests/integration/test_backends.py tests/integration/test_cuda_backend.py \
    tests/integration/test_cuda_one_shot.py tests/integration/test_cuda_host_sync.py -n 6
  engine engine $((deadline - SECONDS))
}

part2() {
  machine
  engine engine_graphs 170 --graphs
  if command -v compute-sanitizer >/dev/null; then
    # Small things: every access is looked at.
    grace=14 step sanitizer correctness 70 compute-sanitizer --error-exitcode 9 "$python" -P \
      "$tools/run_tests.py" "${CSRC_TESTS[@]}" -k "not model_sizes" -x
  else
    left_out sanitizer correctness "no compute-sanitizer"
  fi
}

# The same steps, each with something that a CPU does in seconds.
dry_part1() {
  machine --dry-run
  export KVC_RIG_ATTENTION=torch
  run real_size correctness 60 "$tools/check_real_size.py" --dry-run --out "$(result real_size)" --limit 20
  tests csrc_tests 60 tests/kernels/test_csrc_build.py -m "not slow"
  tests triton_tests 60 tests/kernels/test_slots.py -m "not slow"
  run timings numbers 150 "$tools/as_if_gpu.py" benchmarks/timing/gpu_kernels.py --out "$(result timings)" \
    --shapes "Llama-3.1-70B TP8" --layers 1 --batches 1 --kept 16 --prompts 64 --peers
  run tuning numbers 150 "$tools/tune_decode.py" --dry-run --settings 2 --out "$(result tuning)"
  tests rig 120 tests/integration/test_cuda_host_sync.py
  engine engine 180 --dry-run
}

dry_part2() {
  machine --dry-run
  machine
  engine engine_graphs 180 --dry-run --graphs
  tests sanitizer 60 tests/unit/test_kernel_check.py
}

for part in "${parts[@]}"; do
  reserve=0
  if [[ -n "$is_dry" ]]; then
    deadline=$((SECONDS + 900))
    "dry_$part"
  else
    # Unpacking is part of the first one's time.
    [[ "$part" == part1 ]] && deadline=$((start + 430)) || deadline=$((SECONDS + 240))
    "$part"
  fi
done
"$python" -P "$tools/summary.py" "$out"
