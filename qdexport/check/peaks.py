"""The largest numbers that the modules of a network give, in the order of execution."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qdexport.core.precision import LARGEST
from qdexport.models.torch_types import torch_dtype

__all__ = ["Peaks"]



class Peaks:
    """The largest magnitude of every module's output in FP32, of those whose outputs have the body's type.

    Modules that an FP16 body leaves in FP32 (T5's) may exceed FP16. While :meth:`types` watches, the body computes.

    Args:
        network: is watched.
        body: ``fp16`` or ``fp32``.
    """

    def __init__(self, network: nn.Module, body: str) -> None:
        self._network, self._dtype = network, torch_dtype(body)
        self._peaks: dict[str, float] = {}
        self._large: list[tuple[str, float]] = []  # in the order in which they were seen; a module may run twice
        self._wide: set[str] = set()

    @property
    def value(self) -> float:
        """NaN or infinity where any module gave one."""
        return self.largest()[1]

    def largest(self) -> tuple[str, float]:
        """The module with the largest output, and that; the first whose output is not finite, if there is one."""
        name = self.not_finite()
        if name is not None:
            return name, self._peaks[name]
        narrow = {name: peak for name, peak in self._peaks.items() if name not in self._wide}
        name = max(narrow, key=lambda item: narrow[item], default="")
        return name, narrow.get(name, 0.0)

    def first_beyond(self, limit: float) -> tuple[str, float] | None:
        """The first module, in the order of execution, whose output is not finite or exceeds a limit."""
        for name, peak in self._large:
            if not math.isfinite(peak) or (name not in self._wide and peak > limit):
                return name, self._peaks[name]
        return None

    def not_finite(self) -> str | None:
        """The first module whose output held NaN or infinity."""
        return next((name for name, peak in self._large if not math.isfinite(peak)), None)

    @contextlib.contextmanager
    def magnitudes(self) -> Iterator[None]:
        """Watches a call in FP32."""

        def see(name: str, output: Tensor) -> None:
            low, high = torch.aminmax(output)
            largest, before = max(abs(low.item()), abs(high.item())), self._peaks.get(name, 0.0)
            if math.isnan(before) or largest <= before:
                return
            self._peaks[name] = largest  # NaN too, with which no comparison holds
            if not largest <= LARGEST["fp16"]:
                self._large.append((name, largest))

        with self._watching(see):
            yield

    @contextlib.contextmanager
    def types(self) -> Iterator[None]:
        """Watches a call in the body's types."""

        def see(name: str, output: Tensor) -> None:
            if output.dtype != self._dtype:
                self._wide.add(name)

        with self._watching(see):
            yield

    @contextlib.contextmanager
    def _watching(self, see: Callable[[str, Tensor], None]) -> Iterator[None]:
        def hook(name: str) -> Callable[..., None]:
            def watch(module: nn.Module, args: Any, output: Any) -> None:
                del module, args
                if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                    see(name, output)

            return watch

        hooks = [module.register_forward_hook(hook(name)) for name, module in self._network.named_modules()]
        try:
            yield
        finally:
            for item in hooks:
                item.remove()
