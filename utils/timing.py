"""How long a step takes on this machine, for the estimates of --dry_run."""

import time
from collections.abc import Callable
from dataclasses import dataclass

PIXELS = 2**13  # per measured batch: few images of 32 px, many of 8 px, as in a real batch
REPEATS = 5
PATIENCE = 0.5  # seconds of measuring after which no step is begun


@dataclass(frozen=True)
class Cost:
    """Estimated work of one stage, for --dry_run."""

    stage: str
    description: str  # "2100 steps x 3929 images x 32 noise draws"
    seconds: float  # on this machine, extrapolated from a short measurement
    steps: int | None = None  # of the stage, if a snapshot counts them
    part: str = ""  # train or generate, to which the work belongs; "": `stage` if it is one, else pretrain


def sampling_cost(num_images: int, rows: int, draw: Callable[[], object]) -> Cost:
    """Of the delivered images, by a generator whose `draw` makes `rows` of them."""
    return Cost("generate", f"{num_images} images", num_images / rows * seconds_of(draw))


def batch_rows(resolution: int) -> int:
    """Images of a batch that is worth measuring."""
    return max(1, PIXELS // resolution**2)


def seconds_of(step: Callable[[], object]) -> float:
    """Of one call: the fastest of a few, after a first one, which also allocates and chooses kernels."""
    step()
    times = []
    while len(times) < REPEATS and sum(times) < PATIENCE:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)
