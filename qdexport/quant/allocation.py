"""Bit allocation: sensitivities, integer programs, and the plan of the scan whose images are nearest (MixDQ)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qdexport.core.bit_plan import FLOAT_BITS, BitPlan, LayerBits, apply_bit_plan
from qdexport.core.recipe import BitAllocation, Recipe
from qdexport.core.spec import LayerPlan
from qdexport.core.target import Target
from qdexport.errors import ModelError, RecipeError
from qdexport.models.loaded import LoadedModel
from qdexport.quant.allocation_costs import CostModel, activation_problem, weight_problem
from qdexport.quant.candidates import compare_plans, spread
from qdexport.quant.integer_program import BAND_BITS, Problem, ScanPoint, reachable, scan
from qdexport.quant.layer_groups import chosen_layers, layer_shapes
from qdexport.quant.partial import QuantizedParts, RangeSource
from qdexport.quant.result_cache import SweepRun
from qdexport.quant.sensitivity import measure_sensitivity
from qdexport.quant.sensitivity_table import Group, Part, SensitivityTable

__all__ = ["Allocation", "ScannedPlan", "allocate", "allocate_bits", "checked_settings"]

logger = logging.getLogger(__name__)

# methods.md 2.1(d)
_WEIGHT_SPLITS = tuple(np.linspace(0.46, 1.36, 10).tolist())
_ACTIVATION_SPLITS = tuple(np.linspace(0.94, 1.09, 20).tolist())
_LEVELS = 10
_LEVEL_SPAN_BITS = 0.3
_FULL_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannedPlan:
    """One plan of a scan.

    Attributes:
        part: weights or activations.
        level: average or share that was asked for.
        split: budget of the content group over that of the quality group.
        average_bits: of the plan, by the sizes of all layers.
        scores: summed sensitivities of the two groups.
        mse: pixel error to the floating-point images; None when it was not compared, or an image was not finite.
        chosen: whether it was taken.
    """

    part: Part
    level: float
    split: float
    average_bits: float
    scores: Mapping[Group, float]
    mse: float | None
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A bit plan, and how it was found.

    Attributes:
        plan: the widths.
        scanned: all plans of the scans, weights first.
        sensitivity: what they were made from.
    """

    plan: BitPlan
    scanned: tuple[ScannedPlan, ...]
    sensitivity: SensitivityTable


def allocate_bits(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    observations: RangeSource,
    target: Target,
    run: SweepRun,
) -> BitPlan:
    """The widths that :func:`allocate` finds; arguments and errors as there."""
    return allocate(loaded, plans, recipe, observations, target, run).plan


def allocate(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    observations: RangeSource,
    target: Target,
    run: SweepRun,
) -> Allocation:
    """Chooses a width for every layer.

    Sensitivities are measured (or found again below ``run.folder``); the most sensitive layers stay in floating point
    where the recipe asks for it; weights are allocated first, with activations unquantized, then activations on top.
    Each scan's plans are compared on sampled images, and the nearest to the floating-point images is taken.

    Args:
        loaded: the floating-point model.
        plans: what the rules decided, with multiply-accumulates.
        recipe: ``bit_allocation`` says what is wanted; its patterns ``protect`` keep the rules' widths.
        observations: ranges of the floating-point model for any widths (``ScaledRanges`` adds channel scales).
        target: stored bytes and predicted times are this one's.
        run: where results are kept, and who computes.

    Raises:
        RecipeError: the recipe asks for no allocation, or for one that no plan can have; the message says what is
            within reach.
        ModelError: the model cannot be sampled.
    """
    settings = checked_settings(recipe)
    table = measure_sensitivity(loaded, plans, recipe, observations, run, _needed_parts(settings))
    search = _Search(loaded, plans, recipe, observations, target, run)
    protected = _in_floating_point(plans, settings, table)
    widths = {plan.name: _rule_widths(plan, protected) for plan in plans if plan.quantized}
    fixed = chosen_layers(settings.protect, plans, "bit_allocation.protect") | frozenset(protected)
    scanned: list[ScannedPlan] = []
    if settings.weight_target is not None:
        scanned += search.weights(table, widths, fixed, settings.weight_target)
    if settings.activation_target is not None:
        scanned += search.activations(table, widths, fixed, settings.activation_target)
    layers = {
        name: LayerBits(
            weight=weight, activation=activation, why=_why(name, (weight, activation), table, protected, fixed)
        )
        for name, (weight, activation) in widths.items()
    }
    plan = BitPlan(
        model=loaded.name,
        recipe=recipe.name,
        objective=settings.objective,
        target=target.name,
        weight_target=settings.weight_target,
        activation_target=settings.activation_target,
        average_weight_bits=round(search.costs.average_weight_bits(widths), 4),
        average_activation_bits=round(search.costs.average_activation_bits(widths), 4),
        layers=layers,
    )
    return Allocation(plan=plan, scanned=tuple(scanned), sensitivity=table)


def checked_settings(recipe: Recipe) -> BitAllocation:
    """What a recipe says about bit allocation.

    Raises:
        RecipeError: it asks for none.
    """
    settings = recipe.bit_allocation
    if settings is None or (settings.weight_target is None and settings.activation_target is None):
        raise RecipeError(
            "bit allocation needs bit_allocation.weight_target or bit_allocation.activation_target in the recipe "
            "(or --target-bits)"
        )
    return settings


Widths = dict[str, tuple[int, int]]


class _Search:
    """The two scans, each followed by a comparison on images."""

    def __init__(
        self,
        loaded: LoadedModel,
        plans: Sequence[LayerPlan],
        recipe: Recipe,
        observations: RangeSource,
        target: Target,
        run: SweepRun,
    ) -> None:
        self.loaded, self.plans, self.recipe, self.observations, self.run = loaded, plans, recipe, observations, run
        self.settings = recipe.bit_allocation or BitAllocation()
        body_bytes = 4 if recipe.body == "fp32" or (recipe.body == "auto" and loaded.weights_dtype == "fp32") else 2
        self.costs = CostModel(
            plans=tuple(plans),
            shapes=layer_shapes(loaded.denoiser, plans),
            content=self.settings.content,
            target=target,
            capabilities=recipe.compute_capabilities,
            int4=target.int4_linear and recipe.int4_storage == "auto",
            body_bytes=body_bytes,
        )

    def weights(
        self, table: SensitivityTable, widths: Widths, fixed: frozenset[str], level: float
    ) -> list[ScannedPlan]:
        """Scans the weights' widths and enters the best plan into ``widths``."""
        objective = self.settings.objective
        problem = weight_problem(self.costs, table, widths, fixed, objective)
        span = _LEVEL_SPAN_BITS if objective == "average_bits" else _LEVEL_SPAN_BITS / _FULL_BITS
        # an upper bound on both groups may leave no room at all for other splits than 1
        splits = _WEIGHT_SPLITS if problem.band else (1.0, *_WEIGHT_SPLITS)
        points = self._scan(problem, (level, span), splits, "weight")
        proposals: list[Widths] = [
            {name: (point.widths[name], activation) for name, (_, activation) in widths.items()} for point in points
        ]
        averages = [self.costs.average_weight_bits(proposal) for proposal in proposals]
        errors, best = self._best(proposals, "weight")
        widths.update(proposals[best])
        return _scanned("weight", points, averages, errors, best)

    def activations(
        self, table: SensitivityTable, widths: Widths, fixed: frozenset[str], level: float
    ) -> list[ScannedPlan]:
        """Scans the activations' widths on top of the weights' and enters the best plan into ``widths``."""
        problem = activation_problem(self.costs, table, widths, fixed)
        points = self._scan(problem, (level, _LEVEL_SPAN_BITS), _ACTIVATION_SPLITS, "activation")
        group_of_layer = {plan.name: plan.group for plan in self.plans if plan.quantized}
        proposals: list[Widths] = [
            {
                name: pair if pair[1] == FLOAT_BITS else (pair[0], point.widths[group_of_layer[name]])
                for name, pair in widths.items()
            }
            for point in points
        ]
        averages = [self.costs.average_activation_bits(proposal) for proposal in proposals]
        errors, best = self._best(proposals, "both")
        widths.update(proposals[best])
        return _scanned("activation", points, averages, errors, best)

    def _scan(
        self, problem: Problem, wanted: tuple[float, float], splits: Sequence[float], part: Part
    ) -> list[ScanPoint]:
        level, span = wanted
        levels = np.linspace(level - span, level, _LEVELS).tolist()
        with self.run.progress.track(len(levels) * len(splits), f"allocating {part} bits") as advance:
            points = scan(problem, levels, splits, lambda: advance(1))
        if not points:
            low, high = reachable(problem)
            unit = f"bits on average (within {BAND_BITS})" if problem.band else "of the cost at 8 bits"
            raise RecipeError(
                f"no plan of {part} widths has {level:g} {unit}: with the recipe's widths and protected layers "
                f"{low:.3f} to {high:.3f} are within reach; change bit_allocation.{part}_target, its widths, or what "
                "is protected"
            )
        return sorted(points, key=lambda point: (point.level, point.split))

    def _best(self, proposals: Sequence[Widths], parts: QuantizedParts) -> tuple[dict[int, float | None], int]:
        """Errors of the compared proposals by index, and the index of the least."""
        compared = spread(len(proposals), self.settings.candidates)
        if len(proposals) == 1:
            return {}, 0
        candidates = [self._applied(proposals[index]) for index in compared]
        errors = compare_plans(self.loaded, candidates, parts, self.recipe, self.observations, self.run)
        found = dict(zip(compared, errors, strict=True))
        best = min(compared, key=lambda index: math.inf if (mse := found[index]) is None else mse)
        if found[best] is None:
            raise ModelError("every plan of the scan makes images that are not finite; ask for more bits")
        logger.info("%s: plan %d of %d has the least pixel error, %.3g", parts, best + 1, len(proposals), found[best])
        return found, best

    def _applied(self, widths: Widths) -> list[LayerPlan]:
        layers = {
            name: LayerBits(weight=weight, activation=activation) for name, (weight, activation) in widths.items()
        }
        plan = BitPlan(
            model=self.loaded.name,
            recipe=self.recipe.name,
            average_weight_bits=0.0,
            average_activation_bits=0.0,
            layers=layers,
        )
        # the reason is no part of what is measured
        return [replace(item, why="") for item in apply_bit_plan(self.plans, plan)]


def _needed_parts(settings: BitAllocation) -> list[Part]:
    parts: list[Part] = ["weight"] if settings.weight_target is not None else []
    if settings.activation_target is not None or settings.protect_fp_share > 0:
        parts.append("activation")
    return parts


def _rule_widths(plan: LayerPlan, protected: Mapping[str, str]) -> tuple[int, int]:
    if plan.name in protected or plan.weight is None or plan.activation is None:
        return FLOAT_BITS, FLOAT_BITS
    return plan.weight.bits, plan.activation.bits


def _in_floating_point(plans: Sequence[LayerPlan], settings: BitAllocation, table: SensitivityTable) -> dict[str, str]:
    """The layers with the most sensitive activations of each group by its own metric, and why (methods.md 2.1(f)).

    Layers that share one activation are taken together; a set of them that is larger than what is left of the share
    is passed over.
    """
    protected: dict[str, str] = {}
    if settings.protect_fp_share == 0:
        return protected
    kept = chosen_layers(settings.protect, plans, "bit_allocation.protect")
    bits = max(settings.activation_bits)
    groups: tuple[Group, ...] = ("content", "quality")
    for group in groups:
        entries = sorted(table.of("activation", group), key=lambda entry: entry.at(bits))
        left = math.ceil(settings.protect_fp_share * sum(len(entry.layers) for entry in entries))
        for entry in entries:
            names = [name for name in entry.layers if name not in kept]
            if len(names) > left:
                logger.info("%s: %d layers share it, more than %d may stay in FP", entry.name, len(names), left)
                continue
            left -= len(names)
            reason = f"protected: activation {_metric(entry.metric, entry.at(bits))} at {bits} bits"
            protected.update(dict.fromkeys(names, reason))
            if left == 0:
                break
    return protected


def _why(
    name: str,
    bits: tuple[int, int],
    table: SensitivityTable,
    protected: Mapping[str, str],
    fixed: frozenset[str],
) -> str:
    if name in protected:
        return protected[name]
    if name in fixed:
        return "protected: keeps the widths of its rule"
    told = []
    for part, width in (("weight", bits[0]), ("activation", bits[1])):
        entries = [entry for entry in table.entries if entry.part == part and name in entry.layers]
        told += [f"{part} {_metric(entry.metric, entry.values[width])}" for entry in entries if width in entry.values]
    return f"{_group(name, table)}: {', '.join(told)}" if told else "width of its rule"


def _group(name: str, table: SensitivityTable) -> Group:
    return next(entry.group for entry in table.entries if name in entry.layers)


def _metric(metric: str, value: float) -> str:
    return f"SSIM {value:.4f}" if metric == "ssim" else f"SQNR {value:.1f} dB"


def _scanned(
    part: Part,
    points: Sequence[ScanPoint],
    averages: Sequence[float],
    errors: Mapping[int, float | None],
    best: int,
) -> list[ScannedPlan]:
    return [
        ScannedPlan(
            part=part,
            level=point.level,
            split=point.split,
            average_bits=averages[index],
            scores=point.scores,
            mse=errors.get(index),
            chosen=index == best,
        )
        for index, point in enumerate(points)
    ]
