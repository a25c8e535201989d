#!/usr/bin/env bash
# Attacks against rules of aggregation on heart disease: 528 runs, about a quarter of an hour on one core.
# Needs the four UCI files in data/heart-disease. Keeps finished points; writes a CSV beside itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
data=${DATA:-data}

"$python" -m fedjax_med.sweep --config="$here/robust.py" --sweep="$here/robust.py" \
  --config.data.path="$data/heart-disease" --resume --workdir=runs/exchange/robust
"$python" -m fedjax_med.report --workdir=runs/exchange/robust
mkdir -p "$here/robust"
cp runs/exchange/robust/worst_attacks.csv "$here/robust/worst_attacks.csv"
cp runs/exchange/robust/figures/attacks.png "$here/robust/attacks.png"
