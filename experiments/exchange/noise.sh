#!/usr/bin/env bash
# ε against whom: noise of a trusted server, noise of the hospitals' own, and DP-SGD, at thirty
# hospitals with phantoms; about ten minutes on one core. Keeps finished runs; writes a CSV.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
runs=${RUNS:-runs/exchange/noise}
seeds=${SEEDS:-0 1 2 3 4}

# run NAME ARGUMENT ...: one run of thirty hospitals, unless it has ended.
run() {
  local name=$1
  shift
  [ -e "$runs/$name/summary.json" ] || "$python" -m fedjax_med.train \
    --config="$here/../../configs/quickstart.py" --config.privacy.mechanism=none \
    --config.privacy.target_epsilon=0 --config.model.name=linear --config.data.image_size=16 \
    --config.partition.num_clients=30 --config.partition.scheme=dirichlet \
    --config.client.batch_size=16 --config.client.optimizer=sgd --config.client.num_local_steps=8 \
    --config.server.num_rounds=20 --config.eval.every=20 --config.server.weighting=uniform "$@" \
    --workdir="$runs/$name"
}

mkdir -p "$runs"
whole="--config.client_privacy.mechanism=dp_fedavg --config.client_privacy.clip_norm=0.5"
own="--config.client_privacy.noise=distributed --config.secure.protocol=masking"
for seed in $seeds; do
  run "none_$seed" --config.seed="$seed"
  for sigma in 2 4; do
    noise="--config.client_privacy.noise_multiplier=$sigma --config.seed=$seed"
    # shellcheck disable=SC2086  # several arguments each
    run "server_${sigma}_$seed" $whole $noise
    for colluders in 1 10 20; do
      # shellcheck disable=SC2086
      run "distributed_${sigma}_${colluders}_$seed" $whole $noise $own \
        --config.client_privacy.colluders="$colluders"
    done
  done
  for epsilon in 1 8; do
    run "records_${epsilon}_$seed" --config.privacy.mechanism=dp_sgd \
      --config.privacy.target_epsilon="$epsilon" --config.seed="$seed"
  done
done
"$python" "$here/noise.py" "$runs" "${OUTPUT:-$here/noise.csv}"
