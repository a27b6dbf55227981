"""The ceiling of an evaluation: what its classifiers reach when trained on the real training images.

It is computed from private images without noise, so it is as private as any other comparison with them.
"""

from pathlib import Path

import numpy as np

from data.cache import PrivateCache
from data.spec import Samples
from evaluation.classifiers.recipe import RECIPE_VERSIONS, recipe_for
from evaluation.features import UNREADABLE
from evaluation.inputs import EvaluatorSettings
from evaluation.registry import SMALL_CLASSIFIERS, check_classifiers, need_classifiers
from evaluation.selection import Choice
from utils.files import atomic
from utils.runtime import log
from utils.sections import EvalConfig


def with_ceiling(config: EvalConfig) -> list[str]:
    """The classifiers of `config` whose ceiling is measured; none if no metric needs classifiers."""
    if not need_classifiers(config.metrics):
        return []
    names = check_classifiers(config.classifiers)
    wanted = {"auto": SMALL_CLASSIFIERS, "all": names, "none": ()}[config.ceiling]
    return [name for name in names if name in wanted]


def train_on_real(name: str, train: Samples, test: Samples, settings: EvaluatorSettings) -> Choice:
    """The last epoch of classifier `name`, trained on all of `train` like on samples, and its logits on `test`.

    With a cache the logits are kept there, per prepared dataset, training images, recipe and seed. Raises
    Unavailable if the training fails.
    """
    from evaluation.classifiers.training import train_classifier

    config, spec = settings.config, settings.spec
    recipe = recipe_for(config.recipe, spec, len(train))
    path, shape = _cache_path(name, train, test, settings), (len(test), spec.num_classes)
    logits = None if path is None else _read_logits(path, shape)
    if logits is None:
        log.info(f"ceiling: training {name} on {len(train):,} real images")
        trained = train_classifier(
            name, train, np.arange(len(train)), spec=spec, recipe=recipe, device=settings.device,
            seed=settings.seed, batch_size=config.batch_size,
        )  # fmt: skip
        logits = trained.logits(len(trained.states) - 1, test.images)
        if path is not None:
            _write_logits(path, logits)
    return Choice(recipe.num_epochs, logits)


def _cache_path(name: str, train: Samples, test: Samples, settings: EvaluatorSettings) -> Path | None:
    """The file of these logits; None if nothing is cached."""
    if settings.cache is None or settings.cache.folder is None:
        return None
    spec, recipe = settings.spec, settings.config.recipe
    # `identity` is a random name of the prepared folder and the digest is keyed, so the file name reveals nothing about
    # the images.
    facts = (spec.identity or spec.name, len(train), len(test), name, spec.protocol, recipe)
    # As many other images may have been used, such as those that eval.mode=val holds out.
    rows = _digest(settings.cache, train)
    version = RECIPE_VERSIONS[recipe]
    return (
        settings.cache.folder
        / f"ceiling-{'-'.join(map(str, facts))}-v{version}-seed{settings.seed}-{rows}.npz"
    )


def _digest(cache: PrivateCache, train: Samples) -> str:
    """A keyed digest of the training images and labels."""
    digest = cache.new_hash()
    digest.update(np.ascontiguousarray(train.labels))
    for start in range(0, len(train), 1024):
        digest.update(np.ascontiguousarray(train.images[start : start + 1024]))
    return digest.hexdigest()


def _read_logits(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The logits in `path`; None if there are none that can be used."""
    try:
        with np.load(path) as stored:
            logits = stored["logits"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UNREADABLE as error:
        log.warning(f"{path}: unreadable, computing the ceiling again ({type(error).__name__})")
        return None
    if logits.shape != shape or not np.isfinite(logits).all():
        log.warning(f"{path}: not a ceiling of this dataset, computing it again")
        return None
    return logits


def _write_logits(path: Path, logits: np.ndarray) -> None:
    try:
        with atomic(path, private=True) as temporary:
            np.savez(temporary, logits=logits)
    except OSError as error:
        log.warning(f"{path}: the ceiling is not cached ({error.strerror or error})")
