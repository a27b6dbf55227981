"""Bars and times for a person."""

import io
import logging

import pytest

from utils import log as logs
from utils.progress import duration, open_bar, progress
from utils.runtime import log


def test_a_bar_counts_to_its_total(capsys):
    assert list(progress(range(2, 5), "walk", total=5, initial=2)) == [2, 3, 4]
    assert "5/5" in capsys.readouterr().err
    assert list(progress((n for n in "ab"), "spell", total=2, unit="letter")) == ["a", "b"]
    assert "2/2" in capsys.readouterr().err


def test_without_remaining_steps_there_is_no_bar(capsys):
    assert list(progress(range(0), "generate", unit="batch")) == []
    assert list(progress(range(5, 5), "pretrain", total=5, initial=5)) == []
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What a person sees: a carriage return goes back to the left edge, and later text covers earlier text."""
        found = []
        for line in self.getvalue().split("\n"):
            seen = ""
            for text in line.split("\r"):
                seen = text + seen[len(text) :]
            found.append(seen.rstrip())
        return found


@pytest.fixture
def streams(monkeypatch):
    """Replaces both standard streams by one, as on a terminal or with 2>&1; the log writes to it."""
    kept = log.handlers, log.level, log.propagate, logging.raiseExceptions

    def replace(stream):
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setattr("sys.stderr", stream)
        logs.to_terminal()
        return stream

    yield replace
    log.handlers, log.level, log.propagate, logging.raiseExceptions = kept


def log_while_bars_are_open() -> None:
    for step in progress(range(3), "walk"):
        log.info("message %d", step)
    with open_bar(desc="fetch", total=1):
        log.info("message 3")


def test_a_message_does_not_share_its_line_with_a_bar(streams):
    terminal = streams(Terminal())
    log_while_bars_are_open()
    assert {f"message {number}" for number in range(4)} <= set(terminal.lines())
    assert "3/3" in terminal.getvalue()


def test_in_a_file_bars_and_messages_are_lines(streams):
    output = streams(io.StringIO())
    log_while_bars_are_open()
    text = output.getvalue()
    assert "\r" not in text and "3/3" in text
    assert {f"message {number}" for number in range(4)} <= set(text.split("\n"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.6, "1 second"),
        (119, "119 seconds"),
        (120, "2.0 minutes"),
        (7200, "2.0 hours"),
        (200000, "2.3 days"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
