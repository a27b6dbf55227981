"""Ways to the sum of clipped per-example gradients, and the ordinary step that they are compared with.

A competitor takes a Problem and returns its step; a step returns name -> gradient sum (None: it computes another
thing). Whatever is done once per training run (copies, hooks) is done before the step.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.grad_sample.gsm_exp_weights import GradSampleModuleExpandedWeights
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import nn
from torch.func import functional_call, grad, vmap

from opacus_ext.gradients.per_example import clipped_sum
from opacus_ext.noise import NoiseSource
from scripts.benchmarks.dpsgd.cases import Problem, Recorded
from utils.errors import UserError

Gradients = dict[str, torch.Tensor]
Step = Callable[[], Gradients | None]
CHUNK_ROWS = 8  # rows per chunk of vmap in chunks; at least one example


def ordinary(problem: Problem) -> Step:
    """Forward and backward of the same rows, without privacy."""

    def step() -> None:
        problem.network.zero_grad(set_to_none=True)
        problem.losses(problem.network, *problem.batch).sum().backward()

    return step


def ours(problem: Problem) -> Step:
    """opacus_ext.gradients.per_example.clipped_sum."""

    def loss(network, images, labels, rng: Recorded) -> torch.Tensor:
        return problem.losses(network, images, labels, *rng.tensors)

    def step() -> Gradients:
        rng = Recorded(problem.randomness)
        gradients, _ = clipped_sum(
            problem.network, loss, problem.images, problem.labels, problem.max_grad_norm, rng
        )
        return gradients

    return step


def hooks(problem: Problem) -> Step:
    """Opacus's GradSampleModule: a gradient of every row, then the rows of an example are added."""
    return _opacus_step(problem, _wrap(problem, GradSampleModule))


def expanded_weights(problem: Problem) -> Step:
    """Opacus's "ew" mode: the expanded weights of PyTorch."""
    wrapped = _wrap(problem, GradSampleModuleExpandedWeights)
    for layer in wrapped._module.modules():
        if type(layer) is nn.Embedding:  # it refuses an index without a second axis
            layer.forward = partial(_embed_column, layer)
    return _opacus_step(problem, wrapped)


def ghost(problem: Problem) -> Step:
    """Opacus's ghost clipping: norms in one backward pass, the weighted sum in a second one."""
    if problem.rows > 1:
        raise UserError("ghost clipping of Opacus clips every row by itself: K > 1 cannot be expressed")
    wrapped = _wrap(problem, GradSampleModuleFastGradientClipping, max_grad_norm=problem.max_grad_norm)
    trained = _trained(wrapped._module)
    zero_grad = torch.optim.SGD(trained.values(), lr=0.0)  # what the two passes ask of an optimiser

    def step() -> Gradients:
        zero_grad.zero_grad(set_to_none=True)
        losses = problem.losses(wrapped, *problem.batch)
        DPTensorFastGradientClipping(wrapped, zero_grad, losses, "sum").backward()
        return {name: parameter.grad for name, parameter in trained.items()}

    return step


def vmap_whole(problem: Problem) -> Step:
    """torch.func: vmap of the gradient of one example, all examples at once."""
    return _vmap_step(problem, len(problem.labels))


def vmap_chunks(problem: Problem) -> Step:
    """torch.func in chunks of about CHUNK_ROWS rows."""
    return _vmap_step(problem, max(1, CHUNK_ROWS // problem.rows))


def loop(problem: Problem) -> Step:
    """Plain autograd, one example after the other: the definition."""
    trained = _trained(problem.network)

    def step() -> Gradients:
        total = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        for i in range(len(problem.labels)):
            losses = problem.losses(problem.network, *(part[i : i + 1] for part in problem.batch))
            gradients = torch.autograd.grad(losses.sum(), list(trained.values()))
            one = {name: gradient[None] for name, gradient in zip(trained, gradients, strict=True)}
            _add(total, clip_and_sum(one, problem.max_grad_norm))
        return total

    return step


def noise(problem: Problem) -> Step:
    """One optimiser step's Gaussian noise on all trained parameters, drawn and added; DP-SGD draws it in a second
    thread while the gradients are being computed."""
    source = NoiseSource()
    num_parameters = sum(p.numel() for p in _trained(problem.network).values())
    total = torch.zeros(num_parameters, device=problem.images.device)

    def step() -> None:
        source.gaussian(num_parameters, 1.0, "bench", 0).add_to(total)

    return step


COMPETITORS: dict[str, Callable[[Problem], Step]] = {
    "ordinary": ordinary,
    "ours": ours,
    "hooks": hooks,
    "ghost": ghost,
    "ew": expanded_weights,
    "vmap": vmap_whole,
    "vmap-chunks": vmap_chunks,
    "loop": loop,
    "noise": noise,
}


def clip_and_sum(gradients: Gradients, max_grad_norm: float) -> Gradients:
    """Clip (B, ...) gradients jointly to `max_grad_norm` and sum over the examples."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    coefficients = (max_grad_norm / norms).clamp(max=1.0)
    return {name: torch.tensordot(coefficients.to(g.dtype), g, dims=1) for name, g in gradients.items()}


def _wrap(problem: Problem, kind: type[nn.Module], **options) -> nn.Module:
    wrapped = kind(copy.deepcopy(problem.network), loss_reduction="sum", **options)
    return _with_null_label(wrapped, problem.network)


def _opacus_step(problem: Problem, wrapped: nn.Module) -> Step:
    trained = _trained(wrapped._module)

    def step() -> Gradients:
        wrapped.zero_grad(set_to_none=True)  # the gradients of the rows too
        problem.losses(wrapped, *problem.batch).sum().backward()
        shape = (len(problem.labels), problem.rows)
        per_example = {}
        for name, parameter in trained.items():
            rows, parameter.grad_sample = parameter.grad_sample, None
            per_example[name] = rows if problem.rows == 1 else rows.unflatten(0, shape).sum(1)
        return clip_and_sum(per_example, problem.max_grad_norm)

    return step


def _vmap_step(problem: Problem, chunk: int) -> Step:
    trained = {name: p.detach() for name, p in _trained(problem.network).items()}
    call = _with_null_label(_Functional(problem.network), problem.network)

    def loss_of_one(parameters: Gradients, *example: torch.Tensor) -> torch.Tensor:
        call.parameters_given = parameters
        return problem.losses(call, *(part[None] for part in example))[0]

    gradient_of_each = vmap(grad(loss_of_one), in_dims=(None, *(0 for _ in problem.batch)))

    def step() -> Gradients:
        total = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        for start in range(0, len(problem.labels), chunk):
            part = (tensor[start : start + chunk] for tensor in problem.batch)
            _add(total, clip_and_sum(gradient_of_each(trained, *part), problem.max_grad_norm))
        return total

    return step


def _embed_column(layer: nn.Embedding, index: torch.Tensor) -> torch.Tensor:
    return F.embedding(index[:, None], layer.weight).squeeze(1)


class _Functional:
    """The network called with `parameters_given` in place of its own."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.parameters_given: Gradients = {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return functional_call(self._network, self.parameters_given, inputs)


def _with_null_label(caller, network: nn.Module):
    """The diffusion loss asks its network for the null label; a wrapper must know it too."""
    if isinstance(getattr(network, "null_label", None), int):
        caller.null_label = network.null_label
    return caller


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def _add(total: Gradients, part: Gradients) -> None:
    for name, gradient in part.items():
        total[name] += gradient
