"""The noise floor: how far a fake-quant network is from itself when every operator rounds at random.

No two implementations of a floating-point operator agree in the last bit. In a quantized network such a bit
decides, now and then, which of two codes a value gets, and a whole quantization step travels on. The floor is
the SQNR between the network in FP32 and the network whose every operator rounds its output stochastically (up or
down, with probabilities that make the mean exact) to the body's dtype. A right compiler's network reaches it.

An FP32 convolution or product is no single rounding: each of its K additions rounds. A sum that is accumulated
one product after the other in random order, each partial sum rounded stochastically, has an error of variance

    c (K / 3 y^2 + K / 6 sum(p^2))

for products p and result y, since a partial sum of k products has the mean square (k/K)^2 y^2 + k/K (1 - k/K)
sum(p^2); c = 2^-46 * 0.09 is the mean variance of one stochastic rounding, relative to its square. It is drawn as
normal noise. FP16 bodies accumulate in FP32, which their own rounding hides.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

from qdexport.check.calls import fit_inputs
from qdexport.check.exact import exact_predictions
from qdexport.check.measure import sqnr_db
from qdexport.core.io_spec import IoSpec
from qdexport.models.denoiser import call_denoiser
from qdexport.models.sampling import DenoiserCall
from qdexport.quant.attach import QuantizedModel
from qdexport.quant.ops import fake_quantize

__all__ = ["noise_floor", "round_stochastically", "rounding", "summation_noise"]

_aten = torch.ops.aten
_FAKE_QUANTIZE: Final = torch.ops.qdexport.fake_quantize.default
# they move numbers without computing any; views are recognized by themselves
_MOVES: Final = frozenset(
    {
        _aten.cat,
        _aten.clone,
        _aten.constant_pad_nd,
        _aten.copy_,
        _aten.embedding,
        _aten.index,
        _aten.index_select,
        _aten.repeat,
        _aten.stack,
        _aten.upsample_nearest2d,
        _aten._unsafe_view,
    }
)
_WIDER: Final = {torch.float16: torch.float32, torch.float32: torch.float64}
_NARROWER: Final = {wide: narrow for narrow, wide in _WIDER.items()}
# bits of the wider type's fraction that the narrower one does not have, and the integer type of its size
_EXTRA_BITS: Final = {torch.float32: (13, torch.int32), torch.float64: (29, torch.int64)}
_HALF_SMALLEST_NORMAL: Final = 2.0**-14
_HALF_STEP: Final = 2.0**-24  # distance of the numbers below
# f (1 - f) averages 1/6 over the position f between two neighbours, (ulp / x)^2 averages 2^-46 * 3 / (8 ln 2)
_ROUNDING_VARIANCE: Final = 2.0**-46 * 3.0 / (8.0 * float(np.log(2.0))) / 6.0


def noise_floor(
    model: QuantizedModel,
    io: IoSpec,
    calls: Sequence[DenoiserCall],
    seeds: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
    exact: Sequence[np.ndarray] | None = None,
) -> list[float]:
    """The noise floor of each call in decibels: the median over the seeds.

    No second copy of the weights is made: they are widened operator by operator.

    Args:
        model: the fake-quant model.
        io: says the dtypes and rows of a call.
        calls: denoiser calls at several timesteps.
        seeds: rounding is drawn this many times for each call, from fixed seeds.
        on_progress: called with the runs done and their total.
        exact: what :func:`exact_predictions` gives for the calls, if it is known already.
    """
    if exact is None:
        exact = exact_predictions(model.denoiser, [fit_inputs(call.inputs, io) for call in calls])
    values: list[list[float]] = []
    for index, (call, reference) in enumerate(zip(calls, exact, strict=True)):
        inputs = fit_inputs(call.inputs, io)
        values.append([])
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(1_000 * index + seed)
            with torch.no_grad(), _Rounding(generator):
                prediction = call_denoiser(model.denoiser, inputs)
            values[-1].append(sqnr_db(reference, prediction.float().numpy()))
            if on_progress is not None:
                on_progress(index * seeds + seed + 1, len(calls) * seeds)
    return [statistics.median(several) for several in values]


@contextlib.contextmanager
def rounding(generator: torch.Generator) -> Iterator[None]:
    """Inside, every floating-point operator of PyTorch rounds its output stochastically to its own type."""
    with torch.no_grad(), _Rounding(generator):
        yield


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds FP64 to FP32, or FP32 to FP16, up or down at random, so that the mean is exact.

    Numbers on the narrower grid stay as they are; what lies beyond the largest of them becomes infinite.
    """
    bits, integer = _EXTRA_BITS[value.dtype]
    noise = torch.empty_like(value, dtype=integer).random_(0, 1 << bits, generator=generator)
    # adding below the last kept bit carries into it with the right probability; the rest is cut off
    rounded = (value.view(integer) + noise).bitwise_and_(-(1 << bits)).view(value.dtype)
    if value.dtype == torch.float32:
        tiny = value.abs() < _HALF_SMALLEST_NORMAL
        if bool(tiny.any()):
            steps = torch.floor(value / _HALF_STEP + noise / (1 << bits))
            rounded = torch.where(tiny, steps * _HALF_STEP, rounded)
    return rounded.to(_NARROWER[value.dtype])


def summation_noise(result: Tensor, squares: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """What rounding after each of ``count`` additions in FP32 adds to sums (see the module's text).

    Args:
        result: the exact sums, FP64.
        squares: the sums of the squared products, same shape.
        count: products per sum.
        generator: draws the noise.

    Returns:
        FP64 noise to be added to ``result``.
    """
    variance = (result * result / 3 + squares / 6) * (_ROUNDING_VARIANCE * count)
    normal = torch.empty_like(result, dtype=torch.float32).normal_(generator=generator)
    return variance.sqrt_().mul_(normal)


class _Rounding(TorchDispatchMode):
    """Computes every operator in the next wider type, and rounds its outputs back stochastically.

    Between operators tensors have the dtypes that they have without it.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._generator = generator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func is _FAKE_QUANTIZE:
            return self._fake_quantize(*args, **kwargs)
        if func.is_view or func.overloadpacket in _MOVES or not tree_any(_is_narrow, (args, kwargs)):
            return func(*args, **kwargs)
        wide_args, wide_kwargs = tree_map(_widen, (args, kwargs))
        result = func(*wide_args, **wide_kwargs)
        if func._schema.is_mutable:
            return self._write_back(func, (args, wide_args), (kwargs, wide_kwargs), result)
        if func in _SQUARES and result.dtype == torch.float64:
            squares, count = _SQUARES[func](args)
            result += summation_noise(result, squares, count, self._generator)
        return tree_map(self._narrow, result)

    def _narrow(self, item: Any) -> Any:
        if isinstance(item, Tensor) and item.dtype in _NARROWER:
            return round_stochastically(item, self._generator)
        return item

    def _fake_quantize(self, x: Tensor, *parameters: Any) -> Tensor:
        """Its own arithmetic is FP32 whatever the body is; FP32 results need no rounding."""
        result: Tensor = fake_quantize(x.float(), *parameters)
        return round_stochastically(result, self._generator) if x.dtype == torch.float16 else result

    def _write_back(
        self,
        func: Any,
        args: tuple[Any, Any],
        kwargs: tuple[Mapping[str, Any], Mapping[str, Any]],
        result: Any,
    ) -> Any:
        """Rounds what an operator wrote into the tensors that the caller knows."""
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            key: Any = position if position < len(args[0]) else argument.name
            own, wide = (pair[key] for pair in (args if isinstance(key, int) else kwargs))
            own.copy_(self._narrow(wide))
            result = own if result is wide else result
        return result


def _is_narrow(item: Any) -> bool:
    return (item if isinstance(item, torch.dtype) else getattr(item, "dtype", None)) in _WIDER


def _widen(item: Any) -> Any:
    if isinstance(item, torch.dtype):
        return _WIDER.get(item, item)
    return item.to(_WIDER[item.dtype]) if isinstance(item, Tensor) and item.dtype in _WIDER else item


def _convolution_squares(args: tuple[Any, ...]) -> tuple[Tensor, int]:
    x, weight = args[:2]
    return _aten.convolution.default(x * x, weight * weight, None, *args[3:]), weight[0].numel()


def _product_squares(args: tuple[Any, ...]) -> tuple[Tensor, int]:
    left, right = args[-2:]
    return torch.matmul(left * left, right * right), left.shape[-1]


# operators that sum products: how to get the sums of the squared products, and their number
_SQUARES: Final[dict[Any, Callable[[tuple[Any, ...]], tuple[Tensor, int]]]] = {
    _aten.convolution.default: _convolution_squares,
    _aten.addmm.default: _product_squares,
    _aten.mm.default: _product_squares,
    _aten.bmm.default: _product_squares,
    _aten.baddbmm.default: _product_squares,
}
