"""utils/runtime.py: a run gets its folder once, from the pipeline."""

import ast
from pathlib import Path

import pytest
from test_architecture import EVERYTHING, name, tree

from utils.runtime import Runtime


def test_a_run_is_attached_to_its_folder_once(tmp_path):
    stages = []
    runtime = Runtime()
    runtime.attach(tmp_path, stages.append)
    runtime.snapshot("train")
    assert (runtime.folder, stages) == (tmp_path, ["train"])
    with pytest.raises(RuntimeError, match="already"):
        runtime.attach(tmp_path / "other", stages.append)


def test_a_process_without_a_folder_is_attached_once():
    runtime = Runtime()
    runtime.attach(None, [].append)
    with pytest.raises(RuntimeError, match="already"):
        runtime.attach(Path("other"), [].append)


def test_nothing_else_changes_the_runtime():
    for path in EVERYTHING:
        targets = [
            ast.unparse(target)
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Assign | ast.AugAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        ]
        assert not [target for target in targets if "runtime." in target], name(path)
