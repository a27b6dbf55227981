"""Compose the parts of a run from its configuration: data spec, ledger, method, evaluator. Reads no image."""

import dataclasses
from pathlib import Path

from data.apart import require_apart, training_set_of
from data.cache import CACHE_NAME
from data.in_distribution import require_agreement, require_class_count, require_use
from data.locations import IN_DISTRIBUTION, is_embedded, is_in_distribution
from data.public import misfit, num_public_classes
from data.registry import known_set
from data.sensitive import private_cache, spec_of
from data.spec import DataSpec
from evaluation.evaluator import Evaluator, EvaluatorSettings
from evaluation.registry import of_classifiers
from models import METHODS
from models.synthesizer import Synthesizer
from opacus_ext.accounting import Release
from opacus_ext.ledger import Budget, Ledger, default_delta, weak_delta
from pipeline.record import values_of
from pipeline.teaching import with_teacher
from utils.artefacts import ENVIRONMENT
from utils.config import COMMAND_LINE, Config, load_config
from utils.config_files import flatten
from utils.device import prepare_device
from utils.errors import UserError
from utils.files import read_json
from utils.memory import require_memory
from utils.runtime import Runtime, log

# What decides which records of a set are declared public.
PUBLIC_SHARE = tuple(f"sensitive_data.{key}" for key in ("num_public", "public_seed", "num_train"))


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is composed of before any image has been read."""

    config: Config
    spec: DataSpec
    runtime: Runtime
    ledger: Ledger | None  # None in a run without private data
    synthesizer: Synthesizer
    evaluator: Evaluator


def compose(config: Config, plan: list[Release] | None = None) -> Parts:
    """Build all parts. The ledger adopts the plan of the method, or `plan`, which is calibrated already. Raises
    UserError, which advises preset=quick if the settings of the preset do not fit the user's own images and those of
    preset=quick do."""
    try:
        parts, lines = _compose(config, plan)
    except UserError as error:
        may_help = config.resume is None and config.preset != "quick" and _is_for_own_images(config)
        if may_help and _fits(config, "quick"):
            raise UserError(f"{error}; or use preset=quick, whose settings fit this set") from error
        raise
    for line in lines:
        log.info(line)
    return parts


def _is_for_own_images(config: Config) -> bool:
    name = config.sensitive_data.name
    return name is not None and known_set(name) is None and not is_embedded(config.sensitive_data)


def _fits(config: Config, preset: str) -> bool:
    """The command line of `config` can be composed with this preset."""
    words = [word for word in config.words if not word.startswith("preset=")]
    try:
        _compose(load_config([*words, f"preset={preset}"], METHODS), None)
    except UserError:
        return False
    return True


def _compose(config: Config, plan: list[Release] | None) -> tuple[Parts, list[str]]:
    """All parts, and lines for the user."""
    lines = list(config.notes)
    require_use(config.method, config.sensitive_data, hasattr(config.method_config, "public_data"))
    require_agreement(config.public_data, config.sensitive_data)
    spec, more = spec_of(config.sensitive_data, config.eval.mode, config.data_root)
    lines += more
    starts_from_share = has_checkpoint_of_public_share(config, spec.identity)
    require_apart(config.public_data, config.sensitive_data, config.data_root)
    if config.gen.data_num < spec.num_classes:
        raise UserError(
            f"gen.data_num: {config.gen.data_num}; it must be at least {spec.num_classes}, one per class"
        )
    require_memory("gen.data_num", config.gen.data_num, spec.image_shape)
    runtime = Runtime(
        prepare_device(config.setup),
        config.seed,
        config.setup.precision,
        cache_dir=config.data_root / CACHE_NAME,
        weights_root=config.weights_root,
    )
    evaluator = _evaluator(config, spec, runtime.device)  # before the method is built: unknown names fail now
    synthesizer = _synthesizer(config, spec, runtime)
    if not synthesizer.makes_images:
        judged, left_out = of_classifiers(config.eval)
        if left_out:
            lines.append(f"{config.method} makes no images here; not computed: {', '.join(left_out)}")
        config = dataclasses.replace(config, eval=judged)
        evaluator = _evaluator(config, spec, runtime.device, has_samples=False)
    learns = synthesizer.learns_from_public_images or starts_from_share
    require_use(config.method, config.sensitive_data, learns)
    lines += [*_misfit_lines(config, spec, synthesizer), *_ineffective_lines(config, synthesizer)]
    if config.sensitive_data.name is None:
        require_public_only(config.method, synthesizer)
        return Parts(config, spec, runtime, None, synthesizer, evaluator), lines
    delta = config.privacy.delta or default_delta(spec.num_train)
    budget = Budget(config.privacy.epsilon, delta)
    synthesizer = with_teacher(synthesizer, config, budget)
    ledger = Ledger(budget, config.privacy.accountant, config.privacy.relation)
    if ledger.budget.private and (weak := weak_delta(delta, spec.num_train)):
        lines.append(f"warning: {weak}")
    ledger.adopt(synthesizer.privacy_plan() if plan is None else plan)
    return Parts(config, spec, runtime, ledger, synthesizer, evaluator), lines


def _evaluator(config: Config, spec: DataSpec, device: str, has_samples: bool = True) -> Evaluator:
    cache = None
    if config.sensitive_data.name is not None:
        cache = private_cache(config.sensitive_data, config.data_root)
    return Evaluator(
        EvaluatorSettings(
            config.eval,
            spec,
            config.weights_root,
            device,
            config.seed,
            cache,
            config.sensitive_data.prompt,
            has_samples,
        )
    )


def _synthesizer(config: Config, spec: DataSpec, runtime: Runtime) -> Synthesizer:
    method_config = config.method_config
    if hasattr(method_config, "public_data"):
        if is_in_distribution(config.public_data):
            known = require_class_count(config.public_data, spec)
        else:
            known = num_public_classes(method_config.public_data, config.data_root)
        public = dataclasses.replace(method_config.public_data, n_classes=known)
        method_config = dataclasses.replace(method_config, public_data=public)
    return METHODS.resolve(config.method)(method_config, spec, runtime)


def _misfit_lines(config: Config, spec: DataSpec, synthesizer: Synthesizer) -> list[str]:
    """A line if the public images differ from the private ones in size or channels."""
    if not synthesizer.uses_public_images:
        return []
    line = misfit(config.public_data, spec, config.data_root)
    return [] if line is None else [line]


def _ineffective_lines(config: Config, synthesizer: Synthesizer) -> list[str]:
    without_effect = synthesizer.settings_without_effect()
    if config.eval.mode != "val":
        why = f"no private image is held out with eval.mode={config.eval.mode}"
        without_effect = {**without_effect, "eval.selection_epsilon": why, "sensitive_data.num_val": why}
    if not config.sensitive_data.num_public:
        without_effect["sensitive_data.public_seed"] = (
            "no image is declared public (sensitive_data.num_public=0)"
        )
    if is_in_distribution(config.public_data):
        without_effect["public_data.per_class"] = (
            "sensitive_data.num_public states how many images are public"
        )
    return ineffective_settings(config.provenance, without_effect)


def ineffective_settings(provenance: dict[str, str], without_effect: dict[str, str]) -> list[str]:
    """A line for each setting of the command line that has no effect. `without_effect`: key or section -> reason."""
    given = [key for key, layer in provenance.items() if layer == COMMAND_LINE]
    return [
        f"{key}: no effect: {why}"
        for key in given
        for name, why in without_effect.items()
        if f"{key}.".startswith(f"{name}.")
    ]


def has_checkpoint_of_public_share(config: Config, identity: str) -> bool:
    """True if the run starts from a checkpoint that learned from records of this set that were declared public.

    UserError unless the same ones are declared public here: others would count as private, although nothing protects
    them any more. The settings of the earlier run are in the folder of its checkpoint. `identity`: of the prepared set
    now; which records are public depends on all of them.
    """
    now, found = flatten(config.snapshot), False
    for key, path in now.items():
        if not key.endswith((".ckpt", ".adapters")) or path is None:
            continue
        name = config.sensitive_data.name
        folders = [
            folder for folder in Path(path).resolve().parents[:3] if training_set_of(folder) is not None
        ]
        if not folders or name is None or training_set_of(folders[0]) != name:
            continue
        before = values_of(folders[0])
        if not before.get(PUBLIC_SHARE[0]):
            continue
        found = True
        if any(before.get(share) != now[share] for share in PUBLIC_SHARE):
            settings = " ".join(f"{share}={before.get(share)}" for share in PUBLIC_SHARE)
            raise UserError(
                f"{key}: {path} was trained on images of {name} that were declared public, and would be private here; "
                f"give {settings} public_data.name={IN_DISTRIBUTION}"
            )
        if read_json(folders[0] / ENVIRONMENT)["data_identity"] != identity:
            raise UserError(
                f"{key}: {path} was trained on images of {name} that were declared public, and {name} was prepared "
                f"again since: other images would be public now; train it again"
            )
    return found


def require_public_only(method: str, synthesizer: Synthesizer) -> None:
    """Raise UserError if the pretraining of a run without private images would query them."""
    queries = [f"'{release.name}'" for release in synthesizer.pretraining_plan()]
    if queries:
        raise UserError(
            f"sensitive_data.name: null, but pretraining {method} queries the private images: {', '.join(queries)}"
        )
