# shellcheck shell=bash
# What the scripts beside this file share; sourced by them, after they set `name`.
# Goes to the repository's root, and gives `root` and, by choose_python, `python` and `interpreter`.

cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
root=$(pwd -P)
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'scripts/%s: %s\n' "$name" "$*" >&2; }

# The version and the home of an interpreter that can make a virtual environment; fails for any other.
describe() {
  "$1" -c '
import sys, venv, ensurepip
print(sys.version.split()[0], sys.base_prefix)
sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# PYTHON if it is set, else the first on PATH that will do.
choose_python() {
  if [[ -n "${PYTHON:-}" ]]; then
    if ! interpreter=$(describe "$PYTHON"); then
      say "PYTHON=$PYTHON is not a Python >= 3.11 with the modules venv and ensurepip"
      exit 1
    fi
    python=$PYTHON
    return
  fi
  for python in python3 python3.13 python3.12 python3.11; do
    if interpreter=$(describe "$python"); then
      return
    fi
  done
  say "no Python >= 3.11 with the modules venv and ensurepip was found; install one or set PYTHON"
  exit 1
}
