#!/usr/bin/env bash
# What a first update tells: inversion of phantoms at 16 px, a linear network, an mlp and cnn_small.
# Some minutes on one core; cnn_small is attacked by the learned map alone. Writes
# inversion/NETWORK/inversion.json and inversion.png beside itself; keeps those that are there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

# invert NETWORK ARGUMENT ...: the attack on one network, unless it has been made.
invert() {
  local network=$1
  shift
  [ -e "$here/inversion/$network/inversion.json" ] || "$python" -m fedjax_med.audit \
    --config="$here/../../configs/quickstart.py" --config.data.image_size=16 \
    --config.data.num_examples=2500 --config.model.name="$network" --attack=inversion \
    --records=50 --out="$here/inversion/$network" "$@"
}

invert linear --batch_sizes=1,2,4,8
invert mlp --batch_sizes=1,2,4,8
invert cnn_small --batch_sizes=1 --steps=0
