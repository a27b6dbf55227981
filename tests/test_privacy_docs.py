"""docs/privacy.md names tests as evidence: they must exist, and every pitfall must have some."""

import ast
import re
from functools import cache

import pytest
from tiny_runs import ROOT

TEXT = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(\w+\.py)::(\w+)`", TEXT)))


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_every_named_test_exists(file, test):
    assert test.startswith("test_") and test in names_in(file)


def test_every_pitfall_names_what_would_fail():
    table = TEXT.split("## Ways to lose the guarantee")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20
    for pitfall, severity, *_, tests in rows:
        assert re.search(r"\b(critical|theoretical|negligible)\b", severity), pitfall
        assert "::" in tests, pitfall


def test_the_readme_points_here():
    assert "(docs/privacy.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
