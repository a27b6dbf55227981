"""Cells of grid.sh: the state of a cell, and the plans of a dry run.

    python scripts/grid_cells.py done EXP_ROOT METHOD DATA EPSILON NAME [ARGUMENT ...]
    python scripts/grid_cells.py dry_run LABEL [ARGUMENT ...] \\; LABEL [ARGUMENT ...] \\; ...

The arguments of a cell are those of run.py after the flags that name the cell. `done` exits with 0 for a finished cell
and with 5 for a cell that has no run; with 4 for a cell that was started with these arguments, and prints its folder;
with 3 for a cell that was run with other arguments, or whose files are damaged. `dry_run` prints all plans from one
process, since starting a process takes longer than a plan, and lists missing data and weights once.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import record
from utils.artefacts import RESULTS
from utils.command_line import parse_epsilon, read_command_line
from utils.errors import UserError
from utils.files import read_json
from utils.program import program, run_process

# Exit codes of `done`. None of them is 1 or 2, with which Python itself fails: a failure must not start a run.
DONE, DIFFERENT, BEGUN, NOT_DONE = 0, 3, 4, 5
MISSING = "missing: "
STARTED = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-*"  # end of a folder name


@program
def main(argv: list[str]) -> int:
    action, *rest = argv or [""]
    if action not in ("done", "dry_run"):
        print(__doc__)
        return 0 if action in ("--help", "-h") else 2
    return done(*rest) if action == "done" else dry_run(rest)


def done(*cell: str) -> int:
    code, text = state(*cell)
    if text:
        print(text)
    return code


def state(exp_root: str, method: str, data: str, epsilon: str, name: str, *arguments: str) -> tuple[int, str]:
    """(exit code, text to print) of a cell."""
    try:
        stem = f"{data}_eps{parse_epsilon(epsilon)}{name}"
    except UserError:  # run.py reports the mistake
        return NOT_DONE, ""
    others, begun = [], None  # others: runs with other arguments, and these arguments
    for folder in sorted(Path(exp_root).glob(f"{method.lower()}/{stem}-{STARTED}")):
        if not (folder / record.ENVIRONMENT).exists():  # no query was made yet, or it is no run
            continue
        try:
            before, finished = words_of(folder), (folder / RESULTS).exists()
            if finished:
                read_json(folder / RESULTS)
        except UserError as error:
            return DIFFERENT, str(error)
        if sorted(before) != sorted(arguments):
            others.append(("done" if finished else "begun", before))
        elif finished:
            return DONE, ""
        else:
            begun = folder.name
    if begun is not None:
        return BEGUN, begun
    if not others:
        return NOT_DONE, ""
    (how, before), now = others[-1], " ".join(arguments) or "none"
    return (
        DIFFERENT,
        f"was {how} with {' '.join(before) or 'no settings'}, now {now}; another NAME runs it too",
    )


def words_of(folder: Path) -> list[str]:
    """The arguments of the cell that created this run."""
    words = record.command_of(folder)
    if "--exp_root" not in words:
        raise UserError(f"{folder / record.ENVIRONMENT}: not of a run of this grid")
    return words[words.index("--exp_root") + 2 :]


def dry_run(words: list[str]) -> int:
    from pipeline.configuration import run_config
    from pipeline.planning import dry_run as plan
    from utils import distributed
    from utils.log import to_terminal

    to_terminal()
    missing, failed = {}, False
    while words:
        end = words.index(";")
        (label, *argv), words = words[:end], words[end + 1 :]
        print(f"\n{label}", flush=True)
        method, data, epsilon, name, exp_root = argv[1:11:2]  # the flags that name the cell
        code, text = state(exp_root, method, data, epsilon, name, *argv[10:])
        if code == DONE:
            print("done already")
            continue
        elif code == BEGUN:
            print(f"begun in {text}; remaining work:")
            argv = [*argv, "--resume_exp", text]
        elif text:
            print(text)
        try:
            config = run_config(read_command_line(argv, "run"))
            distributed.determine_place(config.setup)
            lines = list(plan(config))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        missing.update(dict.fromkeys(line for line in lines if line.startswith(MISSING)))
        print("\n".join(line for line in lines if not line.startswith(MISSING)), flush=True)
    print("\n".join(["", *missing]) if missing else "")
    return 1 if failed else 0


if __name__ == "__main__":
    run_process(main)
