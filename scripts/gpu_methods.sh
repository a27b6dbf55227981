#!/usr/bin/env bash
# On one GPU: DPDM and DP-FETA at epsilon 10 as published, but with fewer noise draws of each image (K) and fewer
# sampling steps, so that a run takes minutes instead of a day. Results go to docs/results/gpu_methods.csv. See grid.sh
# for SETTINGS, NAME, EXP_ROOT and --dry_run.
#
#   K=4 DATA="mnist_28" scripts/gpu_methods.sh
. "$(dirname "$0")/grid.sh"

METHODS=${METHODS:-$(registered DPDM DP-FETA)}
DATA=${DATA:-mnist_28 fmnist_28}
EPSILONS=${EPSILONS:-10}
K=${K:-1}

if [ -z "$DRY_RUN" ]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: torch sees no GPU here")' || exit 1
fi
for data in $DATA; do
    for epsilon in $EPSILONS; do
        for method in $METHODS; do
            cell "$method" "$data" "$epsilon" "$NAME-k$K" preset=paper setup.precision=bf16 \
                "train.loss.n_noise_samples=$K" model.sampler_acc.num_steps=50 model.sampler_acc.s_churn=0.0 \
                "eval.metrics=[accuracy]" "eval.classifiers=[wrn]"
        done
    done
done
finish
[ -n "$DRY_RUN" ] || "$PYTHON" scripts/collect.py --exp_root "$EXP_ROOT" --output docs/results/gpu_methods.csv
