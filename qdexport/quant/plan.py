"""From the rules of a recipe to a decision for every Conv2d and Linear of a denoiser."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from qdexport.core.precision import LayerKind
from qdexport.core.recipe import ChannelScale, Recipe, Rule
from qdexport.core.spec import Granularity, LayerPlan
from qdexport.errors import RecipeError
from qdexport.models.denoiser import (
    Trace,
    input_groups,
    quantizable_layers,
    smallest_io,
    time_layers,
    trace_denoiser,
)
from qdexport.quant.blocks import check_blocks, weight_only_plan
from qdexport.quant.bos import bos_layers

__all__ = ["activation_keys", "average_weight_bits", "macs_share", "merge_weight_scales", "plan_layers"]

logger = logging.getLogger(__name__)


_FP_BITS = 16
_MERGED_BITS = 8
_WEIGHT_OBSERVERS = ("minmax", "mse")


def plan_layers(
    denoiser: nn.Module,
    recipe: Recipe,
    macs: Mapping[str, int] | None = None,
    splits: Mapping[str, tuple[int, ...]] | None = None,
    trace: Trace | None = None,
) -> list[LayerPlan]:
    """Decides for every Conv2d and Linear what quantizes it; the last rule that matches a layer wins.

    Layers of the time path become rows of a table and are marked folded, unless the recipe says
    ``time_embedding: keep``. Layers that read one tensor share its quantizer as long as their rules agree on
    it.

    Args:
        denoiser: the floating-point network.
        recipe: the rules.
        macs: multiply-accumulates per layer, for coverage.
        splits: input-channel groups with quantizers of their own, per convolution.
        trace: of the denoiser, when it is known already.

    Returns:
        One plan per layer, in the order of ``named_modules``; layers without a rule stay in floating point.

    Raises:
        RecipeError: a rule matches no layer, or asks for what a weight quantizer cannot do.
    """
    kinds: dict[str, LayerKind] = {
        name: "conv" if isinstance(module, nn.Conv2d) else "linear"
        for name, module in quantizable_layers(denoiser).items()
    }
    _check_rules(recipe.rules, kinds)
    trace = trace or trace_denoiser(denoiser, smallest_io(denoiser))
    folded = frozenset() if recipe.time_embedding == "keep" else time_layers(denoiser, trace=trace)
    bos = bos_layers(denoiser, trace) if recipe.bos == "constant" else frozenset()
    groups = _ActivationGroups(input_groups(denoiser, trace=trace))
    plans = []
    for name, kind in kinds.items():
        number, rule = _deciding_rule(recipe.rules, name, kind)
        runs = macs is None or macs.get(name, 0) > 0
        plan = LayerPlan(
            name=name,
            kind=kind,
            weight=None,
            activation=None,
            folded=name in folded,
            macs=(macs or {}).get(name, 0),
            idle=not runs,
            why=_reason(recipe, number, rule, name in folded) if runs else "does not run",
        )
        if rule is not None and rule.weight_only and runs and not plan.folded:
            layer = denoiser.get_parameter(f"{name}.weight")
            plan = weight_only_plan(plan, rule.weight, layer.shape[1])
        elif rule is not None and rule.activation is not None and runs and not plan.folded:
            check_blocks(plan, rule.weight, denoiser.get_parameter(f"{name}.weight").shape[1])
            plan = replace(
                plan,
                weight=rule.weight,
                activation=rule.activation,
                splits=tuple((splits or {}).get(name, ())),
                bos=name in bos,
                channel_scale=_is_scaled(recipe.channel_scale, name, kind),
            )
            plan = replace(plan, group=groups.of(plan))
        plans.append(plan)
    _warn_of_idle_rules(recipe, plans)
    if recipe.channel_scale is not None and not any(plan.channel_scale for plan in plans):
        raise RecipeError(
            f"channel_scale.match {', '.join(recipe.channel_scale.patterns)!r} matches no quantized layer"
        )
    return plans


def _is_scaled(settings: ChannelScale | None, name: str, kind: LayerKind) -> bool:
    return settings is not None and kind in settings.kinds and settings.chooses(name)


def merge_weight_scales(denoiser: nn.Module, plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """Gives 8-bit linear layers of one block that read one tensor one weight scale between them, where that helps.

    TensorRT-RTX multiplies a scale per output channel in a kernel behind the product, and one scale per tensor in the
    product itself, which then writes the body's type instead of FP32. Layers keep their scales where that would cost a
    kernel: where several read one tensor and one has a bias (the builder makes one kernel of scales, biases and parts
    of a merged product, but one for each part of biases alone, and merges the time embedding's layers of all blocks
    only with scales per channel), and in front of an upsampling, with which it no longer fuses the sum. Narrower
    weights keep them, too: they would lose too much.
    """
    readers = Counter(plan.group for plan in plans if plan.quantized)
    kept = {
        plan.group
        for plan in plans
        if plan.quantized and readers[plan.group] > 1 and denoiser.get_submodule(plan.name).bias is not None
    }
    upsampled = _before_upsampling(denoiser)
    return [
        replace(plan, weight=plan.weight.model_copy(update={"granularity": Granularity.PER_GROUP}))
        if plan.weight is not None
        and plan.quantized
        and plan.kind == "linear"
        and plan.weight.bits >= _MERGED_BITS
        and plan.weight.granularity is Granularity.PER_CHANNEL
        and plan.group not in kept
        and plan.name not in upsampled
        else plan
        for plan in plans
    ]


def _before_upsampling(denoiser: nn.Module) -> set[str]:
    """The linear layers that an upsampling reads, behind a residual sum: the last ones of a block's last attention."""
    found = set()
    for name, module in denoiser.named_modules():
        attentions = getattr(module, "attentions", None)
        if attentions is not None and getattr(module, "upsamplers", None) is not None:
            last = f"{name}.attentions.{len(attentions) - 1}"
            found |= {f"{last}.to_out.0", f"{last}.proj_out"}
    return found


def activation_keys(plan: LayerPlan) -> tuple[str, ...]:
    """Names of the activation ranges of a quantized layer: its group's, or one per part of a split layer."""
    if not plan.quantized:
        return ()
    if plan.splits:
        return tuple(f"{plan.group}#{index}" for index in range(len(plan.splits)))
    return (plan.group,)


def average_weight_bits(denoiser: nn.Module, plans: Iterable[LayerPlan]) -> float:
    """Bits per weight of all layers that are not folded, protected ones at their width, floating-point ones at 16."""
    bits = weights = 0
    for plan in plans:
        if plan.folded or plan.idle:
            continue
        count = denoiser.get_parameter(f"{plan.name}.weight").numel()
        bits += count * (plan.weight.bits if plan.quantizes_weight and plan.weight is not None else _FP_BITS)
        weights += count
    return bits / weights if weights else 0.0


def macs_share(plans: Iterable[LayerPlan]) -> float:
    """Share of all conv and linear multiply-accumulates that are done in a narrow type: not those of folded layers, nor
    of layers whose weight alone is quantized.
    """
    plans = list(plans)
    total = sum(plan.macs for plan in plans)
    return sum(plan.macs for plan in plans if plan.quantized) / total if total else 0.0


class _ActivationGroups:
    """Names of activation groups: one per input tensor and quantizer."""

    def __init__(self, inputs: Mapping[str, str]) -> None:
        self._inputs = inputs
        self._kinds: dict[str, list[tuple[object, ...]]] = {}

    def of(self, plan: LayerPlan) -> str:
        """The group of a layer; layers that disagree about the quantizer of one tensor get groups
        ``tensor@1``, ...
        """
        tensor = self._inputs.get(plan.name, plan.name)
        kinds = self._kinds.setdefault(tensor, [])
        kind = (plan.activation, plan.splits, plan.bos, plan.channel_scale)
        if kind not in kinds:
            kinds.append(kind)
        index = kinds.index(kind)
        return tensor if index == 0 else f"{tensor}@{index}"


def _deciding_rule(rules: Sequence[Rule], name: str, kind: str) -> tuple[int, Rule | None]:
    for number, rule in reversed(list(enumerate(rules, 1))):
        if rule.matches(name, kind):
            return number, rule
    return 0, None


def _check_rules(rules: Sequence[Rule], kinds: Mapping[str, LayerKind]) -> None:
    for number, rule in enumerate(rules, 1):
        if not any(rule.matches(name, kind) for name, kind in kinds.items()):
            raise RecipeError(f"{_label(number, rule)} matches no layer of the model{_hint(rule, kinds)}")
        if rule.weight is not None and rule.weight.observer.kind not in _WEIGHT_OBSERVERS:
            raise RecipeError(
                f"{_label(number, rule)}: weight.observer.kind is {rule.weight.observer.kind!r}; "
                f"weights have {' and '.join(_WEIGHT_OBSERVERS)}"
            )
        if rule.weight is not None and not rule.weight.signed:
            raise RecipeError(f"{_label(number, rule)}: weight.signed is false; weights have both signs, remove it")


def _hint(rule: Rule, kinds: Mapping[str, LayerKind]) -> str:
    other_kind = [name for name, kind in kinds.items() if rule.matches(name, "conv") or rule.matches(name, "linear")]
    if other_kind:
        return f"; {other_kind[0]!r} is a {kinds[other_kind[0]]}, but kinds is {list(rule.kinds)}"
    wanted = " ".join(pattern.removeprefix("re:") for pattern in rule.patterns)
    near = difflib.get_close_matches(wanted, list(kinds), n=3, cutoff=0.4)
    if not near:
        # a glob with much left open resembles no whole path; its last fixed word may resemble a module's name
        words = sorted({part for name in kinds for part in name.split(".") if not part.isdigit()})
        last = [word for word in wanted.replace("*", ".").replace("\\", ".").split(".") if word]
        near = difflib.get_close_matches(last[-1], words, n=3) if last else []
    return f"; did you mean {', '.join(near)}?" if near else f"; layers are named like {', '.join(list(kinds)[:3])}"


def _label(number: int, rule: Rule) -> str:
    return f"rule {number} (match: {', '.join(rule.patterns)})"


def _reason(recipe: Recipe, number: int, rule: Rule | None, folded: bool) -> str:
    if folded:
        return f"depends on the timestep alone (time_embedding: {recipe.time_embedding})"
    return "no rule matches" if rule is None else _label(number, rule)


def _warn_of_idle_rules(recipe: Recipe, plans: Sequence[LayerPlan]) -> None:
    for number, rule in enumerate(recipe.rules, 1):
        matched = [plan for plan in plans if rule.matches(plan.name, plan.kind)]
        if all(plan.folded for plan in matched):
            logger.warning(
                "%s matches only layers that become a table of the timestep; "
                "`time_embedding: keep` would quantize them",
                _label(number, rule),
            )
