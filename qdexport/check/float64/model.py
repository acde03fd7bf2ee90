"""The fake-quant model in float64: the same parameters, codes by the same rules, and no other rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

from qdexport.check.exact import widened_while_running
from qdexport.graph.dialect import LOG2_ZERO
from qdexport.models.denoiser import call_denoiser
from qdexport.quant.affine import SQRT_HALF, block_scales, e4m3_round, nvfp4_codes, quantize_codes
from qdexport.quant.modules import ActivationQuantizer
from qdexport.quant.ops import parameters_like

__all__ = ["Float64", "activation_codes", "call_in_float64", "float64_inputs", "in_float64", "product_in_float64"]

_WIDE: Final = torch.float64
_NARROW: Final = (torch.float16, torch.bfloat16, torch.float32)
_HALVES: Final = (torch.float16, torch.bfloat16)
_FAKE_QUANTIZE: Final = torch.ops.qdexport.fake_quantize.default
_COPY: Final = torch.ops.aten._to_copy.default


class Float64(TorchDispatchMode):
    """Inside, what meets a float64 tensor is computed in float64, and a conversion to a narrower type does nothing.

    What is made of constants and whole numbers alone keeps its type, since FP32 is part of what the network means
    there: frequencies of a time embedding, for instance. Weights are widened operator by operator; no copy of the
    model is made.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if func is _FAKE_QUANTIZE:
            return _fake_quantize(*args, **kwargs)
        if func is _COPY and args[0].is_floating_point() and kwargs.get("dtype") in (_WIDE, *_NARROW):
            kwargs["dtype"] = torch.float32 if args[0].dtype in _HALVES else args[0].dtype
        elif kwargs.get("dtype") in _HALVES:
            kwargs["dtype"] = torch.float32
        if func is not _COPY and tree_any(_is_wide, (args, kwargs)):
            args, kwargs = tree_map(_widen, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def in_float64(network: nn.Module) -> Iterator[None]:
    """Lets a network compute in float64 on float64 inputs, without gradients."""
    hooks = []
    for module in network.modules():
        # the weight of a quantized layer stays as it is: its codes are defined in FP32
        quantized = hasattr(module, "weight_quantizer") or hasattr(module, "weight_quantizers")
        own = [
            item
            for name, item in module.named_parameters(recurse=False)
            if item.dtype in _NARROW and not (quantized and name == "weight")
        ]
        hooks += [] if not own else widened_while_running(module, own, _WIDE)
    try:
        with torch.no_grad(), Float64():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def float64_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named inputs in float64, but for the timestep: what is made of it alone is FP32 in the network too."""
    return {
        name: item.to(_WIDE) if item.is_floating_point() and name != "timestep" else item
        for name, item in inputs.items()
    }


def call_in_float64(denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """One prediction of a fake-quant denoiser in float64, whatever the type of its body."""
    wide = float64_inputs(inputs)  # outside: inside, a conversion does nothing
    with in_float64(denoiser):
        return call_denoiser(denoiser, wide)


def product_in_float64(layer: Any, part: int, operand: Tensor, kernel: Tensor) -> Tensor:
    """One part's product of a quantized layer (:mod:`qdexport.quant.modules`), whose input is float64."""
    bias = layer.bias
    kept = None if bias is None else bias.data
    if bias is not None:
        bias.data = bias.data.to(_WIDE)
    try:
        with torch.no_grad(), Float64():
            product: Tensor = layer.product(part, operand, kernel)
            return product
    finally:
        if bias is not None:
            bias.data = kept


def activation_codes(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    """The codes of a layer's input before any offset, float64: whole numbers, or of FP8 and NVFP4 numbers of theirs.

    Args:
        quantizer: with its row selected.
        x: float64.
    """
    spec = quantizer.spec
    if spec.format == "nvfp4":
        return nvfp4_codes(x.float(), quantizer.scale).to(_WIDE)
    row = None if quantizer.scale.shape[0] == 1 or quantizer.context is None else quantizer.context.row
    scale, zero = parameters_like(x, quantizer.scale, quantizer.zero_point, row)
    return _codes(x, scale, zero, spec.qmin, spec.qmax, spec.format)


def _codes(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, form: str) -> Tensor:
    if x.dtype != _WIDE:  # a weight: its codes are defined in FP32
        return quantize_codes(x, scale, zero, qmin, qmax, form).to(_WIDE)
    ratio = x / scale.to(_WIDE)
    if form == "fp8":
        return e4m3_round(ratio).to(_WIDE)
    return ratio.round_().add_(zero).clamp_(qmin, qmax)


def _fake_quantize(  # noqa: PLR0913  the signature of the operator
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    mode: Tensor | None = None,
    form: str = "int",
) -> Tensor:
    if form == "nvfp4":
        single = x.float() if x.dtype != torch.float32 else x
        wide = block_scales(single, scale).to(_WIDE) * scale.to(_WIDE).reshape(())
        codes = nvfp4_codes(single, scale).to(_WIDE)
        return (codes.reshape(*wide.shape[:-1], -1) * wide).flatten(-2)
    s, z = parameters_like(x, scale, zero_point, row, axis)
    affine = (_codes(x, s, z, qmin, qmax, form) - z) * s.to(_WIDE)
    if mode is None:
        return affine
    logarithmic = ((mode[:1] if row is None else mode[row]) == 1).reshape([-1] + [1] * (x.dim() - 1))
    return torch.where(logarithmic, _powers(x, s, qmax), affine)


def _powers(x: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """``s 2^-q``: see :func:`qdexport.quant.affine.log2_fake_quantize`."""
    mantissa, exponent = torch.frexp(x.to(_WIDE) / scale.to(_WIDE))
    codes = torch.where(mantissa < SQRT_HALF, 1 - exponent, -exponent).clamp_(0, qmax)
    codes = torch.where(mantissa > 0, codes, qmax).to(_WIDE)
    return torch.where(codes < min(qmax, LOG2_ZERO), scale.to(_WIDE) * torch.exp2(-codes), 0.0)


def _is_wide(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype == _WIDE


def _widen(item: Any) -> Any:
    return item.to(_WIDE) if isinstance(item, Tensor) and item.dtype in _NARROW else item
