"""Runs and comparisons through Polygraphy: a runner for PyTorch, and what a comparison says about a layer."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from qdexport.check.measure import flip_rate, sqnr_db
from qdexport.check.session import ort_errors, reference_session
from qdexport.errors import ParityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy as np

__all__ = ["Feed", "FunctionRunner", "Match", "compare_with_onnx"]

Feed = dict[str, "np.ndarray"]
_SILENT = 1000  # above every level that Polygraphy logs at; what is critical is raised as well


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One tensor pair, or one layer with its codes; true where no code differs and every value is finite."""

    sqnr_db: float
    flip_rate: float = 0.0

    def __bool__(self) -> bool:
        return self.flip_rate == 0.0 and self.sqnr_db > 0.0


class FunctionRunner(BaseRunner):  # type: ignore[misc]  # polygraphy ships no types
    """A runner whose outputs come from a Python function of the feed."""

    def __init__(self, name: str, function: Callable[[Feed], Feed], feeds: Sequence[Feed]) -> None:
        super().__init__(name=name)
        self._function = function
        self._like = feeds[0]

    def get_input_metadata_impl(self) -> Any:
        metadata = TensorMetadata()
        for name, array in self._like.items():
            metadata.add(name, dtype=array.dtype, shape=array.shape)
        return metadata

    def infer_impl(self, feed_dict: Feed) -> Feed:
        started = time.perf_counter()
        outputs = self._function(feed_dict)
        self.inference_time = time.perf_counter() - started
        return OrderedDict(outputs)


def compare_with_onnx(
    model: Path | bytes,
    reference: Callable[[Feed], Feed],
    feeds: Sequence[Feed],
    *,
    layers: Sequence[str] | None = None,
    data_folder: Path | None = None,
) -> list[dict[str, Match]]:
    """Runs a model in ONNX Runtime and a function on the same feeds, and compares what they give.

    Args:
        model: a file, or a serialized model with its external data in ``data_folder``.
        reference: gives outputs of the same names.
        feeds: named inputs, one dictionary per run.
        layers: outputs ``L/codes`` and ``L/y`` of these layers are compared as one; None compares each
            output.
        data_folder: see ``model``.

    Returns:
        Per feed, a match by layer, or by output.

    Raises:
        ParityError: the model cannot be loaded, or an input or output does not fit it.
        MissingDependencyError: onnxruntime is not installed.
    """
    runners = [
        FunctionRunner("fake-quant torch", reference, feeds),
        OnnxrtRunner(lambda: reference_session(model, data_folder), name="onnxruntime"),
    ]
    compare = _by_output if layers is None else _ByLayer(layers)
    failures = (PolygraphyException, *ort_errors())
    with _quiet():
        try:
            results = Comparator.run(runners, data_loader=list(feeds), warm_up=0)
            accuracy = Comparator.compare_accuracy(results, compare_func=compare)
        except failures as error:
            raise ParityError(
                f"the ONNX file cannot run on the model's own inputs: {_short(error)}"
            ) from error
    return [dict(match) for match in accuracy[0]["fake-quant torch", "onnxruntime"]]


def _by_output(expected: Any, found: Any) -> OrderedDict[str, Match]:
    _check_names(expected, found)
    return OrderedDict((name, Match(sqnr_db=sqnr_db(array, found[name]))) for name, array in expected.items())


class _ByLayer:
    """One match per layer, named as the layer: of names that are outputs Polygraphy adds statistics."""

    def __init__(self, layers: Sequence[str]) -> None:
        self._layers = layers

    def __call__(self, expected: Any, found: Any) -> OrderedDict[str, Match]:
        _check_names(expected, found)
        return OrderedDict(
            (
                layer,
                Match(
                    sqnr_db=sqnr_db(expected[f"{layer}/y"], found[f"{layer}/y"]),
                    flip_rate=_flips(expected, found, f"{layer}/codes"),
                ),
            )
            for layer in self._layers
        )


def _flips(expected: Any, found: Any, name: str) -> float:
    """0 for a layer without codes: its input is not quantized."""
    return flip_rate(expected[name], found[name]) if name in expected else 0.0


def _check_names(expected: Any, found: Any) -> None:
    # Polygraphy's own functions fall back to similar names
    missing = [name for name in expected if name not in found]
    if missing:
        raise ParityError(f"the ONNX file has no output {missing[0]!r}; it has {', '.join(found)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Polygraphy's log, which goes to stdout, off it."""
    with G_LOGGER.verbosity(_SILENT):
        yield


def _short(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
