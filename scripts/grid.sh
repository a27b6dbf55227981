# Sourced by rq1.sh to rq4.sh, which run cells of a grid: one method on one dataset at one budget. Cells that are done
# are skipped and interrupted ones are resumed, so a script can be stopped and started again. A cell that fails does not
# stop the others. With --dry_run nothing is trained: every cell is calibrated, and its noise and cost are printed.
#
# Environment: SETTINGS, key=value arguments for every cell; NAME, which distinguishes grids with different SETTINGS and is
# part of every run folder's name; EXP_ROOT, the folder of the runs; PYTHON; JOBS, cells at a time, for networks that leave
# a GPU or most cores idle: the output of each cell is then in <EXP_ROOT>/logs.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    echo "grid.sh is what rq1.sh to rq4.sh share; run one of these, or see their --help" >&2
    exit 2
fi
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
SETTINGS=${SETTINGS:-}
NAME=${NAME:-$(basename "$0" .sh)}
EXP_ROOT=${EXP_ROOT:-exp}
JOBS=${JOBS:-1}
DRY_RUN=
failures=()
running=() # with JOBS: processes of cells; their labels have the same index in `labels`
labels=()
planned=() # arguments of all cells of a dry run; a semicolon ends each cell

case "${1:-}" in
    "") ;;
    --dry_run) DRY_RUN=--dry_run ;;
    --help | -h)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/$(basename "$0")"
        echo
        sed -n '/^[^#]/q;/^# Environment/,$s/^# \{0,1\}//p' scripts/grid.sh
        exit
        ;;
    *)
        echo "error: $1: allowed are --dry_run and --help; all else is set by variables" >&2
        exit 2
        ;;
esac

known() { # method ... -> ends the script if one of them is in no table of methods
    "$PYTHON" - "$@" <<'END' || exit 2
import sys
from models import METHODS
from utils.errors import UserError
try:
    for name in sys.argv[1:]:
        METHODS.canonical(name)
except UserError as error:
    sys.exit(f"error: {error}")
END
}

case $JOBS in
    *[!0-9]* | 0*)
        echo "error: JOBS: $JOBS is not allowed; give at least 1" >&2
        exit 2
        ;;
esac

case " $SETTINGS " in
    *" --plugin"*) ;; # brings methods of its own
    *) known ${METHODS:-} ${SELECTIVE:-} ${CENTRAL:-} ;;
esac

registered() { # [method ...] -> those of them that are in the table of methods; all of the table if none is named
    "$PYTHON" -c 'import sys; from models import METHODS; print(*[m for m in sys.argv[1:] or METHODS if m in METHODS])' "$@"
}

cell() { # method data epsilon name [key=value ...]
    local method=$1 data=$2 epsilon=$3 name=$4 code found
    local label="$method $data epsilon $epsilon"
    [ "$name" = "$NAME" ] || label="$label $name"
    shift 4
    # shellcheck disable=SC2206  # SETTINGS is a list of arguments
    local words=("$@" $SETTINGS)
    local named=(--method "$method" --data_name "$data" --epsilon "$epsilon" --exp_description "$name")
    local place=(--exp_root "$EXP_ROOT")
    if [ -n "$DRY_RUN" ]; then
        planned+=("$label" "${named[@]}" "${place[@]}" "${words[@]}" ";")
        return
    fi
    found=$("$PYTHON" scripts/grid_cells.py "done" "$EXP_ROOT" "$method" "$data" "$epsilon" "$name" "${words[@]}")
    code=$?
    if [ $code -eq 0 ]; then
        echo "done already: $label"
        return
    elif [ $code -eq 3 ]; then
        failures+=("$label ($found)")
        return
    elif [ $code -eq 4 ]; then
        named+=(--resume_exp "$found")
        label="$label, begun in $found"
    elif [ $code -ne 5 ]; then
        failures+=("$label (grid_cells.py: exit code $code)")
        return
    fi
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do sleep 0.2; done
    echo "running: $label"
    if [ "$JOBS" -eq 1 ]; then
        "$PYTHON" run.py "${named[@]}" "${place[@]}" "${words[@]}"
        judged $? "$label"
        return
    fi
    local log
    log=$EXP_ROOT/logs/$(date +%F-%H-%M-%S)-${label//[^A-Za-z0-9.]/-}.txt
    mkdir -p -m 700 "$EXP_ROOT/logs"  # what the runs print are metrics without noise
    "$PYTHON" run.py "${named[@]}" "${place[@]}" "${words[@]}" >"$log" 2>&1 &
    running+=($!)
    labels+=("$label, see $log")
}

stop_all() { # Ctrl-C does not reach cells that run in the background
    local left
    left=$(jobs -rp)
    [ -z "$left" ] || echo "stopping, once $(echo "$left" | wc -l | tr -d ' ') cells have saved what they did" >&2
    # shellcheck disable=SC2086  # numbers
    [ -z "$left" ] || kill -TERM $left 2>/dev/null
    wait
    echo "stopped" >&2
    exit 130
}
[ "$JOBS" -eq 1 ] || trap stop_all INT TERM

judged() { # exit code of a run, label: ends the script if the run was stopped
    if [ "$1" -eq 130 ]; then
        stop_all
    elif [ "$1" -eq 3 ]; then
        echo "metrics are missing: $2"
    elif [ "$1" -ne 0 ]; then
        failures+=("$2 (exit code $1)")
    fi
}

finish() { # collect the results in <EXP_ROOT>/table.csv, and report failed cells
    if [ -n "$DRY_RUN" ]; then
        "$PYTHON" scripts/grid_cells.py dry_run "${planned[@]}"
        exit
    fi
    local i
    for ((i = 0; i < ${#running[@]}; i++)); do
        wait "${running[i]}"
        judged $? "${labels[i]}"
    done
    if [ -d "$EXP_ROOT" ]; then
        "$PYTHON" scripts/collect.py --exp_root "$EXP_ROOT" || failures+=("collect.py")
    fi
    if [ ${#failures[@]} -gt 0 ]; then
        printf 'failed: %s\n' "${failures[@]}" >&2
        exit 1
    fi
}
