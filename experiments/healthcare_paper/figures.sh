#!/usr/bin/env bash
# The healthcare paper's two figures, on four kinds of data, with and without privacy; about ten
# minutes on one core. Needs the files of heart disease, Br35H (without them phantoms stand in), the
# watch data and GDSC in data/. Keeps finished points; writes figures/ beside itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
data=${DATA:-data}
presets=$here/../../configs
runs=runs/healthcare/figures

# study KIND_plain|KIND_private PRESET ARGUMENT ...: one sweep, with each hospital alone beside it.
study() {
  local name=$1 preset=$2
  shift 2
  "$python" -m fedjax_med.sweep --config="$presets/$preset.py" --config.eval.local_baselines=True \
    --config.eval.every=2 "$@" --workdir="$runs/$name" --resume
}

# private ε: DP-SGD for each record of each hospital.
private() {
  echo "--config.privacy.mechanism=dp_sgd --config.privacy.target_epsilon=$1"
}

records=("--config.data.path=$data/heart-disease" --config.server.num_rounds=20
  --grid=data.seed=0:3)
study records_plain heart_disease "${records[@]}"
# shellcheck disable=SC2046  # words
study records_private heart_disease "${records[@]}" $(private 1) --config.privacy.clip_norm=0.5 \
  --config.client.learning_rate=4 --config.client.num_local_steps=1 \
  --config.server.weighting=examples

images=("--config.data.path=$data/Br35H")
[ -d "$data/Br35H" ] || images=(--config.data.source=phantoms)
images+=(--config.model.name=cnn_small --config.partition.scheme=quantity
  --config.partition.alpha=2 --config.partition.min_client_size=96 --config.client.schedule=cosine
  --config.server.num_rounds=12 --grid=data.seed=0:3)
study images_plain br35h_small_private "${images[@]}" --config.privacy.mechanism=none \
  --config.client.optimizer=adam --config.client.learning_rate=0.01 \
  --config.client.num_local_steps=8 --config.client.batch_size=32
# shellcheck disable=SC2046
study images_private br35h_small_private "${images[@]}" $(private 3)

wearables=("--config.data.path=$data/smartwatch-physio/manifest.csv" --config.data.rate=25
  --config.data.recorded_rate=50 --config.model.width=0.5 --config.server.num_rounds=12
  --grid=data.test_persons=S03+S06+S09,S01+S04+S07,S02+S05+S08+S10)
study wearables_plain smartwatch "${wearables[@]}" --config.client.optimizer=adam \
  --config.client.learning_rate=0.01
# shellcheck disable=SC2046
study wearables_private smartwatch "${wearables[@]}" $(private 8) \
  --config.client.augmentation=none --config.client.schedule=constant \
  --config.client.batch_size=64 --config.client.num_local_steps=2 --config.client.learning_rate=2

drugs=("--config.data.path=$data/gdsc-ccle" --config.server.algorithm=fedavg
  --config.server.personal_layers=head --config.server.num_rounds=20 --grid=data.seed=0:3)
study drugs_plain gdsc "${drugs[@]}"
# shellcheck disable=SC2046
study drugs_private gdsc "${drugs[@]}" $(private 8) --config.data.scaling=ranges \
  --config.client.num_local_steps=1 --config.client.learning_rate=0.02

"$python" "$here/figures.py" "$runs" "$here/figures"
