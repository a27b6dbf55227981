"""Programs that end early: signals, output that cannot be written, disks that are full or protected, no memory."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from test_distributed import error_lines, failing
from tiny_runs import ROOT, arguments, call

import eval as eval_program
import run as run_program
from utils.stopping import STOP_SIGNALS, StoppedBySignal, exit_code, raise_swallowed, signals_interrupt


def terminate(*_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_interrupts_once(number):
    before = signal.getsignal(number)
    with pytest.raises(StoppedBySignal) as stop, signals_interrupt():
        try:
            signal.raise_signal(number)  # in this thread: os.kill may choose another one, which is slower
        finally:
            signal.raise_signal(number)  # what `timeout` does
            signal.raise_signal(signal.SIGTERM)  # what SLURM does after the signal that was asked for
    assert exit_code(stop.value) == 128 + number
    assert signal.getsignal(number) is before


def test_an_ignored_sigterm_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals_interrupt():
            terminate()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_exit_codes():
    assert (exit_code(KeyboardInterrupt()), exit_code(StoppedBySignal(signal.SIGTERM))) == (130, 143)


def test_sigterm_in_a_run_prints_how_to_resume(tmp_path, monkeypatch):
    monkeypatch.setattr("models.noop.Noise.generate", terminate)
    stopped = call(run_program.main, arguments("Noise", tmp_path, "eval=none"))
    assert stopped.code == 143 and "Traceback" not in stopped.err
    assert (
        f"stopped; to continue from the last snapshot: python run.py --resume_exp {stopped.folder}"
        in stopped.out
    )


def test_a_signal_that_a_library_swallows_stops_the_next_step():
    with pytest.raises(StoppedBySignal) as stop, signals_interrupt():
        with contextlib.suppress(StoppedBySignal):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
        raise_swallowed()
    assert exit_code(stop.value) == 128 + signal.SIGUSR1
    raise_swallowed()  # nothing is left for the next program of this process


def test_sigterm_in_eval(monkeypatch):
    monkeypatch.setattr("evaluation.listing.listing", terminate)
    outcome = call(eval_program.main, ["--list"])
    assert (outcome.code, outcome.err) == (143, "stopped\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_the_process(number, tmp_path):
    argv = arguments("DPDM", tmp_path, "eval=none", "train.n_epochs=5000")
    process = subprocess.Popen(
        [sys.executable, "run.py", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("*/*/config.yaml")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    process.terminate()
    out, err = process.communicate(timeout=60)
    (folder,) = tmp_path.glob("*/*")
    assert process.returncode == 128 + number, err
    assert f"--resume_exp {folder}" in out and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("receivers", "rank"),
    [("os.killpg(os.getpgid(0), signal.SIGTERM)", 1), ("os.kill(os.getpid(), signal.SIGTERM)", 0)],
)
def test_sigterm_ends_all_processes(tmp_path, receivers, rank):
    outcome = failing(tmp_path, f"{receivers}; time.sleep(3)", rank)
    assert outcome.code == 143, outcome.err
    assert "--resume_exp" in outcome.out
    assert "Traceback" not in outcome.err and not error_lines(outcome)


@pytest.mark.parametrize(
    ("program", "argv", "code"),
    [
        ("run.py", ["--method", "Noise", "--print_config"], 0),
        ("run.py", ["--method", "Noise", "--dry_run"], 0),
        ("eval.py", ["--list"], 0),
        ("run.py", ["--help"], 0),
    ],
)
def test_a_reader_that_has_gone_is_no_error(program, argv, code):
    process = subprocess.Popen(
        [sys.executable, program, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == code
