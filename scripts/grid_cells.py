"""What grid.sh asks about its cells: which are done, and what those of a dry run would do.

    python scripts/grid_cells.py done EXP_ROOT METHOD DATA EPSILON NAME [WORD ...]
    python scripts/grid_cells.py dry_run LABEL [WORD ...] \\; LABEL [WORD ...] \\; ...

A cell's words are what run.py gets after the flags that name the cell. `done` exits with 0 for a cell that is done, 1
for one that is not, and 3 for one that was done with other words. `dry_run` prints all plans from one process, as the
start of a process takes longer than a plan, and what is missing once.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.environment import ENVIRONMENT
from utils.errors import UserError
from utils.run_dir import RESULTS, read_json

NOT_DONE, DIFFERENT = 1, 3  # exit codes of `done`
MISSING = "missing: "
STARTED = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-*"  # how a folder's name ends


def main(argv: list[str]) -> int:
    action, *rest = argv
    return done(*rest) if action == "done" else dry_run(rest)


def done(exp_root: str, method: str, data: str, epsilon: str, name: str, *words: str) -> int:
    try:
        stem = f"{data}_eps{float(epsilon)}{name}"
    except ValueError:  # run.py says what is wrong with it
        return NOT_DONE
    others = []
    for results in sorted(Path(exp_root).glob(f"{method.lower()}/{stem}-{STARTED}/{RESULTS}")):
        try:
            read_json(results)
            others.append(words_of(results.parent))
        except UserError as error:
            print(error)
            return DIFFERENT
        if sorted(others[-1]) == sorted(words):
            return 0
    if not others:
        return NOT_DONE
    print(f"was done with {' '.join(others[-1]) or 'no settings'}, now {' '.join(words) or 'none'}; ", end="")
    print("another NAME runs it too")
    return DIFFERENT


def words_of(folder: Path) -> list[str]:
    """The words of the cell that left this run."""
    command = read_json(folder / ENVIRONMENT)["command"]
    return command[command.index("--exp_root") + 2 :]


def dry_run(words: list[str]) -> int:
    from models import METHODS
    from run import dry_run as plan
    from utils import distributed
    from utils.config import load_config
    from utils.log import to_terminal

    to_terminal()
    missing, failed = {}, False
    while words:
        end = words.index(";")
        (label, *argv), words = words[:end], words[end + 1 :]
        print(f"\n{label}", flush=True)
        method, data, epsilon, name, exp_root = argv[1:11:2]  # the flags that name the cell
        if done(exp_root, method, data, epsilon, name, *argv[10:]) == 0:
            print("done already")
            continue
        try:
            config = load_config(argv, METHODS)
            distributed.take_place(config.setup)
            lines = plan(config).splitlines()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        missing.update(dict.fromkeys(line for line in lines if line.startswith(MISSING)))
        print("\n".join(line for line in lines if not line.startswith(MISSING)), flush=True)
    print("\n".join(["", *missing]) if missing else "")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
