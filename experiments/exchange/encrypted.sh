#!/usr/bin/env bash
# What encryption costs: one run of phantoms, plain, on the grid, and under both presets of CKKS; six
# minutes on a busy core. Needs the extra he. Keeps finished runs; writes a CSV beside itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
runs=runs/exchange/encrypted

# run NAME ARGUMENT ...: one run of the preset, unless it has ended.
run() {
  local name=$1
  shift
  [ -e "$runs/$name/summary.json" ] || "$python" -m fedjax_med.train \
    --config="$here/../../configs/encrypted.py" "$@" --workdir="$runs/$name"
}

mkdir -p "$runs"
run none --config.secure.protocol=none
run grid --config.secure.protocol=grid
run ckks_sum --config.secure.he_preset=sum
run ckks_nvflare --config.secure.he_preset=nvflare
"$python" "$here/encrypted.py" "$runs" "$here/encrypted.csv"
