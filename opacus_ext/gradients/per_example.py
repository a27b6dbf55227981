"""The clipped sum of per-example gradients, in one forward and one backward pass.

Trained layers run with their parameters detached, so that no summed weight gradient is computed and discarded. A hook
on each layer's output receives the output gradient; `rules` computes from it and the layer's input the contribution of
each example. Normalisation layers run with one copy of their small parameters per example instead, and so does every
module without a rule (`by_example`). Legend: B examples, K rows per example (its noise draws or augmentations,
adjacent), R = B * K rows.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from opacus_ext.gradients.by_example import ExampleMap, forward_by_example, rows_of
from opacus_ext.gradients.planner import cheapest
from opacus_ext.gradients.rules import (
    Factors,
    RowForward,
    Rule,
    parameter_users,
    refuse_mixing,
    refuse_parameters,
    row_forward_for,
    rule_for,
    squared_norms,
    weighted_sum,
)
from utils.errors import UserError

SMALL = 2**14  # largest size per example of a gradient that is processed together with others

# Times the multiply-adds of forming a gradient, above which its factors cannot be cheaper, memory traffic included.
HOPELESS = 2.0

# (network, images (B, C, H, W), labels (B,), rng) -> losses (B,); the K draws of an example are averaged inside
PerExampleLoss = Callable[[nn.Module, torch.Tensor, torch.Tensor, object], torch.Tensor]


def clipped_sum(
    network: nn.Module,
    per_example_loss: PerExampleLoss,
    images: torch.Tensor,
    labels: torch.Tensor,
    max_grad_norm: float,
    rng: object,
    layer_rows: dict[str, set[int]] | None = None,
    num_padded: int = 0,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Sum over examples of the gradient of each example's own loss, clipped jointly over all trainable tensors.

    Returns name -> summed gradient, and the (B,) norms before clipping. Both are private.

    Guarantees:
    - One example contributes an L2 norm of at most `max_grad_norm` over all tensors together, up to the rounding of
      float32.
    - The gradients are exact: every way to compute them is tested against a loop over the examples.
    - Sums are float32 at least, whatever the type of the parameters.

    Assumes: network and loss treat every example by itself (validate.py tests this).

    | case | result |
    |---|---|
    | example whose gradient is not finite | contributes zero |
    | no examples | zeros |
    | the last `num_padded` examples | contribute zero; they only pad the batch |
    | a parameter that the loss does not reach | zeros |
    | the loss is not one number per example, or depends on no trained parameter | UserError |
    | a layer is called with another number of rows per example than in `layer_rows` (None: any) | UserError |

    `rng` is passed to the loss unchanged. `layer_rows`: the result of `rows_of_layers`.
    """
    trainable = _trainable(network)
    if not len(labels):
        zeros = {name: torch.zeros_like(p) for name, p in trainable.items()}
        return zeros, torch.zeros(0, device=labels.device)
    record = _Record(len(labels), whole=False, layer_rows=layer_rows)
    _fill(record, network, trainable, per_example_loss, images, labels, rng)
    small = record.take_small()
    norms = record.squares(small).sqrt()
    coefficients = clip_coefficients(norms, max_grad_norm)
    coefficients[len(labels) - num_padded :] = 0
    # Computed once, and not on a GPU, where the host would wait for the result.
    may_drop = coefficients.is_cuda or not bool((coefficients > 0).all())
    sums = {
        name: torch.zeros_like(p) for name, p in trainable.items()
    }  # the loss may not reach all parameters
    for name in list(record.gradients):
        sums[name] = weighted_sum(record.gradients.pop(name), coefficients, may_drop)
    if small:
        flat = weighted_sum(small.rows, coefficients, may_drop).split(small.sizes)
        sums.update(zip(small.names, flat, strict=True))
    # In float32 at least, whatever the parameters are: rounding to less would move the sum by more than the bound.
    return {name: sums[name].view_as(p) for name, p in trainable.items()}, norms[: len(labels) - num_padded]


def per_example_gradients(
    network: nn.Module,
    per_example_loss: PerExampleLoss,
    images: torch.Tensor,
    labels: torch.Tensor,
    rng: object,
) -> dict[str, torch.Tensor]:
    """Name -> (B, *shape): the gradient of each example's loss. A parameter that the loss does not reach has zeros."""
    trainable = _trainable(network)
    if not len(labels):
        return {name: p.new_zeros(0, *p.shape) for name, p in trainable.items()}
    record = _Record(len(labels), whole=True)
    _fill(record, network, trainable, per_example_loss, images, labels, rng)
    return {
        name: record.gradients.get(name, p.new_zeros(len(labels), *p.shape)) for name, p in trainable.items()
    }


def rows_of_layers(
    network: nn.Module,
    per_example_loss: PerExampleLoss,
    images: torch.Tensor,
    labels: torch.Tensor,
    rng: object,
) -> dict[str, set[int]]:
    """Path of every trained layer -> the numbers of rows per example with which it is called."""
    record = _Record(len(labels), whole=True)
    _fill(record, network, _trainable(network), per_example_loss, images, labels, rng)
    return record.rows


def clip_coefficients(norms: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """(B,) factors min(1, C / norm); 0 where a norm is zero, not finite, or so large that the factor would be."""
    usable = (norms > 0) & (norms < 1e30 * max_grad_norm)
    return torch.where(usable, (max_grad_norm / norms).clamp(max=1.0), 0.0)


def _trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class _Small:
    """The gradients of many small parameters in one tensor, so that one operation processes all of them."""

    names: list[str]
    sizes: list[int]
    rows: torch.Tensor  # (B, sum of sizes)


class _Record:
    """The result of one backward pass: name -> per-example gradients, formed or as factors, and their squared norms.

    whole: form every gradient. Otherwise a layer that is used once may keep the factors if that is cheaper.
    """

    def __init__(self, batch: int, whole: bool, layer_rows: dict[str, set[int]] | None = None) -> None:
        self.batch = batch
        self.whole = whole
        self.rows: dict[str, set[int]] = {}
        self._allowed_rows = layer_rows
        self.gradients: dict[str, torch.Tensor | Factors] = {}
        self.uses: Counter[str] = Counter()
        self.examples = ExampleMap(batch)
        self.in_loss = True  # until the backward pass of the losses begins
        self._squares: dict[str, torch.Tensor] = {}

    def rows_per_example(self, x: torch.Tensor, path: str) -> int:
        """The number of rows of a layer's input per example. Rows that are selected by content could come in any number
        and be attributed to another example. The message omits the number, which is secret."""
        rows, rest = divmod(len(x), self.batch)
        if rest or (self._allowed_rows is not None and rows not in self._allowed_rows.get(path, ())):
            raise UserError(
                f"network: layer '{path}' is called with another number of rows than K for each example; "
                f"it must be the same in every call"
            )
        self.rows.setdefault(path, set()).add(rows)
        return rows

    def add(self, name: str, gradient: torch.Tensor | Factors) -> None:
        seen = self.gradients.get(name)
        if self.whole or self.uses[name] > 1 or seen is not None:
            self.gradients[name] = _form(gradient) if seen is None else _form(seen) + _form(gradient)
            self._squares.pop(name, None)  # of one of the uses only
        elif isinstance(gradient, Factors):
            # The norm right away, while the gradient is in the processor's cache.
            self.gradients[name], self._squares[name] = _kept(gradient)
        else:
            self.gradients[name] = gradient

    def take_small(self) -> _Small | None:
        """Remove the small formed gradients from this record and return them in one tensor."""
        names = [
            name for name, g in self.gradients.items() if name not in self._squares and g[0].numel() <= SMALL
        ]
        if not names:
            return None
        rows = [self.gradients.pop(name).reshape(self.batch, -1) for name in names]
        return _Small(names, [part.shape[1] for part in rows], torch.cat(rows, dim=1))

    def squares(self, small: _Small | None) -> torch.Tensor:
        """(B,) float64 joint squared norms of this record and of what was taken from it."""
        late = [g for name, g in self.gradients.items() if name not in self._squares]
        if small:
            late.append(small.rows)
        return torch.stack([*self._squares.values(), *map(squared_norms, late)]).sum(0)


def _form(gradient: torch.Tensor | Factors) -> torch.Tensor:
    return gradient.form() if isinstance(gradient, Factors) else gradient


def _kept(gradient: Factors) -> tuple[torch.Tensor | Factors, torch.Tensor]:
    """The gradient in the form that makes norm and weighted sum cheapest, and its squared norms."""

    def formed(rehearse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        whole = gradient.form()
        squares = squared_norms(whole)
        if rehearse:
            weighted_sum(whole, torch.ones_like(squares), may_drop=False)
        return whole, squares

    def factored(rehearse: bool = False) -> tuple[Factors, torch.Tensor]:
        squares = gradient.squared_norms()
        if rehearse:
            gradient.weighted_sum(torch.ones_like(squares), may_drop=False)
        return gradient, squares

    choices = {"factored": factored, "formed": formed}
    if gradient.factored_work > HOPELESS * gradient.work:
        del choices["factored"]
    return cheapest(("keep", *gradient.key), gradient.work, choices, gradient.device)


def _fill(
    record: _Record,
    network: nn.Module,
    trainable: dict[str, nn.Parameter],
    per_example_loss: PerExampleLoss,
    images: torch.Tensor,
    labels: torch.Tensor,
    rng: object,
) -> None:
    """Fill the record by one forward and one backward pass."""
    with _watching(network, trainable, record) as copies, torch.enable_grad():
        losses = per_example_loss(network, images, labels, rng)
        if losses.shape != (len(images),):
            # A mean over the batch would divide by the size of a secret sample.
            raise UserError(f"loss: a tensor of {losses.dim()} dimensions; it must be one number per example")
        if not losses.requires_grad:
            raise UserError(
                "loss: it depends on no trained parameter; are all of them frozen, or does a layer of PyTorch in eval "
                "mode take its path without gradients?"
            )
        record.in_loss = False
        _backward(losses.sum())
    for name, copy in copies.items():
        if copy.grad is not None:
            record.add(name, copy.grad)


def _backward(loss: torch.Tensor) -> None:
    try:
        loss.backward()
    except RuntimeError as error:
        # The original messages may contain the number of rows, which is secret.
        if "modified by an inplace operation" in str(error):
            raise UserError(
                "network: a tensor is changed in place after an operation that needs it for the gradient; use an "
                "out-of-place operation"
            ) from error
        if "being vmapped" in str(error):
            raise UserError(
                "network: a module that runs example by example recomputes a part of itself in the backward pass; "
                "checkpoint the whole module, or nothing inside of it"
            ) from error
        raise


@contextmanager
def _watching(network: nn.Module, trainable: dict[str, nn.Parameter], record: _Record) -> Iterator[dict]:
    """Within: parameters are constants, and a backward pass fills `record`.

    Yields name -> leaf tensor (B, *shape), the per-example copies whose `.grad` the caller collects.
    """
    refuse_mixing(network)
    refuse_parameters(network)
    copies: dict[str, torch.Tensor] = {}
    undo: list[Callable[[], None]] = []
    users = parameter_users(network, trainable)
    row_forwards = [row_forward_for(module) for module, *_ in users]
    rules = [
        rule_for(module) if row_forward is None else None
        for row_forward, (module, *_) in zip(row_forwards, users, strict=True)
    ]
    # Without a module that runs by example, layers with a rule are watched by hooks alone.
    mapped = (None, None) in zip(row_forwards, rules, strict=True)
    try:
        for (module, path, own), row_forward, rule in zip(users, row_forwards, rules, strict=True):
            if rule is not None:
                undo += _watch(module, partial(_attach, rule, own, path, record), record.examples, mapped)
                continue
            for name in own.values():
                leaf = trainable[name].detach().expand(record.batch, *trainable[name].shape)
                copies.setdefault(name, leaf.requires_grad_())
                record.uses[name] += 1
            if row_forward is None:
                run = partial(_forward_by_example, module.forward)
            else:
                run = partial(_forward_by_row, row_forward)
            run = partial(run, module, own, copies, path, record)
            undo.append(_replace_forward(module, partial(record.examples.leave, run)))
        for parameter in trainable.values():
            parameter.requires_grad_(False)
            undo.append(partial(parameter.requires_grad_, True))
        yield copies
    finally:
        for step in undo:
            step()


def _watch(module: nn.Module, attach: Callable, examples: ExampleMap, mapped: bool) -> list[Callable]:
    """Call `attach` on each call of the module; returns functions that undo this. mapped: a map may call the module."""
    if not mapped:
        return [
            module.register_forward_pre_hook(_prepared).remove,
            module.register_forward_hook(attach, with_kwargs=True).remove,
        ]
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        args = _prepared(module, args) or args
        return attach(module, args, kwargs, forward(*args, **kwargs))

    return [_replace_forward(module, partial(examples.leave, run))]


def _replace_forward(module: nn.Module, forward: Callable) -> Callable[[], None]:
    """Replace the forward of the module; returns a function that restores it."""
    before = vars(module).get("forward")
    module.forward = forward
    return (
        partial(delattr, module, "forward") if before is None else partial(setattr, module, "forward", before)
    )


def _first(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _forward_by_row(
    row_forward: RowForward,
    module: nn.Module,
    own: dict[str, str],
    copies: dict,
    path: str,
    record: _Record,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """The module's forward, each row with its example's copy of the parameters; autograd does the rest."""
    x = _first(args, kwargs)
    rows = record.rows_per_example(x, path)
    parameters = {}
    for local, p in module.named_parameters(recurse=False):
        one_each = copies[own[local]] if local in own else p.detach().expand(record.batch, *p.shape)
        parameters[local] = one_each.repeat_interleave(rows, dim=0) if rows > 1 else one_each
    return row_forward(module, x, parameters)


def _forward_by_example(
    forward: Callable,
    module: nn.Module,
    own: dict[str, str],
    copies: dict,
    path: str,
    record: _Record,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The module's own forward, example by example, with that example's copy of the parameters."""
    record.rows_per_example(rows_of(module, path, args, kwargs), path)
    own_copies = {local: copies[name] for local, name in own.items()}
    return forward_by_example(module, forward, path, own_copies, record.examples, args, kwargs)


def _prepared(module: nn.Module, args: tuple) -> tuple | None:
    """Forward pre-hook: on a GPU, what autocast and the convolution would make of the input, made once for both them
    and the gradient rule."""
    if not args or type(module) not in (nn.Linear, nn.Conv2d) or not args[0].is_cuda:
        return None
    x, *rest = args
    if torch.is_autocast_enabled("cuda") and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype("cuda"))
    if _is_channels_last(module.weight) and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return (x, *rest)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _attach(
    rule: Rule,
    own: dict[str, str],
    path: str,
    record: _Record,
    module: nn.Module,
    args: tuple,
    kwargs: dict,
    output: torch.Tensor,
) -> torch.Tensor:
    """Forward hook: have `rule` applied when the gradient of this output arrives."""
    if not torch.is_grad_enabled():
        return output
    if not output.requires_grad:  # the first trained layer: nothing before it needs a gradient
        output = _Start.apply(output, torch.zeros((), requires_grad=True))
    features = _first(args, kwargs).detach()
    record.rows_per_example(features, path)
    version, channels_last = features._version, output.is_cuda and _is_channels_last(output)
    held = [features]  # released when used, so that memory falls during the backward pass
    for name in own.values():
        record.uses[name] += 1

    def receive(output_gradient: torch.Tensor) -> torch.Tensor:
        if record.in_loss:
            if torch.is_grad_enabled():  # create_graph: the loss depends on a gradient
                raise UserError(
                    f"loss: it contains a gradient (create_graph=True) that passes layer '{path}', as a gradient "
                    f"penalty does, and the engine has no per-example gradients of gradients; leave the penalty out"
                )
            return output_gradient  # a number to the loss, and no part of its gradient
        if held[0]._version != version:
            raise UserError(
                f"network: the input of layer '{path}' is changed in place after the layer has read it; use an "
                f"out-of-place operation"
            )
        if channels_last:  # as the convolution's own backward pass would make it
            output_gradient = output_gradient.contiguous(memory_format=torch.channels_last)
        found = rule(module, held.pop(), output_gradient, record.batch)
        if missing := own.keys() - found.keys():
            raise UserError(
                f"network: the gradient rule of {type(module).__name__} returns no gradient of the parameter "
                f"'{path}.{min(missing)}'"
            )
        for local, gradient in found.items():
            if local in own:  # else a frozen parameter of a partly trained layer
                record.add(own[local], gradient)
        return output_gradient

    output.register_hook(receive)
    return output


class _Start(torch.autograd.Function):
    """Makes a tensor part of the graph, at no cost, as `requires_grad_` would; but what follows may overwrite it."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None
