#!/usr/bin/env bash
# What public pretraining does: none, on ImageNet or on Places365, with the public labels or without. See grid.sh for
# SETTINGS, NAME, EXP_ROOT and --dry_run; the grid is
#
#   METHODS="DPGAN PDP-Diffusion" DATA="cifar10_32" EPSILONS="10" PUBLIC="imagenet places365" scripts/rq3.sh
. "$(dirname "$0")/grid.sh"

METHODS=${METHODS:-$(registered DP-MERF DP-NTK DP-Kernel DPGAN GS-WGAN PDP-Diffusion DP-LDM-SD)}
DATA=${DATA:-cifar10_32 fmnist_28}
EPSILONS=${EPSILONS:-10}
PUBLIC=${PUBLIC:-imagenet places365}

for data in $DATA; do
    for epsilon in $EPSILONS; do
        for method in $METHODS; do
            cell "$method" "$data" "$epsilon" "$NAME-none" public_data.name=null
            for public in $PUBLIC; do
                for cond in true false; do
                    cell "$method" "$data" "$epsilon" "$NAME-$public-cond_$cond" \
                        "public_data.name=$public" "pretrain.cond=$cond"
                done
            done
        done
    done
done
finish
