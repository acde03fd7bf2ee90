"""A network beside the denoiser in float64, its ONNX file and PyTorch, module by module.

Such a network has no codes, so that in float64 nothing is rounded at all: a right file agrees to what FP32 constants
lose that were rounded anew, and a wrong constant is in the first module that differs. The file reads PyTorch's output
of each module, so that a difference does not travel on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qdexport.check.float64.compare import distance
from qdexport.check.float64.graph import Float64Graph
from qdexport.check.float64.model import float64_inputs, in_float64
from qdexport.check.float64.ops import UnsupportedError
from qdexport.check.float64.parity import TOLERANCES, largest_bytes
from qdexport.core.layer_names import layers_of
from qdexport.emit.inspect import load_onnx
from qdexport.errors import ParityError
from qdexport.models.companions import Companion

__all__ = ["companion_differences"]

_FLOATS: Final = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
# what a module with weights has once in a call
_ONCE: Final = frozenset({"Conv", "Gather", "Gemm", "InstanceNormalization", "LayerNormalization", "MatMul"})


def companion_differences(companion: Companion, path: Path, inputs: Mapping[str, Tensor]) -> tuple[list[str], str]:
    """Compares one call.

    Args:
        companion: the network.
        path: its ONNX file.
        inputs: of the file's types and sizes.

    Returns:
        A sentence for each module whose output differs, in the order of execution, and why nothing was compared; empty
        where it was.
    """
    graph = load_onnx(path)
    needed, free = largest_bytes(graph, companion.facts.io), int(psutil.virtual_memory().available)
    if needed > free:
        return [], f"float64 needs some {needed / 1e9:.0f} GB of memory, of which {free / 1e9:.0f} GB are free"
    comparison = _Comparison(companion, graph)
    try:
        comparison.call(inputs)
    except UnsupportedError as error:
        return [], str(error)
    except ParityError as error:
        comparison.problems.append(str(error))
    return comparison.problems, ""


class _Comparison:
    """One call of the two."""

    def __init__(self, companion: Companion, graph: ir.Model) -> None:
        self._companion = companion
        self._made = _made_by(graph)
        self._run = Float64Graph(graph, self._made.values())
        self._done: set[str] = set()
        self.problems: list[str] = []

    def call(self, inputs: Mapping[str, Tensor]) -> None:
        wide = float64_inputs(inputs)
        self._run.start(wide)
        with self._watched(), in_float64(self._companion.module):
            outputs = self._companion.in_body(wide)
        for value, (name, tensor) in zip(self._run.outputs, outputs.items(), strict=True):
            self._compare(f"its output {name}", value, tensor)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        hooks = [
            module.register_forward_hook(partial(self._take, name))
            for name, module in self._companion.network.named_modules()
            if name in self._made and any(True for _ in module.parameters(recurse=False))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, name: str, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        if not isinstance(y, Tensor) or name in self._done:
            return  # called again, it is compared with what comes behind it
        self._done.add(name)
        with _disable_current_modes():
            value = self._made[name]
            if self._compare(name, value, y.detach()):
                self._run.force(value, y.detach().to(torch.float64).reshape(self._run.value(value).shape))
            self._run.release(value)

    def _compare(self, place: str, value: ir.Value, tensor: Tensor) -> bool:
        """Whether the two can be compared; a difference becomes a sentence."""
        found = self._run.value(value)
        if found.numel() != tensor.numel():
            return False  # a module that is written in another form, whose last node makes something else
        apart = distance(tensor.reshape(found.shape), found)
        if not apart.worst <= TOLERANCES["fp32"].tensor:
            facts = self._companion.facts
            how = f"{apart.sqnr_db:.1f} dB, an element by {apart.worst:.2g}"
            self.problems.append(f"{facts.network}, {place}: it differs in float64 ({how})")
        return True


def _made_by(graph: ir.Model) -> dict[str, ir.Value]:
    """The last value that each module makes, by its path; not of those that are called more than once."""
    found: dict[str, ir.Value] = {}
    products: Counter[str] = Counter()
    for node in graph.graph:
        for layer in layers_of((node.name or "").rpartition("/")[0]):
            products[layer] += node.op_type in _ONCE
            if node.outputs[0].dtype in _FLOATS and len(node.outputs) == 1:
                found[layer] = node.outputs[0]
    return {layer: value for layer, value in found.items() if products[layer] <= 1}
