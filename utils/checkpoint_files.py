"""Checkpoint files: tensors and plain containers, written whole or not at all."""

import io
import pickle
import zipfile
from pathlib import Path

from utils.errors import UserError
from utils.files import atomic


def write(path: Path, content: dict) -> None:
    """Write tensors and plain containers as a checkpoint file, whole or not at all."""
    with atomic(path) as temporary:
        # Through memory: writing to a full disk is then an OSError, which torch.save hides in a RuntimeError.
        temporary.write_bytes(serialised(content))


def serialised(content: dict) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


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


def not_finite(value: object, name: str = "") -> list[str]:
    """Dotted names of the floating-point tensors in nested containers that hold a NaN or an infinite number."""
    import torch

    if isinstance(value, torch.Tensor):
        return [name] if value.is_floating_point() and not torch.isfinite(value).all() else []
    if isinstance(value, dict):
        entries = value.items()
    else:
        entries = enumerate(value) if isinstance(value, list | tuple) else ()
    return [
        found for key, entry in entries for found in not_finite(entry, f"{name}.{key}" if name else str(key))
    ]


def listed_tensors(names: list[str]) -> str:
    """The first name and the number of the others, as the subject of a sentence."""
    return f"'{names[0]}' is" if len(names) == 1 else f"'{names[0]}' and {len(names) - 1} other tensors are"


def require_finite(source: str, state: object) -> None:
    """Raise UserError if `state`, which was read from `source`, holds weights that are NaN or infinite."""
    if broken := not_finite(state):
        raise UserError(
            f"{source}: {listed_tensors(broken)} NaN or infinite; its training diverged, give another checkpoint"
        )
