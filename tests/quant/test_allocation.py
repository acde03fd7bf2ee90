"""Bit allocation: the integer program against brute force, budgets, protection, and plans compared on images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdexport.core.bit_plan import BitPlan, apply_bit_plan
from qdexport.core.cost_model import predicted_seconds, stored_bytes
from qdexport.core.recipe import BitAllocation, Recipe
from qdexport.core.spec import LayerPlan
from qdexport.core.target import TARGETS
from qdexport.errors import ModelError, RecipeError
from qdexport.models.loaded import LoadedModel
from qdexport.pipeline.quantize import plan_model
from qdexport.quant import allocation
from qdexport.quant.allocation import Allocation, allocate, allocate_bits
from qdexport.quant.allocation_costs import CostModel, Objective, activation_problem, weight_problem
from qdexport.quant.calibrate import Observations, observe
from qdexport.quant.candidates import compare_plans, spread
from qdexport.quant.integer_program import (
    BAND_BITS,
    Budget,
    Choice,
    Problem,
    reachable,
    scan,
    solve,
    split_budget,
)
from qdexport.quant.layer_groups import group_of, layer_shapes
from qdexport.quant.result_cache import SweepRun
from qdexport.quant.sensitivity_table import METRIC_OF_GROUP, LayerSensitivity, Part, SensitivityTable

RTX = TARGETS["tensorrt-rtx"]
CONTENT = BitAllocation().content
TEXT = "encoder_hidden_states"


def choices(seed: int, count: int, widths: Sequence[int] = (2, 4, 8)) -> list[Choice]:
    source = np.random.default_rng(seed)
    sizes = source.uniform(0.2, 1.0, count)
    sizes /= sizes.sum()
    return [
        Choice(
            name=f"layer{index}",
            scores=dict(zip(widths, np.sort(source.uniform(0, 60, len(widths))).tolist(), strict=True)),
            costs={bits: (bits * float(size),) for bits in widths},
        )
        for index, size in enumerate(sizes)
    ]


def brute_force(items: Sequence[Choice], budget: Budget) -> float | None:
    """The largest score within the budget, over all assignments."""
    best = None
    for widths in itertools.product(*(list(item.scores) for item in items)):
        rows = zip(*(item.costs[bits] for item, bits in zip(items, widths, strict=True)), strict=True)
        if all(budget.low <= sum(row) <= budget.high for row in rows):
            score = sum(item.scores[bits] for item, bits in zip(items, widths, strict=True))
            best = score if best is None else max(best, score)
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("low", "high"), [(3.9, 4.1), (-math.inf, 3.0), (5.0, math.inf)])
def test_the_program_finds_what_brute_force_finds(seed: int, low: float, high: float) -> None:
    items, budget = choices(seed, 7), Budget(low=low, high=high)
    found, best = solve(items, budget), brute_force(items, budget)
    assert (found is None) == (best is None)
    if found is not None:
        assert best is not None
        score = sum(item.scores[found[item.name]] for item in items)
        # the gap that HiGHS may leave: 1e-4 of the lost score, which is at most 60 per layer
        assert score == pytest.approx(best, abs=1e-4 * 60 * 7)
        assert low - 1e-6 <= sum(item.costs[found[item.name]][0] for item in items) <= high + 1e-6


def test_several_budget_rows_hold_at_once() -> None:
    source = np.random.default_rng(3)
    items = [
        replace(item, costs={bits: (cost[0], cost[0] * source.uniform(0.5, 2)) for bits, cost in item.costs.items()})
        for item in choices(3, 6)
    ]
    budget = Budget(low=-math.inf, high=4.0)
    found, best = solve(items, budget), brute_force(items, budget)
    assert found is not None
    assert sum(item.scores[found[item.name]] for item in items) == pytest.approx(best, abs=1e-4 * 60 * 6)
    assert all(sum(item.costs[found[item.name]][row] for item in items) <= 4.0 + 1e-6 for row in range(2))


def test_nothing_within_the_budget() -> None:
    assert solve(choices(0, 3), Budget(low=8.1, high=8.2)) is None
    assert solve([], Budget(low=8.1, high=8.2)) == {}


def test_a_fixed_layer_counts_in_the_budget() -> None:
    size = 0.25
    fixed = Choice(name="fixed", scores={8: 0.0}, costs={8: (8 * size,)})
    others = [
        replace(item, costs={bits: (cost[0] * (1 - size),) for bits, cost in item.costs.items()})
        for item in choices(1, 12)
    ]
    found = solve([fixed, *others], Budget(low=3.98, high=4.02))
    assert found is not None
    assert found["fixed"] == 8
    rest = sum(item.costs[found[item.name]][0] for item in others)
    assert 3.98 <= rest + 2.0 <= 4.02


def test_the_split_keeps_the_mean() -> None:
    for ratio, split in itertools.product((0.3, 2.242), (0.46, 1.0, 1.36)):
        content, quality = split_budget(4.0, ratio, split)
        assert content == pytest.approx(split * quality)
        assert (ratio * content + quality) / (1 + ratio) == pytest.approx(4.0)


def test_every_point_of_the_scan_keeps_the_band_of_both_groups() -> None:
    """methods.md 6.10."""
    problem = Problem(content=choices(5, 40), quality=choices(6, 30, (4, 8)), ratio=0.8, band=True)
    problem = replace(problem, quality=[replace(item, name=f"q{item.name}") for item in problem.quality])
    points = scan(problem, [3.7, 3.9, 4.0], [0.46, 0.56, 0.66, 0.86])
    assert len(points) >= 4
    for point in points:
        budgets = split_budget(point.level, problem.ratio, point.split)
        for group, budget in zip((problem.content, problem.quality), budgets, strict=True):
            average = sum(item.costs[point.widths[item.name]][0] for item in group)
            assert abs(average - budget) <= BAND_BITS


def test_one_group_alone_gets_the_whole_budget() -> None:
    problem = Problem(content=[], quality=choices(2, 30, (4, 8)), ratio=0.0, band=True)
    (point,) = scan(problem, [5.0], [0.5, 1.0])
    assert sum(item.costs[point.widths[item.name]][0] for item in problem.quality) == pytest.approx(5, abs=BAND_BITS)
    low, high = reachable(problem)
    assert (low, high) == (pytest.approx(4.0), pytest.approx(8.0))


def test_spread() -> None:
    assert spread(3, 12) == [0, 1, 2]
    assert spread(100, 3) == [0, 50, 99]
    assert spread(9, 1) == [4]


Prepared = tuple[LoadedModel, list[LayerPlan], Recipe, Observations]


def recipe_of(**settings: Any) -> Recipe:
    rule = {
        "match": "*",
        "weight": {"bits": 8, "granularity": "per_channel"},
        "activation": {"bits": 8, "symmetric": False, "signed": False},
    }
    small = {"images": 1, "calls": 2, "candidate_images": 1, "candidates": 2}
    return Recipe.model_validate(
        {
            "name": "test",
            "rules": [rule],
            "split_shortcuts": True,
            "calibration": {"prompts": 1, "steps": 2, "guidance_scale": 3.0},
            "bit_allocation": {**small, **settings},
        }
    )


@pytest.fixture(scope="module")
def prepared(tiny: LoadedModel) -> Prepared:
    recipe = recipe_of()
    plans = plan_model(tiny, recipe)
    return tiny, plans, recipe, observe(tiny, plans, recipe)


def synthetic(plans: Sequence[LayerPlan], widths: Sequence[int] = (2, 4, 8)) -> SensitivityTable:
    """Sensitivities that a sweep could have found: more bits are better, layers differ."""
    source = np.random.default_rng(9)
    entries = []
    quantized = [plan for plan in plans if plan.quantized]
    members: dict[tuple[Part, str], list[str]] = {}
    for plan in quantized:
        members.setdefault(("weight", plan.name), []).append(plan.name)
        members.setdefault(("activation", plan.group), []).append(plan.name)
    for (part, name), layers in sorted(members.items(), key=lambda item: item[0][0], reverse=True):
        group = group_of(layers, CONTENT)
        base = source.uniform(0, 1)
        values = {
            bits: 1 - 0.5 * base * 4.0 ** (2 - bits) if group == "content" else 20 * base + 6.02 * bits
            for bits in widths
            if group == "content" or bits > 2
        }
        entries.append(
            LayerSensitivity(
                part=part, name=name, layers=tuple(layers), group=group, metric=METRIC_OF_GROUP[group], values=values
            )
        )
    return SensitivityTable(model="tiny", recipe="test", entries=tuple(entries))


def without_measuring(monkeypatch: pytest.MonkeyPatch, plans: Sequence[LayerPlan]) -> None:
    """Synthetic sensitivities, and fewer points in the scan."""
    monkeypatch.setattr(allocation, "measure_sensitivity", lambda *_: synthetic(plans))
    monkeypatch.setattr(allocation, "_WEIGHT_SPLITS", (0.66, 0.96))
    monkeypatch.setattr(allocation, "_ACTIVATION_SPLITS", (0.94, 1.09))


def run_allocation(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str = "tensorrt-rtx", **settings: Any
) -> Allocation:
    """Allocates with synthetic sensitivities; plans are compared on real images."""
    loaded, plans, _, observations = prepared
    without_measuring(monkeypatch, plans)
    return allocate(loaded, plans, recipe_of(**settings), observations, TARGETS[target], SweepRun(folder=tmp_path))


def cost_model(prepared: Prepared, **changes: Any) -> CostModel:
    loaded, plans, _, _ = prepared
    facts = {
        "plans": tuple(plans),
        "shapes": layer_shapes(loaded.denoiser, plans),
        "content": CONTENT,
        "target": RTX,
        "capabilities": None,
        "int4": True,
        "body_bytes": 2,
    }
    return CostModel(**{**facts, **changes})


def test_sizes_of_layers(prepared: Prepared) -> None:
    loaded, plans, _, _ = prepared
    shapes = layer_shapes(loaded.denoiser, plans)
    size, rows = loaded.denoiser.config["sample_size"], 2
    conv_in = shapes["conv_in"]
    assert conv_in.inputs == rows * 4 * size**2
    assert conv_in.outputs == rows * conv_in.channels * size**2
    down = shapes["down_blocks.0.downsamplers.0.conv"]
    assert down.inputs == rows * down.channels * size**2
    assert down.outputs == down.inputs // 4
    keys = shapes["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert keys.inputs == rows * 77 * keys.weights // keys.channels
    assert not any(plan.folded for plan in plans if plan.name in shapes)
    with pytest.raises(ModelError, match="the size of conv_in's activation is unknown"):
        layer_shapes(loaded.denoiser, [replace(plan, macs=0) for plan in plans])


def test_weights_average_what_was_asked_for(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With all layers counted, protected ones too."""
    loaded, plans, _, _ = prepared
    found = run_allocation(prepared, monkeypatch, tmp_path, weight_target=4.5, protect=["conv_in", "conv_out"])
    plan = found.plan
    sizes = {name: shape.weights for name, shape in layer_shapes(loaded.denoiser, plans).items()}
    average = sum(sizes[name] * bits.weight for name, bits in plan.layers.items()) / sum(sizes.values())
    assert set(plan.layers) == set(sizes)
    assert plan.average_weight_bits == pytest.approx(average, abs=1e-4)  # four decimals in the file
    assert 4.5 - 0.3 - BAND_BITS <= average <= 4.5 + BAND_BITS
    assert plan.layers["conv_in"].weight == 8
    assert plan.layers["conv_in"].why == "protected: keeps the widths of its rule"
    assert "SSIM" in plan.layers["mid_block.attentions.0.transformer_blocks.0.ff.net.2"].why
    assert {bits.activation for bits in plan.layers.values()} == {8}
    assert {bits.weight for name, bits in plan.layers.items() if group_of([name], CONTENT) == "quality"} == {4, 8}
    assert sum(scanned.chosen for scanned in found.scanned) == 1
    compared = [scanned.mse for scanned in found.scanned if scanned.mse is not None]
    chosen = next(scanned for scanned in found.scanned if scanned.chosen)
    assert len(compared) == 2
    assert chosen.mse == min(compared)
    assert chosen.average_bits == pytest.approx(average)


def test_activations_come_on_top_and_groups_agree(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, plans, _, _ = prepared
    found = run_allocation(prepared, monkeypatch, tmp_path, weight_target=5.0, activation_target=6.5)
    assert 6.5 - 0.3 - BAND_BITS <= found.plan.average_activation_bits <= 6.5 + BAND_BITS
    assert {scanned.part for scanned in found.scanned} == {"weight", "activation"}
    applied = apply_bit_plan(plans, found.plan)  # raises when layers of one tensor disagree
    text = {plan.activation.bits for plan in applied if plan.group == TEXT and plan.activation is not None}
    assert len(text) == 1
    assert {plan.activation.bits for plan in applied if plan.activation is not None} == {4, 8}


def test_the_most_sensitive_layers_stay_in_floating_point(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, plans, _, _ = prepared
    found = run_allocation(prepared, monkeypatch, tmp_path, weight_target=5.0, protect_fp_share=0.02)
    table = found.sensitivity
    floating = {name for name, bits in found.plan.layers.items() if bits.weight == 16}
    for group in ("content", "quality"):
        entries = sorted(table.of("activation", group), key=lambda entry: entry.at(8))  # type: ignore[arg-type]
        count = math.ceil(0.02 * sum(len(entry.layers) for entry in entries))
        first = next(entry for entry in entries if len(entry.layers) <= count)
        assert set(first.layers) <= floating
    assert "protected: activation S" in found.plan.layers[min(floating)].why
    assert found.plan.average_weight_bits <= 5.0 + BAND_BITS
    applied = {plan.name: plan for plan in apply_bit_plan(plans, found.plan)}
    assert not any(applied[name].quantized for name in floating)


def test_an_edited_plan_is_fed_back(prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded, plans, _, observations = prepared
    without_measuring(monkeypatch, plans)
    plan = allocate_bits(
        loaded, plans, recipe_of(weight_target=6.0), observations, RTX, SweepRun(folder=tmp_path / "run")
    )
    path = tmp_path / "bits.yaml"
    plan.save(path)
    assert BitPlan.load(path, plans) == plan
    line = next(text for text in path.read_text().splitlines() if text.startswith("  conv_out:"))
    path.write_text(path.read_text().replace(line, "  conv_out: {weight: 16, activation: 16}"))
    recipe = recipe_of().model_copy(update={"bit_plan": str(path)})
    assert [item.name for item in plan_model(loaded, recipe) if not item.quantized and not item.folded] == ["conv_out"]


def test_a_target_out_of_reach_says_what_is(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"no plan of weight widths has 2\.5 bits on average.*to 8\.000 are within"):
        run_allocation(prepared, monkeypatch, tmp_path, weight_target=2.5)
    with pytest.raises(RecipeError, match=r"has 0\.4 of the cost at 8 bits.*to 1\.000 are within reach"):
        run_allocation(prepared, monkeypatch, tmp_path, weight_target=0.4, objective="stored_bytes")
    with pytest.raises(RecipeError, match=r"needs bit_allocation\.weight_target"):
        run_allocation(prepared, monkeypatch, tmp_path)
    with pytest.raises(RecipeError, match=r"bit_allocation\.protect: 'nothing' matches no quantized layer"):
        run_allocation(prepared, monkeypatch, tmp_path, weight_target=4.0, protect=["nothing"])


def test_stored_bytes_are_within_the_share(prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded, plans, _, _ = prepared
    found = run_allocation(prepared, monkeypatch, tmp_path, weight_target=0.95, objective="stored_bytes", candidates=1)
    shapes = layer_shapes(loaded.denoiser, plans)
    spent = sum(
        stored_bytes(shapes[name], bits.weight, int4_linear=True, body_bytes=4)
        for name, bits in found.plan.layers.items()
    )
    full = sum(stored_bytes(shape, 8, int4_linear=True, body_bytes=4) for shape in shapes.values())
    assert spent <= 0.95 * full * (1 + 1e-6)  # HiGHS keeps a row of shares to 1e-6
    # a convolution gains nothing from fewer bits: its carrier is INT8
    assert {found.plan.layers[name].weight for name, shape in shapes.items() if shape.kind == "conv"} == {8}
    assert {found.plan.layers[name].weight for name, shape in shapes.items() if shape.kind == "linear"} >= {4, 8}


def test_predicted_time_is_within_the_share(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """INT4 costs time on TensorRT-RTX, so a share of 1 leaves every layer at 8 bits; without INT4 all widths tie."""
    found = run_allocation(prepared, monkeypatch, tmp_path, weight_target=1.0, objective="predicted_time")
    shapes = cost_model(prepared).shapes
    for capability in RTX.default_compute_capabilities:
        spent, full = (
            sum(
                predicted_seconds(shape, bits(name), capability, int4_linear=True, body_bytes=4)
                for name, shape in shapes.items()
            )
            for bits in (lambda name: found.plan.layers[name].weight, lambda _: 8)
        )
        assert spent <= full * (1 + 1e-9)
    assert {bits.weight for bits in found.plan.layers.values()} == {8}


@pytest.mark.parametrize("objective", ["average_bits", "stored_bytes", "predicted_time"])
def test_costs_are_relative_to_the_group(prepared: Prepared, objective: Objective) -> None:
    costs, (_, plans, _, _) = cost_model(prepared), prepared
    widths = {plan.name: (8, 8) for plan in plans if plan.quantized}
    problem = weight_problem(costs, synthetic(plans), widths, frozenset(), objective)
    wanted = 8.0 if objective == "average_bits" else 1.0
    rows = len(RTX.default_compute_capabilities) if objective == "predicted_time" else 1
    for group in (problem.content, problem.quality):
        for row in range(rows):
            assert sum(choice.costs[8][row] for choice in group) == pytest.approx(wanted)
    sizes = {
        group: sum(shape.weights for name, shape in costs.shapes.items() if group_of([name], CONTENT) == group)
        for group in ("content", "quality")
    }
    if objective == "average_bits":
        assert problem.ratio == pytest.approx(sizes["content"] / sizes["quality"])


def test_a_shared_activation_counts_once(prepared: Prepared) -> None:
    costs, (_, plans, _, _) = cost_model(prepared), prepared
    widths = {plan.name: (8, 8) for plan in plans if plan.quantized}
    problem = activation_problem(costs, synthetic(plans), widths, frozenset())
    names = [choice.name for choice in (*problem.content, *problem.quality)]
    assert names.count(TEXT) == 1
    assert set(names) == {plan.group for plan in plans if plan.quantized}
    assert costs.average_activation_bits(widths) == pytest.approx(8.0)
    # a protected member fixes the quantizer that it shares
    member = next(plan.name for plan in plans if plan.group == TEXT)
    fixed = activation_problem(costs, synthetic(plans), widths, frozenset([member]))
    assert next(choice.scores for choice in fixed.content if choice.name == TEXT) == {8: 0.0}


def test_compared_plans_are_kept(prepared: Prepared, tmp_path: Path) -> None:
    loaded, plans, recipe, observations = prepared
    run = SweepRun(folder=tmp_path)
    quantized = [plan for plan in plans if plan.quantized]
    assert all(plan.weight is not None for plan in quantized)
    coarse = [
        replace(plan, weight=plan.weight.model_copy(update={"bits": 2})) if plan.weight is not None else plan
        for plan in plans
    ]
    fine, rough = compare_plans(loaded, [plans, coarse], "both", recipe, observations, run)
    assert fine is not None
    assert rough is not None
    assert fine < rough
    (again,) = compare_plans(loaded, [plans], "both", recipe, observations, run)
    assert again == fine
    assert sorted(path.name for path in (tmp_path / "candidates").iterdir()) == ["both-0.json", "both-1.json"]
