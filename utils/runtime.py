"""What a method receives in addition to its configuration: device, named randomness, and a place for snapshots."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from utils.seeding import derive_key, seeded, torch_rng

if TYPE_CHECKING:
    import numpy as np
    import torch

    from utils.draws import Draws

Network = TypeVar("Network", bound="torch.nn.Module")

log = logging.getLogger("dpib")


def _keep_nothing(stage: str) -> None:
    """The default: no run folder, no snapshots."""


@dataclass
class Runtime:
    """One per run. With no `folder` nothing is written, which is how tests run methods."""

    device: str = "cpu"
    seed: int = 0
    precision: str = "float32"  # of networks in training and sampling: float32, tf32 or bf16
    folder: Path | None = None  # the run's folder
    cache_dir: Path | None = None  # of public data alone (data.cache.public_cache)
    weights_root: Path = Path("weights")  # published weights that have been fetched
    snapshot: Callable[[str], None] = field(default=_keep_nothing)  # stage -> save state and ledger together

    def attach(self, folder: Path | None, snapshot: Callable[[str], None]) -> None:
        """Connect the run to its snapshots and, in the main process, to its folder, which exists only after the plan is
        known. Raises RuntimeError the second time: everything that holds this object would silently write elsewhere."""
        if self.folder is not None or self.snapshot is not _keep_nothing:
            raise RuntimeError("the run is attached to its folder already")
        self.folder, self.snapshot = folder, snapshot

    def rng(self, name: str) -> "torch.Generator":
        """A torch.Generator on the run's device for the stream `name`; the same seed and name repeat it."""
        return torch_rng(self.seed, name, self.device)

    def draws(self, name: str, num_examples: int) -> "Draws":
        """utils.draws.Draws on the run's device for a batch of the stream `name`, addressed by position in it."""
        from utils.draws import Draws

        return Draws(derive_key(self.seed, name), 0, num_examples, self.device)

    def seeded(self, name: str) -> AbstractContextManager[None]:
        """Context in which PyTorch's global generators, which initialise layers, start from the stream `name`; that of
        the CPU is as before afterwards."""
        return seeded(self.seed, name)

    def place(self, network: "Network") -> "Network":
        """`network` on the run's device, in the memory layout that is fastest there."""
        import torch

        on_gpu = torch.device(self.device).type == "cuda"
        return network.to(self.device, memory_format=torch.channels_last if on_gpu else torch.preserve_format)

    def autocast(self) -> "torch.autocast":
        """Context in which networks compute in the run's precision; losses, norms and sums stay float32."""
        import torch

        return torch.autocast(
            torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"
        )

    def preview(self, stage: str, step: int, images: "np.ndarray", labels: "np.ndarray") -> None:
        """Write a grid of samples to <run>/<stage>/samples/iter_<step>/sample.png."""
        if self.folder is not None:
            from utils.images import save_grid

            save_grid(images, labels, self.folder / stage / "samples" / f"iter_{step}" / "sample.png")
