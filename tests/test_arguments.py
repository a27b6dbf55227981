"""Flags and numbers of every command line: only plain decimal numbers, no abbreviation, the nearest flag is named."""

import importlib
import math
from pathlib import Path

import pytest
from tiny_runs import call

import run as run_program
from models import METHODS
from utils.arguments import Parser, decimal_number, one_of, whole_number
from utils.config import load_config
from utils.errors import UserError

MISREAD = [
    "010",
    "0o10",
    "0x10",
    "0b1",
    "1_000",
    " 5",
    "5 ",
    "\N{FULLWIDTH DIGIT FIVE}",
    "1e0_1",
    "1:30",
    "00",
    "01.5",
]
NOT_WHOLE = ["1.5", "1e3", "inf", "x", ""]
PROGRAMS = [
    f"scripts.{path.relative_to('scripts').with_suffix('').as_posix().replace('/', '.')}"
    for path in sorted(Path("scripts").rglob("*.py"))
    if "parse_args(" in path.read_text()
]


def parsed(kind, *words: str):
    parser = Parser(prog="program")
    parser.add_argument("--number", type=kind)
    return parser.parse_args([*words]).number


@pytest.mark.parametrize("text", [*MISREAD, *NOT_WHOLE])
def test_a_whole_number_is_read_in_one_way_only(text):
    with pytest.raises(UserError) as refused:
        parsed(whole_number, f"--number={text}")
    assert "--number" in str(refused.value) and repr(text) in str(refused.value)


@pytest.mark.parametrize("text", [*MISREAD, "x", "", "nan"])
def test_a_decimal_number_is_read_in_one_way_only(text):
    with pytest.raises(UserError, match="--number"):
        parsed(decimal_number, f"--number={text}")


def test_plain_numbers_are_read():
    assert [parsed(whole_number, f"--number={text}") for text in ("0", "10", "-3", "+4")] == [0, 10, -3, 4]
    texts = ("0", "0.5", ".5", "5.", "1e-05", "-2.5E3", "inf")
    assert [parsed(decimal_number, f"--number={text}") for text in texts] == [
        0, 0.5, 0.5, 5, 1e-5, -2500, math.inf
    ]  # fmt: skip


@pytest.mark.parametrize("text", MISREAD)
@pytest.mark.parametrize("key", ["seed", "gen.data_num", "privacy.delta", "setup.omp_n_threads"])
def test_no_setting_is_another_number_than_it_looks(text, key):
    with pytest.raises(UserError) as refused:
        load_config(["--method", "Noise", "--data_name", "digits_8", f"{key}={text}"], METHODS)
    assert str(refused.value).startswith(f"{key}: ") and text in str(refused.value)


@pytest.mark.parametrize("text", MISREAD)
def test_no_epsilon_is_another_number_than_it_looks(text):
    refusal = call(
        run_program.main, ["--method", "Noise", "--data_name", "digits_8", "--epsilon", text]
    ).refusal
    assert "--epsilon" in refusal and text in refusal


def test_numbers_in_lists_are_plain_too_and_texts_are_not_numbers():
    argv = ["--method", "DPDM", "--data_name", "digits_8"]
    with pytest.raises(UserError, match=r"ch_mult: \[1,010\]"):
        load_config([*argv, "model.network.ch_mult=[1,010]"], METHODS)
    assert load_config([*argv, "model.network.ch_mult=[1, 2]"], METHODS).method_config
    names = ",".join(f"'0{digit}'" for digit in range(10))
    config = load_config([*argv, f"sensitive_data.class_names=[{names}]"], METHODS)
    assert config.sensitive_data.class_names[1] == "01"


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_script_suggests_the_nearest_flag(name):
    outcome = call(importlib.import_module(name).main, ["--hepl"])
    assert "--hepl" in outcome.refusal and "did you mean '--help'" in outcome.refusal


def test_there_are_scripts_to_test():
    assert {"scripts.prepare_data", "scripts.collect", "scripts.benchmarks.bench_eval"} <= set(PROGRAMS)


def test_a_flag_is_not_completed_and_not_repeated():
    for words, found in ((["--numb", "1"], "--number"), (["--number", "1", "--number", "2"], "twice")):
        with pytest.raises(UserError, match=found):
            parsed(whole_number, *words)


def test_a_choice_suggests_the_nearest_one():
    with pytest.raises(UserError, match=r"--number: .*'incepton'; did you mean 'inception'"):
        parsed(one_of(["inception", "clip"]), "--number", "incepton")
