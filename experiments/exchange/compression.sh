#!/usr/bin/env bash
# Kinds of compression on phantoms and on Br35H (the folder given as the argument), three seeds each,
# and on the smartwatch recordings (the manifest given as the second one), three folds of people.
# About an hour on one core. Keeps finished points; writes compression.csv beside itself.
# ONLY="none int8" trains these settings alone, and the table then holds all that are finished.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
runs=${RUNS:-runs/exchange/compression}
br35h=${1:-}
watch=${2:-}

# study DATA NAME ARGUMENT ...: one sweep of the preset over seeds.
study() {
  local data=$1 name=$2
  shift 2
  [[ " ${ONLY:-$name} " == *" $name "* ]] || return 0
  local source=()
  if [ "$data" = br35h ]; then
    source=(--config.data.source=br35h --config.data.path="$br35h" --config.data.num_examples=4000
      --config.partition.scheme=dirichlet --config.partition.alpha=0.5)
  fi
  "$python" -m fedjax_med.sweep --config="$here/../../configs/compressed.py" \
    ${source[@]+"${source[@]}"} "$@" --grid=seed=0:3 --resume --workdir="$runs/$data/$name"
}

all() {
  local kind=--config.compression.kind feedback=--config.compression.error_feedback
  study "$1" none $kind=none $feedback=none
  study "$1" topk_ef $kind=topk $feedback=ef
  study "$1" topk $kind=topk $feedback=none
  study "$1" int8 $kind=int $feedback=none
  study "$1" int4 $kind=int --config.compression.bits=4 $feedback=none
  study "$1" sign_ef $kind=sign $feedback=ef
  study "$1" randk_ef $kind=randk $feedback=ef
  study "$1" sketch_ef $kind=sketch --config.compression.columns=200 $feedback=ef
  study "$1" int8_both_ways $kind=int $feedback=none --config.compression.download=int
}

# smartwatch NAME ARGUMENT ...: the same on recordings at 25 Hz, tested on other people.
smartwatch() {
  local name=$1
  shift
  [[ " ${ONLY:-$name} " == *" $name "* ]] || return 0
  "$python" -m fedjax_med.sweep --config="$here/../../configs/smartwatch.py" \
    --config.data.path="$watch" --config.data.rate=25 --config.data.recorded_rate=50 \
    --config.model.width=0.5 --config.server.num_rounds=24 --config.eval.every=6 \
    --config.client.optimizer=adam --config.client.learning_rate=0.01 "$@" \
    --grid=data.test_persons=S03+S06+S09,S01+S04+S07,S02+S05+S08+S10 \
    --resume --workdir="$runs/smartwatch/$name"
}

mkdir -p "$runs"
if [ -n "$watch" ]; then
  smartwatch none
  smartwatch int8 --config.compression.kind=int
  smartwatch topk --config.compression.kind=topk
  smartwatch topk_ef --config.compression.kind=topk --config.compression.error_feedback=ef
fi
[ -z "$br35h" ] || all br35h
all phantoms
"$python" "$here/compression.py" "$runs" "$here/compression.csv"
