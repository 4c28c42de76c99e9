#!/usr/bin/env bash
# Everything that is to be measured on one accelerator, in one call, within nine minutes and without a network.
#
#   launch/bench_gpu.sh [--minutes=9] [--rows=124m,1b,...] [--smoke] [--out=FILE]
#
# Needs a Python with jax for the card, flax, optax and orbax-checkpoint; PYTHON says which (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m experiments.bench_gpu "$@"
