"""The typed sections of the configuration that all runs share. Their values are in configs/, never here.

A field without a value in YAML is an error. Comments explain what `None` means.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from utils.errors import FieldError, UserError, nearest

MOST_PROCESSES = 4096  # also of threads; more is a mistake that would overload the machine


def check(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise UserError("key: value is not allowed; allowed") unless the condition holds."""
    if not condition:
        raise UserError(f"{key}: {value} is not allowed; it must be {allowed}")


def check_field(condition: bool, field: str, value: object, allowed: str) -> None:
    """`check` for a section that does not know its own key: utils/typed.py puts the key before `field`."""
    if not condition:
        raise FieldError(f"{field}: {value} is not allowed; it must be {allowed}")


def check_least(section: object, least: int, *fields: str, or_null: bool = False) -> None:
    """`check_field` that these fields of `section` are at least `least`, or None."""
    allowed = "0 or more" if least == 0 else f"at least {least}"
    for field in fields:
        value = getattr(section, field)
        if not (or_null and value is None):
            check_field(value >= least, field, value, f"null or {allowed}" if or_null else allowed)


def check_positive(section: object, *fields: str) -> None:
    """`check_field` that these fields of `section` are greater than 0."""
    for field in fields:
        check_field(getattr(section, field) > 0, field, getattr(section, field), "greater than 0")


def check_choice(field: str, value: object, known: Sequence[str]) -> None:
    """`check_field` that the value is one of `known`; suggests the nearest."""
    near = nearest(str(value), known)
    hint = f"; did you mean '{near}'?" if near else ""
    check_field(value in known, field, value, f"{', '.join(known[:-1])} or {known[-1]}{hint}")


@dataclass(frozen=True)
class SensitiveDataConfig:
    name: str | None  # None: no private stage (pretraining only)
    resolution: int  # pixels, square
    num_channels: int  # 1 or 3
    n_classes: int | None  # None: read from the prepared data (custom sets)
    num_train: int | None  # upper limit of training images, validation included; None: all
    num_val: int  # images held out of the training part when eval.mode=val
    num_public: (
        int  # training images, equally many per class, that are declared public and leave the private set
    )
    public_seed: int  # which ones
    class_names: list[str] | None  # in label order; None: from the prepared data
    path: str | None  # folder of prepared data; None: <data_root>/<name>
    prompt: str  # ImageReward prompt, "{}" stands for the class name
    protocol: str  # sizes and published training of the test classifiers: standard or cifar

    def __post_init__(self) -> None:
        check_choice("protocol", self.protocol, ("standard", "cifar"))
        check_least(self, 1, "resolution")
        check_field(self.num_channels in (1, 3), "num_channels", self.num_channels, "1 or 3")
        check_least(self, 1, "n_classes", "num_train", or_null=True)
        check_least(self, 0, "num_val", "num_public", "public_seed")


@dataclass(frozen=True)
class PublicSetConfig:
    """The public set. A package of methods may extend the section (`utils.config.MethodRegistry`)."""

    name: str | None  # None: no public data
    n_classes: int | None  # None: from the prepared data
    train_path: str | None  # folder of prepared data or of class folders; None: <data_root>/<name>
    per_class: int | None  # images per class that are used (rendered, for glyphs); None: all
    flip: bool  # random horizontal flips in pretraining; wrong for characters

    def __post_init__(self) -> None:
        check_least(self, 1, "n_classes", "per_class", or_null=True)


@dataclass(frozen=True)
class PrivacyConfig:
    epsilon: float  # inf: non-private
    delta: float | None  # None: 1 / (N ln N)
    relation: str
    accountant: str
    noise_seed: int | None  # tests only; it voids the guarantee, and the report states it

    def __post_init__(self) -> None:
        check_field(self.epsilon > 0, "epsilon", self.epsilon, "greater than 0 (inf: non-private)")
        check_field(self.delta is None or 0 < self.delta < 1, "delta", self.delta, "null or in (0, 1)")
        check_choice("relation", self.relation, ("add_or_remove_one", "replace_one"))
        check_choice("accountant", self.accountant, ("pld", "rdp", "prv"))


@dataclass(frozen=True)
class GenConfig:
    data_num: int  # images to generate
    batch_size: int  # images per forward pass of the generator
    teacher: list[str] | None  # settings of a DP classifier that labels the samples; None: there is none
    teacher_share: float  # of epsilon, for the teacher alone
    teacher_use: str  # relabel: samples get its labels; filter: samples that it labels otherwise are left out

    def __post_init__(self) -> None:
        check_field(0 < self.teacher_share < 1, "teacher_share", self.teacher_share, "between 0 and 1")
        check_choice("teacher_use", self.teacher_use, ("relabel", "filter"))
        for field in ("data_num", "batch_size"):
            check_field(getattr(self, field) > 0, field, getattr(self, field), "a positive number of images")


@dataclass(frozen=True)
class EvalConfig:
    mode: str  # how a classifier's epoch is chosen: val, syn or sen
    selection_epsilon: float  # budget of all noisy selections (mode val) on the validation records
    classifiers: list[str]
    metrics: list[str]
    recipe: str  # paper: the published training recipes; quick: a few epochs
    num_val: int  # synthetic images held out for selection
    batch_size: int  # images per forward pass of feature extractors and of testing
    extractor: str  # of the fidelity metrics: a name of extractors/__init__.py
    oracles: bool  # also report the epochs that are best on validation and test images, which is not private
    gallery: str | None  # samples next to their nearest training images: private (a separate page) or report
    ceiling: str  # classifiers that are also trained on the real training images: auto (small), all or none

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("val", "syn", "sen"))
        check_choice("recipe", self.recipe, ("paper", "quick"))
        check_choice("ceiling", self.ceiling, ("auto", "all", "none"))
        check_least(self, 1, "batch_size")
        check_least(self, 0, "num_val")
        known = self.gallery in (None, "private", "report")
        check_field(known, "gallery", self.gallery, "null, private or report")
        finite = 0 < self.selection_epsilon < math.inf  # eval.oracles chooses without noise, and marks it
        check_field(finite, "selection_epsilon", self.selection_epsilon, "greater than 0 and finite")


@dataclass(frozen=True)
class SetupConfig:
    device: str  # auto, cpu or cuda
    n_gpus_per_node: int  # processes per machine
    n_nodes: int
    node_rank: int
    master_address: str
    master_port: int
    precision: str  # of training and sampling: float32, tf32 (GPU) or bf16
    omp_n_threads: int | None  # CPU threads per process; None: the cores, shared by the machine's processes

    def __post_init__(self) -> None:
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_choice("precision", self.precision, ("float32", "tf32", "bf16"))
        for field in ("n_gpus_per_node", "n_nodes"):
            value = getattr(self, field)
            check_field(0 < value <= MOST_PROCESSES, field, value, f"from 1 to {MOST_PROCESSES}")
        check_field(0 <= self.master_port < 2**16, "master_port", self.master_port, f"from 0 to {2**16 - 1}")
        last = self.n_nodes - 1
        check_field(0 <= self.node_rank <= last, "node_rank", self.node_rank, f"from 0 to {last}")
        threads = self.omp_n_threads
        some = threads is None or 0 < threads <= MOST_PROCESSES
        check_field(some, "omp_n_threads", threads, f"null or from 1 to {MOST_PROCESSES}")


# Name on the command line and in YAML -> section.
SHARED_SECTIONS = {
    "sensitive_data": SensitiveDataConfig,
    "public_data": PublicSetConfig,
    "privacy": PrivacyConfig,
    "eval": EvalConfig,
    "setup": SetupConfig,
    "gen": GenConfig,
}
