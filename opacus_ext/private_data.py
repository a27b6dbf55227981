"""PrivateData: the only object through which methods use private images. It has no loader, no index and no length."""

import copy
import functools
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from data.spec import DataSpec, Samples
from opacus_ext.accounting import Release
from opacus_ext.errors import UnplannedRelease
from opacus_ext.ledger import Ledger
from opacus_ext.mechanisms import sum_clipped_rows, vote_sum
from opacus_ext.noise import NoiseSource
from opacus_ext.outer_products import OuterProducts
from opacus_ext.records import MappedRecords, PerExample, RecordAccess, with_fixed_batch_size
from opacus_ext.row_by_row import NUM_TRIED, require_row_by_row, require_same_choices
from utils import distributed
from utils.progress import progress

# (values, l2_bound, groups, num_groups) -> (num_groups, D): the sum of bounded values by group
BoundedSum = Callable[[torch.Tensor | OuterProducts, float, torch.Tensor, int], torch.Tensor]

_TUNED_ON_THIS_SET = (
    "the values of the presets: they may have been chosen by experiments on this very data set (by the papers or, for "
    "preset=quick, by this toolkit), and no noise was added to that choice; for records that need protection use a "
    "preset that was tuned on other images"
)


class PrivateData:
    """The private records behind the ledger.

    Guarantees of every query:
    - It books its release before a record is read, so an unplanned or surplus query reads nothing.
    - It bounds each record's contribution itself; it does not trust the function that it is given.
    - It adds noise before it returns. An exception ends the run and never yields a result without noise.
    - With several processes, one process adds the noise, once, and all receive the same result.

    Assumes:
    - The function treats every record by itself. This is tested on random public images before the first query of a
      release, never on records.
    - The caller divides results, which are sums, by public constants only.

    `spec` is the public description of the set, `num_train` included. `batch_size`: records per batch, at most.
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
        noise = noise or NoiseSource()
        self.spec = spec
        self.ledger = ledger
        self.device = torch.device(device)
        self._records = RecordAccess(samples, spec, noise, self.device, batch_size)
        ledger.noise_seeded |= noise.seeded

    def noisy_sum(self, name: str, fn: PerExample, l2_bound: float, by_class: bool = False) -> torch.Tensor:
        """Sum of fn(image, label) over all records, each clipped to an L2 norm of `l2_bound`, plus Gaussian noise.

        Returns (D,) float32, where D is the size of one flattened value; with `by_class` (num_classes, D), one row per
        label.

        Guarantees:
        - One record changes the sum by at most `l2_bound` in L2, whatever fn returns. With `by_class` a record
          contributes to one row, so the bound holds for the whole matrix.
        - The noise standard deviation is noise_multiplier * l2_bound on every coordinate.

        Assumes: fn treats every record by itself.

        | case | result |
        |---|---|
        | value with a non-finite entry | counts as zero |
        | number of values differs from the number of records | ValueError |
        | the release is sampled or truncated, or has another mechanism | UnplannedRelease |
        | no step of the release remains | BudgetExceeded, and no record is read |
        """
        return self._noisy_sum_of_all(name, fn, l2_bound, by_class, sum_clipped_rows)

    def _noisy_sum_of_all(
        self, name: str, fn: PerExample, l2_bound: float, by_class: bool, bounded_sum: BoundedSum
    ) -> torch.Tensor:
        """`noisy_sum` with another way to bound and add up the values of a batch."""
        release = self._book(name)
        if not release.takes_all:
            raise UnplannedRelease(
                f"'{name}' is planned with sample_rate {release.sample_rate}, max_batch_size "
                f"{release.max_batch_size}, but sums all records"
            )
        num_batches = -(-self.spec.num_train // (self._records.batch_size * distributed.world_size()))
        batches = self._records.batches_of_this_process()
        shown = progress(batches, name, num_batches, unit="batch") if num_batches > 10 else batches
        return self._noisy_sum_over(shown, release, fn, l2_bound, by_class, bounded_sum)

    def sampled_noisy_sum(
        self, name: str, fn: PerExample, l2_bound: float, by_class: bool = False
    ) -> torch.Tensor:
        """`noisy_sum` over a fresh, secret Poisson sample of the records; takes one planned step.

        Guarantees, in addition to those of `noisy_sum`:
        - Each record is in the sample with the planned sample_rate, independently of all others and of earlier steps.
        - The actual size of the sample stays secret. An empty sample yields noise like any other.

        Assumes: the caller divides by the expected size, spec.num_train * sample_rate, which is public.

        | case | result |
        |---|---|
        | the release has a max_batch_size | UnplannedRelease |
        """
        release = self._book(name)
        if release.max_batch_size is not None:
            raise UnplannedRelease(
                f"'{name}' is planned with max_batch_size {release.max_batch_size}, but sums all of its sample"
            )
        chosen = self._records.sampled_indices(release, self.ledger.executed(name) - 1)
        batches = self._records.batches(distributed.share(len(chosen)), chosen)
        return self._noisy_sum_over(batches, release, fn, l2_bound, by_class, sum_clipped_rows)

    def _book(self, name: str) -> Release:
        release = self.ledger.book(name)
        _require_mechanism(release, "gaussian")
        return release

    def _noisy_sum_over(
        self,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        release: Release,
        fn: PerExample,
        l2_bound: float,
        by_class: bool,
        bounded_sum: BoundedSum,
    ) -> torch.Tensor:
        """The noisy sum over this process's batches of (images, labels); the release is already booked."""
        num_groups = self.spec.num_classes if by_class else 1
        chooses = bounded_sum is not sum_clipped_rows
        self._try_on_public_images(release, fn, chooses)
        fn = with_fixed_batch_size(fn, self._records.batch_size) if chooses else fn
        total = None
        for images, labels in batches:
            groups = labels if by_class else torch.zeros_like(labels)
            part = bounded_sum(fn(images, labels), l2_bound, groups, num_groups)
            total = part if total is None else total + part
        step = self.ledger.executed(release.name) - 1
        std = release.noise_multiplier * l2_bound

        def add_noise(total: torch.Tensor) -> torch.Tensor:
            return self._records.noise.gaussian(total.numel(), std, release.name, step).add_to(total)

        result = distributed.sum_on_main(total, add_noise)
        return result if by_class else result[0]

    def _try_on_public_images(self, release: Release, fn: PerExample, chooses: bool) -> None:
        """Before the first query of a release, refuse a fn that visibly mixes records. Uses random images only.

        chooses: fn returns votes or ballots instead of values.
        """
        if self.ledger.executed(release.name) != 1:
            return
        if chooses:
            require_same_choices(release.name, fn, *self._records.public_batch(NUM_TRIED["choices"]))
            return

        def rows(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            own_group = torch.arange(len(labels), device=labels.device)
            return sum_clipped_rows(fn(images, labels), math.inf, own_group, len(labels))

        require_row_by_row(release.name, rows, *self._records.public_batch(NUM_TRIED["values"]))

    def noisy_histogram(
        self, name: str, fn: PerExample, num_bins: int, votes_per_example: int, by_class: bool = False
    ) -> torch.Tensor:
        """Histogram of the votes of all records, plus Gaussian noise: (num_bins,), or (num_classes, num_bins).

        fn(images, labels) -> (B, k) int64 bin indices, where k = votes_per_example.

        Guarantees:
        - One record changes the histogram by at most sqrt(k) in L2. Votes for k different bins reach this bound;
          repeated votes are scaled down to it.
        - The noise standard deviation is noise_multiplier * sqrt(k) on every bin.
        - fn always sees batches of one size, so that rounding by batch size changes no vote.
        - Memory does not grow with the product of records and bins.

        Assumes: fn treats every record by itself.

        | case | result |
        |---|---|
        | another number of votes per record than k | AssertionError |
        | a vote outside 0..num_bins - 1 | IndexError |
        | the release is sampled or has another mechanism | UnplannedRelease |
        """

        def votes(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            cast = fn(images, labels)
            assert cast.shape[1] == votes_per_example, (cast.shape, votes_per_example)
            return cast

        count = functools.partial(vote_sum, num_bins=num_bins)
        return self._noisy_sum_of_all(name, votes, votes_per_example**0.5, by_class, count)

    def report_noisy_max(self, name: str, fn: PerExample) -> int:
        """Index of the candidate with the most votes after Laplace noise (Dwork & Roth 2014, section 3.3).

        fn(images, labels) -> (B, candidates) of 0/1: the record's vote for each candidate.

        Guarantees:
        - Only the index leaves. The noisy counts do not.
        - Votes are clamped to [0, 1]; nan counts as 0.
        - Votes and noise are multiples of one grid that contains 1, as the proof requires (it adds 1 to the noise and
          to the votes). The winner is found before anything is cast to float32, where that would not hold.

        Assumes: fn treats every record by itself.

        | case | result |
        |---|---|
        | number of ballots differs from the number of records | ValueError |
        | the release has another mechanism | UnplannedRelease |
        """
        release = self.ledger.book(name)
        _require_mechanism(release, "report_noisy_max")
        ballots = functools.partial(_ballots, fn)
        self._try_on_public_images(release, ballots, chooses=True)
        padded = with_fixed_batch_size(ballots, self._records.batch_size)
        parts = [padded(*batch).sum(0).cpu() for batch in self._records.batches_of_this_process()]
        step = self.ledger.executed(name) - 1

        def winner(totals: torch.Tensor) -> torch.Tensor:
            noise = self._records.noise.laplace(len(totals), release.noise_multiplier, name, step)
            return F.one_hot(noise.added_to(totals).argmax(), len(totals)).float()

        return int(distributed.sum_on_main(torch.stack(parts).sum(0), winner).argmax())

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "PrivateData":
        """The same records with every image replaced by fn(image), for example its latent; same ledger, same noise.

        fn maps batches (B, C, H, W) float32 and must treat every image by itself. It is called when the first release
        reads the mapped records, and its result is kept. `map` itself reads nothing.
        """
        mapped = copy.copy(self)
        mapped._records = MappedRecords(self._records, fn)
        return mapped

    def report(self) -> dict:
        """The ledger's report, the assumptions about this set, and whether the noise was seeded; plain containers."""
        return {
            **self.ledger.report(),
            "data": self.spec.name,
            "num_records": self.spec.num_train,
            "data_identity": self.spec.identity,
            "assumptions": [
                f"the number of records, {self.spec.num_train}, is public",
                *_choice_of_records(self.spec),
                *_public_share(self.spec),
                f"the image size and the {self.spec.num_classes} classes are public",
                "the hyperparameters: choosing them by looking at these records is not accounted for",
                *([_TUNED_ON_THIS_SET] if self.spec.is_benchmark else []),
                *_images_per_person(self.spec),
            ],
            "images_per_person": self.spec.images_per_person,
            "noise_seeded": self.ledger.noise_seeded,
        }


def records_of(private: PrivateData) -> RecordAccess:
    """The records behind `private`, for the other mechanisms of this package. No other package may call this."""
    return private._records


def _choice_of_records(spec: DataSpec) -> list[str]:
    if not spec.num_unused:
        return []
    return [
        f"which records are used: {spec.num_unused} more training images are left out, by position only "
        f"(sensitive_data.num_train)"
    ]


def _public_share(spec: DataSpec) -> list[str]:
    """The assumption about records that were declared public."""
    if not spec.num_public:
        return []
    each = spec.num_public // spec.num_classes
    return [
        f"which records are private: {spec.num_public} more of the training images were declared public "
        f"(sensitive_data.num_public), of each class the first {each} in a permutation that depends on "
        f"sensitive_data.public_seed={spec.public_seed} and the number of images; nothing protects them, and the "
        f"guarantee is for this split as it is, because labels of private images have a part in it"
    ]


def _images_per_person(spec: DataSpec) -> list[str]:
    """The assumption about groups of records of one person, if the set has groups."""
    if spec.images_per_person is None:
        return []
    known = {
        "declared": "as declared when they were prepared",
        "observed": "the largest group of these very images, which is not protected by noise; declare a bound with "
        "--images_per_person to avoid that",
    }
    return [f"no person has more than {spec.images_per_person} images ({known[spec.images_per_person_is]})"]


def _require_mechanism(release: Release, mechanism: str) -> None:
    """A release that is accounted for as one mechanism must not be used by another."""
    if release.mechanism != mechanism:
        raise UnplannedRelease(
            f"'{release.name}' is planned as {release.mechanism}, but is queried as {mechanism}"
        )


def _ballots(fn: PerExample, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, candidates) float64 in [0, 1], one row per record."""
    ballots = torch.nan_to_num(fn(images, labels).double()).clamp(0.0, 1.0)
    if len(ballots) != len(labels):
        raise ValueError(f"{len(ballots)} ballots for {len(labels)} records")
    return ballots
