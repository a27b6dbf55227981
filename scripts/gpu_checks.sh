#!/usr/bin/env bash
# All checks on a GPU except whole runs (gpu_methods.sh): the tests that need one, the quick preset of every method, and
# the benchmarks of DP-SGD and of GS-WGAN's critics. Writes docs/results/*_cuda.json and their pages. See grid.sh for
# METHODS, EXP_ROOT and JOBS; other arguments go to the benchmark of DP-SGD, e.g. --cases 'unet32-*'.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export PYTHON
"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: torch sees no GPU here")'

"$PYTHON" -m pytest tests/test_cuda.py
DATA=digits_8 EPSILONS=10 NAME=gpu JOBS=${JOBS:-4} SETTINGS="setup.device=cuda" bash scripts/rq1.sh && grid=0 || grid=$? # reported at the end
"$PYTHON" scripts/benchmarks/bench_dpsgd.py --device cuda --dtype bf16 --memory "$@"
"$PYTHON" scripts/benchmarks/bench_dpsgd.py --device cuda --dtype float32 "$@"
results=docs/results/bench_gs_wgan
"$PYTHON" scripts/benchmarks/bench_gs_wgan.py --device cuda --stack 64 --case quick --json ${results}_cuda_quick.json
"$PYTHON" scripts/benchmarks/bench_gs_wgan.py --device cuda --stack 64 --case published --json ${results}_cuda_published.json \
    --beside ${results}_cpu.json ${results}_cuda_quick.json --markdown docs/bench_gs_wgan.md
exit $grid
