#!/usr/bin/env bash
# Autoregressive and masked models side by side, on the same cases: four methods on the twins' test split and on real zsRE records, then a report of each.
#
#   EASYEDIT_HOME=... EASYEDIT_MDM_DATA=... benchmarks/side_by_side/run.sh [RUNS_FOLDER]
#
# Every run goes on where it was stopped. Without EASYEDIT_MDM_DATA (the folder of the benchmark data) zsRE is left out.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
runs="${1:-$here/runs}"
mkdir -p "$runs"

bench() { # name, method, hyperparameters, data set and its options
  easyedit-mdm bench --alg "$2" --hparams "$3" --label "$4" --seed 0 --no-fluency --out "$runs/$1.jsonl" --resume "${@:5}"
}

sets() { # label of the data, its options
  bench "$1-easyedit-rome" ROME ROME/twin-llama "twin-llama, EasyEdit's ROME" "${@:2}"
  bench "$1-ours-llama" ROME_MDM ROME_MDM/twin-llama "twin-llama, ROME_MDM" "${@:2}"
  bench "$1-llada-plain" ROME_MDM "$here/twin-llada-plain.yaml" "twin-llada, plain" "${@:2}"
  bench "$1-llada-aware" ROME_MDM ROME_MDM/twin-llada "twin-llada, denoising-aware" "${@:2}"
  easyedit-mdm compare "$runs/$1-"{easyedit-rome,ours-llama,llada-plain,llada-aware}.jsonl --out "$here/$1"
}

sets twins --dataset twins --limit 100
if [ -n "${EASYEDIT_MDM_DATA:-}" ]; then
  sets zsre --dataset zsre --data-dir "$EASYEDIT_MDM_DATA" --limit 50
else
  echo "EASYEDIT_MDM_DATA is not set: no zsRE" >&2
fi
