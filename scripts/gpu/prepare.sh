#!/usr/bin/env bash
# Makes, with network and without a GPU, the folder that fifteen.sh needs on a GPU machine that has
# the packages of THERE below, but no network.
#
#   scripts/gpu/prepare.sh [--dry-run] [OUT]      OUT: default .gpu, which git ignores
#
# In it: fifteen.sh, project.tar.xz (this package with its CUDA library for sm_90, tests and scripts as
# they are in this tree, Triton's kernels compiled for sm_90), vllm.tar.xz (vLLM for CUDA and what it
# needs, less what a Hopper GPU does not need for a dense model), manifest.json. It fails if that is
# more than 58 MiB. Downloads and what is made of them stay in .cache/gpu.
#
# --dry-run leaves vLLM, the CUDA library and Triton's cache out, for `fifteen.sh --dry-run`.
#
# Environment: PYTHON (default: .venv's, else python3) packs; PYTHON312 (default: python3.12, also
# pyenv's) becomes an environment like the GPU machine's, see THERE; KVC_LIMIT_MIB is the limit.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
is_dry=
[[ "${1:-}" != --dry-run ]] || { is_dry=1; shift; }
out="${1:-$root/.gpu}"
limit="${KVC_LIMIT_MIB:-58}"
cache="$root/.cache/gpu"
# What Triton's kernels are compiled with, and vLLM's imports tried beside. The others of its packages
# that vLLM needs come as dependencies or are named below.
THERE=(torch==2.11.0 triton==3.6.0 transformers==5.17.0 numpy tokenizers safetensors huggingface_hub
  sentencepiece tiktoken aiohttp cloudpickle einops filelock httpx jinja2 numba pillow
  prometheus-client protobuf psutil py-cpuinfo pyyaml regex requests setuptools six tqdm
  nvidia-ml-py ninja pytest pytest-timeout pytest-xdist hypothesis)

say() { echo "[prepare] $*"; }

find_python() {
  if [[ -n "${PYTHON:-}" ]]; then echo "$PYTHON"
  elif [[ -x "$root/.venv/bin/python" ]]; then echo "$root/.venv/bin/python"
  else echo python3; fi
}

find_python312() {
  local candidate
  for candidate in "${PYTHON312:-}" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    if [[ -n "$candidate" ]] && "$candidate" -c 'import sys; assert sys.version_info[:2] == (3, 12)' \
      2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.12: name one in PYTHON312" >&2
  return 1
}

# A copy of this tree's files, as they are now, that tests and benchmarks need.
copy_project() {
  local target="$1"
  mkdir -p "$target"
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    (cd "$root" && while IFS= read -r -d '' file; do
      case "$file" in benchmarks/results/* | docs/* | docker/*) continue ;; esac
      [[ ! -f "$file" ]] || printf '%s\0' "$file"
    done | tar --null --files-from=- -cf -) | tar -xf - -C "$target"
}

# The package without compiled parts, as pip installs it; built in a copy, since a build leaves files.
install_package() {
  local source="$stage/source"
  cp -r "$stage/project/repo" "$source"
  VLLM_KVCOMPRESS_BUILD=0 "$python" -m pip install -q --no-deps --no-build-isolation --no-compile \
    --target "$stage/project/site" "$source" 2>"$stage/pip.log" || { cat "$stage/pip.log" >&2; return 1; }
  rm -rf "$stage/project/site/bin"
}

build_library() {
  "$python" -P - "$root" "$stage/project/site/vllm_kvcompress" <<'PY'
import sys
from importlib.util import find_spec
from pathlib import Path

root, out = map(Path, sys.argv[1:])
sys.path.insert(0, str(root / "csrc"))
import build_cuda

if build_cuda.build(out, Path(find_spec("torch").origin).parent, [90]) is None:
    sys.exit("no nvcc in $CUDA_HOME, $PATH or /usr/local/cuda")
PY
}

make_environment() {
  local stamp
  stamp="$cache/env/made-$(echo "${THERE[@]}" | sha256sum | cut -c1-16)"
  [[ ! -f "$stamp" ]] || return 0
  say "an environment like the GPU machine's (some gigabytes of torch) ..."
  rm -rf "$cache/env"
  "$(find_python312)" -m venv "$cache/env"
  "$cache/env/bin/python" -m pip install -q "${THERE[@]}"
  touch "$stamp"
}

# vllm.tar.xz, anew where what goes in has changed.
make_vllm() {
  local key
  key="$(cat "$root"/scripts/gpu/{bundle,strip_fatbin,pack}.py | sha256sum | cut -c1-16)"
  if [[ ! -f "$cache/vllm-$key.tar.xz" ]]; then
    say "vLLM ..."
    rm -rf "$cache/site" "$cache"/vllm-*.tar.xz
    "$python" -P "$root/scripts/gpu/bundle.py" --out "$cache/site" --wheels "$cache/wheels"
    say "packing vLLM (some minutes) ..."
    "$python" -P -c 'import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from gpu import pack
pack.archive(Path(sys.argv[2]), Path(sys.argv[3]))' "$root/scripts" "$cache/site" "$cache/vllm-$key.tar.xz"
  fi
  cp "$cache/vllm-$key.tar.xz" "$out/vllm.tar.xz"
}

fill_cache() {
  local arguments
  # What the engine warms up, and the cases that fifteen.sh times.
  source "$root/scripts/gpu/plan.sh"
  for arguments in "${FILL_CACHE[@]}"; do
    # shellcheck disable=SC2086
    (cd "$stage/project/repo" && env -u TRITON_INTERPRET TRITON_CACHE_DIR="$stage/project/triton_cache" \
      TRITON_DEFAULT_FP_FUSION=1 PYTHONPATH="$stage/project/site:$cache/site" "$cache/env/bin/python" -P \
      scripts/gpu/fill_triton_cache.py $arguments) >"$stage/fill.log" 2>&1 ||
      { tail -n 20 "$stage/fill.log" >&2; return 1; }
    tail -n 1 "$stage/fill.log"
  done
}

# What vLLM would start a process for, to ask the model's class.
inspect_model() {
  VLLM_CACHE_ROOT="$stage/project/vllm_cache" PYTHONPATH="$stage/project/site:$cache/site" \
    VLLM_LOGGING_LEVEL=ERROR "$cache/env/bin/python" -P "$root/scripts/gpu/model_info.py" LlamaForCausalLM
}

check_imports() {
  PYTHONPATH="$stage/project/site:$cache/site" VLLM_LOGGING_LEVEL=ERROR "$cache/env/bin/python" -P \
    "$root/scripts/gpu/check_site.py"
}

python="$(find_python)"
stage="$(mktemp -d)"
trap 'rm -rf "$stage"' EXIT
# Only what this script makes is taken away.
rm -rf "$out"/{fifteen.sh,manifest.json,project.tar.xz,vllm.tar.xz}
mkdir -p "$out" "$cache"
copy_project "$stage/project/repo"
install_package
if [[ -z "$is_dry" ]]; then
  make_environment
  say "this package's CUDA library ..."
  build_library
  make_vllm
  say "imports ..."
  check_imports
  inspect_model
  say "Triton's kernels ..."
  fill_cache
fi
cp "$root/scripts/gpu/fifteen.sh" "$out/"
KVC_COMMIT="${KVC_COMMIT:-$(git -C "$root" rev-parse HEAD)}" "$python" -P "$root/scripts/gpu/pack.py" \
  "$out" --limit-mib "$limit" --part "project=$stage/project"
