"""Neural tangent kernel features (DP-NTK, Yang et al., UAI 2023) in closed form, and mean embeddings in them.

The feature vector of an image is the gradient of a random network's summed outputs with respect to all of its weights.
In every layer that is an outer product, delta [input, 1]^T, and stays one: a vector of 600,000 numbers for an image of
28 x 28 pixels is made of 3,200. Sums over images are matrix products. Legend: B batch, C channels, H W pixels, D
features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.embedding.mean_embedding import Embedding
from opacus_ext.outer_products import OuterProducts
from utils.errors import unknown
from utils.runtime import Runtime
from utils.sections import check_field, check_least, check_positive

ONE_LAYER, TWO_LAYERS = "fc_1l", "fc_2l"
EPS = 1e-5  # of the layer norm


@dataclass(frozen=True)
class NTKConfig:
    model_ntk: str  # fc_1l: Linear, ReLU, LayerNorm, Linear; fc_2l: Linear, ReLU, Linear, LayerNorm, Linear
    ntk_width: int  # of the first layer
    ntk_width2: int | None  # of the second one of fc_2l
    input_constant: float  # an additional input of this times sqrt(number of pixels); 0: none, as published
    class_mass: (
        float  # of an additional constant feature, against norm 1 of the others; carries the class shares
    )

    def __post_init__(self) -> None:
        if self.model_ntk not in (ONE_LAYER, TWO_LAYERS):
            raise unknown("model.model_ntk", self.model_ntk, (ONE_LAYER, TWO_LAYERS))
        check_least(self, 1, "ntk_width")
        second = self.ntk_width2
        fits = second is not None and second > 0 if self.model_ntk == TWO_LAYERS else True
        check_field(0 <= self.input_constant <= 100, "input_constant", self.input_constant, "0 to 100")
        check_positive(self, "class_mass")
        check_field(fits, "ntk_width2", second, f"at least 1 for model_ntk={TWO_LAYERS}")

    @property
    def widths(self) -> list[int]:
        return [self.ntk_width] if self.model_ntk == ONE_LAYER else [self.ntk_width, self.ntk_width2]


class NTKFeatures(nn.Module):
    """(B, dim) -> B vectors of L2 norm 1, in factors.

    widths [w]: Linear, ReLU, LayerNorm, Linear; [w, v]: Linear, ReLU, Linear, LayerNorm, Linear. The layer norm has no
    weights, those of the others are torch's initial ones. All rows of the last layer have the same gradient, so it is
    stored once, times sqrt(num_outputs): norms, inner products and distances are those of the whole gradient.
    """

    def __init__(self, dim: int, widths: list[int], num_outputs: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(*shape) for shape in zip([dim, *widths], widths, strict=False))
        self.output = nn.Linear(widths[-1], num_outputs)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> OuterProducts:
        inputs = [x]  # of every layer
        h = F.relu(self.hidden[0](x))
        active = h > 0
        for layer in self.hidden[1:]:
            inputs.append(h)
            h = layer(h)
        normed, delta = _through_layer_norm(h, self.output.weight.sum(0))
        last = torch.full_like(x[:, :1], self.output.out_features**0.5)
        blocks = [(last, _append_one(normed))]
        for layer, given in zip(self.hidden[:0:-1], inputs[:0:-1], strict=True):
            blocks.append((delta, _append_one(given)))
            delta = delta @ layer.weight
        blocks.append((delta * active, _append_one(x)))
        gradient = OuterProducts(blocks)
        return gradient.scaled(1 / gradient.norms())


def _through_layer_norm(h: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer norm of h (B, w), and the gradient of its inputs for one (w,) of its outputs."""
    centred = h - h.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + EPS).sqrt()
    normed = centred / scale
    along = (gradient * normed).mean(1, keepdim=True)
    return normed, (gradient - gradient.mean() - normed * along) / scale


def _append_one(rows: torch.Tensor) -> torch.Tensor:
    """(B, n) -> (B, n + 1): the input that a bias sees is 1."""
    return F.pad(rows, (0, 1), value=1.0)


class NTKEmbedding(Embedding):
    """In NTK features of the pixels, which the network sees in [0, 1].

    Features of norm 1 depend on the direction of the input alone, nearly: an image and its half are almost the same.
    With a constant next to the pixels, directions differ if pixels do."""

    def __init__(
        self, config: NTKConfig, image_size: int, channels: int, num_outputs: int, runtime: Runtime
    ) -> None:
        super().__init__(config.class_mass)
        num_pixels = channels * image_size**2
        self.constant = config.input_constant * num_pixels**0.5
        num_inputs = num_pixels + (self.constant > 0)
        with runtime.seeded("features"):
            self.phi = NTKFeatures(num_inputs, config.widths, num_outputs).to(runtime.device)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.phi.parameters())

    def features(self, images: torch.Tensor) -> OuterProducts:
        inputs = (images.flatten(1) + 1) / 2
        gradient = self.phi(F.pad(inputs, (0, 1), value=self.constant) if self.constant else inputs)
        one = images.new_ones(len(images), 1)
        return OuterProducts([*gradient.blocks, (one * self.mass, one)])

    def mean(self, images: torch.Tensor, labels: torch.Tensor, num_labels: int) -> torch.Tensor:
        return self.features(images).sums(labels, num_labels) / len(images)
