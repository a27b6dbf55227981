"""Suggestions for unknown names."""

import pytest

from utils.errors import nearest, unknown

METRICS = [
    "accuracy", "authpct", "density", "density_coverage", "fid", "fld", "image_reward", "inception_score", "kid",
    "mind", "precision", "precision_recall",
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("fdi", "fid"),  # as similar to "fld" by the positions of its letters
        ("FDI", "fid"),
        ("acc", "accuracy"),
        ("precisio", "precision"),  # not precision_recall, which starts with it too
        ("is", "inception_score"),
        ("dc", "density_coverage"),
        ("fidd", "fid"),
        ("inceptionscore", "inception_score"),
        ("qqq", None),
        ("", None),
    ],
)
def test_the_nearest_name_is_suggested(given, meant):
    assert nearest(given, METRICS) == meant


def test_initials_and_other_separators_are_understood():
    assert nearest("dls", ["DP-LDM-SD", "DPDM"]) == "DP-LDM-SD"
    assert nearest("dp-ldms", ["DP-LDM-SD", "DPDM"]) == "DP-LDM-SD"


def test_the_error_names_kind_value_suggestion_and_all_entries():
    near, far = (str(unknown("metric", value, ["kid", "fid"])) for value in ("fdi", "xx"))
    assert all(part in near for part in ("metric", "'fdi'", "'fid'?", "fid, kid"))
    assert all(part in far for part in ("metric", "'xx'", "fid, kid")) and "?" not in far
