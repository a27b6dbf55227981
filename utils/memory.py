"""Check that images fit into memory, so that a count with too many digits is refused before hours of training."""

import math
import os
from pathlib import Path

from utils.errors import UserError

# Memory limits of a container, by control groups version 2 and 1.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
COPIES = 2  # the batches of images, and the array that they are joined to


def machine_memory() -> int:
    """Bytes of memory available to a process: those of the machine, or the limit of its container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in LIMITS:
        try:
            total = min(total, int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return total


def require_memory(key: str, count: int, image_shape: tuple[int, ...]) -> None:
    """Raise UserError, which names `key`, if `count` uint8 images of this shape do not fit into memory. This is
    a coarse check: it ignores everything else that a run holds."""
    needed, available = COPIES * count * math.prod(image_shape), machine_memory()
    if needed > available:
        raise UserError(
            f"{key}: {count:,} images need {needed / 1e9:,.1f} GB of memory, and this machine has "
            f"{available / 1e9:,.1f} GB; give a smaller number"
        )
