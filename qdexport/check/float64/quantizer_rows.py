"""Quantizers with a row per step: which row every timestep is given, and every row, executed with its layer on a few
random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor

from qdexport.check.float64.compare import distance
from qdexport.check.float64.graph import Float64Graph
from qdexport.check.float64.model import Float64, product_in_float64
from qdexport.check.float64.network import Float64Network, stored_codes
from qdexport.check.float64.ops import UnsupportedError
from qdexport.check.float64.table_check import TableCheck
from qdexport.core.network_facts import NetworkFacts
from qdexport.core.spec import LayerPlan
from qdexport.errors import ParityError
from qdexport.graph.dialect import STEP_ROWS
from qdexport.quant.attach import QuantizedModel
from qdexport.quant.modules import ActivationQuantizer, quantizer_pairs
from qdexport.quant.softmax import SoftmaxQuantizer

__all__ = ["check_layer_rows", "check_softmax_rows", "check_step_lookup"]

_SEED: Final = 20240611


def check_step_lookup(
    found: TableCheck, run: Float64Graph, network: Float64Network, model: QuantizedModel, facts: NetworkFacts
) -> None:
    """The row of activation scales that every timestep is given."""
    rows = _row_values(network.graph)
    lookup: Any = model.denoiser.get_submodule(STEP_ROWS)
    steps: list[float] = list(range(facts.training_steps))
    if lookup.fractions:
        ordered = sorted(float(step) for step in lookup.timesteps)
        steps = [*ordered, *(a + share * (b - a) for a, b in pairwise(ordered) for share in (0.45, 0.55))]
    wrong = []
    for some in _together(run, network, rows, steps):
        sample = torch.cat([network.timestep(step) for step in some])
        # FLUX's denoiser is called with a thousandth of the scheduler's timestep
        lookup(sample / lookup.unit if lookup.unit != 1.0 else sample)
        expected = torch.zeros(0, dtype=torch.int64) if model.context.row is None else model.context.row
        run.start({"timestep": sample})
        for value in rows:
            stored = run.value(value).reshape(-1)
            if stored.shape != expected.shape:
                wrong.append(f"timestep {some[0]:g} is given {stored.numel()} rows")
                continue
            wrong += [
                f"timestep {some[index]:g} is given row {int(stored[index])}, not {int(expected[index])}"
                for index in (stored != expected).nonzero().reshape(-1).tolist()
            ]
    found.rows["timesteps of activation rows"] = len(steps)
    if not rows:
        found.notes.append("the lookup of activation rows was not found in the file")
    found.wrong("the lookup of activation rows", wrong)


def _together(
    run: Float64Graph, network: Float64Network, rows: Sequence[ir.Value], steps: Sequence[float]
) -> list[list[float]]:
    """The timesteps in parts that the lookup takes at once: all of them, where it gives a row for each."""
    if not network.timestep(0).is_floating_point():
        run.start({"timestep": torch.cat([network.timestep(step) for step in steps])})
        if all(run.value(value).numel() == len(steps) for value in rows):
            return [list(steps)]
    return [[step] for step in steps]


def _row_values(graph: ir.Model) -> list[ir.Value]:
    """The rows that tables of quantizers are read at."""
    found: dict[ir.Value, None] = {}
    for node in graph.graph:
        module = (node.name or "").partition("/")[0]
        if node.op_type == "Gather" and module in {"step_table", "softmax_table"} and node.inputs[1] is not None:
            found.setdefault(node.inputs[1])
    return list(found)


def check_layer_rows(found: TableCheck, network: Float64Network, model: QuantizedModel) -> None:
    """Every layer with a row per step, at every row, on a few random numbers."""
    source = torch.Generator().manual_seed(_SEED)
    wrong: list[str] = []
    count = 0
    for plan in model.plans:
        if not plan.quantizes_weight:
            continue
        layer: Any = model.denoiser.get_submodule(plan.name)
        for index, (part, (quantizer, _)) in enumerate(zip(plan.parts, quantizer_pairs(layer), strict=True)):
            if quantizer is None or quantizer.scale.shape[0] == 1:
                continue
            rows = quantizer.scale.shape[0]
            bad = _part_rows(network, model, plan, index, rows, source)
            count += rows
            try:
                wrong += [f"{part} at row {row} (timestep {model.timesteps[row]:g}): {what}" for row, what in bad]
            except UnsupportedError:
                raise
            except ParityError as error:
                wrong.append(f"{part} cannot be executed ({error})")
    found.rows["rows of layers"] = count
    found.wrong("rows of activation scales, zero points or corrections differ", wrong)


def _part_rows(
    network: Float64Network, model: QuantizedModel, plan: LayerPlan, index: int, rows: int, source: torch.Generator
) -> Iterator[tuple[int, str]]:
    layer: Any = model.denoiser.get_submodule(plan.name)
    part = plan.parts[index]
    probe = network.layers[part]
    quantizer, _ = quantizer_pairs(layer)[index]
    if quantizer is None:
        return
    kernel, run = layer.kernels()[index], network.graph_alone()
    held = probe.node.inputs[1]
    weight = None
    for row in range(rows):
        x = _numbers(layer, kernel, quantizer, row, source)
        model.context.row = torch.tensor([row])
        expected = network.stored_output(part, product_in_float64(layer, index, x, kernel))
        codes = network.laid_out(part, stored_codes(quantizer, x, probe.pads), carried=False)
        run.start({"timestep": network.timestep(model.timesteps[row])})
        if held is not None:
            weight = run.value(held) if weight is None else weight
            run.force(held, weight)
        run.force(probe.x, network.laid_out(part, x, carried=False))
        stored = codes if probe.codes is None else run.value(probe.codes)
        if not torch.equal(stored, codes):
            share = 1.0 if stored.shape != codes.shape else float((stored != codes).double().mean())
            yield row, f"{share:.2g} of the codes differ"
            continue
        apart = distance(expected, run.value(probe.y))
        if not apart.worst <= network.tolerances.tensor:
            yield row, f"the output differs ({apart.sqnr_db:.1f} dB)"


def _numbers(layer: Any, kernel: Tensor, quantizer: ActivationQuantizer, row: int, source: torch.Generator) -> Tensor:
    """Random numbers that reach both ends of a quantizer's range: an input of the layer of the least size."""
    spec = quantizer.spec
    scale, zero = float(quantizer.scale[row]), float(quantizer.zero_point[row])
    low, high = (spec.qmin - zero) * scale, (spec.qmax - zero) * scale
    margin = 0.1 * (high - low)
    if isinstance(layer, torch.nn.Conv2d):
        sizes = [d * (k - 1) + 1 for d, k in zip(layer.dilation, kernel.shape[2:], strict=True)]
        shape = [1, kernel.shape[1] * layer.groups, *sizes]
    else:
        shape = [1, 1, kernel.shape[1]]
    numbers = torch.rand(shape, generator=source, dtype=torch.float64)
    return numbers.mul(high - low + 2 * margin).add(low - margin)


def check_softmax_rows(found: TableCheck, network: Float64Network, model: QuantizedModel) -> None:
    """Every quantizer behind softmax, at every row."""
    source = torch.Generator().manual_seed(_SEED)
    wrong, count = [], 0
    for name, module in model.denoiser.named_modules():
        if not isinstance(module, SoftmaxQuantizer) or module.scale.shape[0] == 1:
            continue
        probe, run = network.probes[name], network.graph_alone()
        # probabilities over all powers of two that a code of 8 bits has
        numbers = torch.exp2(-20 * torch.rand([1, 1, 8, 32], generator=source, dtype=torch.float64))
        for row in range(module.scale.shape[0]):
            model.context.row = torch.tensor([row])
            with torch.no_grad(), Float64():
                expected = module(numbers)
            run.start({"timestep": network.timestep(model.timesteps[row])})
            run.force(probe.x, numbers)
            apart = distance(expected, run.value(probe.y))
            count += 1
            if not apart.worst <= network.tolerances.tensor:
                wrong.append(f"{name} at row {row} (timestep {model.timesteps[row]:g}): {apart.sqnr_db:.1f} dB")
    if count:
        found.rows["rows behind softmax"] = count
    found.wrong("rows of quantizers behind softmax differ", wrong)
