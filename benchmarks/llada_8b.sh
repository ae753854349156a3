#!/usr/bin/env bash
# The protocol of real_facts/PROTOCOL.md at 8 billion parameters: LLaDA-8B (or Dream-7B), on one GPU of 80 GB. It
# goes on where it was stopped.
#
#   DATA_DIR=data benchmarks/llada_8b.sh
#
# DATA_DIR  the folder that holds counterfact/ and kamel/
# MASKED    hyperparameter file of the masked model (ROME_MDM/llada-8b); ROME_MDM/dream-7b for Dream. Choose its layer
#           first, on other facts: easyedit-mdm sweep
# CAUSAL    hyperparameter file of an autoregressive model to stand beside it, or none (the default). Both models are
#           in memory at once: 2 x 16 GB of weights in bfloat16
# EACH      facts of each target length, 1 to 4 tokens (25); OUT: where the run is kept; DEVICE: cuda
set -euo pipefail
cd "$(dirname "$0")/.."
: "${DATA_DIR:?give the folder that holds counterfact/ and kamel/ as DATA_DIR}"
OUT="${OUT:-runs/llada_8b}"
study=(python benchmarks/real_facts/study.py)
"${study[@]}" run --masked "${MASKED:-ROME_MDM/llada-8b}" --causal "${CAUSAL:-none}" --control none --each "${EACH:-25}" \
  --device "${DEVICE:-cuda}" --data-dir "$DATA_DIR" --out "$OUT"
"${study[@]}" tables --out "$OUT" --results "$OUT"
cat "$OUT/results.md"
