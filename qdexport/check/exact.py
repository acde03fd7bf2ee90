"""The fake-quant model in FP32, whatever the type of its body: what compiled networks are measured by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from qdexport.models.denoiser import call_denoiser

__all__ = ["exact_call", "exact_predictions", "in_float32", "widened_while_running"]


def exact_predictions(
    denoiser: nn.Module,
    calls: Sequence[Mapping[str, Tensor]],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """Predictions of a fake-quant denoiser with every operator in FP32.

    Args:
        denoiser: fake-quant, FP32 or FP16.
        calls: named inputs; those of an FP16 network are rounded to FP16.
        on_progress: called with the runs done and their total.

    Returns:
        FP32 arrays, one per call.
    """
    predictions = []
    for done, inputs in enumerate(calls):
        predictions.append(exact_call(denoiser, inputs).numpy())
        if on_progress is not None:
            on_progress(done + 1, len(calls))
    return predictions


def exact_call(denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """One prediction of a fake-quant denoiser, FP32 whatever the type of its body and inputs."""
    with torch.no_grad(), in_float32(denoiser):
        single = {name: item.float() if item.is_floating_point() else item for name, item in inputs.items()}
        return call_denoiser(denoiser, single)


@contextlib.contextmanager
def in_float32(denoiser: nn.Module) -> Iterator[None]:
    """Lets a denoiser compute in FP32 on FP32 inputs.

    The weights of an FP16 body are widened layer by layer while it runs; no second copy of the model is made.
    CPUs have no fast FP16 arithmetic, so that this is faster, too.
    """
    if all(parameter.dtype == torch.float32 for parameter in denoiser.parameters()):
        yield
        return
    hooks = []
    for module in denoiser.modules():
        halves = [item for item in module.parameters(recurse=False) if item.dtype == torch.float16]
        if halves:
            hooks += widened_while_running(module, halves, torch.float32)
    try:
        with _NoHalf():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def widened_while_running(module: nn.Module, parameters: list[nn.Parameter], dtype: torch.dtype) -> list[Any]:
    """Hooks that give parameters of a module another type while it runs; remove them in the end."""
    kept: list[Tensor] = []
    return [
        module.register_forward_pre_hook(partial(_widen_weights, parameters, kept, dtype)),
        module.register_forward_hook(partial(_restore_weights, parameters, kept), always_call=True),
    ]


def _widen_weights(
    parameters: list[nn.Parameter], kept: list[Tensor], dtype: torch.dtype, module: Any, args: Any
) -> None:
    del module, args
    kept.extend(parameter.data for parameter in parameters)
    with _disable_current_modes():
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)


def _restore_weights(parameters: list[nn.Parameter], kept: list[Tensor], *_: Any) -> None:
    for parameter, data in zip(parameters, kept, strict=True):
        parameter.data = data
    kept.clear()


class _NoHalf(TorchDispatchMode):
    """Turns what a network's own code asks to be FP16, by the dtype of its weights, into FP32."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if kwargs is not None and kwargs.get("dtype") is torch.float16:
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **(kwargs or {}))
