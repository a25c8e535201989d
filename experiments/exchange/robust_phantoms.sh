#!/usr/bin/env bash
# Attacks against rules of aggregation on phantoms at eight hospitals that are alike, of which the
# first two are hostile: 48 runs, 24 programs; about ten minutes on two cores. Keeps finished points;
# writes robust/phantoms.csv beside itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
runs=runs/exchange/robust_phantoms

# study NAME ARGUMENT ...: a sweep over rules and seeds.
study() {
  local name=$1
  shift
  "$python" -m fedjax_med.sweep --config="$here/../../configs/robust.py" \
    --config.partition.scheme=iid --config.partition.num_clients=8 --config.attack.number=2 \
    --config.robust.assumed_byzantine=2 --config.data.num_examples=1600 "$@" \
    --grid=server.aggregator=mean,trimmed_mean,geometric_median,centered_clipping \
    --grid=seed=0:2 --resume --workdir="$runs/$name"
}

study ipm_20 --config.attack.kind=ipm --config.attack.strength=20
study others --config.attack.strength=0 \
  --grid=attack.kind=none,sign_flip,alie,mimic,label_flip
"$python" "$here/robust_phantoms.py" "$runs" "$here/robust/phantoms.csv"
