#!/usr/bin/env bash
# AUROC of phantoms after 10 rounds: updates as they are, and masked at 32 and 16 bits, by seed.
# About four minutes on two cores. Keeps finished points; writes secure.csv beside itself.
# Usage: experiments/exchange/secure.sh [SEEDS]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
seeds=${1:-5}
runs=runs/exchange/secure

# study NAME ARGUMENT ...: one sweep over seeds.
study() {
  local name=$1
  shift
  "$python" -m fedjax_med.sweep --config="$here/secure_base.py" "$@" \
    --grid=seed=0:"$seeds" --resume --workdir="$runs/$name"
}

study none
for bits in 32 16; do
  study "masking_$bits" --config.secure.protocol=masking --config.secure.bits="$bits"
done
"$python" "$here/secure.py" "$runs" "$here/secure.csv"
