#!/usr/bin/env bash
# Everything that needs a GPU: the engine's tests there, and the benchmark of clipped per-example gradients with peak memory.
# Writes docs/results/bench_dpsgd_cuda.json and docs/bench_dpsgd.md. Arguments go to the benchmark, e.g. --cases 'unet32-*'.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: torch sees no GPU here")'

"$PYTHON" -m pytest tests/test_cuda.py
"$PYTHON" scripts/bench_dpsgd.py --device cuda --dtype bf16 --memory "$@"
"$PYTHON" scripts/bench_dpsgd.py --device cuda --dtype float32 "$@"
