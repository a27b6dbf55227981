#!/usr/bin/env bash
# On one GPU, in minutes: DPDM and DP-FETA as published, but with K noise draws of each image, DIFFUSION_EPOCHS epochs
# and 20 sampling steps; DP-MERF and DP-Kernel as published; DP-NTK with NTK_BATCH generated images in a step; all in
# short precision. The quick classifier evaluates GENERATED images. Results go to docs/results/gpu_methods.csv. See
# grid.sh for SETTINGS, NAME, EXP_ROOT, JOBS and --dry_run.
#
#   K=4 DIFFUSION_EPOCHS=150 METHODS=DPDM DATA=mnist_28 scripts/gpu_methods.sh
. "$(dirname "$0")/grid.sh"

METHODS=${METHODS:-$(registered DPDM DP-FETA DP-MERF DP-Kernel DP-NTK)}
DATA=${DATA:-mnist_28 fmnist_28}
EPSILONS=${EPSILONS:-10}
K=${K:-1}
DIFFUSION_EPOCHS=${DIFFUSION_EPOCHS:-30}
PHYSICAL_BATCH=${PHYSICAL_BATCH:-1024} # of diffusion, so that several cells fit on the GPU
NTK_BATCH=${NTK_BATCH:-1000}
GENERATED=${GENERATED:-20000}

if [ -z "$DRY_RUN" ]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: torch sees no GPU here")' || exit 1
fi
for epsilon in $EPSILONS; do
    for data in $DATA; do
        for method in $METHODS; do
            case $method in
                DP-MERF | DP-Kernel) own=(setup.precision=tf32) ;;
                DP-NTK) own=("train.batch_size=$NTK_BATCH" train.n_splits=1 setup.precision=bf16) ;;
                *) own=("train.loss.n_noise_samples=$K" "train.n_epochs=$DIFFUSION_EPOCHS" setup.precision=bf16
                    "train.dp.max_physical_batch_size=$PHYSICAL_BATCH" model.sampler_acc.type=dpmpp
                    model.sampler_acc.num_steps=20 model.sampler_acc.s_churn=0.0) ;;
            esac
            cell "$method" "$data" "$epsilon" "$NAME" preset=paper eval=quick "eval.metrics=[accuracy]" \
                "gen.data_num=$GENERATED" "${own[@]}"
        done
    done
done
finish
"$PYTHON" scripts/collect.py --exp_root "$EXP_ROOT" --output docs/results/gpu_methods.csv
