"""Rules that compute the gradient of every single example, by kind of layer.

A rule takes a layer's input and output gradient; a gradient may stay in factors (ghost norms, "book-keeping": Bu et
al. 2022) until the clipping coefficients are known. A row forward runs a layer with one copy of its parameters per
row. Everything here is exact. Legend: B examples, K rows per example, R = B * K rows, T positions per example (K and
space together).
"""

import abc
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from opacus_ext.gradients import convolutions
from opacus_ext.gradients.convolutions import Geometry
from opacus_ext.gradients.group_norm import group_norm_on_gpu
from opacus_ext.gradients.planner import LARGEST, is_small, kernels_for
from utils.errors import UserError

NORM_BLOCK = 2**12  # numbers whose squares are added up in float32


def _without_tf32(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator: compute the products of `method` in full float32 on a GPU too, as the norms were."""

    @functools.wraps(method)
    def wrapped(*args: Any, **options: Any) -> torch.Tensor:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        try:
            return method(*args, **options)
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before

    return wrapped


class Factors(abc.ABC):
    """Per-example gradients (B, *shape) that are not formed."""

    key: tuple  # what their cost depends on
    work: float  # multiply-adds of forming one
    factored_work: float  # multiply-adds of one's norm and share of the weighted sum, without forming it
    device: torch.device

    @abc.abstractmethod
    def form(self) -> torch.Tensor:
        """(B, *shape)"""

    @abc.abstractmethod
    def squared_norms(self) -> torch.Tensor:
        """(B,) float64"""

    @abc.abstractmethod
    def weighted_sum(self, coefficients: torch.Tensor, may_drop: bool) -> torch.Tensor:
        """Sum over examples of coefficient times gradient, `shape`. may_drop: some coefficients may be 0, and these
        examples' gradients nan."""


# (module, input, output gradient, B) -> per-example gradients by parameter name, (B, *parameter.shape) or factors
Rule = Callable[[nn.Module, torch.Tensor, torch.Tensor, int], dict[str, "torch.Tensor | Factors"]]
# (module, input (R, ...), parameters by name, (R, *parameter.shape)) -> output
RowForward = Callable[[nn.Module, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


def squared_norms(gradient: torch.Tensor) -> torch.Tensor:
    """(B, *shape) -> (B,) float64 squared norms, inf or nan where an entry is not finite.

    Block by block, since a float32 sum of millions of squares falls short by up to a percent.
    """
    rows = _in_memory_order(gradient).reshape(len(gradient), -1)
    whole = rows.shape[1] // NORM_BLOCK * NORM_BLOCK
    parts = [rows[:, :whole].unflatten(1, (-1, NORM_BLOCK)), rows[:, None, whole:]]
    dtype = _at_least_float32(rows)
    norms = [torch.linalg.vector_norm(part, dim=2, dtype=dtype) for part in parts if part.numel()]
    return torch.cat(norms, dim=1).double().square().sum(1)


def _at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def weighted_sum(
    gradient: "torch.Tensor | Factors", coefficients: torch.Tensor, may_drop: bool
) -> torch.Tensor:
    """Sum over examples of coefficient times gradient. may_drop: as in `Factors.weighted_sum`."""
    if isinstance(gradient, Factors):
        return gradient.weighted_sum(coefficients, may_drop)
    rows = _in_memory_order(gradient)
    kernels = kernels_for(rows.device)
    # In float32 at least: coefficients rounded to bfloat16 would let a clipped gradient exceed its bound.
    dtype = _at_least_float32(rows)
    if kernels is not None and dtype == torch.float32 and 0 < rows[0].numel() <= LARGEST:
        total = kernels.weighted_sum(rows.reshape(len(rows), -1).contiguous(), coefficients)
    else:
        flat = _without_dropped(rows, coefficients, may_drop).reshape(len(rows), -1)
        total = coefficients.to(dtype) @ flat.to(dtype)
    return total.view(rows.shape[1:]).permute(_inverse(_memory_order(gradient)))


def _memory_order(gradient: torch.Tensor) -> list[int]:
    """The axes behind the first, by falling stride: kernels return views of what they found natural to write."""
    return sorted(range(gradient.dim() - 1), key=lambda axis: -gradient.stride(axis + 1))


def _in_memory_order(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.permute(0, *(axis + 1 for axis in _memory_order(gradient)))


def _inverse(order: list[int]) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]


def _without_dropped(rows: torch.Tensor, coefficients: torch.Tensor, may_drop: bool) -> torch.Tensor:
    """(B, ...) with zeros for examples of coefficient 0, since 0 * inf is nan."""
    if not may_drop:
        return rows
    return torch.where((coefficients > 0).view(-1, *[1] * (rows.dim() - 1)), rows, 0.0)


def _factored_squares(alike: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Squared norms (B,) of g^T x: sum over position pairs of <x, x'> <g, g'>, for g (B, T, d) and the products
    alike = <x, x'> (B, T, T) in float64.

    In float64: the terms have both signs, and what float32 loses where they cancel could pass for a small norm. The
    weighted sum is formed in the precision of g though, and keeps a residue of what cancels: its size is added, so
    that the norm is not below that of what is summed. An example that could overflow there counts as not finite.
    """
    limits = torch.finfo(_at_least_float32(g))
    g = g.double()
    squares = (alike * (g @ g.transpose(1, 2))).sum((1, 2)).clamp_min(0.0)
    terms = (alike.diagonal(dim1=1, dim2=2).sqrt() * g.norm(dim=2)).sum(1)
    residue = 2 * math.sqrt(g.shape[1]) * limits.eps * terms
    return torch.where(terms < 0.1 * limits.max, squares + residue.square(), math.inf)


def _products(x: torch.Tensor) -> torch.Tensor:
    """(B, T, p) -> (B, T, T) float64"""
    x = x.double()
    return x @ x.transpose(1, 2)


class LinearFactors(Factors):
    """x (B, T, p), g (B, T, d): gradient g^T x, (B, d, p)."""

    def __init__(self, x: torch.Tensor, g: torch.Tensor) -> None:
        self.x, self.g = x.to(g.dtype), g
        batch, positions, d = g.shape
        p = x.shape[2]
        self.key = ("linear", is_small(batch), positions, p, d, g.dtype)
        self.work = positions * p * d
        self.factored_work = 0 if positions == 1 else 2 * positions**2 * (p + d)
        self.device = g.device

    def form(self) -> torch.Tensor:
        return self.g.transpose(1, 2) @ self.x

    def squared_norms(self) -> torch.Tensor:
        return _factored_squares(_products(self.x), self.g)

    @_without_tf32
    def weighted_sum(self, coefficients: torch.Tensor, may_drop: bool) -> torch.Tensor:
        dtype = _at_least_float32(self.g)
        g = _without_dropped(self.g, coefficients, may_drop).to(dtype) * coefficients.to(dtype)[:, None, None]
        return g.flatten(0, 1).T @ _without_dropped(self.x, coefficients, may_drop).to(dtype).flatten(0, 1)


class ConvFactors(Factors):
    """x (R, C, H, W), g (R, D, H', W'): gradient of a convolution's weight, (B, D, C / groups, kh, kw)."""

    def __init__(self, x: torch.Tensor, g: torch.Tensor, geometry: Geometry, batch: int) -> None:
        self.x, self.g, self.geometry, self.batch = x.to(g.dtype), g, geometry, batch
        d, c, *kernel = geometry.weight_shape
        positions = g.numel() // (batch * d)
        self.key = ("conv", is_small(batch), len(x) // batch, tuple(x.shape[1:]), geometry, g.dtype)
        self.work = positions * geometry.weight_shape.numel()
        formed_only = geometry.groups > 1 or len(kernel) > 2
        self.factored_work = float("inf") if formed_only else 2 * positions**2 * (c * math.prod(kernel) + d)
        self.device = g.device

    def form(self) -> torch.Tensor:
        return convolutions.per_example(self.x, self.g, self.geometry, self.batch)

    def squared_norms(self) -> torch.Tensor:
        columns = convolutions.columns(self.x, self.geometry, self.batch)
        g = convolutions.by_example(self.g, self.batch).transpose(1, 2)
        return _factored_squares(_products(columns.transpose(1, 2)), g)

    @_without_tf32
    def weighted_sum(self, coefficients: torch.Tensor, may_drop: bool) -> torch.Tensor:
        dtype = _at_least_float32(self.g)
        rows = coefficients.to(dtype).repeat_interleave(len(self.g) // self.batch)
        g = _without_dropped(self.g, rows, may_drop).to(dtype) * rows[:, None, None, None]
        return convolutions.summed(_without_dropped(self.x, rows, may_drop).to(dtype), g, self.geometry)


class OneRowFactors(ConvFactors):
    """`ConvFactors` of a 1-d convolution run in 2-d, over images of one row: (B, D, C / groups, k)."""

    def form(self) -> torch.Tensor:
        return super().form().squeeze(-2)

    def weighted_sum(self, coefficients: torch.Tensor, may_drop: bool) -> torch.Tensor:
        return super().weighted_sum(coefficients, may_drop).squeeze(-2)


class EmbeddingFactors(Factors):
    """index (B, T), g (B, T, d): rows of g added up by index, (B, num_embeddings, d)."""

    def __init__(self, index: torch.Tensor, g: torch.Tensor, num_embeddings: int) -> None:
        self.index, self.g, self.num_embeddings = index, g, num_embeddings
        batch, positions, d = g.shape
        self.key = ("embedding", is_small(batch), positions, num_embeddings, d, g.dtype)
        self.work = num_embeddings * d
        self.factored_work = 2 * positions**2 * d
        self.device = g.device

    def form(self) -> torch.Tensor:
        zeros = self.g.new_zeros(len(self.g), self.num_embeddings, self.g.shape[2])
        return zeros.scatter_add_(1, self.index[:, :, None].expand_as(self.g), self.g)

    def squared_norms(self) -> torch.Tensor:
        return _factored_squares((self.index[:, :, None] == self.index[:, None, :]).double(), self.g)

    def weighted_sum(self, coefficients: torch.Tensor, may_drop: bool) -> torch.Tensor:
        dtype = _at_least_float32(self.g)
        g = _without_dropped(self.g, coefficients, may_drop).to(dtype) * coefficients.to(dtype)[:, None, None]
        zeros = g.new_zeros(self.num_embeddings, g.shape[2])
        return zeros.index_add_(0, self.index.flatten(), g.flatten(0, 1))


def _linear(module: nn.Linear, x: torch.Tensor, g: torch.Tensor, batch: int) -> dict:
    g = g.reshape(batch, -1, g.shape[-1])
    gradients = {"weight": LinearFactors(x.reshape(batch, -1, x.shape[-1]), g)}
    return gradients if module.bias is None else {**gradients, "bias": g.sum(1)}


def convolution(module: nn.Module, x: torch.Tensor, g: torch.Tensor, batch: int) -> dict:
    """The rule of nn.Conv1d, nn.Conv2d and nn.Conv3d with all their options, for layers that compute their weight from
    other parameters too: see `pull_back`."""
    _require_rows(module, x)
    bias = g.flatten(2).sum(2).view(batch, -1, g.shape[1]).sum(1)
    return _with_bias(module, _weight_factors(*convolutions.geometry_of(module, x), g, batch), bias)


def _transposed_convolution(module: nn.Module, x: torch.Tensor, g: torch.Tensor, batch: int) -> dict:
    """Of ConvTranspose1d, ConvTranspose2d and ConvTranspose3d: input and output gradient change places."""
    _require_rows(module, x)
    bias = g.flatten(2).sum(2).view(batch, -1, g.shape[1]).sum(1)
    geometry, padded = convolutions.transposed_geometry(module, x, g)
    return _with_bias(module, _weight_factors(geometry, padded, x.to(g.dtype), batch), bias)


def _weight_factors(geometry: Geometry, x: torch.Tensor, g: torch.Tensor, batch: int) -> ConvFactors:
    if len(geometry.stride) > 1:
        return ConvFactors(x, g, geometry, batch)
    return OneRowFactors(x.unsqueeze(-2), g.unsqueeze(-2), geometry.with_one_row(), batch)


def _with_bias(module: nn.Module, weight: Factors, bias: torch.Tensor) -> dict:
    return {"weight": weight} if module.bias is None else {"weight": weight, "bias": bias}


def _require_rows(module: nn.Module, x: torch.Tensor) -> None:
    expected = module.weight.dim()
    if x.dim() != expected:
        raise UserError(
            f"network: {type(module).__name__} is called with a tensor of {x.dim()} dimensions; it must have "
            f"{expected}, the first of which counts images or draws"
        )


def pull_back(
    derive: Callable[..., torch.Tensor],
    parameters: tuple[torch.Tensor, ...],
    gradient: "torch.Tensor | Factors",
) -> tuple[torch.Tensor, ...]:
    """Per-example gradients of `parameters`, from those (B, ...) of the weight `derive(*parameters)`."""
    formed = gradient.form() if isinstance(gradient, Factors) else gradient
    _, pull = torch.func.vjp(derive, *(p.detach() for p in parameters))
    return torch.func.vmap(pull)(formed)


def _embedding(module: nn.Embedding, index: torch.Tensor, g: torch.Tensor, batch: int) -> dict:
    index = index.reshape(batch, -1)
    g = g.reshape(batch, index.shape[1], -1)
    if module.padding_idx is not None:
        g = torch.where((index == module.padding_idx)[:, :, None], 0.0, g)
    return {"weight": EmbeddingFactors(index, g, module.num_embeddings)}


def _group_norm(module: nn.GroupNorm, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """All rows as one, each channel of each row as a channel of its own: the stock kernels' affine gradients then
    come out per row."""
    weight, bias = parameters["weight"], parameters["bias"]
    if x.is_cuda:
        return group_norm_on_gpu(x, weight, bias, module.num_groups, module.eps)
    if x.is_contiguous():
        rows, groups = x.view(1, -1, *x.shape[2:]), len(x) * module.num_groups
        return F.group_norm(rows, groups, weight.reshape(-1), bias.reshape(-1), module.eps).view_as(x)
    shape = (*x.shape[:2], *[1] * (x.dim() - 2))
    return F.group_norm(x, module.num_groups, eps=module.eps) * weight.view(shape) + bias.view(shape)


def _layer_norm(module: nn.LayerNorm, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    shape = (len(x), *[1] * (x.dim() - 1 - len(module.normalized_shape)), *module.normalized_shape)
    y = F.layer_norm(x, module.normalized_shape, eps=module.eps) * parameters["weight"].view(shape)
    return y if module.bias is None else y + parameters["bias"].view(shape)


def _rms_norm(module: nn.RMSNorm, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    shape = (len(x), *[1] * (x.dim() - 1 - len(module.normalized_shape)), *module.normalized_shape)
    return F.rms_norm(x, module.normalized_shape, eps=module.eps) * parameters["weight"].view(shape)


def _instance_norm(module: nn.Module, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    shape = (*x.shape[:2], *[1] * (x.dim() - 2))
    normalised = F.instance_norm(x, eps=module.eps)
    return normalised * parameters["weight"].view(shape) + parameters["bias"].view(shape)


def _prelu(module: nn.PReLU, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    slope = parameters["weight"]
    slope = slope[:, 0] if x.dim() == 1 else slope.view(*slope.shape, *[1] * (x.dim() - 2))
    return torch.where(x > 0, x, slope * x)


# Layer type (exact: a subclass may compute something else) -> how to get each example's gradient.
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.ConvTranspose1d: _transposed_convolution,
    nn.ConvTranspose2d: _transposed_convolution,
    nn.ConvTranspose3d: _transposed_convolution,
    nn.Embedding: _embedding,
}
ROW_FORWARDS: dict[type[nn.Module], RowForward] = {
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
    nn.PReLU: _prelu,
}


def register_rule(kind: type[nn.Module], rule: Rule) -> None:
    """Add a rule for layers of type `kind`, whose rows must be independent."""
    RULES[kind] = rule


def register_row_forward(kind: type[nn.Module], forward: RowForward) -> None:
    """Like `register_rule`, for layers that are simplest to run with one copy of their parameters per row."""
    ROW_FORWARDS[kind] = forward


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a trained module, else one that the user registered with Opacus; None: it has none, or a row
    forward, and runs with a copy of its parameters for each example."""
    if "forward" in vars(module):  # replaced on this object: the type says nothing of it
        return None
    return RULES.get(type(module)) or _opacus_rule(type(module))


def row_forward_for(module: nn.Module) -> RowForward | None:
    """The row forward of a trained module, if it has one."""
    return None if "forward" in vars(module) else ROW_FORWARDS.get(type(module))


# Modules that hold parameters for the one around them, and compute nothing that it does not ask for.
HOLDERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict, parametrize.ParametrizationList)


def parameter_users(
    network: nn.Module, trainable: dict[str, nn.Parameter]
) -> list[tuple[nn.Module, str, dict[str, str]]]:
    """The modules whose forward uses trained parameters of their own, each with its path and: name below it -> name in
    the network."""
    names = {id(p): name for name, p in trainable.items()}
    modules = dict(network.named_modules())
    users: dict[str, dict[str, str]] = {}
    for path, module in modules.items():
        own = {local: names[id(p)] for local, p in module._parameters.items() if id(p) in names}
        if not own:
            continue
        user = path
        while user and _is_held(modules[user], modules[user.rpartition(".")[0]]):
            user = user.rpartition(".")[0]
        prefix = f"{path[len(user) :].lstrip('.')}." if user != path else ""
        users.setdefault(user, {}).update({prefix + local: name for local, name in own.items()})
    return [(modules[path], path, own) for path, own in users.items()]


def _is_held(module: nn.Module, parent: nn.Module) -> bool:
    # Attention hands the weights of its last layer to a function.
    return isinstance(module, HOLDERS) or (
        isinstance(parent, nn.MultiheadAttention) and type(module) not in RULES
    )


def _opacus_rule(kind: type[nn.Module]) -> Rule | None:
    """Rules of Opacus give one gradient per row; memory is K times that of the rules here. Those that come with Opacus
    are left out: they ignore options of the layers, such as `padding_mode`."""
    from opacus.grad_sample import GradSampleModule

    sampler = GradSampleModule.GRAD_SAMPLERS.get(kind)
    if sampler is None or sampler.__module__.startswith("opacus."):
        return None

    def rule(module: nn.Module, x: torch.Tensor, g: torch.Tensor, batch: int) -> dict:
        names = {id(p): name for name, p in module.named_parameters(recurse=False)}
        # Opacus gives rules gradients for parameters that are trained; within the engine none is marked so.
        trained = [p for p in module.parameters(recurse=False)]
        for p in trained:
            p.requires_grad_(True)
        try:
            found = sampler(module, [x], g)
        finally:
            for p in trained:
                p.requires_grad_(False)
        return {names[id(p)]: rows.view(batch, -1, *p.shape).sum(1) for p, rows in found.items()}

    return rule


def refuse_mixing(network: nn.Module) -> None:
    """Raise UserError naming the first module that mixes examples (batch statistics) or is changed by them."""
    for name, module in network.named_modules():
        if getattr(module, "max_norm", None) is not None:
            raise UserError(
                f"network: {type(module).__name__} at '{name}' has a max_norm, so its weight reveals which labels were "
                f"looked up; leave max_norm out"
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.scale_grad_by_freq:
            raise UserError(
                f"network: {type(module).__name__} at '{name}' has scale_grad_by_freq=True, which divides a gradient "
                f"by what all examples of a batch look up; leave scale_grad_by_freq out"
            )
        mixes = isinstance(module, nn.modules.batchnorm._BatchNorm)
        tracks = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        if mixes or tracks:
            raise UserError(
                f"network: {type(module).__name__} at '{name}' mixes the examples of a batch, so per-example "
                f"clipping bounds nothing; use GroupNorm"
            )


def refuse_parameters(network: nn.Module) -> None:
    """Raise UserError naming the first module whose parameters the engine cannot follow."""
    for name, module in network.named_modules():
        where = f"network: {type(module).__name__} at '{name}'"
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(f"{where} is compiled by torch.jit; train the module that it was made from")
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod)):
                raise UserError(
                    f"{where} computes a parameter in a hook ({type(hook).__name__}), outside of its forward; use "
                    f"torch.nn.utils.parametrizations or torch.nn.utils.parametrize"
                )
        for local, parameter in module._parameters.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise UserError(
                    f"{where} has no weights yet; call the network on an image once, then train it"
                )
            if parameter is not None and parameter.requires_grad and parameter.is_complex():
                raise UserError(
                    f"{where}: the parameter '{local}' is complex; store real and imaginary parts"
                )
