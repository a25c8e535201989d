#!/usr/bin/env bash
# One command for everything: installs what is missing into .venv, then trains, reports or tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
venv=${VENV:-.venv} # the folder that everything is installed into

usage() {
  cat <<'TEXT'
Usage: ./run.sh [COMMAND] [ARGUMENTS]

  quickstart     (or nothing) five hospitals train privately on phantoms; the report lands in
                 runs/quickstart (CPU, no data and no GPU needed)
  train ...      python -m fedjax_med.train ...   (./run.sh train --help lists every flag)
  sweep ...      python -m fedjax_med.sweep ...     a grid of configurations as one program
  report ...     python -m fedjax_med.report ...    on a run, several runs or a sweep
  predict ...    python -m fedjax_med.predict ...   classes of your pictures, by a run's model
  explain ...    python -m fedjax_med.explain ...   where a run's model looks, by hospital
  export ...     python -m fedjax_med.export ...    a run's model for other programs
  privacy ...    python -m fedjax_med.privacy ...   recomputes every ε of a run from its ledger
  audit ...      python -m fedjax_med.audit ...     attacks the privacy mechanism of a config
  python ...     this installation's Python: ./run.sh python -m experiments.imaging_paper.tables
  test ...       the tests; arguments go to pytest: ./run.sh test -m "not slow"
  check          ruff (lint and format) and pyright over the whole tree
  format         ruff rewrites what it can
  hook           runs the same checks before every git commit (pre-commit)
  help           this text

Paths are relative to the folder of run.sh. The first start installs into .venv (a minute, needs the
network); later starts install nothing. PYTHON=/path/to/python3.12 chooses the interpreter, VENV
another folder than .venv: VENV=.venv312 PYTHON=python3.12 ./run.sh test leaves .venv as it is.
GPU: .venv/bin/python -m pip install -e '.[gpu]' after the first start.
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 1
}

is_recent() { # Runs it: a pyenv shim exists for versions that do not run.
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  if [[ -n "${PYTHON:-}" ]]; then
    is_recent "$PYTHON" || fail "PYTHON=$PYTHON does not run or is older than Python 3.11;" \
      "set it to a newer one or unset it"
    echo "$PYTHON"
    return
  fi
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3; do
    if is_recent "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer found; install one (python.org, or apt install python3 python3-venv)" \
    "or point PYTHON at it"
}

make_venv() {
  local python
  python=$(find_python)
  if [[ -n "$(ls -A "$venv" 2>/dev/null)" && ! -f "$venv/pyvenv.cfg" ]]; then # --clear empties it
    fail "VENV=$venv holds files that are no Python environment; name another folder or empty it"
  fi
  echo "Making $venv with $("$python" -V) ..."
  "$python" -m venv --clear "$venv" || fail "$python cannot make a virtual environment;" \
    "on Debian or Ubuntu run: apt install python3-venv; or point PYTHON at another Python"
}

# install NAME REQUIREMENT: runs pip unless the stamp says that exactly this was done before.
# The stamp is written last, so an interrupted install is done again.
install() {
  local stamp="$venv/.installed-$1" wanted done
  if ! is_recent "$venv/bin/python" || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    make_venv
  elif [[ -n "${PYTHON:-}" && "$(version_of "$PYTHON")" != "$(version_of "$venv/bin/python")" ]]; then
    make_venv
  fi
  wanted="$(version_of "$venv/bin/python") $PWD $(cksum <setup.py)"
  for done in "$stamp" "$venv/.installed-dev"; do # dev holds all that run needs
    if [[ -f "$done" && "$(<"$done")" == "$wanted" ]]; then
      return
    fi
  done
  echo "Installing $2 into $venv (about a minute; only when setup.py or Python changed) ..."
  rm -f "$venv"/.installed-* # pip may be stopped half-way, so no earlier stamp holds either
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$2" ||
    fail "the installation did not finish; check the network (or set PIP_INDEX_URL to a mirror)" \
      "and start again"
  echo "$wanted" >"$stamp"
}

version_of() {
  "$1" -c 'import sys; print(sys.version.split()[0], sys.implementation.name)' 2>/dev/null
}

command=${1:-quickstart}
[[ $# -gt 0 ]] && shift
case "$command" in
  quickstart)
    install run .
    exec "$venv/bin/python" -m fedjax_med.train \
      --config=configs/quickstart.py --workdir=runs/quickstart "$@"
    ;;
  python)
    install run .
    exec "$venv/bin/python" "$@"
    ;;
  train | sweep | report | predict | explain | export | privacy | audit)
    install run .
    exec "$venv/bin/python" -m "fedjax_med.$command" "$@"
    ;;
  test)
    install dev '.[dev]'
    exec "$venv/bin/python" -m pytest "$@"
    ;;
  check)
    install dev '.[dev]'
    status=0 # all three run, so one call shows every problem
    "$venv/bin/python" -m ruff check . || status=1
    "$venv/bin/python" -m ruff format --check . || status=1
    "$venv/bin/python" -m pyright --pythonpath "$venv/bin/python" || status=1
    exit "$status"
    ;;
  format)
    install dev '.[dev]'
    "$venv/bin/python" -m ruff check --fix-only --quiet .
    exec "$venv/bin/python" -m ruff format .
    ;;
  hook)
    install dev '.[dev]'
    exec "$venv/bin/python" -m pre_commit install
    ;;
  help | -h | --help)
    usage
    ;;
  *)
    usage >&2
    fail "unknown command '$command'; choose one of the above"
    ;;
esac
