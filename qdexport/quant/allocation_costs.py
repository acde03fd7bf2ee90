"""What widths cost: bits per weight, stored bytes, predicted time, bits per activation value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qdexport.core.bit_plan import FLOAT_BITS
from qdexport.core.cost_model import LayerShape, capabilities_of, predicted_seconds, stored_bytes
from qdexport.core.spec import LayerPlan, stores_int4
from qdexport.core.target import Target
from qdexport.quant.integer_program import Choice, Problem
from qdexport.quant.layer_groups import group_of
from qdexport.quant.sensitivity_table import Group, LayerSensitivity, SensitivityTable

__all__ = ["CostModel", "Objective", "Widths", "activation_problem", "weight_problem"]

Objective = Literal["average_bits", "stored_bytes", "predicted_time"]
Widths = Mapping[str, tuple[int, int]]

_FULL_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Sizes of a model's layers on a target.

    Attributes:
        plans: what the rules decided.
        shapes: of all layers that are there at run time.
        content: patterns of content layers.
        target: where the model will run.
        capabilities: what the recipe asks for; None: the target's default.
        int4: whether linear weights of up to 4 bits are stored as INT4.
        body_bytes: of a floating-point number.
    """

    plans: tuple[LayerPlan, ...]
    shapes: Mapping[str, LayerShape]
    content: tuple[str, ...]
    target: Target
    capabilities: tuple[str, ...] | None
    int4: bool
    body_bytes: int

    def average_weight_bits(self, widths: Widths) -> float:
        """Bits per weight over all layers at run time; those in floating point count 16."""
        total = sum(shape.weights for shape in self.shapes.values())
        return sum(shape.weights * _weight_bits(name, widths) for name, shape in self.shapes.items()) / total

    def average_activation_bits(self, widths: Widths) -> float:
        """Bits per value that layers read; a tensor of several layers counts once, in floating point with 16."""
        sizes = self.tensors()
        bits: dict[str, int] = {}
        for plan in self.plans:
            if plan.name in self.shapes:
                width = widths[plan.name][1] if plan.name in widths else FLOAT_BITS
                # of a tensor with a floating-point and a quantized reader, the quantizer counts
                tensor = plan.group or plan.name
                bits[tensor] = min(width, bits.get(tensor, FLOAT_BITS))
        return sum(size * bits[tensor] for tensor, size in sizes.items()) / sum(sizes.values())

    def tensors(self) -> dict[str, int]:
        """Elements of the tensors that layers read, by activation group, or by layer where none is quantized."""
        sizes: dict[str, int] = {}
        for plan in self.plans:
            if plan.name in self.shapes:
                sizes[plan.group or plan.name] = self.shapes[plan.name].inputs
        return sizes

    def weight_costs(self, plan: LayerPlan, bits: int, objective: Objective) -> tuple[float, ...]:
        """What a layer's weight costs: bits, bytes, or seconds per compute capability."""
        shape = self.shapes[plan.name]
        if objective == "average_bits":
            return (float(bits * shape.weights),)
        int4 = self.int4 and bits < FLOAT_BITS and _stored_as_int4(plan, bits)
        if objective == "stored_bytes":
            return (float(stored_bytes(shape, bits, int4_linear=int4, body_bytes=self.body_bytes)),)
        return tuple(
            predicted_seconds(shape, bits, capability, int4_linear=int4, body_bytes=self.body_bytes)
            for capability in capabilities_of(self.target, self.capabilities)
        )


def weight_problem(
    costs: CostModel, table: SensitivityTable, widths: Widths, fixed: frozenset[str], objective: Objective
) -> Problem:
    """The integer programs of the weights.

    Costs are in the objective's unit: bits of a group's average weight; or a share of what the group's bytes or time
    would be with all its layers at 8 bits.

    Args:
        costs: of the model.
        table: sensitivities of weights.
        widths: of all quantized layers, by the rules or protected.
        fixed: layers that keep these widths; they count in the budget.
        objective: what is held within the budget.
    """
    groups: dict[Group, list[Choice]] = {"content": [], "quality": []}
    full: dict[Group, float] = {"content": 0.0, "quality": 0.0}
    totals = {group: _totals(costs, group, objective) for group in groups}
    for plan in costs.plans:
        if plan.name not in costs.shapes:
            continue
        group = group_of([plan.name], costs.content)
        scores = _scores(plan.name, table, widths, fixed)
        divided = {
            bits: tuple(
                cost / total
                for cost, total in zip(costs.weight_costs(plan, bits, objective), totals[group], strict=True)
            )
            for bits in scores
        }
        groups[group].append(Choice(name=plan.name, scores=scores, costs=divided))
        full[group] += costs.weight_costs(plan, _FULL_BITS, objective)[0]
    return _problem(groups, full, band=objective == "average_bits")


def activation_problem(costs: CostModel, table: SensitivityTable, widths: Widths, fixed: frozenset[str]) -> Problem:
    """The integer programs of the activations: bits of a group's average value. Arguments as for weights."""
    sizes = costs.tensors()
    entries = {entry.name: entry for entry in table.of("activation")}
    members: dict[str, list[LayerPlan]] = {}
    for plan in costs.plans:
        if plan.name in costs.shapes:
            members.setdefault(plan.group or plan.name, []).append(plan)
    groups: dict[Group, list[Choice]] = {"content": [], "quality": []}
    full: dict[Group, float] = {"content": 0.0, "quality": 0.0}
    totals: dict[Group, float] = {"content": 0.0, "quality": 0.0}
    scores_by_tensor = {}
    for tensor, plans in members.items():
        group = group_of([plan.name for plan in plans], costs.content)
        totals[group] += sizes[tensor]
        scores_by_tensor[tensor] = (group, _tensor_scores(plans, entries.get(tensor), widths, fixed))
    for tensor, (group, scores) in scores_by_tensor.items():
        share = sizes[tensor] / totals[group]
        choice = Choice(name=tensor, scores=scores, costs={bits: (bits * share,) for bits in scores})
        groups[group].append(choice)
        full[group] += sizes[tensor]
    return _problem(groups, full, band=True)


def _problem(groups: Mapping[Group, Sequence[Choice]], full: Mapping[Group, float], *, band: bool) -> Problem:
    ratio = full["content"] / full["quality"] if full["quality"] else 0.0
    return Problem(content=groups["content"], quality=groups["quality"], ratio=ratio, band=band)


def _totals(costs: CostModel, group: Group, objective: Objective) -> tuple[float, ...]:
    plans = [
        plan for plan in costs.plans if plan.name in costs.shapes and group_of([plan.name], costs.content) == group
    ]
    if objective == "average_bits":
        return (float(sum(costs.shapes[plan.name].weights for plan in plans)),)
    rows = [costs.weight_costs(plan, _FULL_BITS, objective) for plan in plans]
    return tuple(map(sum, zip(*rows, strict=True)))


def _scores(name: str, table: SensitivityTable, widths: Widths, fixed: frozenset[str]) -> dict[int, float]:
    if name not in widths or name in fixed:
        # no choice, and no part in the sum that is compared
        return {_weight_bits(name, widths): 0.0}
    return dict(table.of_layer("weight", name).values)


def _tensor_scores(
    plans: Sequence[LayerPlan], entry: LayerSensitivity | None, widths: Widths, fixed: frozenset[str]
) -> dict[int, float]:
    quantized = [plan.name for plan in plans if plan.name in widths and widths[plan.name][1] != FLOAT_BITS]
    if not quantized or entry is None:
        return {FLOAT_BITS: 0.0}
    kept = [name for name in quantized if name in fixed]
    if kept:  # one quantizer serves all readers
        return {widths[kept[0]][1]: 0.0}
    return dict(entry.values)


def _weight_bits(name: str, widths: Widths) -> int:
    return widths[name][0] if name in widths else FLOAT_BITS


def _stored_as_int4(plan: LayerPlan, bits: int) -> bool:
    if plan.weight is None:
        return False
    return stores_int4(replace(plan, weight=plan.weight.model_copy(update={"bits": bits})), int4_linear=True)
