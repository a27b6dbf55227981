"""PrivateData: holds the images and lends them to mechanisms. There is no loader, no index, no length."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from data.spec import DataSpec, Samples
from opacus_ext.accounting import Release
from opacus_ext.errors import UnplannedRelease
from opacus_ext.ledger import Ledger
from opacus_ext.mechanisms import clipped_sum, vote_sum
from opacus_ext.noise import GridNoise, NoiseSource
from opacus_ext.outer_products import OuterProducts
from opacus_ext.row_by_row import require_row_by_row, require_same_choices
from utils import distributed
from utils.draws import Draws
from utils.images import to_float
from utils.progress import progress

# images (B, C, H, W) float32 in [-1, 1], labels (B,) int64 -> per-example values (B, ...), or these in factors
PerExample = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | OuterProducts]

COARSE = 4  # pixels of the random images on which functions are tried, before these are enlarged
NUM_TRIED = {"values": 3, "choices": 16}  # records on which functions are tried
_TUNED = (
    "the values of the presets, although they may have been chosen by experiments on this very data set (by the papers "
    "or, for preset=quick, by this toolkit), which added no noise to that choice: for records that need protection "
    "take a preset that was tuned on other images"
)


class PrivateData:
    """The private records behind the ledger.

    Every method that answers books first, bounds each record's influence itself, and adds noise before returning;
    an exception on the way ends the run, it never yields a clean answer. Answers are sums: divide them by a public
    constant, never by something counted here. `spec` is the public description, `num_train` included.
    """

    def __init__(
        self,
        samples: Samples,
        spec: DataSpec,
        ledger: Ledger,
        noise: NoiseSource | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 1024,
    ) -> None:
        self.spec = spec
        self.ledger = ledger
        self.device = torch.device(device)
        self._images: np.ndarray | torch.Tensor | None = samples.images  # None: to be mapped when first read
        self._labels = torch.from_numpy(samples.labels)
        self._noise = noise or NoiseSource()
        ledger.noise_seeded |= self._noise.seeded
        self._batch_size = _equal_parts(spec.num_train, batch_size)
        self._source: PrivateData | None = None  # of mapped records

    def noisy_sum(self, name: str, fn: PerExample, l2_bound: float, by_class: bool = False) -> torch.Tensor:
        """Sum over all records of fn(image, label), clipped to `l2_bound` each, plus Gaussian noise.

        Returns (D,) float32, D the size of one flattened value; with `by_class` (num_classes, D), one row per label
        (a record touches one row, so the sensitivity is the same). Noise std is noise_multiplier * l2_bound on every
        coordinate. The release must be planned without sampling.
        """
        return self._noisy_sum_of_all(name, fn, l2_bound, by_class, clipped_sum)

    def _noisy_sum_of_all(
        self, name: str, fn: PerExample, l2_bound: float, by_class: bool, bounded_sum: Callable
    ) -> torch.Tensor:
        """`noisy_sum`, where bounded_sum(values, l2_bound, groups, num_groups) adds up a batch by group."""
        release = self._booked(name)
        if not release.takes_all:
            raise UnplannedRelease(
                f"'{name}' is planned with sample_rate {release.sample_rate}, max_batch_size "
                f"{release.max_batch_size}, but sums all records"
            )
        num_batches = -(-self.spec.num_train // (self._batch_size * distributed.world_size()))
        batches = self._batches(distributed.share(len(self._labels)))
        shown = progress(batches, name, num_batches, unit="batch") if num_batches > 10 else batches
        return self._noisy_sum_over(shown, release, fn, l2_bound, by_class, bounded_sum)

    def sampled_noisy_sum(
        self, name: str, fn: PerExample, l2_bound: float, by_class: bool = False
    ) -> torch.Tensor:
        """`noisy_sum` over a fresh, secret Poisson sample of the records, at the planned rate; one planned step.

        The expected size of the sample, spec.num_train * sample_rate, is public; its actual size is not.
        """
        release = self._booked(name)
        if release.max_batch_size is not None:
            raise UnplannedRelease(
                f"'{name}' is planned with max_batch_size {release.max_batch_size}, but sums all of its sample"
            )
        chosen = self._sampled_indices(release, self.ledger.executed(name) - 1)
        batches = self._batches(distributed.share(len(chosen)), chosen)
        return self._noisy_sum_over(batches, release, fn, l2_bound, by_class, clipped_sum)

    def _try_on_public_images(self, release: Release, fn: PerExample, choosing: bool) -> None:
        """Before the first answer of a release: that fn mixes no records, as far as a few images show, none of them
        private."""
        if self.ledger.executed(release.name) != 1:
            return
        if choosing:
            require_same_choices(release.name, fn, *self._public_batch(NUM_TRIED["choices"]))
            return

        def rows(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            own_group = torch.arange(len(labels), device=labels.device)
            return clipped_sum(fn(images, labels), math.inf, own_group, len(labels))

        require_row_by_row(release.name, rows, *self._public_batch(NUM_TRIED["values"]))

    def _public_batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random images as fn would see the records, the same at every call, and labels, equal and different ones."""
        if self._source is not None:
            images, labels = self._source._public_batch(count)
            return self._fn(images), labels
        rng = torch.Generator().manual_seed(0)
        shape = (count, self.spec.channels, COARSE, COARSE)
        coarse = torch.randint(256, shape, generator=rng, dtype=torch.uint8)
        images = F.interpolate(to_float(coarse.numpy(), self.device), size=(self.spec.resolution,) * 2)
        return images, torch.arange(count, device=self.device) % min(2, self.spec.num_classes)

    def _filled_up(self, fn: PerExample) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """fn, which is given batches of one size alone, with blank records in the places that are left.

        How a library rounds depends on the size of what it is given. Where nearly equal numbers decide, one record
        more in a batch could so change what all others choose.
        """

        def filled(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            missing = max(0, self._batch_size - len(labels))
            whole = F.pad(images, (0, 0) * (images.dim() - 1) + (0, missing))
            values = fn(whole, F.pad(labels, (0, missing)))
            if len(values) != len(whole):
                raise ValueError(f"{len(values)} values for {len(whole)} records")
            return values[: len(labels)]

        return filled

    def _booked(self, name: str) -> Release:
        release = self.ledger.book(name)
        _require_mechanism(release, "gaussian")
        return release

    def _noisy_sum_over(
        self,
        batches: Iterable,
        release: Release,
        fn: PerExample,
        l2_bound: float,
        by_class: bool,
        bounded_sum: Callable,
    ) -> torch.Tensor:
        """What both kinds of noisy sum do with this process's batches of (images, labels)."""
        num_groups = self.spec.num_classes if by_class else 1
        choosing = bounded_sum is not clipped_sum
        self._try_on_public_images(release, fn, choosing)
        fn = self._filled_up(fn) if choosing else fn
        total = None
        for images, labels in batches:
            groups = labels if by_class else torch.zeros_like(labels)
            part = bounded_sum(fn(images, labels), l2_bound, groups, num_groups)
            total = part if total is None else total + part
        step = self.ledger.executed(release.name) - 1
        std = release.noise_multiplier * l2_bound

        def add_noise(total: torch.Tensor) -> torch.Tensor:
            return self._noise.gaussian(total.numel(), std, release.name, step).add_to(total)

        answer = distributed.sum_on_main(total, add_noise)
        return answer if by_class else answer[0]

    def noisy_histogram(
        self, name: str, fn: PerExample, num_bins: int, votes_per_example: int, by_class: bool = False
    ) -> torch.Tensor:
        """Votes of all records, (num_bins,) or (num_classes, num_bins), plus Gaussian noise.

        fn(images, labels) -> (B, votes_per_example) int64 bin indices. A record's k votes for different bins move the
        histogram by sqrt(k) in L2; repeated votes are scaled down to the same bound. Noise std is
        noise_multiplier * sqrt(k) on every bin. Memory does not depend on the product of records and bins.
        """

        def votes(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            cast = fn(images, labels)
            assert cast.shape[1] == votes_per_example, (cast.shape, votes_per_example)
            return cast

        count = functools.partial(vote_sum, num_bins=num_bins)
        return self._noisy_sum_of_all(name, votes, votes_per_example**0.5, by_class, count)

    def report_noisy_max(self, name: str, fn: PerExample) -> int:
        """Index of the candidate with most votes after Laplace noise (Dwork & Roth 2014, section 3.3).

        fn(images, labels) -> (B, candidates) of 0/1: what the record says of each candidate; clamped to [0, 1].
        The proof adds 1 to noise and to votes: both are whole multiples of a grid that 1 is on. Cast to float32 they
        would not be, so the winner is found before, and nothing else leaves.
        """
        release = self.ledger.book(name)
        _require_mechanism(release, "report_noisy_max")
        ballots = functools.partial(_ballots, fn)
        self._try_on_public_images(release, ballots, choosing=True)
        own = distributed.share(len(self._labels))
        filled = self._filled_up(ballots)
        parts = [filled(*batch).sum(0).cpu() for batch in self._batches(own)]
        step = self.ledger.executed(name) - 1

        def winner(totals: torch.Tensor) -> torch.Tensor:
            noise = self._noise.laplace(len(totals), release.noise_multiplier, name, step)
            return F.one_hot(noise.added_to(totals).argmax(), len(totals)).float()

        return int(distributed.sum_on_main(torch.stack(parts).sum(0), winner).argmax())

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "PrivateData":
        """The same records with every image replaced by fn(image), e.g. its latent; same ledger, same noise.

        fn sees batches (B, C, H, W) float32 and must treat each image by itself, as every fn of this class. It is
        called when the first release reads the mapped records, and then kept: mapping alone reads nothing.
        """
        mapped = object.__new__(PrivateData)
        mapped.__dict__.update(self.__dict__)
        mapped._images, mapped._source, mapped._fn = None, self, fn
        return mapped

    def report(self) -> dict:
        """The ledger's report plus what concerns this set: assumptions, seeding of the noise."""
        return {
            **self.ledger.report(),
            "data": self.spec.name,
            "num_records": self.spec.num_train,
            "data_identity": self.spec.identity,
            "assumptions": [
                f"the number of records, {self.spec.num_train}, is public",
                *self._choice_of_records(),
                f"the image size and the {self.spec.num_classes} classes are public",
                "the hyperparameters: choosing them by looking at these records is not accounted for",
                *([_TUNED] if self.spec.is_benchmark else []),
            ],
            "noise_seeded": self.ledger.noise_seeded,
        }

    def _choice_of_records(self) -> list[str]:
        unused = self.spec.num_unused
        if not unused:
            return []
        return [
            f"which records are used: {unused} training images more are left out by their positions alone "
            f"(sensitive_data.num_train)"
        ]

    def _batches(
        self, positions: slice, chosen: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A range of all records, or of the `chosen` ones, in order; an empty range is one empty batch, for its sum
        has a shape too."""
        for start in range(positions.start, max(positions.start + 1, positions.stop), self._batch_size):
            part = slice(start, min(start + self._batch_size, positions.stop))
            yield self._take(part if chosen is None else chosen[part])

    def _take(self, which: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._images is None:
            self._images = self._all_mapped()
        labels = self._labels[which].to(self.device)
        if isinstance(self._images, torch.Tensor):
            return self._images[which].to(self.device), labels
        rows = self._images[which if isinstance(which, slice) else which.numpy()]
        return to_float(rows, self.device), labels

    def _all_mapped(self) -> torch.Tensor:
        """(N, ...) float32 in main memory. Every process maps all records for itself, in the same batches: whether a
        process reads at all in a step depends on the sample, so they cannot share the work here."""
        num_batches = -(-self.spec.num_train // self._batch_size)
        batches = self._source._batches(slice(0, len(self._labels)))
        shown = progress(batches, "map", num_batches, unit="batch") if num_batches > 10 else batches
        rows, start = None, 0
        tried = self._source._public_batch(NUM_TRIED["values"])
        require_row_by_row("map", lambda images, _: self._fn(images).nan_to_num(), *tried)
        mapped = self._filled_up(lambda images, _: self._fn(images))
        # In place: side by side with its parts the whole would take twice the memory.
        for images, labels in shown:
            part = mapped(images, labels).cpu()
            rows = part.new_empty(len(self._labels), *part.shape[1:]) if rows is None else rows
            rows[start : start + len(part)] = part
            start += len(part)
        return rows

    def _image_shape(self) -> tuple[int, ...]:
        if self._images is not None:
            return tuple(self._images.shape[1:])
        blank = torch.zeros(1, *self._source._image_shape(), device=self.device)
        return tuple(self._fn(blank).shape[1:])

    def _sampled_indices(self, release: Release, step: int) -> torch.Tensor:
        rate, max_size = release.sample_rate, release.max_batch_size
        if max_size is not None and release.num_records != self.spec.num_train:
            raise UnplannedRelease(
                f"'{release.name}' is planned for {release.num_records} records, but there are {self.spec.num_train}"
            )
        return self._noise.sample(len(self._labels), rate, release.name, step, max_size)

    def _loss_draws(self, name: str, step: int, num_examples: int) -> Draws:
        return self._noise.loss_draws(name, step, num_examples, self.device)

    def _gradient_noise(self, name: str, size: int, std: float, step: int) -> GridNoise:
        return self._noise.gaussian(size, std, name, step)


def _equal_parts(count: int, most: int) -> int:
    """The size of parts of at most `most`, the last of which falls short of it by little."""
    return -(-count // -(-count // most))


def _require_mechanism(release: Release, mechanism: str) -> None:
    """What is accounted for as one mechanism must not be answered by another."""
    if release.mechanism != mechanism:
        raise UnplannedRelease(
            f"'{release.name}' is planned as {release.mechanism}, but is asked as {mechanism}"
        )


def _ballots(fn: PerExample, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, candidates) in [0, 1], one row per record."""
    ballots = torch.nan_to_num(fn(images, labels).double()).clamp(0.0, 1.0)
    if len(ballots) != len(labels):
        raise ValueError(f"{len(ballots)} ballots for {len(labels)} records")
    return ballots
