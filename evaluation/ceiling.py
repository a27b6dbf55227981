"""What the classifiers of an evaluation reach if they are trained on the real training images: its ceiling.

That is computed from private images without noise, so it is as private as other results that compare with them.
"""

from pathlib import Path

import numpy as np

from data.cache import PrivateCache
from data.spec import DataSpec, Samples
from evaluation.classifiers.recipe import RECIPE_VERSIONS, recipe_for
from evaluation.features import UNREADABLE
from evaluation.registry import SMALL_CLASSIFIERS, check_classifiers, needs_of
from evaluation.selection import Choice
from utils.files import atomic
from utils.runtime import log
from utils.sections import EvalConfig


def with_ceiling(config: EvalConfig) -> list[str]:
    """The classifiers of `config` whose ceiling is measured; none if no metric needs classifiers."""
    if "classifiers" not in needs_of(config.metrics):
        return []
    names = check_classifiers(config.classifiers)
    wanted = {"auto": SMALL_CLASSIFIERS, "all": names, "none": ()}[config.ceiling]
    return [name for name in names if name in wanted]


def trained_on_real(
    name: str, train: Samples, test: Samples, *, spec: DataSpec, config: EvalConfig, device: str, seed: int,
    cache: PrivateCache | None,
) -> Choice:  # fmt: skip
    """The last epoch of classifier `name`, trained on all of `train` as on samples, and its logits on `test`.

    With `cache` the logits are kept there: per prepared dataset, training images, recipe and seed. Raises
    Unavailable if the training fails.
    """
    from evaluation.classifiers.training import train_classifier

    recipe = recipe_for(config.recipe, spec, len(train))
    path, shape = None, (len(test), spec.num_classes)
    if cache is not None and cache.folder is not None:
        # A prepared folder has a random name in `identity`, and the digest is keyed: the file's name says nothing
        # about the images.
        facts = (spec.identity or spec.name, len(train), len(test), name, spec.protocol, config.recipe)
        version = RECIPE_VERSIONS[config.recipe]
        rows = _digest(
            cache, train
        )  # as many others may have been used, such as those that eval.mode=val holds out
        path = cache.folder / f"ceiling-{'-'.join(map(str, facts))}-v{version}-seed{seed}-{rows}.npz"
    logits = None if path is None else _kept(path, shape)
    if logits is None:
        log.info(f"ceiling: {name} is trained on the {len(train):,} real training images")
        trained = train_classifier(
            name, train, np.arange(len(train)), spec=spec, recipe=recipe, device=device, seed=seed,
            batch_size=config.batch_size,
        )  # fmt: skip
        logits = trained.logits(len(trained.states) - 1, test.images)
        if path is not None:
            _keep(path, logits)
    return Choice(recipe.num_epochs, logits)


def _digest(cache: PrivateCache, train: Samples) -> str:
    digest = cache.new_hash()
    digest.update(np.ascontiguousarray(train.labels))
    for start in range(0, len(train), 1024):
        digest.update(np.ascontiguousarray(train.images[start : start + 1024]))
    return digest.hexdigest()


def _kept(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The logits in `path`; None if there are none that can be used."""
    try:
        with np.load(path) as stored:
            logits = stored["logits"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UNREADABLE as error:
        log.warning(f"{path}: cannot be read and is computed again ({type(error).__name__})")
        return None
    if logits.shape != shape or not np.isfinite(logits).all():
        log.warning(f"{path}: is not the result of this dataset and is computed again")
        return None
    return logits


def _keep(path: Path, logits: np.ndarray) -> None:
    try:
        with atomic(path, private=True) as temporary:
            np.savez(temporary, logits=logits)
    except OSError as error:
        log.warning(f"{path}: the ceiling is not kept ({error.strerror or error})")
