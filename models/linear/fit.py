"""Fit a linear classifier to fixed features of private images, by one of three private queries.

- class_means: one Gaussian release of the sum of features per class.
- least_squares: one Gaussian release of second moments and class sums, bounded together (sufficient statistics
  perturbation; Mehta et al. 2023, arXiv:2211.13403).
- sgd: DP-SGD on the cross-entropy of a linear layer (Tramer and Boneh 2021, arXiv:2011.11660).

Legend: B batch, D features, K classes.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data.spec import DataSpec
from models.fitting.stages import restore_moments
from models.linear.classifier import LinearClassifier
from models.linear.features import FeatureMap
from opacus_ext.accounting import Release
from opacus_ext.dpsgd import DPSGDConfig, dpsgd_release, dpsgd_steps
from opacus_ext.outer_products import OuterProducts
from opacus_ext.private_data import PrivateData
from utils.draws import Draws
from utils.progress import progress
from utils.runtime import Runtime
from utils.sections import check_choice, check_field, check_least, check_positive
from utils.stopping import raise_swallowed
from utils.timing import Cost, batch_rows, seconds_of
from utils.typed import Number

CLASS_MEANS, LEAST_SQUARES, SGD = "class_means", "least_squares", "sgd"
LEAST_RIDGE = 1e-6  # of the number of records: solves the normal equations without noise


@dataclass(frozen=True)
class FitConfig:
    fit: str  # class_means, least_squares or sgd
    label_weight: float  # least_squares: of the class sums against the second moments, in the joint bound
    ridge: float  # least_squares: regularisation, in units of the spectral norm of the noise on the second moments
    batch_size: int | None  # sgd: nominal; q = 1 / ceil(N / batch_size); None: all N in every step
    n_epochs: Number  # sgd: passes over the private images
    snapshot_freq: int  # sgd: steps between snapshots
    lr: float  # sgd, constant
    momentum: float  # sgd
    dp: DPSGDConfig  # sgd

    def __post_init__(self) -> None:
        check_choice("fit", self.fit, (CLASS_MEANS, LEAST_SQUARES, SGD))
        check_positive(self, "label_weight", "lr")
        check_least(self, 0, "ridge")
        check_field(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        check_least(self, 1, "snapshot_freq")


class LinearFit:
    """A linear layer on the features of a FeatureMap, fitted by the private query `name`."""

    def __init__(
        self, name: str, config: FitConfig, features: FeatureMap, spec: DataSpec, runtime: Runtime
    ) -> None:
        self.name, self.config, self.features, self.spec, self.runtime = name, config, features, spec, runtime
        self.layer = nn.Linear(features.num_features, spec.num_classes, bias=False).to(runtime.device)
        nn.init.zeros_(self.layer.weight)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=config.lr, momentum=config.momentum)
        self.class_sums = torch.zeros_like(
            self.layer.weight.detach()
        )  # (K, D), noisy; zero before the query, and with sgd

    def release(self, noise_multiplier: float | None = None) -> Release:
        """The one planned query; with `noise_multiplier` its noise is fixed, else the ledger solves for it."""
        if self.config.fit == SGD:
            size, epochs, most = self.config.batch_size, self.config.n_epochs, self.config.dp.max_batch_size
            steps = dpsgd_release(self.name, self.spec.num_train, size, epochs, most)
            return dataclasses.replace(steps, noise_multiplier=noise_multiplier)
        return Release(self.name, noise_multiplier)

    def fit(self, private: PrivateData) -> None:
        """Make the query, continuing where a restored state ends, and keep its result."""
        if private.ledger.executed(self.name) == private.ledger.planned(self.name).num_steps:
            return
        {
            CLASS_MEANS: self._fit_class_means, LEAST_SQUARES: self._fit_least_squares, SGD: self._fit_sgd
        }[self.config.fit](private)  # fmt: skip
        self.runtime.snapshot("train")  # a result that is lost would be queried again

    def classifier(self) -> LinearClassifier:
        return LinearClassifier(self.features, self.layer)

    def _fit_class_means(self, private: PrivateData) -> None:
        """The class whose mean has the direction nearest to x: classes of any size count alike, and no noisy number of
        records is needed."""
        bound = math.hypot(1.0, self.features.config.constant)
        self.class_sums = private.noisy_sum(self.name, lambda x, _: self.features(x), bound, by_class=True)
        std = private.ledger.planned(self.name).noise_multiplier * bound
        sums = self.class_sums[:, :-1]
        # The noise adds its own share to |sum|^2, which is known.
        squares = sums.square().sum(1, keepdim=True) - sums.shape[1] * std**2
        lengths = squares.clamp(min=max(std**2, 1e-12)).sqrt()
        self._set_weights(F.pad(sums / lengths, (0, 1)))

    def _fit_least_squares(self, private: PrivateData) -> None:
        """Ridge regression of one-hot labels: (X^T X + r I)^-1 X^T Y, from noisy X^T X and X^T Y.

        A record contributes (x x^T, w onehot(y) x^T), whose norm is sqrt(|x|^4 + w^2 |x|^2).
        """
        config, num_features = self.config, self.features.num_features
        square = 1.0 + self.features.config.constant**2
        bound = math.sqrt(square**2 + config.label_weight**2 * square)

        def products(images: torch.Tensor, labels: torch.Tensor) -> OuterProducts:
            x = self.features(images)
            weighted = config.label_weight * F.one_hot(labels, self.spec.num_classes).to(x.dtype)
            return OuterProducts([(x, x), (weighted, x)])

        total = private.noisy_sum(self.name, products, bound).double()
        moments, sums = total.split([num_features**2, self.spec.num_classes * num_features])
        moments = moments.view(num_features, num_features)
        self.class_sums = sums.view(self.spec.num_classes, num_features) / config.label_weight
        # Averaging with the transpose halves the variance: entries of variance s^2 / 2, spectral norm s sqrt(2 D).
        noise = private.ledger.planned(self.name).noise_multiplier * bound * math.sqrt(2 * num_features)
        ridge = config.ridge * noise + LEAST_RIDGE * self.spec.num_train
        values, vectors = torch.linalg.eigh((moments + moments.T) / 2)
        inverse = vectors / (values.clamp(min=0) + ridge) @ vectors.T
        self._set_weights(self.class_sums @ inverse)

    def _fit_sgd(self, private: PrivateData) -> None:
        scale = math.sqrt(self.features.num_features)  # entries of size 1, as of normalised features
        mapped = private.map(lambda images: self.features(images) * scale)

        def loss(
            network: nn.Module, features: torch.Tensor, labels: torch.Tensor, rng: Draws
        ) -> torch.Tensor:
            return F.cross_entropy(network(features), labels, reduction="none")

        total = private.ledger.planned(self.name).num_steps
        start = private.ledger.executed(self.name)
        steps = dpsgd_steps(self.name, mapped, self.layer, self.optimizer, loss, self.config.dp)
        for step in progress(steps, f"{self.name} (DP-SGD)", total, initial=start):
            raise_swallowed()
            if (step.index + 1) % self.config.snapshot_freq == 0 and step.index + 1 < total:
                self.runtime.snapshot("train")

    @property
    def needs_public_images(self) -> bool:
        return self.features.config.num_directions is not None

    def costs(self, stage: str = "train") -> list[Cost]:
        num_images = self.spec.num_train
        seconds = num_images * self.seconds_per_image()
        text = f"features of {num_images} images"
        if self.config.fit == SGD:
            release = self.release()
            rows = max(1, round(release.sample_rate * num_images))
            batch = torch.ones(rows, self.features.num_features, device=self.runtime.device)
            # A step multiplies features and weights, and features and gradients of the logits.
            seconds += release.num_steps * 2 * seconds_of(lambda: self.layer(batch))
            text += f", {release.num_steps} steps x {rows} images"
        return [Cost(stage, text, seconds)]

    def seconds_per_image(self) -> float:
        """Of the features, measured on a small batch."""
        rows = batch_rows(self.spec.resolution)
        blank = torch.zeros(rows, *self.spec.image_shape, device=self.runtime.device)
        return seconds_of(lambda: self.features(blank)) / rows

    def state_dict(self) -> dict:
        return {
            "features": self.features.state_dict(),
            "layer": self.layer.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "class_sums": self.class_sums,
        }

    def load_state_dict(self, state: dict) -> None:
        self.features.load_state_dict(state["features"])
        self.layer.load_state_dict(state["layer"])
        restore_moments(self.optimizer, state["optimizer"])
        self.class_sums = state["class_sums"].to(self.runtime.device)

    @torch.no_grad()
    def _set_weights(self, weights: torch.Tensor) -> None:
        self.layer.weight.copy_(weights)
