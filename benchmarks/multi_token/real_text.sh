#!/usr/bin/env bash
# Plain and denoising-aware on real text: zsRE records, target length by the twins' tokenizer, with the twins' own files (PROTOCOL.md, "Real text").
#
#   EASYEDIT_MDM_DATA=... [LIMIT=200] benchmarks/multi_token/real_text.sh [RUNS_FOLDER]
#
# Every run goes on where it was stopped.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
runs="${1:-$here/results}"
data="${EASYEDIT_MDM_DATA:?names the folder of the benchmark data}"

bench() { # name, hyperparameters, label
  easyedit-mdm bench --alg ROME_MDM --hparams "$2" --label "$3" --dataset zsre --data-dir "$data" --limit "${LIMIT:-200}" --seed 0 \
    --light --out "$runs/zsre-$1.jsonl" --resume
}

bench llada-plain "$here/../side_by_side/twin-llada-open-plain.yaml" "twin-llada, plain"
bench llada-aware ROME_MDM/twin-llada-open "twin-llada, denoising-aware"
bench llama ROME_MDM/twin-llama "twin-llama"
easyedit-mdm compare "$runs/zsre-"{llama,llada-plain,llada-aware}.jsonl --out "$here/zsre"
