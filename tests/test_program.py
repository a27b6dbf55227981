"""How programs start and end: words that are no text, output that cannot be written, what the machine lacks."""

import ast
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import ROOT, call

import eval as eval_program
import run as run_program
from data.prepared import new_prepared, reserve
from scripts import prepare_data
from utils.errors import UserError
from utils.places import weights_root
from utils.program import program

RUNS_A_PROCESS = sorted(
    path
    for path in (*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


def ending(error: BaseException):
    """The outcome of a program that raises `error`."""

    @program
    def main(argv: list[str]) -> int:
        raise error

    return call(main, [])


@pytest.mark.parametrize("path", RUNS_A_PROCESS, ids=lambda path: path.name)
def test_every_program_ends_in_one_place(path):
    code = ast.parse(path.read_text(encoding="utf-8"))
    (main,) = (node for node in code.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert [ast.unparse(decorator) for decorator in main.decorator_list] == ["program"]
    assert ast.unparse(code.body[-1].body[0]) == "run_process(main)"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("seed: x is not allowed"), ["seed: x"]),
        (OSError(errno.ENOSPC, "No space left on device", "/a/file"), ["/a/file", "No space left", "free space"]),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ["Disk quota exceeded"]),
        (PermissionError(errno.EACCES, "Permission denied", "/a/file"), ["/a/file", "Permission denied"]),
        (OSError(errno.EROFS, "Read-only file system", "/a/file"), ["/a/file", "Read-only"]),
        (OSError(errno.EIO, "Input/output error", "/a/file"), ["/a/file", "Input/output error"]),
        (MemoryError(), ["out of memory", "gen.batch_size"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), ["out of memory"]),
    ],
)  # fmt: skip
def test_missing_resources_are_reported_in_one_line(error, words):
    refusal = ending(error).refusal
    assert all(word in refusal for word in words), refusal


def test_exhausted_cpu_memory_is_reported_in_one_line():
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    refusal = ending(error.value).refusal
    assert "out of memory" in refusal
    assert not re.search(r"\d{5}", refusal), "how much was asked for may depend on private images"


@pytest.mark.parametrize(
    "error", [RuntimeError("a fault"), FileNotFoundError(errno.ENOENT, "x"), KeyError("k")]
)
def test_faults_of_the_code_keep_their_traceback(error):
    with pytest.raises(type(error)):
        ending(error)


@pytest.mark.parametrize("word", ["seed=1\r", "digits_8\r", "a\x00b", "\x1b[0m", "a\nb", "caf\udce9"])
def test_arguments_that_are_not_text_are_refused(word):
    @program
    def main(argv: list[str]) -> int:
        return 0

    shown = r"'caf\xe9'" if word == "caf\udce9" else repr(word)
    assert shown in call(main, ["seed=2", word]).refusal


# ------------------------------------------------------------------------------------------ standard streams

SPEAKS = """
import logging, sys
from utils.log import to_terminal
from utils.program import program, run_process
from utils.progress import progress
from utils.runtime import log

@program
def main(argv):
    to_terminal()
    with open("written.txt", "w", encoding="utf-8") as file:
        for step in progress(range(2), "walk"):
            print("print", step)
            log.info("caf\\xe9 \\xb1 %d", step)
            print("complaint", step, file=sys.stderr)
        file.write("the end")
    return 5

run_process(main)
"""


def speak(folder: Path, redirection: str, **environment: str) -> subprocess.CompletedProcess:
    (folder / "speaks.py").write_text(SPEAKS, encoding="utf-8")
    return subprocess.run(
        ["sh", "-c", f"'{sys.executable}' speaks.py {redirection}"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "redirection",
    [">&-", "2>&-", ">&- 2>&- <&-", "2>/dev/full", ">/dev/full", ">/dev/full 2>&1", "2>&1 | true; exit 5"],
)
def test_output_that_nobody_takes_ends_no_program(tmp_path, redirection):
    if "/dev/full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    done = speak(tmp_path, redirection)
    assert done.returncode == 5, done.stderr
    assert (tmp_path / "written.txt").read_text() == "the end"  # and nothing of what was printed
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_an_ascii_console_loses_no_line(tmp_path, environment):
    done = speak(tmp_path, "", PYTHONCOERCECLOCALE="0", **environment)
    lines = done.stdout.decode("utf-8").splitlines()
    assert len(lines) == 4 and [line for line in lines if re.match(r"caf(é|\\xe9) (±|\\xb1) 1", line)]


# ------------------------------------------------------------------------------------------ homes


def test_a_user_without_a_home_has_a_place_for_weights(monkeypatch, tmp_path):
    def nobody(_):
        raise KeyError("uid not found")

    monkeypatch.chdir(tmp_path)
    for variable in ("HOME", "DPIB_WEIGHTS_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert weights_root() == Path("weights")
    assert call(eval_program.main, ["--list"]).code == 0


@pytest.mark.parametrize("flag", ["--exp_root", "--data_root", "--weights_root", "--config_dir"])
def test_an_unknown_home_is_reported_in_one_line(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal = call(run_program.main, ["--method", "Noise", flag, "~nosuchuser/x", "--print_config"]).refusal
    assert "~nosuchuser/x" in refusal


# ------------------------------------------------------------------------------------------ disks


def test_a_mapped_file_has_its_place_on_the_disk(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(b"head" + bytes(10))
    os.truncate(path, 3 << 20)
    reserve(path)
    assert path.stat().st_blocks * 512 >= 3 << 20
    assert path.read_bytes()[:4] == b"head"


def test_a_file_system_without_reservation_is_filled_with_zeros(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    test_a_mapped_file_has_its_place_on_the_disk(tmp_path)


def test_a_disk_that_fills_ends_preparation_with_one_line(tmp_path, monkeypatch):
    np.savez(tmp_path / "mine.npz", x=np.zeros((20, 8, 8), np.uint8), y=np.arange(20) % 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    words = [
        "--data_name",
        "mine",
        "--source",
        str(tmp_path / "mine.npz"),
        "--data_root",
        str(tmp_path / "root"),
    ]
    refusal = call(prepare_data.main, words).refusal
    assert "No space left" in refusal and str(tmp_path / "root" / "mine") in refusal
    assert list((tmp_path / "root").iterdir()) == []


def test_a_file_that_grows_too_large_kills_no_process(tmp_path):
    """The limit on the size of a file stands for a disk without space, which kills who writes to a mapped file."""
    np.savez_compressed(tmp_path / "mine.npz", x=np.zeros((400, 64, 64), np.uint8), y=np.arange(400) % 2)
    words = [
        "--data_name",
        "mine",
        "--source",
        str(tmp_path / "mine.npz"),
        "--data_root",
        str(tmp_path / "root"),
    ]
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 20}, {1 << 20}))"
    code = f"import resource, sys; {limit}; sys.argv[1:] = {words!r}; "
    code += "from scripts.prepare_data import *; run_process(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "File too large" in done.stderr, (done.returncode, done.stderr)
    assert list((tmp_path / "root").iterdir()) == []


def test_an_error_about_a_source_keeps_its_name(tmp_path):
    with pytest.raises(OSError, match="source"), new_prepared(tmp_path / "set", (1, 8, 8)):
        raise PermissionError(errno.EACCES, "Permission denied", "source.png")
    with pytest.raises(OSError, match="set"), new_prepared(tmp_path / "set", (1, 8, 8)):
        raise OSError(errno.ENOSPC, "No space left on device")
