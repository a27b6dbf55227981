"""Checkpoints of a run: the method's state and the ledger's, in one file, so that neither is restored alone."""

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from utils.errors import UserError
from utils.run_dir import atomic


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

    def save(self, stage: str, kind: str) -> None:
        """Write a snapshot (overwritten each time), or the final checkpoint of a stage."""
        import io

        import torch

        content = {
            "method": self.method,
            "state": self.synthesizer.state_dict(),
            "ledger": None if self.ledger is None else self.ledger.state_dict(),
        }
        with atomic(self._path(stage, kind)) as temporary:
            # Through memory: writing to a full disk is then an OSError, which torch.save hides in a RuntimeError.
            buffer = io.BytesIO()
            torch.save(content, buffer)
            temporary.write_bytes(buffer.getbuffer())

    def finished(self, stage: str) -> bool:
        return self._path(stage, "final").exists()

    def restore(self) -> str | None:
        """Load the furthest checkpoint into method and ledger; returns "stage (kind)", None if there is none."""
        for stage in reversed(self.STAGES):
            for kind in ("final", "snapshot"):
                path = self._path(stage, kind)
                if path.exists():
                    content = read(str(path))
                    # The ledger first: nothing may be asked before what was spent is known.
                    if self.ledger is not None and content["ledger"] is not None:
                        self.ledger.load_state_dict(content["ledger"])
                    self.synthesizer.load_state_dict(content["state"])
                    return f"{stage} ({kind})"
        return None

    def _path(self, stage: str, kind: str) -> Path:
        return self.folder / stage / "checkpoints" / f"{kind}_checkpoint.pth"


def read(path: str) -> dict:
    """The content of a checkpoint file, tensors on the CPU; loads tensors and plain containers only."""
    import torch

    if not Path(path).is_file():
        raise UserError(f"checkpoint {path}: there is no such file")
    if not zipfile.is_zipfile(
        path
    ):  # the form of every checkpoint; the reader's complaints about others are obscure
        raise UserError(f"checkpoint {path}: not a checkpoint, or cut short")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"checkpoint {path}: not readable as a checkpoint ({reason[:100]})") from error
    if not isinstance(content, dict) or "state" not in content:
        raise UserError(f"checkpoint {path}: not a checkpoint of this toolkit")
    return content
