#!/usr/bin/env bash
# Every table and figure of the imaging paper for one set and scale; goes on where it was stopped.
# Usage: experiments/imaging_paper/run.sh SET SCALE [FOLDER] [FLAGS]
#        SET phantoms, br35h or sars_cov2_ct; SCALE smoke, cpu or gpu; FOLDER holds the class folders
set -euo pipefail
set=${1:?name phantoms, br35h or sars_cov2_ct} scale=${2:?name smoke, cpu or gpu}
shift 2
flags=("--set=$set" "--scale=$scale")
if [[ "$set" != phantoms ]]; then
  flags+=("--path=$(realpath "${1:?name the folder with the class folders}")")
  shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
[[ -x "$python" ]] || python=python
target="experiments/imaging_paper/${set}_$scale" runs="runs/imaging_paper/${set}_$scale"
mkdir -p "$target"
"$python" -m experiments.imaging_paper.tables "${flags[@]}" "--workdir=$runs" "$@"
"$python" -m experiments.imaging_paper.figures "${flags[@]}" "--workdir=$runs" "$@"
"$python" -m experiments.imaging_paper.significance "${flags[@]}" "--workdir=$runs" "$@" |
  tee "$target/significance.md"
cp "$runs"/results.csv "$runs"/tables.{csv,md,tex} "$runs"/figures/*.png "$target/"
