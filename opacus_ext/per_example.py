"""The clipped sum of per-example gradients: the one function behind which the speed of DP-SGD lives.

One forward and one backward pass. Trained layers run with their parameters detached, so that no summed weight
gradient is computed only to be thrown away; a hook on each layer's output takes the output gradient and forms the
per-example weight gradient from it and the layer's input. Legend: B examples, K rows per example (its noise draws,
adjacent), R = B * K rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_weight

from utils.errors import UserError

# (network, images (B, C, H, W), labels (B,), rng) -> losses (B,); the K noise draws of an example are averaged inside
PerExampleLoss = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]

# (module, input, output gradient, B) -> gradient of each example by parameter name, (B, *parameter.shape)
Rule = Callable[[nn.Module, torch.Tensor, torch.Tensor, int], dict[str, torch.Tensor]]


def clipped_gradient_sum(
    network: nn.Module,
    per_example_loss: PerExampleLoss,
    images: torch.Tensor,
    labels: torch.Tensor,
    max_grad_norm: float,
    rng: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Sum over examples of the gradient of each one's own loss, clipped jointly over all trainable tensors.

    Returns name -> tensor, the L2 norm of one example's contribution being at most `max_grad_norm`. An example whose
    gradient is not finite contributes zero. No example: zeros.
    """
    if not len(labels):
        return {name: torch.zeros_like(p) for name, p in _trainable(network).items()}
    gradients = per_example_gradients(network, per_example_loss, images, labels, rng)
    coefficients = clip_coefficients(gradients, max_grad_norm)
    # 0 * inf is nan: a non-finite example is taken out of the matrices, not only weighted by zero.
    keep = coefficients > 0
    return {
        name: torch.tensordot(coefficients[keep], gradient[keep], dims=1)
        for name, gradient in gradients.items()
    }


def per_example_gradients(
    network: nn.Module,
    per_example_loss: PerExampleLoss,
    images: torch.Tensor,
    labels: torch.Tensor,
    rng: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Name -> (B, *shape): the gradient of each example's loss. A parameter the loss does not reach has zeros."""
    trainable = _trainable(network)
    with _recording(network, trainable, len(labels)) as gradients:
        per_example_loss(network, images, labels, rng).sum().backward()
    return {
        name: gradients[name] if name in gradients else p.new_zeros(len(labels), *p.shape)
        for name, p in trainable.items()
    }


def clip_coefficients(gradients: dict[str, torch.Tensor], max_grad_norm: float) -> torch.Tensor:
    """(B,) factors min(1, C / norm) of the joint norms of (B, ...) gradients; 0 where a norm is not finite or zero."""
    squares = [torch.linalg.vector_norm(g.flatten(1), dim=1).double() ** 2 for g in gradients.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    coefficients = (max_grad_norm / norms).clamp(max=1.0)
    return torch.where(torch.isfinite(norms) & (norms > 0), coefficients, 0.0).float()


def _trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


@contextmanager
def _recording(network: nn.Module, trainable: dict[str, nn.Parameter], batch: int) -> Iterator[dict]:
    """Within: parameters are constants, and every backward pass fills the yielded dict name -> (B, ...) gradients."""
    names = {id(p): name for name, p in trainable.items()}
    gradients: dict[str, torch.Tensor] = {}

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if not output.requires_grad:
            output.requires_grad_()  # the first trained layer: nothing before it needs a gradient
        features = inputs[0].detach()
        version = features._version

        def receive(output_gradient: torch.Tensor) -> None:
            if features._version != version:
                raise RuntimeError(
                    f"the input of {module} was changed in place after it; use an out-of-place operation"
                )
            for local_name, gradient in RULES[type(module)](module, features, output_gradient, batch).items():
                name = names.get(id(getattr(module, local_name)))
                if name is not None:  # a frozen parameter of a partly trained layer
                    seen = gradients.get(name)
                    gradients[name] = gradient if seen is None else seen + gradient

        output.register_hook(receive)

    handles = [module.register_forward_hook(hook) for module in _trained_modules(network, names)]
    try:
        for parameter in trainable.values():
            parameter.requires_grad_(False)
        yield gradients
    finally:
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def _trained_modules(network: nn.Module, names: dict[int, str]) -> list[nn.Module]:
    trained = []
    for path, module in network.named_modules():
        if any(id(p) in names for p in module.parameters(recurse=False)):
            if type(module) not in RULES:
                raise UserError(
                    f"network: no per-example gradient rule for {type(module).__name__} at '{path}'; known: "
                    f"{', '.join(kind.__name__ for kind in RULES)}; add one with opacus_ext.per_example.RULES"
                )
            trained.append(module)
    return trained


def _linear(module: nn.Linear, features: torch.Tensor, output_gradient: torch.Tensor, batch: int) -> dict:
    x = features.reshape(batch, -1, features.shape[-1])
    g = output_gradient.reshape(batch, -1, output_gradient.shape[-1])
    gradients = {"weight": g.transpose(1, 2) @ x}
    return gradients if module.bias is None else {**gradients, "bias": g.sum(1)}


def _conv2d(module: nn.Conv2d, features: torch.Tensor, output_gradient: torch.Tensor, batch: int) -> dict:
    """One grouped convolution: examples folded into the groups, draws as its batch. Memory stays at B x P."""
    assert not isinstance(module.padding, str) and module.padding_mode == "zeros", module
    weight = conv2d_weight(
        _fold(features, batch),
        (batch * module.out_channels, *module.weight.shape[1:]),
        _fold(output_gradient, batch),
        module.stride,
        module.padding,
        module.dilation,
        batch * module.groups,
    )
    gradients = {"weight": weight.reshape(batch, *module.weight.shape)}
    bias = output_gradient.reshape(batch, -1, *output_gradient.shape[1:]).sum((1, 3, 4))
    return gradients if module.bias is None else {**gradients, "bias": bias}


def _fold(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """(B * K, C, H, W) -> (K, B * C, H, W)"""
    draws = len(rows) // batch
    return rows.reshape(batch, draws, *rows.shape[1:]).transpose(0, 1).reshape(draws, -1, *rows.shape[2:])


def _group_norm(
    module: nn.GroupNorm, features: torch.Tensor, output_gradient: torch.Tensor, batch: int
) -> dict:
    shape = (batch, -1, module.num_channels, features[0, 0].numel())
    normalised = F.group_norm(features, module.num_groups, eps=module.eps)
    weight = (output_gradient * normalised).reshape(shape).sum((1, 3))
    return {"weight": weight, "bias": output_gradient.reshape(shape).sum((1, 3))}


def _layer_norm(
    module: nn.LayerNorm, features: torch.Tensor, output_gradient: torch.Tensor, batch: int
) -> dict:
    normalised = F.layer_norm(features, module.normalized_shape, eps=module.eps)
    shape = (batch, -1, *module.normalized_shape)
    gradients = {"weight": (output_gradient * normalised).reshape(shape).sum(1)}
    return gradients if module.bias is None else {**gradients, "bias": output_gradient.reshape(shape).sum(1)}


def _embedding(
    module: nn.Embedding, features: torch.Tensor, output_gradient: torch.Tensor, batch: int
) -> dict:
    index = features.reshape(batch, -1)
    g = output_gradient.reshape(batch, index.shape[1], -1)
    weight = g.new_zeros(batch, *module.weight.shape).scatter_add_(1, index[:, :, None].expand_as(g), g)
    if module.padding_idx is not None:
        weight[:, module.padding_idx] = 0
    return {"weight": weight}


# Layer type -> how to get each example's gradient. Add an entry for a layer of your own.
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}
