"""Starting from a checkpoint of the diffusion family: its weights, and the privacy cost of its own training."""

from dataclasses import replace

import torch

from opacus_ext.accounting import Release
from utils.errors import UserError


def read_checkpoint(path: str) -> tuple[dict, list[Release]]:
    """The method's state, and the private releases that were booked up to it."""
    from utils.checkpoint_files import read, require_finite

    content = read(path)
    state = content["state"]
    if "network" not in state or "label_dim" not in state:
        raise UserError(f"model.ckpt: {path} is not a checkpoint of a diffusion method")
    require_finite(f"checkpoint {path}", state)
    return state, spent_releases(content, "checkpoint")


def spent_releases(content: dict, label: str) -> list[Release]:
    """The private releases that were booked up to a file's state, named "<label>: <release>".

    Raises UserError if the file does not state them; the ledger of a run without private data is None.
    """
    if "ledger" not in content:
        raise UserError(f"{label}: the file does not state its privacy cost (it has no 'ledger')")
    ledger = content["ledger"] or {"plan": [], "executed": {}}
    taken = [(Release(**saved), ledger["executed"][saved["name"]]) for saved in ledger["plan"]]
    return [
        replace(
            release,
            name=f"{label}: {release.name}",
            num_steps=steps,
            noise_seeded=ledger.get("noise_seeded", False),
            inherited=True,
        )
        for release, steps in taken
        if steps
    ]


def require_fit(state: dict, source: str, shape: tuple[int, ...], num_classes: int) -> None:
    """Raise UserError if a checkpoint was made for inputs of another shape, or for fewer labels than classes."""
    if tuple(state["shape"]) != shape:
        raise UserError(f"{source} was made for inputs of shape {tuple(state['shape'])}; these have {shape}")
    if state["label_dim"] < num_classes:
        raise UserError(
            f"{source} knows {state['label_dim']} labels; the private images have {num_classes} classes"
        )


def chosen_weights(state: dict, kind: str) -> dict[str, torch.Tensor]:
    """The weights of a state by name: "raw", or "ema" (which averages parameters; buffers have one value)."""
    return {**state["network"], **state["ema"]["weights"]} if kind == "ema" else state["network"]
