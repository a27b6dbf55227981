#!/usr/bin/env bash
# What the parts of one method do for another: PrivImage's selection of public classes, DP-FETA's central images, and
# Private Evolution of the samples of a pretrained diffusion network. See grid.sh for SETTINGS, NAME, EXP_ROOT and
# --dry_run; the grid is
#
#   SELECTIVE="DPDM" CENTRAL="DP-MERF DPGAN" DATA="cifar10_32" EPSILONS="10" scripts/rq4.sh
#   CENTRAL= SELECTIVE= CKPT=exp/pdp-diffusion/<run>/pretrain/checkpoints/final_checkpoint.pth scripts/rq4.sh
#
# PE-SD is run if CKPT names the checkpoint to start from.
. "$(dirname "$0")/grid.sh"

SELECTIVE=${SELECTIVE-$(registered DPDM DP-LDM-SD)}
CENTRAL=${CENTRAL-$(registered DP-MERF DP-NTK DP-Kernel DPGAN GS-WGAN DP-LDM-SD)}
DATA=${DATA:-cifar10_32}
EPSILONS=${EPSILONS:-10}
CKPT=${CKPT:-}

for data in $DATA; do
    for epsilon in $EPSILONS; do
        for method in $SELECTIVE; do
            cell "$method" "$data" "$epsilon" "$NAME-selective" \
                public_data.name=imagenet public_data.selective.ratio=0.05 pretrain.cond=true
        done
        for method in $CENTRAL; do
            cell "$method" "$data" "$epsilon" "$NAME-central" \
                public_data.name=central_mean public_data.central.sample_num=50
        done
        if [ -n "$CKPT" ]; then
            cell PE-SD "$data" "$epsilon" "$NAME-ckpt" "model.api_params.ckpt=$CKPT"
        fi
    done
done
finish
