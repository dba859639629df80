#!/usr/bin/env bash
# Creates the virtual environment $1 and installs expertmesh with its development tools into it.
# Reads PYTHON and TORCH_INDEX_URL (see Makefile), and EXTRAS: of pyproject.toml, default dev. Safe to run again at any time.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
torch=$(sed -nE 's/^ *"(torch==[^"]+)".*/\1/p' pyproject.toml)
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

is_new_enough() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [[ -n $candidate ]] && is_new_enough "$candidate"; then echo "$candidate"; return; fi
    if [[ -n ${PYTHON:-} ]]; then break; fi
  done
  die "no Python 3.11 or newer with its venv module was found (on Debian and Ubuntu: apt install python3-venv);" \
      "install one, or name it: make setup PYTHON=/path/to/python3"
}

install() { "$venv/bin/python" -m pip install --disable-pip-version-check "$@" >&2; }

# The versions of torch that pip's own sources offer.
offered() { "$venv/bin/python" -m pip index versions torch --pre 2>/dev/null || true; }

# Where pip's own sources already offer a CPU build (it sorts above the plain version) or know only one build (macOS),
# the plain command is right. Elsewhere PyPI's build for Linux brings several gigabytes of CUDA libraries along.
install_torch() {
  local installed
  installed=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
  if [[ ${installed%%+*} == "${torch#*==}" && -z ${TORCH_INDEX_URL:-} ]]; then return; fi
  if [[ -n ${TORCH_INDEX_URL:-} ]]; then
    say "installing $torch from $TORCH_INDEX_URL"
    # Reinstalled, because pip takes a CPU build for the same version.
    install "$torch" --index-url "$TORCH_INDEX_URL" --force-reinstall || die "pip could not install $torch from $TORCH_INDEX_URL"
  elif [[ $(uname -s) != Linux || $(offered) == *"${torch#*==}+cpu"* ]]; then
    say "installing $torch"
    install "$torch" || die "pip could not install $torch; its last lines above say why"
  else
    say "installing $torch for CPUs from $cpu_index"
    install "$torch" --index-url "$cpu_index" --retries 2 || {
      say "$cpu_index did not work; taking pip's default build of torch, which may be large"
      install "$torch" || die "pip could not install $torch; its last lines above say why"
    }
  fi
}

if [[ ! -x $venv/bin/python ]]; then
  python=$(find_python)
  say "creating $venv with $("$python" --version)"
  "$python" -m venv "$venv" || die "$python could not create $venv"
fi
is_new_enough "$venv/bin/python" || die "$venv was made with a Python older than 3.11; remove it with: make clean"
install_torch
extras=${EXTRAS:-dev}
say "installing expertmesh with [$extras]"
install --editable ".[$extras]" || die "pip could not install the dependencies of pyproject.toml; its last lines above say why"
# pip shows nothing of a build that succeeds, and this one succeeds without the kernel.
[[ -e common/native/kernels.so ]] || say "the native kernels were not built, and models run more slowly without it:" \
  "install g++ or clang++, or name a compiler in CXX, then: make clean setup"
say "done"
