"""Where a run computes."""

from utils.errors import UserError, unknown
from utils.runtime import log
from utils.sections import SetupConfig

DEVICES = ("auto", "cpu", "cuda")


def prepare_device(setup: SetupConfig) -> str:
    """Resolve setup.device, set the number of CPU threads, and return the device's name for torch."""
    import torch

    if setup.device not in DEVICES:
        raise unknown("setup.device", setup.device, DEVICES)
    if setup.omp_n_threads is not None:
        torch.set_num_threads(setup.omp_n_threads)
    if setup.n_gpus_per_node * setup.n_nodes > 1:
        log.info(
            f"setup: {setup.n_gpus_per_node} x {setup.n_nodes} processes were asked for; this version trains in one, "
            f"with the same result"
        )
    if setup.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if setup.device == "cuda" and not torch.cuda.is_available():
        raise UserError("setup.device: cuda, but torch sees no GPU; use setup.device=cpu or auto")
    return setup.device
