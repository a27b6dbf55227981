"""Checkpoints of a run: the method's state and the ledger's, in one file, so that neither is restored alone.

Of several processes the main one reads and writes the files, and the others get from it what it has read.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from utils import distributed
from utils.checkpoint_files import listed_tensors, not_finite, read, serialised, write
from utils.errors import Diverged


class HasState(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


@dataclass
class Checkpoints:
    """<run>/<stage>/checkpoints/{snapshot,final}_checkpoint.pth of one run."""

    folder: Path
    method: str
    synthesizer: HasState
    ledger: HasState | None

    STAGES = ("pretrain", "train")

    def __post_init__(self) -> None:
        # What is infinite by design, such as the mask of an attention, is so from the start.
        self._infinite_by_design = frozenset(not_finite(self.synthesizer.state_dict()))

    def save(self, stage: str, kind: str) -> None:
        """Write a snapshot (overwritten each time), or the final checkpoint of a stage.

        Raises Diverged, and leaves the earlier file as it is, if a tensor of the method has become NaN or infinite.
        """
        if not distributed.is_main():
            return
        content = self._content()
        if broken := [name for name in not_finite(content["state"]) if name not in self._infinite_by_design]:
            raise Diverged(f"{listed_tensors(broken)} NaN or infinite")
        write(self._path(stage, kind), content)

    def last(self) -> Path | None:
        """The file that `restore` would load; None if there is none."""
        paths = (self._path(stage, kind) for stage in reversed(self.STAGES) for kind in ("final", "snapshot"))
        return next((path for path in paths if path.exists()), None)

    def finished(self, stage: str) -> bool:
        return distributed.from_main(self._path(stage, "final").exists)

    def is_completed(self, stage: str, restored: str | None) -> bool:
        """True if the stage has its final checkpoint, or has no file of its own and a later stage has begun."""
        return self.finished(stage) or (stage == "pretrain" and (restored or "").startswith("train"))

    def restore(self) -> str | None:
        """Load the furthest checkpoint into method and ledger; returns "stage (kind)", None if there is none."""
        found = distributed.from_main(self._furthest)
        if found is None:
            return None
        label, content = found
        self._load(content)
        return label

    def synchronise(self) -> None:
        """Give the main process's state to the others, whose sums may have been rounded differently. What was booked
        must be the same everywhere."""
        import torch

        content_bytes = distributed.from_main(lambda: serialised(self._content()))
        if not distributed.is_main():
            content = torch.load(io.BytesIO(content_bytes), map_location="cpu", weights_only=True)
            if self.ledger is not None and self.ledger.state_dict() != content["ledger"]:
                raise RuntimeError(
                    f"the ledgers of two processes differ: {self.ledger.state_dict()}, {content['ledger']}"
                )
            self._load(content)

    def _content(self) -> dict:
        return {
            "method": self.method,
            "state": self.synthesizer.state_dict(),
            "ledger": None if self.ledger is None else self.ledger.state_dict(),
        }

    def _furthest(self) -> tuple[str, dict] | None:
        path = self.last()
        if path is None:
            return None
        return f"{path.parent.parent.name} ({path.name.partition('_')[0]})", read(str(path))

    def _load(self, content: dict) -> None:
        # The ledger first: nothing may be asked before what was spent is known.
        if self.ledger is not None and content["ledger"] is not None:
            self.ledger.load_state_dict(content["ledger"])
        self.synthesizer.load_state_dict(content["state"])

    def _path(self, stage: str, kind: str) -> Path:
        return self.folder / stage / "checkpoints" / f"{kind}_checkpoint.pth"
