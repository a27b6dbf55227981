"""What a run reports and keeps when its network diverges."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opacus_ext.ledger import Ledger
from pipeline.checkpoints import Checkpoints
from utils import distributed
from utils.artefacts import DIVERGED
from utils.config import Config
from utils.config_files import flatten
from utils.errors import Diverged, UserError
from utils.files import read_json, write_json
from utils.text import at_most

LEARNING_RATE = re.compile(r"(^|[._])lr$")
WHAT = {"pretrain": "pretraining", "train": "private training", "generate": "sampling"}


@contextmanager
def explaining_divergence(
    stage: str, config: Config, checkpoints: Checkpoints, public: str | None
) -> Iterator[None]:
    """Around one stage of a run: a Diverged from inside says what helps. `public` is the name of the public set.

    A run that diverged in private training is marked in its folder: it cannot be resumed. The steps since its last
    checkpoint have shown that they diverge; repeated, they would have to be paid for again.
    """
    try:
        yield
    except Diverged as error:
        text = _advice(stage, str(error), config, checkpoints, public)
        if stage == "train" and distributed.is_main():
            account = checkpoints.ledger.report()
            write_json(checkpoints.folder / DIVERGED, {"message": text, "account": account})
        raise Diverged(text) from error


def require_not_diverged(folder: Path) -> None:
    """Raise UserError, with what helps, for a run that diverged in private training."""
    if (folder / DIVERGED).exists():
        record = read_json(folder / DIVERGED)
        raise UserError(f"--resume_exp: {folder.name} cannot be resumed: {record['message']}")


def _advice(stage: str, error: str, config: Config, checkpoints: Checkpoints, public: str | None) -> str:
    what = WHAT[stage]
    if stage == "pretrain" and public is not None:
        what = f"pretraining on public images ({public})"
    values = flatten(config.snapshot)
    parts = [f"{what} diverged: {error}", f"start a new run with {_remedy(stage, values)}"]
    if stage == "generate" and values.get("setup.precision") == "bf16":
        parts.append("or resume this one with setup.precision=float32")
    final = checkpoints.folder / "pretrain" / "checkpoints" / "final_checkpoint.pth"
    can_start_from_it = {"model.ckpt", "pretrain.n_epochs"} <= set(values)
    if stage != "pretrain" and public is not None and final.exists() and can_start_from_it:
        path = shlex.quote(str(final))
        parts.append(f"pretrain.n_epochs=0 model.ckpt={path} reuses the pretraining")
    last = checkpoints.last()
    if last is not None:
        parts.append(f"the last finite checkpoint is kept: {last}")
    parts += _cost(checkpoints.ledger)
    return "; ".join(parts)


def _remedy(stage: str, values: dict[str, object]) -> str:
    """The settings that most likely made the stage diverge, with their values."""
    rates = {key: value for key, value in values.items() if LEARNING_RATE.search(key) and value is not None}
    of_training = {key: value for key, value in rates.items() if key.startswith("train.")}
    of_others = {key: value for key, value in rates.items() if key not in of_training}
    chosen = (of_others if stage == "pretrain" else of_training) or rates
    now = ", ".join(f"{key}={value}" for key, value in chosen.items())
    return f"a lower learning rate (this one had {now})" if now else "a lower learning rate"


def _cost(ledger: Ledger | None) -> list[str]:
    """What a new run on the same images must be added to."""
    if ledger is None or not ledger.budget.private:
        return []
    if not any(ledger.executed(release.name) for release in ledger.releases()):
        return ["no private image was used"]
    # Not `spent()`, which may raise: the run would not be marked, and could be resumed.
    spent = ledger.report()["spent"]
    return [
        f"what this run spent on these private images, epsilon {at_most(spent)}, stays spent and adds to the "
        f"epsilon of the new run"
    ]
