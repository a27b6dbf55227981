"""Runs a module once per example, each time with that example's own copy of the module's parameters.

This is how modules without a gradient rule get per-example gradients: bare parameters (a class token, a layer scale, a
table of positions), attention, parametrizations. `torch.func.vmap` calls the module's own forward with the rows of one
example, so the result is exact whatever the forward does with its parameters; what vmap cannot run is refused. A layer
inside such a module whose rule is known leaves the map and runs on the rows of all examples at once, at full speed.
Legend: B examples, K rows per example, adjacent, R = B * K rows.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from utils.errors import UserError


class ExampleMap:
    """The maps over the examples of one batch: entered by modules without a rule, left by layers that have one."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._token: torch.Tensor | None = None  # batched by the innermost map; None: in no map

    def run(self, call: Callable, copies: dict[str, torch.Tensor], args: tuple, kwargs: dict) -> Any:
        """call(the copies of one example, *args, **kwargs) for every example.

        copies: name -> (B, *shape). Tensors in args and kwargs have R rows or no dimension; so have those of the
        result, which is that of one call but for the rows.
        """
        inputs, layout = tree_flatten((args, kwargs))
        layouts = []

        def one(token: torch.Tensor, own: dict, rows: list[torch.Tensor]) -> list[torch.Tensor]:
            remaining = iter(rows)
            own_args, own_kwargs = tree_unflatten(
                [next(remaining) if _has_rows(x) else x for x in inputs], layout
            )
            with self._at(token):
                outputs, output_layout = tree_flatten(call(own, *own_args, **own_kwargs))
            layouts.append((outputs, output_layout))
            return [y for y in outputs if isinstance(y, torch.Tensor)]

        rows = [x.unflatten(0, (self._batch, -1)) for x in inputs if _has_rows(x)]
        found = torch.func.vmap(one, randomness="different")(rows[0].new_zeros(self._batch), copies, rows)
        if any(y.dim() < 2 for y in found):
            raise ValueError("it returns a number for each example instead of rows")
        ((outputs, output_layout),) = layouts
        remaining = iter(found)
        rows = [next(remaining).flatten(0, 1) if isinstance(y, torch.Tensor) else y for y in outputs]
        return tree_unflatten(rows, output_layout)

    def leave(self, run: Callable, *args: Any, **kwargs: Any) -> Any:
        """run(*args, **kwargs) on the rows of all examples, also when it is called for one example of a map."""
        if self._token is None:
            return run(*args, **kwargs)
        inputs, layout = tree_flatten((args, kwargs))
        layouts = []

        def run_on_all(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            remaining = iter(tensors)
            all_args, all_kwargs = tree_unflatten(
                [next(remaining) if isinstance(x, torch.Tensor) else x for x in inputs], layout
            )
            with self._at(None):
                outputs, output_layout = tree_flatten(run(*all_args, **all_kwargs))
            layouts.append((outputs, output_layout))
            return tuple(y for y in outputs if isinstance(y, torch.Tensor))

        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        found = _Leave.apply(run_on_all, self._token, *tensors)
        ((outputs, output_layout),) = layouts
        remaining = iter(found)
        rows = [next(remaining) if isinstance(y, torch.Tensor) else y for y in outputs]
        return tree_unflatten(rows, output_layout)

    @contextmanager
    def _at(self, token: torch.Tensor | None) -> Iterator[None]:
        before, self._token = self._token, token
        try:
            yield
        finally:
            self._token = before


class _Leave(torch.autograd.Function):
    """Unwraps what a map has batched. Only the rule for vmap is ever called: autograd records what happens in it."""

    @staticmethod
    def forward(run_on_all: Callable, token: torch.Tensor, *tensors: torch.Tensor) -> None:
        raise AssertionError("the token is batched, so vmap is called")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        raise AssertionError("see forward")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, run_on_all: Callable, token: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        batch = info.batch_size
        rows = [_all_rows(x, dim, batch) for x, dim in zip(tensors, in_dims[2:], strict=True)]
        found = tuple(y.unflatten(0, (batch, -1)) for y in run_on_all(rows))
        return found, (0,) * len(found)


def _all_rows(x: torch.Tensor, dim: int | None, batch: int) -> torch.Tensor:
    """(R, ...) of a tensor that the map has batched along `dim`; None: all examples share it."""
    if dim is None:
        return x.expand(batch, *x.shape).flatten(0, 1) if x.dim() else x
    return x.movedim(dim, 0).flatten(0, 1)


def _has_rows(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() > 0


def rows_of(module: nn.Module, path: str, args: tuple, kwargs: dict) -> torch.Tensor:
    """The first tensor that the module is called with; UserError unless all of them have as many rows."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if _has_rows(x)]
    if len({len(x) for x in tensors}) != 1:
        raise UserError(
            f"network: {type(module).__name__} at '{path}' has parameters of its own, so it must be called with a "
            f"tensor, and each tensor must have one row per image or draw; keep other tensors as buffers"
        )
    return tensors[0]


def forward_by_example(
    module: nn.Module,
    forward: Callable,
    path: str,
    copies: dict[str, torch.Tensor],
    examples: ExampleMap,
    args: tuple,
    kwargs: dict,
) -> Any:
    """`forward`, the module's own, with each example's copy (B, *shape) of the parameters. UserError if it cannot be
    run this way."""

    def call(own: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        with _parameters_replaced(module, own):
            return forward(*args, **kwargs)

    try:
        return examples.run(call, copies, args, kwargs)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        # Without numbers: layers within the map see all examples, whose number is a secret.
        reason = re.sub(r"\b\d+", "?", str(error).strip().split("\n")[0][:200])
        raise UserError(
            f"network: no per-example gradient rule for {type(module).__name__} at '{path}', and it cannot be run one "
            f"example at a time ({reason}); register_rule or register_row_forward of opacus_ext.gradients.rules adds a "
            f"rule"
        ) from error


@contextmanager
def _parameters_replaced(module: nn.Module, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Within: the module reads these tensors where it reads its parameters; names are dotted paths below it."""
    kept = []
    try:
        for name, value in values.items():
            owner, _, local = name.rpartition(".")
            parameters = module.get_submodule(owner)._parameters
            kept.append((parameters, local, parameters[local]))
            parameters[local] = value
        yield
    finally:
        for parameters, local, parameter in kept:
            parameters[local] = parameter
