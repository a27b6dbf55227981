"""Images for pretraining: a public set, the part of it that the semantic query selects, or noisy central images of the
private set."""

from dataclasses import dataclass

import numpy as np

from data.locations import has_public_images
from data.spec import DataSpec, PublicData
from models.public.central_images import CENTRAL_IMAGES, MEAN, MODE, CentralImages
from models.public.config import PublicDataConfig
from models.public.semantic_query import QueryConfig, SemanticQuery, public_classes_per_class
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from utils.draws import Draws
from utils.runtime import Runtime
from utils.timing import Cost

# Reasons why settings have no effect.
NO_IMAGES = "this run has no images to pretrain on"
NO_FLIP = "there are no public images, and central images are never mirrored"
SELECTIVE, NO_SELECTION = (
    "public_data.selective",
    "there is no public set to select from; give public_data.name",
)


@dataclass(frozen=True)
class PublicLabels:
    """How pretraining uses the labels of a public set: part of the section `pretrain`."""

    cond: bool  # False: public labels are ignored
    query: QueryConfig  # classifier of the semantic query


class Pretraining:
    """Plan and make the private queries of pretraining, and keep their results. `used`: pretraining takes at least one
    step; otherwise there is no query, and `public` and `query` may be None.

    Central images are of the kind that public_data.name says, or else of `central_kind`, in addition to public
    images; None: there are none in that case. With warms_up=False there are none in any case.
    """

    def __init__(
        self,
        public: PublicDataConfig | None,
        query: QueryConfig | None,
        used: bool,
        spec: DataSpec,
        runtime: Runtime,
        *,
        central_kind: str | None = None,
        warms_up: bool = True,
    ) -> None:
        self.public, self.used, self.spec, self.runtime = public, used, spec, runtime
        self.central, self.query = None, None
        if not used:
            return
        if has_public_images(public) and public.selective.ratio < 1:
            words = public_classes_per_class(public, spec.num_classes)
            self.query = SemanticQuery(query, public, words, spec, runtime)
        kind = public.name if public.name in (MEAN, MODE) else central_kind
        if kind is not None and warms_up:
            self.central = CentralImages(kind, public.central, spec, runtime)

    @property
    def flip(self) -> bool:
        """Every other image is mirrored. Central images never are: they may be characters."""
        return self.public.flip and self.central is None

    @property
    def num_labels(self) -> int:
        """Labels that a generator needs: the private classes, and the public ones where those are trained."""
        public_classes = 0 if self.query is not None else self.public.n_classes or 0
        return max(self.spec.num_classes, public_classes)

    def settings_without_effect(self) -> dict[str, str]:
        """`Synthesizer.settings_without_effect`, of the pretraining."""
        if has_public_images(self.public):
            return {}
        without_effect = {"pretrain": NO_IMAGES} if self.used and self.central is None else {}
        return {**without_effect, SELECTIVE: NO_SELECTION, "public_data.flip": NO_FLIP}

    def plan(self) -> list[Release]:
        return [query.release() for query in (self.query, self.central) if query is not None]

    def obtain(self, public: PublicData | None, private: PrivateData | None) -> PublicData | None:
        """The images, or None without a public set; labelled with private classes if a query selected or made them."""
        if self.central is not None:
            images = PublicData(CENTRAL_IMAGES, self.central.query(private), self.spec.class_names)
            self.runtime.snapshot("pretrain")
            return images
        return None if public is None else self.select(public, private)

    def select(self, public: PublicData, private: PrivateData | None) -> PublicData:
        """The part of a public set that the query chooses, or all of it."""
        return public if self.query is None else self.query.select(public, private)

    def augmented(self, images: np.ndarray, rng: Draws) -> np.ndarray:
        """A batch (B, C, H, W) uint8 of these images as one pass shows it: central images are changed a little."""
        return images if self.central is None else self.central.augment(images, rng)

    def costs(self, num_images: int) -> tuple[list[Cost], int]:
        """Cost of the selection, and the number of `num_images` public images that it keeps."""
        if self.query is None:
            return [], num_images
        num_classes = self.public.n_classes
        left = num_images * self.query.words * self.spec.num_classes // num_classes
        return [self.query.cost(num_images, num_classes)], left

    def state_dict(self) -> dict:
        """The central images. The result of the semantic query is in a separate file."""
        return {} if self.central is None else self.central.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.central is not None:
            self.central.load_state_dict(state)
