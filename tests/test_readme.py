"""Every command that README.md shows works: python lines compose, make lines name a target."""

import re
import shlex
from itertools import pairwise

import pytest
from tiny_runs import ROOT, call

import run as run_program
from models import METHODS
from scripts import collect, prepare_data, prepare_weights, test_classifier
from utils.config import load_config

README = ROOT / "README.md"
COMPOSING = {"run.py": run_program.main, "scripts/test_classifier.py": test_classifier.main}
PARSING = {
    "eval.py": lambda argv: load_config(argv, METHODS, program="eval"),
    "scripts/prepare_data.py": prepare_data.parse_arguments,
    "scripts/prepare_weights.py": prepare_weights.parse_arguments,
    "scripts/collect.py": collect.parse_arguments,
}


def commands() -> list[str]:
    """The python and make lines of README.md's code blocks, continued lines joined, comments removed."""
    if not README.exists():
        return []
    blocks = re.findall(r"^```\w*\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.sub(r"^(\$ |\.venv/bin/)", "", line) for line in lines]
    return [line for line in found if re.match(r"(python|make) ", line)]


pytestmark = pytest.mark.skipif(not README.exists(), reason="there is no README.md")


def test_the_two_commands_are_at_the_top():
    assert {"make quickstart", "make test"} <= {shlex.join(shlex.split(c, comments=True)) for c in commands()}


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("make ")])
def test_make_targets_exist(command):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = [word for word in shlex.split(command, comments=True)[1:] if "=" not in word]
    assert wanted and set(wanted) <= set(targets)


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("python ")])
def test_python_commands_compose(command, tmp_path):
    words = shlex.split(command, comments=True)[1:]
    program, argv = words[0].removeprefix("./"), words[1:]
    assert (ROOT / program).is_file(), f"{program} does not exist"
    if program in PARSING:
        assert PARSING[program](argv)
        return
    assert program in COMPOSING, (
        f"{program}: no check of this script's commands; add it to COMPOSING or PARSING"
    )
    if stand_in := placeholder(argv):
        pytest.skip(f"{stand_in} stands for something of the user's own")
    stops = [] if {"--dry_run", "--print_config"} & set(argv) else ["--dry_run"]
    outcome = call(COMPOSING[program], [*argv, "--exp_root", str(tmp_path / "exp"), *stops])
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "exp").exists()


def placeholder(argv: list[str]) -> str | None:
    """A word that only the reader can fill in: <something>, or a dataset that is not one of the toolkit's."""
    known = {path.stem for path in (ROOT / "configs/data").glob("*.yaml")}
    named = [value for flag, value in pairwise(argv) if flag in ("--data_name", "-dn")]
    own = [word for word in argv if "<" in word] + [name for name in named if name not in known]
    return own[0] if own else None
