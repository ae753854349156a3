#!/usr/bin/env bash
# Plain and denoising-aware on real text: zsRE records, target length by the twins' tokenizer, with the twins' own files (PROTOCOL.md, "Real text").
#
#   EASYEDIT_MDM_DATA=... [LIMIT=200] benchmarks/multi_token/real_text.sh [RUNS_FOLDER]
#
# Every run goes on where it was stopped. RUNS="llama llada-aware" makes only some of them.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
runs="${1:-$here/results}"
data="${EASYEDIT_MDM_DATA:?names the folder of the benchmark data}"

bench() { # name, hyperparameters, label
  case " ${RUNS:-$1} " in *" $1 "*) ;; *) return ;; esac
  easyedit-mdm bench --alg ROME_MDM --hparams "$2" --label "$3" --dataset zsre --data-dir "$data" --limit "${LIMIT:-200}" --seed 0 \
    --light --out "$runs/zsre-$1.jsonl" --resume
}

bench llada-aware ROME_MDM/twin-llada "twin-llada, denoising-aware"
bench llada-plain "$here/../side_by_side/twin-llada-plain.yaml" "twin-llada, plain"
bench llada-activation "$here/../twin-llada-open.yaml" "twin-llada, denoising-aware, as an activation"
bench llama "$here/real_text/twin-llama.yaml" "twin-llama"
bench llama-activation ROME_MDM/twin-llama "twin-llama, as an activation"
[ -n "${RUNS:-}" ] || easyedit-mdm compare "$runs/zsre-"{llama-activation,llama,llada-activation,llada-plain,llada-aware}.jsonl --out "$here/zsre"
