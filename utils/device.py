"""Where a run computes."""

import os

from utils import distributed
from utils.errors import UserError
from utils.sections import SetupConfig


def prepare_device(setup: SetupConfig) -> str:
    """Resolve setup.device, set the number of CPU threads and the precision of GPU products, and return the device's
    name for torch: one GPU per process where several run on this machine."""
    import torch

    _set_threads(setup)
    available = torch.cuda.is_available()
    if setup.device == "cuda" and not available:
        raise UserError("setup.device: cuda, but torch sees no GPU; use setup.device=cpu or auto")
    if setup.device == "cpu" or not available:
        return "cpu"
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = setup.precision != "float32"
    place = distributed.place()
    return "cuda" if place.local_size == 1 else f"cuda:{place.local_rank}"


def _set_threads(setup: SetupConfig) -> None:
    """As configured; else the processes of a machine share its cores, unless the environment says how."""
    import torch

    processes = distributed.place().local_size
    if setup.omp_n_threads is not None:
        torch.set_num_threads(setup.omp_n_threads)
    elif processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
