#!/usr/bin/env bash
# How fast edits are on one GPU of 80 GB, in at most 9 minutes: random weights of the large models' shapes, nothing is
# fetched. Writes kit.json and kit.md into OUT after every figure, so that a run that is cut off keeps what it has.
#
#   benchmarks/gpu/run.sh                                                      # one GPU
#   benchmarks/gpu/run.sh --shape tiny --device cpu --minutes 2                # a rehearsal
#
# OUT  the folder (gpu-kit); PYTHON: python; EASYEDIT_HOME: a clone of EasyEdit, if PyPI's wheel is not installed.
# All other arguments are kit.py's: --shape, --device, --minutes, --parts, --facts, --steps
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" "$here/kit.py" --out "${OUT:-gpu-kit}" "$@"
