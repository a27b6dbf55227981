"""Collect the results of all runs in one table: python scripts/collect.py --exp_root exp

Writes <exp_root>/table.csv, one row per finished run and one column per metric. Collecting again replaces the rows of
the runs that are there and keeps the rows of runs whose folder has gone. What is left out is listed on stderr.
"""

import argparse
import csv
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.arguments import Parser
from utils.artefacts import CONFIG, RESULTS
from utils.errors import UserError
from utils.files import read_json, write_text
from utils.program import program, run_process

FACTS = (
    "method", "data", "epsilon", "delta", "private", "spent_epsilon", "selection_epsilon", "noise_seeded", "seed",
    "preset", "preset_tier", "borrowed", "precision", "eval_mode", "overrides", "git",
)  # fmt: skip
JUDGED = ("recipe", "eval_seed")  # of the evaluations whose values are in the row, the latest first
RUN = "run"  # the run's folder, relative to exp_root: the key of a row
UNREADABLE = 1  # exit code: the table is written, but some results are damaged


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--exp_root", type=Path, default=Path("exp"), metavar="DIR", help="default: exp")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the table (default: <exp_root>/table.csv)"
    )
    return parser.parse_args(argv)


@program
def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    output = arguments.output or arguments.exp_root / "table.csv"
    rows, damaged = collect(arguments.exp_root)
    kept = [row for row in read_table(output) if row[RUN] not in {found[RUN] for found in rows}]
    for folder in unfinished(arguments.exp_root):
        print(f"unfinished: {folder}", file=sys.stderr)
    for path, reason in damaged:
        print(f"unreadable: {path}: {reason}", file=sys.stderr)
    for row in kept:
        there = (arguments.exp_root / row[RUN]).exists()
        reason = "its results cannot be read" if there else "its folder is not there"
        print(f"kept from the table, {reason}: {row[RUN]}", file=sys.stderr)
    write_text(output, as_csv(sorted(kept + rows, key=lambda row: row[RUN])))
    count = len(kept) + len(rows)
    print(f"{output}: {count} run{'' if count == 1 else 's'}")
    return UNREADABLE if damaged else 0


def collect(exp_root: Path) -> tuple[list[dict], list[tuple[Path, str]]]:
    """Rows of all finished runs, and (file, reason) of every unreadable file."""
    if not exp_root.is_dir():
        raise UserError(f"--exp_root: {exp_root} is not a folder; give the folder of the runs")
    rows, damaged = [], []
    for path in sorted(exp_root.rglob(RESULTS)):
        try:
            results = read_json(path)
            facts = {name: results.get(name) for name in FACTS}
            facts["overrides"] = " ".join(facts["overrides"] or [])
            run = path.parent.relative_to(exp_root).as_posix()
            rows.append({**facts, **judged(results), RUN: run, **results["metrics"]})
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged.append((path, f"{type(error).__name__}: {error}"))
    return rows, damaged


def judged(results: dict) -> dict:
    """The settings of the evaluation; several, such as "quick+paper", if evaluations differ."""
    settings = [results["evaluation"]]
    settings += [info["evaluation"] for info in results["metric_info"].values() if "evaluation" in info]
    found = zip(JUDGED, ("recipe", "seed"), strict=True)
    return {column: "+".join(dict.fromkeys(str(entry[key]) for entry in settings)) for column, key in found}


def unfinished(exp_root: Path) -> list[Path]:
    """Folders of runs without results: running, stopped, or pretraining alone."""
    return sorted(path.parent for path in exp_root.rglob(CONFIG) if not path.with_name(RESULTS).exists())


def read_table(path: Path) -> list[dict]:
    """The rows of an earlier table; none if there is no table."""
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; give a file")
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        try:
            if RUN in (table.fieldnames or []):
                return list(table)
        except (UnicodeDecodeError, csv.Error):
            pass
    raise UserError(f"{path}: not a table of runs (it has no column '{RUN}'); move it away")


def as_csv(rows: list[dict]) -> str:
    """Facts first, then the metrics sorted by name; values that a run does not have stay empty."""
    metrics = sorted({name for row in rows for name in row} - {*FACTS, *JUDGED, RUN})
    text = io.StringIO()
    writer = csv.DictWriter(text, [*FACTS, *JUDGED, RUN, *metrics], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    run_process(main)
