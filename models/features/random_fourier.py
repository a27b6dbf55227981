"""Random Fourier features of the Gaussian kernel (Rahimi & Recht 2007)."""

import torch


class RandomFourierFeatures:
    """(B, D) -> (B, num_features): [cos(Wx), sin(Wx)] / sqrt(num_features / 2), of L2 norm exactly 1 for every x.

    W has entries N(0, 1 / squared_bandwidth), so that E[phi(x) . phi(y)] = exp(-|x - y|^2 / (2 squared_bandwidth)).
    """

    def __init__(self, dim: int, num_features: int, squared_bandwidth: float, rng: torch.Generator) -> None:
        assert num_features % 2 == 0, num_features
        frequencies = torch.randn(num_features // 2, dim, generator=rng, device=rng.device)
        self.frequencies = frequencies / squared_bandwidth**0.5
        self.num_features = num_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        angles = x @ self.frequencies.T
        return torch.cat([angles.cos(), angles.sin()], dim=1) / (self.num_features / 2) ** 0.5
