#!/usr/bin/env bash
# Which method is best, per dataset and budget: runs the whole grid, and gathers the results in <EXP_ROOT>/table.csv.
# Cells that are done are skipped, so the script can be stopped and started again. Override what is needed:
#
#   METHODS="DP-MERF PrivImage" DATA="digits_8" EPSILONS="1 10" SETTINGS="preset=quick" NAME=trial scripts/rq1.sh
#
# NAME tells grids with different SETTINGS apart: it is part of every run folder's name.
set -u
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
METHODS=${METHODS:-DP-MERF DPDM PDP-Diffusion PrivImage}
DATA=${DATA:-mnist_28 fmnist_28 cifar10_32 cifar100_32 eurosat_32 camelyon_32 celeba_male_32 celeba_male_64}
EPSILONS=${EPSILONS:-1 10}
SETTINGS=${SETTINGS:-}
NAME=${NAME:-rq1}
EXP_ROOT=${EXP_ROOT:-exp}

is_done() { # method data epsilon
    local method epsilon
    method=$(echo "$1" | tr '[:upper:]' '[:lower:]')
    epsilon=$("$PYTHON" -c 'import sys; print(float(sys.argv[1]))' "$3")
    compgen -G "$EXP_ROOT/$method/$2_eps${epsilon}$NAME-[0-9]*/results.json" >/dev/null
}

failures=()
for data in $DATA; do
    for epsilon in $EPSILONS; do
        for method in $METHODS; do
            cell="$method $data epsilon $epsilon"
            if is_done "$method" "$data" "$epsilon"; then
                echo "done already: $cell"
                continue
            fi
            echo "running: $cell"
            # shellcheck disable=SC2086  # SETTINGS is a list of words
            "$PYTHON" run.py --method "$method" --data_name "$data" --epsilon "$epsilon" \
                --exp_description "$NAME" --exp_root "$EXP_ROOT" $SETTINGS
            code=$?
            if [ $code -eq 130 ]; then
                echo "stopped" >&2
                exit 130
            elif [ $code -eq 3 ]; then
                echo "metrics are missing: $cell"
            elif [ $code -ne 0 ]; then
                failures+=("$cell (exit code $code)")
            fi
        done
    done
done

if [ -d "$EXP_ROOT" ]; then
    "$PYTHON" scripts/collect.py --exp_root "$EXP_ROOT" || failures+=("collect.py")
fi
if [ ${#failures[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failures[@]}" >&2
    exit 1
fi
