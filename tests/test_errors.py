"""Suggestions for names that are in no table."""

import pytest

from utils.errors import nearest, unknown

METRICS = [
    "accuracy", "authpct", "density", "density_coverage", "fid", "fld", "image_reward", "inception_score", "kid",
    "mind", "precision", "precision_recall",
]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("fdi", "fid"),  # as like "fld" by its letters' places
        ("FDI", "fid"),
        ("acc", "accuracy"),
        ("precisio", "precision"),  # and not precision_recall, which begins with it too
        ("is", "inception_score"),
        ("dc", "density_coverage"),
        ("fidd", "fid"),
        ("inceptionscore", "inception_score"),
        ("qqq", None),
        ("", None),
    ],
)
def test_the_nearest_name(asked, meant):
    assert nearest(asked, METRICS) == meant


def test_words_of_other_separators_and_spellings():
    assert nearest("dls", ["DP-LDM-SD", "DPDM"]) == "DP-LDM-SD"
    assert nearest("dp-ldms", ["DP-LDM-SD", "DPDM"]) == "DP-LDM-SD"


def test_the_error_lists_all():
    assert str(unknown("metric", "fdi", ["kid", "fid"])) == (
        "unknown metric 'fdi'; did you mean 'fid'? Known: fid, kid"
    )
    assert str(unknown("metric", "xx", ["kid", "fid"])) == "unknown metric 'xx'. Known: fid, kid"
