"""Runs of toy size, which take seconds: call the programs in this process or as a process; read their outcome."""

import atexit
import contextlib
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toys import TOYS, run_settings

ROOT = Path(__file__).resolve().parent.parent

SHARED = ["--data_name", "digits_8", "preset=quick", "gen.data_num=100"]


@dataclass(frozen=True)
class Outcome:
    """Exit code, standard output and standard error of a program."""

    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """The run folder that the program printed."""
        lines = [line for line in self.out.splitlines() if line.startswith("run folder: ")]
        assert lines, f"no run folder was printed (exit code {self.code}): {self.err}"
        return Path(lines[-1].removeprefix("run folder: "))

    @property
    def refusal(self) -> str:
        """The one line that reports a mistake of the user; only progress bars may precede it."""
        assert self.code == 2, (self.code, self.out, self.err)
        lines = [line for line in self.err.splitlines() if line and not re.search(r"\d+%\|", line)]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0]


@functools.cache
def data_root() -> Path:
    """A folder for prepared data, shared by the tests of a process, so that glyphs are rendered once."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def arguments(method: str, exp_root: Path, *more: str) -> list[str]:
    """The command line of a toy run; settings in `more` override those of the toy."""
    keys = {setting.partition("=")[0] for setting in more}
    flags = ["--method", method, "--exp_root", str(exp_root)]
    flags += [] if "--data_root" in more else ["--data_root", str(data_root())]
    shared = SHARED[2:] if "--data_name" in more else SHARED
    settings = [
        setting for setting in [*shared, *run_settings(TOYS[method])] if setting.partition("=")[0] not in keys
    ]
    return [*flags, *settings, *more]


def call(main: Callable[[list[str]], int], argv: list[str]) -> Outcome:
    """Call a program's `main` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return Outcome(code, out.getvalue(), err.getvalue())


def execute(program: str, argv: list[str], prefix: tuple[str, ...] = (), **environment: str) -> Outcome:
    """Run `python <program> <argv>` as a process in the project's folder."""
    command = [*prefix, sys.executable, program, *argv]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=550
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def kill_when(argv: list[str], exp_root: Path, pattern: str) -> Path:
    """Start run.py as a process, kill it when a file of its run matches `pattern`, and return the run folder."""
    process = subprocess.Popen(
        [sys.executable, "run.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(3000):
            if found := list(exp_root.glob(f"*/*/{pattern}")):
                break
            assert process.poll() is None, f"run.py ended with {process.returncode} before it wrote {pattern}"
            time.sleep(0.02)
        assert found, f"run.py did not write {pattern} within a minute"
    finally:
        process.kill()
        process.wait()
    return next(exp_root.glob("*/*"))


def strict_json(path: Path) -> object:
    """The content of a JSON file; fails on NaN and Infinity, which are not JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} contains {constant}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
