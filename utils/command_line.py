"""The strict command line: flags and key=value settings, in any order.

Nothing is guessed: an unknown flag, a stray word, and a setting that is given twice are errors.
"""

import argparse
import math
import re
from typing import NamedTuple

from utils.errors import UserError, unknown
from utils.sections import check
from utils.typed import without_none
from utils.yaml_numbers import ADVICE, misread_numbers

# Names from other places -> the name here; a target that starts with "--" is a flag, and the error says so.
ALIASES = {
    "train.accountant": "privacy.accountant",
    "train.dp.delta": "privacy.delta",
    "train.dp.epsilon": "--epsilon",
    "privacy.epsilon": "--epsilon",
    "data": "--data_name",
    "public_data": "public_data.name",
}

# Option strings, the programs that have the flag, and what argparse needs to know.
FLAGS = (
    (
        ("--method", "-m"),
        "run test_classifier",
        {
            "default": "PrivImage",
            "help": "synthesizer; run.py without a word lists them (default: %(default)s)",
        },
    ),
    (
        ("--method", "-m"),
        "eval",
        {"default": "PrivImage", "help": "with --exp_path: the run's, if not given"},
    ),
    (
        ("--data_name", "-dn"),
        "run test_classifier",
        {
            "default": "digits_8",
            "help": "dataset: the name of a file in configs/data, or of images that you have prepared (default: "
            "%(default)s)",
        },
    ),
    (
        ("--data_name", "-dn"),
        "eval",
        {
            "default": "digits_8",
            "help": "dataset; if not given, the run's with --exp_path, %(default)s with --images",
        },
    ),
    (
        ("--epsilon", "-e"),
        "run test_classifier",
        {"default": "10", "help": "privacy budget; inf: non-private (default: %(default)s)"},
    ),
    (("--epsilon", "-e"), "eval", {"default": "10", "help": "with --exp_path: the run's, if not given"}),
    (
        ("--exp_description", "-ed"),
        "run eval test_classifier",
        {"default": "", "metavar": "TEXT", "help": "is added to the name of the folder that is made"},
    ),
    (
        ("--resume_exp", "-re"),
        "run",
        {
            "metavar": "RUN",
            "help": "continue this run (its folder or the name of it); given alone, with the run's own settings",
        },
    ),
    (
        ("--exp_path", "-ep"),
        "eval",
        {"metavar": "RUN", "help": "judge the samples of this finished run (its folder) again"},
    ),
    (
        ("--images",),
        "eval",
        {
            "metavar": "PATH",
            "help": "judge these labelled images, whoever made them: an npz, a folder or zip of class folders, or of "
            "files <class>_<rest>.png; no --method and no --epsilon is needed",
        },
    ),
    (
        ("--out",),
        "eval",
        {"metavar": "FOLDER", "help": "with --images: where results go (default: below --exp_root)"},
    ),
    (("--metrics",), "eval", {"metavar": "A,B", "help": "short for eval.metrics=[A,B]"}),
    (
        ("--list",),
        "eval",
        {"action": "store_true", "help": "show metrics, extractors and classifiers, and what is missing"},
    ),
    (
        ("--config_dir",),
        "run eval test_classifier",
        {"metavar": "FOLDER", "help": "more YAML files; with a config.yaml of its own it replaces configs/"},
    ),
    (
        ("--plugin",),
        "run eval test_classifier",
        {
            "action": "append",
            "default": [],
            "metavar": "MODULE",
            "help": "import this module, which registers its methods; its configs/ is searched too (repeatable)",
        },
    ),
    (
        ("--data_root",),
        "run eval test_classifier",
        {"metavar": "FOLDER", "help": "prepared datasets (default: $DPIB_DATA_ROOT, else dataset)"},
    ),
    (
        ("--exp_root",),
        "run eval test_classifier",
        {"default": "exp", "metavar": "FOLDER", "help": "folder of all runs (default: %(default)s)"},
    ),
    (
        ("--weights_root",),
        "run eval test_classifier",
        {
            "metavar": "FOLDER",
            "help": "downloaded weights (default: $DPIB_WEIGHTS_ROOT, else ~/.cache/dp-image-bench)",
        },
    ),
    (
        ("--dry_run",),
        "run",
        {
            "action": "store_true",
            "help": "print the privacy plan, the networks, the time and what is missing, and stop",
        },
    ),
    (
        ("--dry_run",),
        "eval test_classifier",
        {"action": "store_true", "help": "check what is given, and stop"},
    ),
    (
        ("--print_config",),
        "run eval test_classifier",
        {"action": "store_true", "help": "print every value with the layer that set it, and stop"},
    ),
)

REPEATABLE = ("plugin",)
LARGEST_EPSILON = 1000  # more bounds nothing, and takes the accountants minutes
PURPOSE = {
    "run": "Train one synthesizer on one dataset at one privacy budget, generate, and evaluate.",
    "eval": "Judge a finished run, or any labelled images, against a dataset.",
    "test_classifier": "Accuracy of the configured classifiers when they are trained on the real images. Not private; "
    "takes the settings of run.py, of which method and epsilon change nothing else.",
}
FILES = {"run": "run.py", "eval": "eval.py", "test_classifier": "scripts/test_classifier.py"}
SETTINGS_HELP = (
    "Settings are given as key=value, for example: privacy.delta=1e-5 seed=1 preset=paper eval.metrics=[accuracy]. "
    "--print_config lists them all."
)


class CommandLine(NamedTuple):
    """A command line that has been read."""

    flags: argparse.Namespace
    settings: dict[str, str]  # key -> text, aliases replaced
    given: set[str]  # names of the flags that were given
    arguments: tuple[str, ...]  # as they were given, without the program's name


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors."""

    def error(self, message: str) -> None:
        raise UserError(message)


def parser(program: str) -> argparse.ArgumentParser:
    """The flags of `program`, a key of FILES."""
    result = _Parser(
        prog=FILES[program],
        usage="%(prog)s [flags] [key=value ...]",
        description=PURPOSE[program],
        epilog=SETTINGS_HELP,
        allow_abbrev=False,
    )
    for names, programs, options in FLAGS:
        if program in programs.split():
            result.add_argument(*names, **options)
    return result


EXAMPLES = {
    "run": (
        ("--method PrivImage --data_name digits_8 --epsilon 10", "a whole run, minutes on a CPU"),
        ("--method DPDM --data_name mnist_28 --dry_run", "its privacy plan and its time"),
        ("--method DPDM --data_name mnist_28 --print_config", "all settings"),
        ("--help", "all flags"),
    ),
    "eval": (
        ("--exp_path exp/privimage/<run>", "a finished run again"),
        ("--exp_path exp/privimage/<run> --metrics fid,kid", "more metrics of it"),
        ("--images my_samples.zip --data_name digits_8 --out judged", "images of any origin"),
        ("--list", "all metrics, and what they need"),
        ("--help", "all flags"),
    ),
}


def short_help(program: str) -> str:
    """What `program` says to a command line without a word."""
    width = max(len(words) for words, _ in EXAMPLES[program])
    lines = [f"  python {program}.py {words:<{width}}    {what}" for words, what in EXAMPLES[program]]
    return "\n".join((f"usage: python {program}.py [flags] [key=value ...]", "", *lines))


def read_command_line(argv: list[str], program: str) -> CommandLine:
    """Read the arguments of `program`, a key of FILES. Raises UserError for a mistake in them."""
    given = _given_flags(argv, program)
    flags, rest = parser(program).parse_known_args(argv)
    settings = _split_settings(rest)
    if "metrics" in given:
        if "eval.metrics" in settings:
            raise UserError("--metrics and eval.metrics are both given; they mean the same")
        settings["eval.metrics"] = f"[{flags.metrics}]"
    return CommandLine(flags, settings, given, tuple(argv))


def _given_flags(argv: list[str], program: str) -> set[str]:
    """Names of the flags in `argv`; raises UserError for an unknown flag and for one that is given twice."""
    known = {"--help": "help", "-h": "help"}
    for names, programs, _ in FLAGS:
        if program in programs.split():
            known.update(dict.fromkeys(names, names[0].lstrip("-")))
    given = set()
    for word in argv:
        if not word.startswith("-") or re.match(r"-\.?\d", word):  # a negative number is a value
            continue
        flag = word.partition("=")[0]
        if flag not in known:
            key = flag.lstrip("-")
            if "." in key or key in ("seed", "preset"):
                raise UserError(f"{flag}: settings have no dashes; write {key}=<value>")
            raise unknown("flag", flag, known)
        name = known[flag]
        if name in given and name not in REPEATABLE:
            raise UserError(f"--{name} is given twice")
        given.add(name)
    return given


def _split_settings(words: list[str]) -> dict[str, str]:
    flag_names = {names[0] for names, _, _ in FLAGS}
    settings = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise UserError(
                f"cannot read '{word}': expected key=value or a flag (see --help); of several values write a,b"
            )
        target = f"--{key}" if f"--{key}" in flag_names else ALIASES.get(key, key)
        if target.startswith("--"):
            raise UserError(f"{key}={text}: this is a flag, use {target} {text}")
        if target in settings:
            raise UserError(f"{target} is given twice: {settings[target]} and {text}")
        settings[target] = text
    return settings


def parse_epsilon(text: str) -> float:
    """The budget as a number; inf is allowed."""
    try:
        epsilon = float(text)
    except ValueError:
        epsilon = float("nan")
    allowed = f"a number greater than 0 and at most {LARGEST_EPSILON:g}, or inf for a non-private run"
    check(0 < epsilon <= LARGEST_EPSILON or epsilon == math.inf, "--epsilon", text, allowed)
    return epsilon


def parse_value(text: str, annotation: object, key: str) -> object:
    """The value of key=`text` for a setting of this type, read as YAML (1e-3, [1, 2], null, True).

    Text settings, and the entries of lists of them, are taken as they stand, whatever characters a path may hold; one
    pair of quotes around them is removed, and null means None where None is allowed. The type itself is checked later
    (utils/typed.py). Raises UserError for a number that YAML reads as another one, such as 010.
    """
    inner, optional = without_none(annotation)
    if inner is str:
        if optional and text == "null":
            return None
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    if re.fullmatch(r"[+-]?inf", text):
        return float(text)
    return _read_yaml(text, key, is_texts=inner == list[str])


def _read_yaml(text: str, key: str, is_texts: bool) -> object:
    """`text` as YAML; as it stands where it is anything else than a scalar or a list of them."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    allowed = (
        yaml.StreamStartToken, yaml.StreamEndToken, yaml.ScalarToken,
        yaml.FlowSequenceStartToken, yaml.FlowSequenceEndToken, yaml.FlowEntryToken,
    )  # fmt: skip
    try:
        tokens = list(yaml.scan(text, Loader=yaml.SafeLoader))
        # A comment is no token, and what comes after it would be left out in silence.
        if not text.strip() or " #" in text or not all(isinstance(token, allowed) for token in tokens):
            return text
        if is_texts and text.startswith("["):
            return yaml.load(text, Loader=yaml.BaseLoader)
        for _, number in misread_numbers(text):
            raise UserError(f"{key}: {text} is not allowed: YAML reads {number} as another number; {ADVICE}")
        # OmegaConf's reader and no other: plain YAML reads 1e-3 as text
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException):
        return text  # no setting of this type accepts a text
