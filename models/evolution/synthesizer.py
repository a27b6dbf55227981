"""Private Evolution (Lin et al., ICLR 2024): private images vote for synthetic ones, and the winners are varied.

Nothing is trained. A generator draws a population; in every iteration each private record votes for the k candidates
of its class whose features are nearest to its own. The votes of all classes together are one Gaussian release of L2
sensitivity sqrt(k), for a record votes in one class alone; everything else is a consequence of the released
numbers. Each class has an equal, public share of the population, and clean votes are never kept.
Legend: B images, C H W pixels, n candidates, D features.
"""

import abc
import functools
from dataclasses import dataclass

import numpy as np
import torch

from data.convert import resized, to_channels
from data.locations import has_public_images
from data.spec import DataSpec, PublicData, Samples
from extractors import build_extractor
from extractors.extractor import Extractor
from models.evolution.apis.api import Candidates, ImageAPI, checked
from models.evolution.config import EvolutionConfig
from models.evolution.population import class_labels, class_sizes, consecutive, survivors
from models.evolution.voting import NearestCandidates, ballots, choose_backend
from models.public.central_images import MEAN, MODE
from models.public.config import PublicDataConfig
from models.synthesizer import Synthesizer, balanced_labels
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from utils import distributed
from utils.errors import Unavailable, UserError
from utils.images import to_uint8
from utils.memory import require_memory
from utils.progress import progress
from utils.runtime import Runtime
from utils.sections import GenConfig, check
from utils.seeding import numpy_rng
from utils.timing import Cost, batch_rows, seconds_of

VOTES = "votes"


class PrivateEvolution(Synthesizer, abc.ABC):
    """The population after `iteration` rounds, and the noisy votes of a round that was released but not finished."""

    @dataclass(frozen=True)
    class Config:
        model: object  # with a field feature_extractor
        train: EvolutionConfig
        gen: GenConfig
        public_data: PublicDataConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        public, settings = config.public_data.name, config.train
        check(
            public not in (MEAN, MODE),
            "public_data.name",
            public,
            "a public set or null: nothing here is trained on central images",
        )
        settings.check_sizes(spec.num_classes)
        for iteration, size in enumerate(settings.num_samples_schedule):
            candidates = size * settings.growth(iteration)
            require_memory(f"train.num_samples_schedule[{iteration}]", candidates, spec.image_shape)
        self.api = self.make_api()
        self._check_degrees()
        if self.api.needs_public_images and not has_public_images(config.public_data):
            raise UserError(
                "public_data.name: null is not allowed with this generator, which needs a public set; give one, for "
                "example public_data.name=glyphs"
            )
        self.num_blocks = spec.num_classes if settings.cond else 1
        self.backend = choose_backend(settings.nn_backend)
        self.iteration = 0
        self.population: Candidates | None = None
        self.votes: torch.Tensor | None = None  # (blocks, candidates of the largest block), noisy

    def _check_degrees(self) -> None:
        settings = self.config.train
        # The first degree is that of the initial variations, of which there may be none.
        for degree in settings.variation_degree_schedule[settings.initial_variation_fold == 0 :]:
            try:
                self.api.check_degree(degree)
            except UserError as error:
                raise UserError(f"train.variation_degree_schedule: {error}") from error

    @abc.abstractmethod
    def make_api(self) -> ImageAPI:
        """The generator that the method steers."""

    @functools.cached_property
    def extractor(self) -> Extractor:
        """Built when pretraining starts: planning a run needs no weights."""
        name = self.config.model.feature_extractor
        return build_extractor(
            "model.feature_extractor", name, self.spec, self.runtime.weights_root, self.runtime.device
        )

    @property
    def uses_public_images(self) -> bool:
        return self.api.needs_public_images

    def settings_without_effect(self) -> dict[str, str]:
        return {} if self.uses_public_images else {"public_data": "this generator takes no public images"}

    # -------------------------------------------------------------------------------------------- stages

    def privacy_plan(self) -> list[Release]:
        return [*self.pretraining_plan(), Release(VOTES, None, num_steps=self.config.train.num_iterations)]

    def pretraining_plan(self) -> list[Release]:
        return self.api.releases()

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        self.extractor  # noqa: B018 - what is missing shows now
        for release in self.api.releases():
            private.ledger.book(release.name, release.num_steps - private.ledger.executed(release.name))
        self.api.prepare(public)

    def train(self, private: PrivateData) -> None:
        records = private.map(self._embed_records)  # once, at the first query of votes
        if self.population is None:
            self.population = self._first_population()
            self._keep()
        for iteration in range(self.iteration + 1, self.config.train.num_iterations + 1):
            if self.votes is None:
                self.votes = self._query_votes(records, self._features(iteration)).cpu()
                # Before anything outside this process, such as an image API, learns the winners.
                self.runtime.snapshot("train")
            self.population = self._next_population(iteration, self._selected(iteration))
            self.iteration, self.votes = iteration, None
            self._keep()

    def generate(self, num_samples: int) -> Samples:
        labels = balanced_labels(num_samples, self.spec.num_classes)
        pool = self._final_population()
        rng = numpy_rng(self.runtime.seed, "generate")
        rows, again = np.empty(num_samples, np.int64), np.zeros(num_samples, bool)
        wanted = labels if self.num_blocks > 1 else np.zeros_like(labels)
        for block in range(self.num_blocks):
            places = np.flatnonzero(wanted == block)
            members = np.flatnonzero(pool.labels == block) if self.num_blocks > 1 else np.arange(len(pool))
            rows[places] = np.resize(rng.permutation(members), len(places))
            again[places[len(members) :]] = True
        images = pool.images[rows]
        if again.any():  # more than there are: variations of them, by the last degree
            degree = self.config.train.variation_degree_schedule[-1]
            images[again] = self._vary(pool.take(rows[again]), degree, "generate").images
        return Samples(self._as_spec(images), labels)

    def state_dict(self) -> dict:
        return {
            "iteration": self.iteration,
            "population": None if self.population is None else _as_tensors(self.population),
            "votes": self.votes,
            "api": self.api.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.api.load_state_dict(state["api"])
        self.iteration, self.votes = state["iteration"], state["votes"]
        self.population = None if state["population"] is None else _from_tensors(state["population"])

    def missing_requirements(self) -> list[str]:
        lines = []
        for require in (self.api.require_ready, lambda: self.extractor):
            try:
                require()
            except UserError as error:
                lines.append(str(error))
        return lines

    def parameter_counts(self) -> dict[str, int]:
        return self.api.parameter_counts()

    def public_costs(self, num_images: int) -> list[Cost]:
        return self.api.public_costs(num_images, self.config.public_data.n_classes)

    def costs(self) -> list[Cost]:
        """Nothing where the generator cannot tell before it is prepared, or weights of the feature extractor are
        missing."""
        settings, drawing = self.config.train, self.api.seconds_per_image()
        blank = torch.zeros(batch_rows(self.spec.resolution), *self.spec.image_shape, dtype=torch.uint8)
        try:
            embedding = seconds_of(lambda: self._embed_bytes(blank)) / len(blank)
        except Unavailable:
            return []
        sizes = [n * settings.growth(t) for t, n in enumerate(settings.num_samples_schedule)]
        ahead = settings.lookahead_degree
        if drawing is None or settings.num_iterations == 0:
            return []
        seconds = (ahead * sum(sizes[:-1]) + sum(sizes)) * drawing
        seconds += (max(1, ahead) * sum(sizes[:-1]) + self.spec.num_train) * embedding
        seconds += self.spec.num_train * sum(sizes[:-1]) / self.num_blocks * self._seconds_per_comparison()
        described = (
            f"{settings.num_iterations} votes of {self.spec.num_train:,} private images for {max(sizes[:-1])} images, "
            f"{ahead} variations of each"
        )
        return [Cost("train", described, seconds, settings.num_iterations)]

    def remaining_share(self, cost: Cost) -> float:
        return 1 - self.iteration / cost.steps if cost.stage == "train" else self.api.remaining_share(cost)

    def _seconds_per_comparison(self) -> float:
        """Of one private record with one candidate."""
        settings, count = self.config.train, 1024
        blank = torch.zeros(1, *self.spec.image_shape, dtype=torch.uint8)
        features = torch.rand(count, self._embed_bytes(blank).shape[1], device=self.runtime.device)
        search = NearestCandidates(
            features.clone(), settings.nn_mode, settings.num_nearest_neighbor, self.backend
        )
        return seconds_of(lambda: search(features)) / count**2

    # -------------------------------------------------------------------------------------------- populations

    def _first_population(self) -> Candidates:
        settings = self.config.train
        labels = class_labels(settings.num_samples_schedule[0], self.spec.num_classes)
        drawn = self._draw(labels, "initial")
        degree = settings.variation_degree_schedule[0]
        return self._with_variations(drawn, True, settings.initial_variation_fold, degree, "initial")

    def _next_population(self, iteration: int, selected: Candidates) -> Candidates:
        settings = self.config.train
        kept, fold = settings.keeps(iteration), settings.fold(iteration)
        degree = settings.variation_degree_schedule[iteration]
        return self._with_variations(selected, kept, fold, degree, f"iteration {iteration}")

    def _with_variations(
        self, parents: Candidates, kept: bool, fold: int, degree: float, name: str
    ) -> Candidates:
        """Class by class, in each the parents before their variations."""
        parts = [parents] if kept else []
        parts += [self._vary(parents, degree, f"{name} variation {index}") for index in range(fold)]
        together = Candidates.concatenate(parts)
        if self.num_blocks == 1 or len(parts) == 1:
            return together
        return together.take(np.argsort(together.labels, kind="stable"))

    def _blocks(self) -> list[slice]:
        """Which candidates belong to each class."""
        settings = self.config.train
        drawn = class_sizes(settings.num_samples_schedule[self.iteration], self.num_blocks)
        return consecutive(drawn * settings.growth(self.iteration))

    def _draw(self, labels: np.ndarray, name: str) -> Candidates:
        return checked(self.api.random_api(labels, name), labels, self.api.image_shape, "random_api")

    def _vary(self, parents: Candidates, degree: float, name: str) -> Candidates:
        found = self.api.variation_api(parents, degree, name)
        return checked(found, parents.labels, self.api.image_shape, "variation_api")

    def _selected(self, iteration: int) -> Candidates:
        """The candidates that this round's votes select: an equal share of every class."""
        settings = self.config.train
        sizes = class_sizes(settings.num_samples_schedule[iteration], self.num_blocks)
        chosen = []
        for block, members in enumerate(self._blocks()):
            votes = self.votes[block, : members.stop - members.start].numpy()
            rng = numpy_rng(self.runtime.seed, f"selection {iteration} {block}")
            selection = settings.selection_of(iteration)
            found = survivors(votes, sizes[block], selection, settings.count_threshold, rng)
            chosen.append(members.start + found)
        return self.population.take(np.concatenate(chosen))

    def _final_population(self) -> Candidates:
        """The population; of one that keeps its parents the parents, which have been voted for."""
        settings = self.config.train
        if self.population is None:  # untrained
            drawn = class_labels(settings.num_samples_schedule[0], self.spec.num_classes)
            return self._draw(drawn, "initial")
        if self.iteration == 0 or not settings.keeps(self.iteration):
            return self.population
        selected = class_sizes(settings.num_samples_schedule[self.iteration], self.num_blocks)
        firsts = [np.arange(size) + block.start for size, block in zip(selected, self._blocks(), strict=True)]
        return self.population.take(np.concatenate(firsts))

    def _keep(self) -> None:
        """Leave a snapshot and a picture of the population, which is made of released numbers alone."""
        self.runtime.snapshot("train")
        labels = self.population.labels
        shown = np.concatenate([np.flatnonzero(labels == label)[:8] for label in np.unique(labels)])
        images = self._as_spec(self.population.images[shown])
        self.runtime.preview("train", self.iteration, images, labels[shown])

    # -------------------------------------------------------------------------------------------- votes

    def _query_votes(self, records: PrivateData, features: torch.Tensor) -> torch.Tensor:
        """(blocks, candidates of the largest block): the noisy votes, float32. Cells beyond a block are noise alone."""
        settings = self.config.train
        members = self._blocks()
        nearest = [
            NearestCandidates(features[rows], settings.nn_mode, settings.num_nearest_neighbor, self.backend)
            for rows in members
        ]
        result = records.noisy_histogram(
            VOTES,
            ballots(nearest, settings.num_nearest_neighbor),
            max(block.stop - block.start for block in members),
            settings.num_nearest_neighbor,
            by_class=self.num_blocks > 1,
        )
        return result.view(self.num_blocks, -1)

    def _features(self, iteration: int) -> torch.Tensor:
        """(n, D): the mean embedding of every candidate's lookahead variations; of itself without lookahead."""
        degree, ahead = (
            self.config.train.variation_degree_schedule[iteration],
            self.config.train.lookahead_degree,
        )
        if ahead == 0:
            return self._embed(self.population.images)
        total, name = 0.0, f"iteration {iteration} lookahead"
        for index in progress(range(ahead), name, unit="variation"):
            total = total + self._embed(self._vary(self.population, degree, f"{name} {index}").images)
        return total / ahead

    def _embed(self, images: np.ndarray) -> torch.Tensor:
        """uint8 images of the generator's shape -> (n, D) float32 on the run's device; processes share the work."""
        is_shared = len(images) >= distributed.world_size()
        own = images[distributed.share(len(images))] if is_shared else images
        features = self._embed_bytes(torch.from_numpy(np.ascontiguousarray(self._as_spec(own))))
        return distributed.concatenate(features) if is_shared else features

    def _embed_records(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float32 in [-1, 1], as the private data gives its records."""
        return self._embed_bytes(torch.from_numpy(to_uint8(images)))

    def _embed_bytes(self, images: torch.Tensor) -> torch.Tensor:
        parts = images.to(self.runtime.device).split(self.config.train.feature_extractor_batch_size)
        with torch.no_grad():
            return torch.cat([self.extractor(part)[0].float() for part in parts])

    def _as_spec(self, images: np.ndarray) -> np.ndarray:
        return resized(to_channels(images, self.spec.channels), self.spec.resolution)


def _as_tensors(candidates: Candidates) -> dict:
    info = {name: torch.from_numpy(rows) for name, rows in candidates.info.items()}
    return {
        "images": torch.from_numpy(candidates.images),
        "labels": torch.from_numpy(candidates.labels),
        "info": info,
    }


def _from_tensors(state: dict) -> Candidates:
    info = {name: rows.numpy() for name, rows in state["info"].items()}
    return Candidates(state["images"].numpy(), state["labels"].numpy(), info)
