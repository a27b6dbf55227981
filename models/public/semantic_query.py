"""The semantic query of PrivImage: which public classes look like which private ones (Li et al. 2024, section 4.2).

A classifier trained on public data alone votes for the top-k public classes of every private image. The noisy
(private class x public class) histogram is one Gaussian release of sensitivity sqrt(k); the selection from it is
post-processing.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.cache import public_cache
from data.spec import DataSpec, PublicData
from models.linear.features import FeatureMap
from models.nn.resnet import CLASSIFIERS
from models.public import prototypes
from models.public.config import PublicDataConfig
from opacus_ext.accounting import Release
from opacus_ext.ledger import Ledger
from opacus_ext.private_data import PrivateData
from utils import distributed
from utils.checkpoint_files import not_finite
from utils.errors import Diverged, UserError, unknown
from utils.files import atomic, write_json
from utils.images import to_float
from utils.private_files import for_everyone
from utils.progress import progress
from utils.runtime import Runtime, log
from utils.sections import check
from utils.seeding import numpy_rng
from utils.timing import Cost, batch_rows, seconds_of

QUERY = "semantic query"
# The noisy result, written before the first checkpoint.
QUERY_ANSWER = "pretrain/semantic_query.json"


@dataclass(frozen=True)
class QueryConfig:
    network: (
        str  # resnet50 (CIFAR style), small_cnn, or efficientnet_lite0, which is published and not trained
    )
    image_size: int  # pixels that the classifier sees; efficientnet_lite0 has its own
    n_epochs: int
    batch_size: int
    lr: float  # SGD with momentum 0.9 and a cosine schedule
    weight_decay: float

    def __post_init__(self) -> None:
        if self.network not in (*CLASSIFIERS, prototypes.NETWORK):
            raise unknown("pretrain.query.network", self.network, (*CLASSIFIERS, prototypes.NETWORK))
        for field in ("image_size", "n_epochs", "batch_size"):
            check(getattr(self, field) > 0, f"pretrain.query.{field}", getattr(self, field), "at least 1")


def public_classes_per_class(public: PublicDataConfig, num_private: int) -> int:
    """k = int(public classes * ratio / private classes): votes per image, and classes each private class gets."""
    if public.n_classes is None:
        raise UserError(f"public_data.n_classes: unknown for '{public.name}'; give public_data.n_classes=<k>")
    check(
        public.n_classes >= num_private,
        "public_data.name",
        public.name,
        f"a set of at least {num_private} classes, one for each private class; it has {public.n_classes}",
    )
    words = int(public.n_classes * public.selective.ratio / num_private + 1e-9)
    least = num_private / public.n_classes
    check(
        words >= 1,
        "public_data.selective.ratio",
        public.selective.ratio,
        f"at least {least:.3g}: each of {num_private} private classes needs one of {public.n_classes} public ones",
    )
    return words


class SemanticQuery:
    """Plan the query, make it and select classes. The result is kept in <run>/pretrain/semantic_query.json. Other runs
    reuse it with public_data.selective.semantic_path, which books the same cost on their ledger.

    The classifier is the one after the last epoch, of all public images; the published one is the best of all epochs
    on public images held out for that. Its learning rate ends at 0, so that the last epochs hardly differ. With
    network=efficientnet_lite0 it is the nearest class mean in published features (models/public/prototypes.py).
    """

    def __init__(
        self, config: QueryConfig, public: PublicDataConfig, words: int, spec: DataSpec, runtime: Runtime
    ) -> None:
        self.config, self.words, self.spec, self.runtime = config, words, spec, runtime
        self.flip, self.selective = public.flip, public.selective
        selective = self.selective
        self.saved = (
            None if selective.semantic_path is None else self._read_saved(Path(selective.semantic_path))
        )

    def release(self) -> Release:
        if self.saved is None:
            return Release(QUERY, self.selective.sigma)
        return Release(
            QUERY,
            self.saved["noise_multiplier"],
            noise_seeded=self.saved.get("noise_seeded", False),
            inherited=True,
        )

    def cost(self, num_images: int, num_classes: int) -> Cost:
        """Of training the classifier on the public set, unless it is in the cache, and of the private images' votes."""
        config, rows = self.config, batch_rows(self.config.image_size)
        device = self.runtime.device
        if self._is_published:
            text = f"features of {num_images} public images, and {self.spec.num_train:,} votes"
            return Cost(QUERY, text, (num_images + self.spec.num_train) * self._seconds_of_features())
        classifier = CLASSIFIERS[config.network](self.spec.channels, num_classes).to(device)
        images = torch.zeros(rows, self.spec.channels, config.image_size, config.image_size, device=device)
        seconds = seconds_of(lambda: classifier(images).sum().backward()) / rows
        with torch.no_grad():
            vote = seconds_of(lambda: classifier(images)) / rows
        steps = config.n_epochs * -(-num_images // config.batch_size)
        description = (
            f"{steps} steps x {min(config.batch_size, num_images)} images, unless it is in the cache, and "
            f"{self.spec.num_train:,} votes"
        )
        total = config.n_epochs * num_images * seconds + self.spec.num_train * vote
        return Cost(QUERY, description, total)

    def select(self, public: PublicData, private: PrivateData | None) -> PublicData:
        """The selected public images, labelled with the private class that selected them."""
        if private is None:
            raise UserError(
                "public_data.selective.ratio < 1 needs a query of the private data, but sensitive_data.name is null"
            )
        chosen = self._selected_classes(public, private)
        for name, classes in zip(self.spec.class_names, chosen, strict=True):
            chosen_names = ", ".join(public.class_names[c] for c in classes)
            log.info(f"semantic query: class {name} is pretrained on public {chosen_names}")
        return public.select(chosen, self.spec.class_names)

    def _selected_classes(self, public: PublicData, private: PrivateData) -> list[list[int]]:
        if self.saved is not None:
            if self.saved["public_classes"] != list(public.class_names):
                raise UserError(
                    f"public_data.selective.semantic_path: made on another public set than {public.name}"
                )
            if not private.ledger.executed(QUERY):
                private.ledger.book(QUERY)
            return self.saved["selected"]
        path = None if self.runtime.folder is None else self.runtime.folder / QUERY_ANSWER
        kept = distributed.from_main(
            lambda: self._read_saved(path) if path is not None and path.exists() else None
        )
        if kept is not None:
            # A resumed run. The result was written before the run was killed, perhaps before a checkpoint held the
            # booking: book it now and use it again, because a second query would spend more budget.
            if not private.ledger.executed(QUERY):
                private.ledger.book(QUERY)
            return kept["selected"]
        classifier = self._classifier(public)
        histogram = self._query(classifier, public.num_classes, private)
        chosen = disjoint_top(histogram, self.words)
        if path is not None:
            self._write(path, public, chosen, private.ledger)
        return chosen

    def _query(self, classifier: nn.Module, num_public: int, private: PrivateData) -> np.ndarray:
        """(private classes, public classes) noisy votes."""

        @torch.no_grad()
        def votes(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            parts = [
                classifier(self._as_input(part)).topk(self.words, dim=1).indices
                for part in images.split(self.selective.batch_size)
            ]
            return torch.cat(parts) if parts else labels.new_zeros(0, self.words)

        return private.noisy_histogram(QUERY, votes, num_public, self.words, by_class=True).cpu().numpy()

    def _classifier(self, public: PublicData) -> nn.Module:
        """The query classifier: a published one, or one that is trained on public data or read from the cache (keyed by
        data and configuration), by the main process for all."""
        if self._is_published:
            classifier = prototypes.Prototypes(public, self.spec, self.runtime)
            distributed.copy_from_main(classifier.state_dict().values())
            return classifier
        with self.runtime.seeded("query classifier"):
            channels = public.samples.images.shape[1]
            classifier = CLASSIFIERS[self.config.network](channels, public.num_classes).to(
                self.runtime.device
            )
        if distributed.is_main():
            with self.runtime.seeded("query classifier training"):  # its dropout
                self._train_or_read(classifier, public)
        distributed.copy_from_main(classifier.state_dict().values())
        return classifier.eval()

    @property
    def _is_published(self) -> bool:
        return self.config.network == prototypes.NETWORK

    def _as_input(self, images: torch.Tensor) -> torch.Tensor:
        return images if self._is_published else _resized(images, self.config.image_size)

    def _seconds_of_features(self) -> float:
        """Per image, measured."""
        features = FeatureMap(prototypes.FEATURES, self.spec, self.runtime.weights_root, self.runtime.device)
        blank = torch.zeros(8, *self.spec.image_shape, device=self.runtime.device)
        return seconds_of(lambda: features(blank)) / 8

    def _train_or_read(self, classifier: nn.Module, public: PublicData) -> None:
        cached = self._cache_path(public)
        if cached is not None and cached.exists():
            classifier.load_state_dict(
                torch.load(cached, map_location=self.runtime.device, weights_only=True)
            )
            return
        self._train(classifier, public)
        if broken := not_finite(classifier.state_dict()):  # before it is cached and used in a private query
            raise Diverged(f"'{broken[0]}' of the query classifier is NaN or infinite")
        if cached is None:
            return
        try:
            with for_everyone(), atomic(cached) as temporary:
                torch.save(classifier.state_dict(), temporary)
        except OSError as error:
            log.warning(f"{cached}: the query classifier is not kept ({error.strerror or error})")

    def _train(self, classifier: nn.Module, public: PublicData) -> None:
        config, samples = self.config, public.samples
        batches = -(-len(samples) // config.batch_size)
        total = config.n_epochs * batches
        optimizer = torch.optim.SGD(
            classifier.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        classifier.train()
        order, shown = None, None
        for step in progress(range(total), "query classifier (public data)"):
            epoch, position = divmod(step, batches)
            if epoch != shown:
                order, shown = self._rng(f"query order {epoch}").permutation(len(samples)), epoch
            batch = np.sort(order[position * config.batch_size : (position + 1) * config.batch_size])
            images = _resized(to_float(samples.images[batch], self.runtime.device), config.image_size)
            if self.flip:
                flipped = self._rng(f"query flip {step}").random(len(batch)) < 0.5
                images = torch.where(
                    torch.from_numpy(flipped).to(images.device)[:, None, None, None], images.flip(-1), images
                )
            labels = torch.from_numpy(samples.labels[batch]).to(self.runtime.device)
            loss = F.cross_entropy(classifier(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()

    def _rng(self, stream: str) -> np.random.Generator:
        return numpy_rng(self.runtime.seed, stream)

    def _cache_path(self, public: PublicData) -> Path | None:
        if self.runtime.cache_dir is None:
            return None
        digest = hashlib.sha256(
            repr((self.config, self.flip, self.runtime.seed, public.class_names)).encode()
        )
        digest.update(np.ascontiguousarray(public.samples.images))
        digest.update(public.samples.labels)
        return public_cache(self.runtime.cache_dir, f"query_classifier_{digest.hexdigest()[:16]}.pth")

    def _write(self, path: Path, public: PublicData, chosen: list[list[int]], ledger: Ledger) -> None:
        saved = {
            "noise_multiplier": ledger.planned(QUERY).noise_multiplier,
            "noise_seeded": ledger.noise_seeded,
            "words_per_class": self.words,
            "private_classes": list(self.spec.class_names),
            "public_classes": list(public.class_names),
            "selected": chosen,
        }
        write_json(path, saved)

    def _read_saved(self, path: Path) -> dict:
        key = "public_data.selective.semantic_path"
        try:
            saved = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: {path} cannot be read as a saved query ({error})") from error
        if saved.get("private_classes") != list(self.spec.class_names):
            raise UserError(f"{key}: {path} was made for the classes {saved.get('private_classes')}")
        if not isinstance(saved.get("noise_multiplier"), int | float):  # null would let the ledger choose it
            raise UserError(f"{key}: {path} does not state its privacy cost (it has no 'noise_multiplier')")
        return saved


def disjoint_top(histogram: np.ndarray, words: int) -> list[list[int]]:
    """Private classes in order take their `words` largest bins that no earlier class has taken."""
    left = histogram.astype(np.float64).copy()
    chosen = []
    for row in range(len(left)):
        best = np.argsort(-left[row], kind="stable")[:words]
        chosen.append([int(c) for c in best])
        left[:, best] = -np.inf
    return chosen


def _resized(images: torch.Tensor, size: int) -> torch.Tensor:
    return images if images.shape[-1] == size else F.interpolate(images, size=size, mode="nearest")
