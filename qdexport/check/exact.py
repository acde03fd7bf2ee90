"""The fake-quant model in FP32, whatever the type of its body: what compiled networks are measured by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qdexport.check.calls import fit_inputs
from qdexport.core.io_spec import IoSpec
from qdexport.models.denoiser import call_denoiser
from qdexport.models.sampling import DenoiserCall

__all__ = ["exact_predictions"]

OnRun = Callable[[int, int], None]


def exact_predictions(
    denoiser: nn.Module, io: IoSpec, calls: Sequence[DenoiserCall], on_progress: OnRun | None = None
) -> list[np.ndarray]:
    """Predictions of a fake-quant denoiser with every operator in FP32.

    The weights of an FP16 body are widened layer by layer while it runs; no second copy of the model is made.

    Args:
        denoiser: fake-quant, FP32 or FP16.
        io: says the dtypes and rows of a call.
        calls: the inputs; they are those of the body, rounded to FP16 where it is.
        on_progress: called with the runs done and their total.

    Returns:
        FP32 arrays, one per call.
    """
    predictions = []
    with _in_float32(denoiser), torch.no_grad():
        for done, call in enumerate(calls):
            inputs = _widen(fit_inputs(call.inputs, io))
            predictions.append(call_denoiser(denoiser, inputs).numpy())
            if on_progress is not None:
                on_progress(done + 1, len(calls))
    return predictions


@contextlib.contextmanager
def _in_float32(denoiser: nn.Module) -> Iterator[None]:
    if all(parameter.dtype == torch.float32 for parameter in denoiser.parameters()):
        yield
        return
    hooks = []
    for module in denoiser.modules():
        halves = [item for item in module.parameters(recurse=False) if item.dtype == torch.float16]
        if halves:
            kept: list[Tensor] = []
            hooks.append(module.register_forward_pre_hook(partial(_widen_weights, halves, kept)))
            hooks.append(
                module.register_forward_hook(partial(_restore_weights, halves, kept), always_call=True)
            )
    try:
        with _NoHalf():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _widen_weights(halves: list[nn.Parameter], kept: list[Tensor], module: Any, args: Any) -> None:
    del module, args
    kept.extend(parameter.data for parameter in halves)
    for parameter in halves:
        parameter.data = parameter.data.float()


def _restore_weights(halves: list[nn.Parameter], kept: list[Tensor], *_: Any) -> None:
    for parameter, data in zip(halves, kept, strict=True):
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
        return func(*args, **{key: _widen(value) for key, value in (kwargs or {}).items()})


def _widen(item: Any) -> Any:
    if isinstance(item, Mapping):
        return {key: _widen(value) for key, value in item.items()}
    if isinstance(item, Tensor) and item.dtype == torch.float16:
        return item.float()
    return torch.float32 if item is torch.float16 else item
