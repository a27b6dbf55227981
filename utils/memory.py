"""How many images this machine can hold: a count with some digits too many is refused before hours of training."""

import math
import os
from pathlib import Path

from utils.errors import UserError

# Of a container: version 2 and version 1 of control groups.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
COPIES = 2  # batches of images, and the array that they are joined to


def machine_memory() -> int:
    """Bytes of memory that a process may have at most: the machine's, or the limit of its container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in LIMITS:
        try:
            total = min(total, int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # not there; "max", which is no limit
            continue
    return total


def require_memory(key: str, count: int, image_shape: tuple[int, ...]) -> None:
    """Raise UserError, which names `key`, if `count` uint8 images of this shape cannot be made here. What passes may
    still be too much together with everything else."""
    needed, there = COPIES * count * math.prod(image_shape), machine_memory()
    if needed > there:
        raise UserError(
            f"{key}: {count:,} images need {needed / 1e9:,.1f} GB of memory, and this machine has {there / 1e9:,.1f} GB"
            f"; give a smaller number"
        )
