#!/usr/bin/env bash
# Attacks against rules of aggregation on heart disease: 528 runs, 77 programs, which take half an
# hour to compile on one busy core. Needs the four UCI files in $DATA/heart-disease (DATA=data).
# Keeps finished points; writes tables and a figure beside itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
data=${DATA:-data}
runs=runs/exchange

"$python" -m fedjax_med.sweep --config="$here/robust.py" --sweep="$here/robust.py" \
  --config.data.path="$data/heart-disease" --resume --workdir="$runs/robust"
"$python" -m fedjax_med.report --workdir="$runs/robust"
# The mean before its model is saturated and predicts one class with certainty.
"$python" -m fedjax_med.sweep --config="$here/robust.py" --config.attack.kind=ipm \
  --config.attack.strength=20 --config.attack.number=2 --config.server.num_rounds=2 \
  --config.data.path="$data/heart-disease" --grid=data.seed=0:3 --resume --workdir="$runs/start"
mkdir -p "$here/robust"
cp "$runs/robust/worst_attacks.csv" "$here/robust/worst_attacks.csv"
cp "$runs/robust/figures/attacks.png" "$here/robust/attacks.png"
cp "$runs/start/results.csv" "$here/robust/mean_after_two_rounds.csv"
