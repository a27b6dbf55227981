"""What a resumed run takes over of an optimiser."""

import torch


def restore_moments(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Take over the moments and step counts of a checkpoint: optimizer.state_dict()["state"]. Learning rate, decay and
    betas are the configuration's, so that a run may go on with others than the checkpoint was made with."""
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
