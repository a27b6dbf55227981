"""The private records and the secret randomness about them, for the mechanisms of this package only.

Everything that a RecordAccess returns is private: not bounded, not noised, not booked. A mechanism books its release
first, bounds what each record contributes, and lets only the noisy sum leave. tests/test_architecture.py refuses any
use of this module outside opacus_ext.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from data.spec import DataSpec, Samples
from opacus_ext.accounting import Release
from opacus_ext.errors import UnplannedRelease
from opacus_ext.noise import GridNoise, NoiseSource
from opacus_ext.outer_products import OuterProducts
from opacus_ext.row_by_row import NUM_TRIED, require_row_by_row
from utils import distributed
from utils.draws import Draws
from utils.images import to_float
from utils.progress import progress

# images (B, C, H, W) float32 in [-1, 1], labels (B,) int64 -> per-example values (B, ...), or these in factors
PerExample = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | OuterProducts]

COARSE = 4  # resolution of the random public images before they are enlarged


class RecordAccess:
    """Read access to the private records, and the draws that decide which records a step uses.

    noise: source of all secret randomness. batch_size: records per batch; it depends on public facts only.
    """

    def __init__(
        self, samples: Samples, spec: DataSpec, noise: NoiseSource, device: torch.device, batch_size: int
    ) -> None:
        self.noise = noise
        self.device = device
        self.batch_size = _equal_parts(spec.num_train, batch_size)
        self._spec = spec
        self._images: np.ndarray | torch.Tensor | None = samples.images
        self._labels = torch.from_numpy(samples.labels)

    @property
    def num_records(self) -> int:
        """The number of records that are held. For sums use spec.num_train, the public number."""
        return len(self._labels)

    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image as mechanisms see it."""
        return tuple(self._images.shape[1:])

    def take(self, which: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) float32 in [-1, 1] and labels (B,) int64 of these positions, on the device."""
        images = self._all_images()
        labels = self._labels[which].to(self.device)
        if isinstance(images, torch.Tensor):
            return images[which].to(self.device), labels
        return to_float(images[which if isinstance(which, slice) else which.numpy()], self.device), labels

    def _all_images(self) -> np.ndarray | torch.Tensor:
        return self._images

    def batches(
        self, positions: slice, chosen: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of a range of all records, or of a range of `chosen`, in order.

        An empty range yields one empty batch, because a sum of no records still has a shape.
        """
        for start in range(positions.start, max(positions.start + 1, positions.stop), self.batch_size):
            part = slice(start, min(start + self.batch_size, positions.stop))
            yield self.take(part if chosen is None else chosen[part])

    def batches_of_this_process(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of this process's share of all records."""
        return self.batches(distributed.share(self.num_records))

    def sampled_indices(self, release: Release, step: int) -> torch.Tensor:
        """Sorted positions of the Poisson sample of one step; the same in all processes."""
        max_size = release.max_batch_size
        if max_size is not None and release.num_records != self._spec.num_train:
            raise UnplannedRelease(
                f"'{release.name}' is planned for {release.num_records} records, but there are {self._spec.num_train}"
            )
        return self.noise.sample(self.num_records, release.sample_rate, release.name, step, max_size)

    def loss_draws(self, name: str, step: int, num_examples: int) -> Draws:
        """Secret randomness for the loss of one step; see NoiseSource.loss_draws."""
        return self.noise.loss_draws(name, step, num_examples, self.device)

    def gradient_noise(self, name: str, size: int, std: float, step: int) -> GridNoise:
        """Fresh Gaussian noise for the `size` coordinates of one step of release `name`."""
        return self.noise.gaussian(size, std, name, step)

    def public_batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random images in the form of the records, the same at every call, with equal and with different labels."""
        rng = torch.Generator().manual_seed(0)
        shape = (count, self._spec.channels, COARSE, COARSE)
        coarse = torch.randint(256, shape, generator=rng, dtype=torch.uint8)
        images = F.interpolate(to_float(coarse.numpy(), self.device), size=(self._spec.resolution,) * 2)
        return images, torch.arange(count, device=self.device) % min(2, self._spec.num_classes)


class MappedRecords(RecordAccess):
    """The records of `source` with every image replaced by fn(image), computed when a release first reads them."""

    def __init__(self, source: RecordAccess, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.noise, self.device, self.batch_size = source.noise, source.device, source.batch_size
        self._spec, self._labels = source._spec, source._labels
        self._images = None
        self._source, self._fn = source, fn

    def image_shape(self) -> tuple[int, ...]:
        if self._images is not None:
            return super().image_shape()
        blank = torch.zeros(1, *self._source.image_shape(), device=self.device)
        return tuple(self._fn(blank).shape[1:])

    def public_batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self._source.public_batch(count)
        return self._fn(images), labels

    def _all_images(self) -> torch.Tensor:
        if self._images is None:
            self._images = self._map_all()
        return self._images

    def _map_all(self) -> torch.Tensor:
        """(N, ...) float32 in main memory.

        Every process maps all records, in the same batches. Processes cannot share this work: whether a process reads
        a record in a step depends on the secret sample.
        """
        num_batches = -(-self._spec.num_train // self.batch_size)
        batches = self._source.batches(slice(0, self.num_records))
        shown = progress(batches, "map", num_batches, unit="batch") if num_batches > 10 else batches
        tried = self._source.public_batch(NUM_TRIED["values"])
        require_row_by_row("map", lambda images, _: self._fn(images).nan_to_num(), *tried)
        mapped = with_fixed_batch_size(lambda images, _: self._fn(images), self.batch_size)
        rows, start = None, 0
        # Written in place: collecting the parts and joining them would take twice the memory.
        for images, labels in shown:
            part = mapped(images, labels).cpu()
            rows = part.new_empty(self.num_records, *part.shape[1:]) if rows is None else rows
            rows[start : start + len(part)] = part
            start += len(part)
        return rows


def with_fixed_batch_size(
    fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], batch_size: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """fn, called with batches of exactly `batch_size` images: smaller batches are padded with blank images.

    The rounding of a library depends on the batch size. If nearly equal numbers decide a choice, one record more in a
    batch could otherwise change the choices of all others.
    """

    def padded(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        missing = max(0, batch_size - len(labels))
        whole = F.pad(images, (0, 0) * (images.dim() - 1) + (0, missing))
        values = fn(whole, F.pad(labels, (0, missing)))
        if len(values) != len(whole):
            raise ValueError(f"{len(values)} values for {len(whole)} records")
        return values[: len(labels)]

    return padded


def _equal_parts(count: int, most: int) -> int:
    """The size of parts of at most `most`, chosen so that the last part is not much smaller."""
    return -(-count // -(-count // most))
