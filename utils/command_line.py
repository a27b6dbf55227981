"""The strict command line: flags and key=value settings, in any order.

Nothing is guessed: an unknown flag, an argument that is neither, and a setting that is given twice are errors.
"""

import argparse
import math
import re
from collections.abc import Callable
from typing import NamedTuple, get_origin

from utils.arguments import PLAIN, Parser, is_plain_number, looks_like_number
from utils.errors import UserError
from utils.sections import SHARED_SECTIONS, check
from utils.typed import Number, leaf_types, without_none

# Names of the published benchmark -> the name here; if the target is a flag, the error names the flag.
ALIASES = {
    "train.accountant": "privacy.accountant",
    "train.dp.delta": "privacy.delta",
    "train.dp.epsilon": "--epsilon",
    "privacy.epsilon": "--epsilon",
    "data": "--data_name",
    "public_data": "public_data.name",
}

LARGEST_EPSILON = 1000  # a larger one is no guarantee, and takes the accountants minutes
PURPOSE = {
    "run": "Train one synthesizer on one dataset at one privacy budget, generate, and evaluate.",
    "eval": "Evaluate a finished run, or any labelled images, against a dataset.",
    "test_classifier": "Accuracy of the configured classifiers when they are trained on the real images. Not private; "
    "accepts the settings of run.py; method and epsilon have no other effect than to choose them.",
}
# What --method, --data_name, --epsilon and --dry_run mean in a program.
_OF_TRAINING = (
    "synthesizer; run.py without arguments lists them (default: %(default)s)",
    "dataset: the name of a file in configs/data, or of images that you have prepared (default: %(default)s)",
    "privacy budget; inf: non-private (default: %(default)s)",
)
CELL_HELP = {
    "run": (*_OF_TRAINING, "print the privacy plan, the networks, the time and what is missing, and stop"),
    "test_classifier": (*_OF_TRAINING, "check the command line, and stop"),
    "eval": (
        "with --exp_path: default is the run's method",
        "dataset; default is the run's with --exp_path, %(default)s with --images",
        "with --exp_path: default is the run's epsilon",
        "print how the images would be evaluated, the time and what is missing, and stop",
    ),
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


class _Parser(Parser):
    def unknown_flag(self, flag: str) -> UserError:
        key = flag.lstrip("-")
        if "." in key or key in ("seed", "preset"):
            return UserError(f"{flag}: settings have no dashes; write {key}=<value>")
        if settings := _settings_named(key, is_evaluation=self.prog == FILES["eval"]):
            more = "; --print_config lists all settings" if len(settings) > 1 else ""
            return UserError(f"{flag}: this is no flag but a setting; write {' or '.join(settings)}{more}")
        return super().unknown_flag(flag)


def parser(program: str) -> _Parser:
    """The flags of `program`, a key of FILES."""
    texts = {"description": PURPOSE[program], "epilog": SETTINGS_HELP}
    result = _Parser(prog=FILES[program], usage="%(prog)s [flags] [key=value ...]", **texts)
    add = result.add_argument
    if program == "eval":
        _add_evaluation_flags(add)
    method, data, epsilon, dry_run = CELL_HELP[program]
    add("--method", "-m", default="PrivImage", help=method)
    add("--data_name", "-dn", default="digits_8", help=data)
    add("--epsilon", "-e", default="10", help=epsilon)
    if program == "run":
        resume = "continue this run (its folder or its name); given alone, with the run's own settings"
        add("--resume_exp", "-re", metavar="RUN", help=resume)
    add("--dry_run", action="store_true", help=dry_run)
    _add_common_flags(add)
    return result


def _add_evaluation_flags(add: Callable[..., object]) -> None:
    add(
        "--exp_path",
        "-ep",
        metavar="RUN",
        help="evaluate the samples of this finished run (its folder) again",
    )
    images = (
        "evaluate these labelled images, of any origin: an npz, a folder or zip of class folders, or of files "
        "<class>_<rest>.png; needs neither --method nor --epsilon"
    )
    add("--images", metavar="PATH", help=images)
    add("--out", metavar="FOLDER", help="with --images: folder of the results (default: below --exp_root)")
    add("--metrics", metavar="A,B", help="short for eval.metrics=[A,B]")
    add("--list", action="store_true", help="show metrics, extractors and classifiers, and what is missing")


def _add_common_flags(add: Callable[..., object]) -> None:
    add(
        "--exp_description",
        "-ed",
        default="",
        metavar="TEXT",
        help="is appended to the name of the new folder",
    )
    config_dir = "more YAML files; with a config.yaml of its own it replaces configs/"
    add("--config_dir", metavar="FOLDER", help=config_dir)
    plugin = "import this module, which registers its methods; its configs/ is searched too (repeatable)"
    add("--plugin", action="append", default=[], metavar="MODULE", help=plugin)
    add("--data_root", metavar="FOLDER", help="prepared datasets (default: $DPIB_DATA_ROOT, else dataset)")
    add("--exp_root", default="exp", metavar="FOLDER", help="folder of all runs (default: %(default)s)")
    weights = "downloaded weights (default: $DPIB_WEIGHTS_ROOT, else ~/.cache/dp-image-bench)"
    add("--weights_root", metavar="FOLDER", help=weights)
    add("--print_config", action="store_true", help="print every value with the layer that set it, and stop")


EXAMPLES = {
    "run": (
        ("--method PrivImage --data_name digits_8 --epsilon 10", "a complete run, minutes on a CPU"),
        ("--method DPDM --data_name mnist_28 --dry_run", "only print its privacy plan and its time"),
        ("--method DPDM --data_name mnist_28 --print_config", "all settings"),
        ("--help", "all flags"),
    ),
    "eval": (
        ("--exp_path exp/privimage/<run>", "evaluate a finished run again"),
        ("--exp_path exp/privimage/<run> --metrics fid,kid", "with more metrics"),
        ("--images my_samples.zip --data_name digits_8 --out results", "evaluate images of any origin"),
        ("--list", "list all metrics and their requirements"),
        ("--help", "all flags"),
    ),
}


def short_help(program: str) -> str:
    """What `program` prints for an empty command line."""
    width = max(len(arguments) for arguments, _ in EXAMPLES[program])
    lines = [f"  python {program}.py {arguments:<{width}}    {what}" for arguments, what in EXAMPLES[program]]
    return "\n".join((f"usage: python {program}.py [flags] [key=value ...]", "", *lines))


def read_command_line(argv: list[str], program: str) -> CommandLine:
    """Read the arguments of `program`, a key of FILES. Raises UserError for a mistake in them."""
    reader = parser(program)
    given = reader.given_flags(argv)
    flags, rest = reader.parse_known_args(argv)
    settings = _split_settings(rest, reader.flags)
    if "metrics" in given:
        if "eval.metrics" in settings:
            raise UserError("--metrics and eval.metrics are both given; they mean the same")
        if flags.metrics.startswith("["):
            raise UserError(
                f"--metrics: {flags.metrics} is not allowed; write --metrics {flags.metrics.strip('[]')}, or "
                f"eval.metrics={flags.metrics}"
            )
        settings["eval.metrics"] = f"[{flags.metrics}]"
    return CommandLine(flags, settings, given, tuple(argv))


def _settings_named(name: str, is_evaluation: bool) -> list[str]:
    """How to write the settings of all methods whose last part is `name`; of an evaluation those of `eval`, if there
    is one."""
    types = leaf_types(SHARED_SECTIONS)
    found = [key for key in types if key.count(".") == 1 and key.endswith(f".{name}")]
    own = [key for key in found if key.startswith("eval.")]
    found = own if is_evaluation and own else found
    is_list = {key: get_origin(without_none(types[key])[0]) is list for key in found}
    return [f"{key}=[<a>,<b>]" if is_list[key] else f"{key}=<value>" for key in found]


def _split_settings(arguments: list[str], flags: dict[str, str]) -> dict[str, str]:
    settings = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise UserError(
                f"cannot read '{argument}': expected key=value or a flag (see --help); write several values as a,b"
            )
        target = f"--{key}" if f"--{key}" in flags else ALIASES.get(key, key)
        if target.startswith("--"):
            raise UserError(f"{key}={text}: this is a flag, use {target} {text}")
        if target in settings:
            raise UserError(f"{target} is given twice: {settings[target]} and {text}")
        settings[target] = text
    return settings


def parse_epsilon(text: str) -> float:
    """The budget as a number; inf is allowed."""
    epsilon = float(text) if is_plain_number(text) else math.nan
    allowed = f"a number greater than 0 and at most {LARGEST_EPSILON:g}, or inf for a non-private run"
    if looks_like_number(text) and not is_plain_number(text):
        allowed = f"{allowed}; {PLAIN}"
    check(0 < epsilon <= LARGEST_EPSILON or epsilon == math.inf, "--epsilon", text, allowed)
    return epsilon


def parse_value(text: str, annotation: object, key: str) -> object:
    """The value of the setting key=`text`, read as YAML (1e-3, [1, 2], null, True) according to its type.

    Text settings, and the entries of lists of texts, are taken literally, since a path may hold any character; one
    pair of quotes around them is removed, and null means None where None is allowed. The type itself is checked later
    (utils/typed.py). Raises UserError for a number that is not a plain decimal one, such as 010, 0x10 or 1_000.
    """
    inner, optional = without_none(annotation)
    if inner is str:
        if optional and text == "null":
            return None
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    if re.fullmatch(r"[+-]?inf", text):
        return float(text)
    return _read_yaml(text, inner, key)


def _read_yaml(text: str, kind: object, key: str) -> object:
    """`text` as YAML if it is a scalar or a list of scalars, else `text` itself."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    allowed = (
        yaml.StreamStartToken, yaml.StreamEndToken, yaml.ScalarToken,
        yaml.FlowSequenceStartToken, yaml.FlowSequenceEndToken, yaml.FlowEntryToken,
    )  # fmt: skip
    try:
        tokens = list(yaml.scan(text, Loader=yaml.SafeLoader))
        # A comment is no token, so that the text after it would be dropped in silence.
        if (
            not text
            or text != text.strip()
            or " #" in text
            or not all(isinstance(token, allowed) for token in tokens)
        ):
            return text
        if kind == list[str] and text.startswith("["):
            return yaml.load(text, Loader=yaml.BaseLoader)
        scalars = [token for token in tokens if isinstance(token, yaml.ScalarToken)]
        if kind in (int, float, Number) or text.startswith("["):
            for token in scalars:
                if token.plain and looks_like_number(token.value) and not is_plain_number(token.value):
                    raise UserError(f"{key}: {text} is not allowed; {PLAIN}")
        # OmegaConf's reader, because plain YAML reads 1e-3 as text
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException):
        return text  # no setting of this type accepts a text
