"""docs/plugins.md: its example runs, and its tables name what there is."""

import inspect
import re
from dataclasses import fields

from tiny_runs import ROOT, execute

from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData

PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")


def write_example(folder) -> None:
    """Every file of the page that is followed by a code block."""
    found = re.findall(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in found] == [
        "my_plugin.py",
        "configs/method/ClassMeans.yaml",
        "configs/presets/ClassMeans.yaml",
    ]
    for name, text in found:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_the_example_runs(tmp_path):
    write_example(tmp_path)
    (command,) = re.findall(r"^python run\.py (.*)$", PAGE, re.MULTILINE)
    more = ["--exp_root", str(tmp_path / "exp"), "eval=none", "gen.data_num=40"]
    done = execute("run.py", [*command.split(), *more], PYTHONPATH=str(tmp_path))
    assert done.code == 0, done.err
    assert (done.folder / "gen" / "gen.npz").is_file()
    assert "class sums" in (done.folder / "privacy_card.md").read_text()


def test_all_calls_of_private_data_are_listed():
    public = {
        name
        for name, member in inspect.getmembers(PrivateData, inspect.isfunction)
        if not name.startswith("_") and name != "report"
    }
    for name in public:
        arguments = list(inspect.signature(getattr(PrivateData, name)).parameters)[1:]
        listed = re.search(rf"^\| `{name}\(([^)]*)\)`", PAGE, re.MULTILINE)
        assert listed, name
        assert [text.split("=")[0].strip() for text in listed[1].split(",")] == arguments


def test_all_fields_of_a_release_are_listed():
    table = PAGE.partition("\n## Release\n")[2]
    named = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    assert {field.name for field in fields(Release)} <= named
