"""Bars and times for a person."""

import pytest

from utils.progress import duration, progress


def test_a_bar_counts_to_its_total(capsys):
    assert list(progress(range(2, 5), "walk", total=5, initial=2)) == [2, 3, 4]
    assert "5/5" in capsys.readouterr().err
    assert list(progress((n for n in "ab"), "spell", total=2, unit="letter")) == ["a", "b"]
    assert "2/2" in capsys.readouterr().err


def test_without_remaining_steps_there_is_no_bar(capsys):
    assert list(progress(range(0), "generate", unit="batch")) == []
    assert list(progress(range(5, 5), "pretrain", total=5, initial=5)) == []
    assert capsys.readouterr().err == ""


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
