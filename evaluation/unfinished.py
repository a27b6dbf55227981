"""Results of the finished parts of a stopped evaluation, so that the same command computes only the other parts."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data.spec import Samples
from evaluation.classifiers.recipe import RECIPE_VERSIONS
from evaluation.features import UNREADABLE
from evaluation.inputs import EvaluatorSettings
from evaluation.registry import Value
from evaluation.selection import Choice, ClassifierResult
from utils.errors import Unavailable, UserError
from utils.files import atomic, read_json, write_json
from utils.runtime import log

# Settings that choose what is computed, and change no value.
CHOOSING = ("metrics", "gallery")


class Unfinished:
    """The results of finished classifiers and metrics, one file each, until `discard`.

    They are computed from real images without noise, so the folder is readable by its owner only. `folder` may be None:
    nothing is kept then. A file that cannot be written or read costs time and a warning, nothing else.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def has_classifier(self, name: str) -> bool:
        path = self._path(f"classifier-{name}.npz")
        return path is not None and path.exists()

    def classifier(self, name: str) -> ClassifierResult | None:
        """The result of this classifier, if it has been kept."""
        if not self.has_classifier(name):
            return None
        path = self._path(f"classifier-{name}.npz")
        try:
            with np.load(path) as stored:
                facts = json.loads(str(stored["facts"]))
                choices: dict[str, Choice | Unavailable] = {
                    selection: Choice(found, stored[selection])
                    if isinstance(found, int)
                    else Unavailable(found)
                    for selection, found in facts["choices"].items()
                }
        except UNREADABLE as error:
            log.warning(f"{path}: unreadable, training {name} again ({type(error).__name__})")
            return None
        log.info(f"classifier {name}: trained before this evaluation was stopped")
        return ClassifierResult(name, facts["num_train"], facts["num_epochs"], choices)

    def keep_classifier(self, result: ClassifierResult) -> None:
        """Keep the result, unless the training failed."""
        chosen = {name: found for name, found in result.choices.items() if isinstance(found, Choice)}
        path = self._path(f"classifier-{result.name}.npz")
        if path is None or not chosen:
            return
        choices = {
            name: found.epoch if name in chosen else str(found) for name, found in result.choices.items()
        }
        facts = {"num_train": result.num_train, "num_epochs": result.num_epochs, "choices": choices}
        try:
            with atomic(path, private=True) as temporary:
                logits = {name: choice.logits for name, choice in chosen.items()}
                np.savez(temporary, facts=np.array(json.dumps(facts)), **logits)
        except OSError as error:
            log.warning(f"{path}: the result is not kept ({error.strerror or error})")

    def metric(self, key: str) -> tuple[dict[str, Value | Unavailable], dict[str, float]] | None:
        """The values of this metric for the samples and for real images, if they have been kept."""
        path = self._path(f"metric-{key}.json")
        if path is None or not path.exists():
            return None
        try:
            stored = read_json(path)
            found = {
                name: Unavailable(entry) if isinstance(entry, str) else Value(**entry)
                for name, entry in stored["samples"].items()
            }
            return found, stored["real"]
        except (UserError, OSError, KeyError, TypeError, AttributeError) as error:
            log.warning(f"{path}: unreadable, computing {key} again ({type(error).__name__})")
            return None

    def keep_metric(self, key: str, found: dict[str, Value | Unavailable], real: dict[str, float]) -> None:
        """Keep the values."""
        path = self._path(f"metric-{key}.json")
        if path is None:
            return
        samples = {
            name: asdict(value) if isinstance(value, Value) else str(value) for name, value in found.items()
        }
        try:
            write_json(path, {"samples": samples, "real": real}, private=True)
        except OSError as error:
            log.warning(f"{path}: the values are not kept ({error.strerror or error})")

    def is_empty(self) -> bool:
        return self._folder is None or not self._folder.exists()

    def discard(self) -> None:
        """Remove everything: the evaluation is finished, and its results are written."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / name


def unfinished(settings: EvaluatorSettings, samples: Samples, folder: Path | None) -> Unfinished:
    """What is kept of this evaluation, in the private cache.

    It is identified by everything that its values depend on. `folder`: of the run, so that no other run reuses a noisy
    choice that is booked in this one; None for images without a run.
    """
    cache = settings.cache
    if not settings.config.metrics or cache is None or cache.folder is None:
        return Unfinished()
    config = {key: value for key, value in asdict(settings.config).items() if key not in CHOOSING}
    facts = [
        config, RECIPE_VERSIONS[settings.config.recipe], asdict(settings.spec), settings.seed, settings.prompt,
        settings.device, samples.images.shape, None if folder is None else str(folder.resolve()),
    ]  # fmt: skip
    digest = cache.new_hash()
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(np.ascontiguousarray(samples.labels))
    for start in range(0, len(samples), 1024):
        digest.update(np.ascontiguousarray(samples.images[start : start + 1024]))
    return Unfinished(cache.folder / f"evaluation-{digest.hexdigest()}")
