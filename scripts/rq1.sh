#!/usr/bin/env bash
# Which method is best, per dataset and budget: runs the whole grid, and gathers the results in <EXP_ROOT>/table.csv.
# The published Tables 6, 7 and 9 (CelebA at 32, 64 and 128 pixels) are among the default cells.
# Cells that are done are skipped, so the script can be stopped and started again. Override what is needed:
#
#   METHODS="DP-MERF PrivImage" DATA="digits_8" EPSILONS="1 10" SETTINGS="preset=quick" NAME=trial scripts/rq1.sh
#   scripts/rq1.sh --dry_run
. "$(dirname "$0")/grid.sh"

METHODS=${METHODS:-$(registered)}
DATA=${DATA:-mnist_28 fmnist_28 cifar10_32 cifar100_32 eurosat_32 camelyon_32 celeba_male_32 celeba_male_64 celeba_male_128}
EPSILONS=${EPSILONS:-1 10}

for data in $DATA; do
    for epsilon in $EPSILONS; do
        for method in $METHODS; do
            cell "$method" "$data" "$epsilon" "$NAME"
        done
    done
done
finish
