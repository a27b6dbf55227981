"""A public set as an image generator: what is drawn and varied are its images (Lin et al. 2025, "APIs 3").

A variation of an image is one of its nearest neighbours by an embedding. Legend: n public images, D features.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data.spec import DataSpec, PublicData
from extractors import build_extractor
from models.evolution.apis.api import Candidates, ImageAPI
from utils.errors import UserError
from utils.progress import progress
from utils.runtime import Runtime
from utils.sections import check_field
from utils.seeding import numpy_rng
from utils.timing import Cost, batch_rows, seconds_of

ROW = "public row"
ROWS_AT_ONCE = 256  # whose distances to all public images are in memory together
ASSUMED_IMAGES = 20000  # of a public set of any size, for an estimate of time


@dataclass(frozen=True)
class NearestConfig:
    embedding: (
        str  # features that define which images are near: an extractor (extractors/__init__.py) or auto
    )
    max_images: (
        int | None
    )  # a random subset of the public set of at most this size; None: all. They are in checkpoints
    batch_size: int  # images per forward pass of the embedding

    def __post_init__(self) -> None:
        for name in ("max_images", "batch_size"):
            value = getattr(self, name)
            check_field(value is None or value > 0, name, value, "at least 1")


class NearestAPI(ImageAPI):
    """Images of the public set, without regard to class. Degree d of a variation: one of the d nearest images with
    equal chance, the image itself being the nearest."""

    Config = NearestConfig

    def __init__(self, config: NearestConfig, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        self.extractor = build_extractor(
            "model.api_params.nearest.embedding", config.embedding, spec, runtime.weights_root, runtime.device
        )
        self.images: np.ndarray | None = None  # (n, C, H, W) uint8
        self._features: torch.Tensor | None = None  # (n, D), when first needed
        self._neighbors: dict[int, np.ndarray] = {}  # degree -> (n, degree) int32, -1 where not looked up yet

    @property
    def needs_public_images(self) -> bool:
        return True

    def check_degree(self, degree: float) -> None:
        if degree < 1 or degree != int(degree):
            raise UserError(
                f"{degree:g} is not allowed for api nearest; it must be a number of neighbours, 1 or more"
            )

    def public_costs(self, num_images: int, num_classes: int) -> list[Cost]:
        count = min(num_images, self.config.max_images or num_images)
        seconds = seconds_of(lambda: self._features_of(self._blank())) / len(self._blank())
        return [Cost("public features", f"{count:,} public images", count * seconds)]

    def seconds_per_image(self) -> float:
        """Of a variation: the search for neighbours among max_images images."""
        width, count = self._features_of(self._blank()).shape[1], self.config.max_images or ASSUMED_IMAGES
        features = torch.rand(count, width, device=self.runtime.device)
        rows = torch.arange(ROWS_AT_ONCE)
        return seconds_of(lambda: _nearest_rows(features, rows, 100)) / ROWS_AT_ONCE

    def _blank(self) -> torch.Tensor:
        return torch.zeros(batch_rows(self.image_shape[-1]), *self.image_shape, dtype=torch.uint8)

    def _features_of(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.extractor(images.to(self.runtime.device))[0].float()

    def prepare(self, public: PublicData | None) -> None:
        if self.images is not None:
            return
        images, most = public.samples.images, self.config.max_images
        if most is not None and len(images) > most:
            rng = numpy_rng(self.runtime.seed, "nearest subset")
            images = images[np.sort(rng.choice(len(images), most, replace=False))]
        self.images = np.array(images)

    def random_api(self, labels: np.ndarray, rng_name: str) -> Candidates:
        """Every public image once before one comes again."""
        rng = numpy_rng(self.runtime.seed, rng_name)
        passes = -(-len(labels) // len(self.images))
        order = np.concatenate([rng.permutation(len(self.images)) for _ in range(passes)])
        return self._candidates(labels, order[: len(labels)])

    def variation_api(self, candidates: Candidates, degree: float, rng_name: str) -> Candidates:
        rng = numpy_rng(self.runtime.seed, rng_name)
        rows = candidates.info[ROW]
        neighbors = self._nearest(rows, min(int(degree), len(self.images)))
        chosen = rng.integers(neighbors.shape[1], size=len(rows))
        return self._candidates(candidates.labels, neighbors[rows, chosen].astype(np.int64))

    def _candidates(self, labels: np.ndarray, rows: np.ndarray) -> Candidates:
        return Candidates(self.images[rows], labels, {ROW: rows})

    def _nearest(self, rows: np.ndarray, degree: int) -> np.ndarray:
        """(n, degree) int32: the neighbours, nearest first, of those public images that are in `rows`."""
        if degree not in self._neighbors:  # one table at a time: iterations seldom come back to a degree
            self._neighbors = {degree: np.full((len(self.images), degree), -1, np.int32)}
        table, features = self._neighbors[degree], self._embedded()
        missing = np.unique(rows)
        missing = missing[table[missing, 0] < 0]
        starts = range(0, len(missing), ROWS_AT_ONCE)
        for start in progress(starts, "nearest images", unit="batch") if len(starts) > 10 else starts:
            part = missing[start : start + ROWS_AT_ONCE]
            table[part] = _nearest_rows(features, torch.from_numpy(part), degree).cpu().numpy()
        return table

    def _embedded(self) -> torch.Tensor:
        if self._features is None:
            starts = range(0, len(self.images), self.config.batch_size)
            parts = []
            for start in progress(starts, "features of the public set", unit="batch"):
                part = torch.from_numpy(self.images[start : start + self.config.batch_size])
                parts.append(self._features_of(part))
            self._features = torch.cat(parts)
        return self._features

    def state_dict(self) -> dict:
        return {} if self.images is None else {"images": torch.from_numpy(self.images)}

    def load_state_dict(self, state: dict) -> None:
        if "images" in state:
            self.images = state["images"].numpy()


def _nearest_rows(features: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """(len(rows), count): indices of the nearest of `features` (n, D); the row itself first, also before its copies."""
    rows = rows.to(features.device)
    distances = torch.cdist(features[rows], features)
    distances[torch.arange(len(rows), device=rows.device), rows] = -1.0
    return distances.topk(count, largest=False).indices
