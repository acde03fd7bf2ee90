"""Sensitivities: the traps of methods.md 2.4, what exactly is quantized, the two metrics, and sweeps that go on."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qdexport.core.recipe import BitAllocation, ChannelScale, Recipe
from qdexport.core.spec import LayerPlan
from qdexport.core.target import TARGETS
from qdexport.errors import MissingDependencyError, ModelError, RecipeError
from qdexport.models.loaded import LoadedModel
from qdexport.pipeline.quantize import QuantizeSettings, observe_model, plan_model
from qdexport.quant.affine import fake_quantize_reference
from qdexport.quant.attach import quantize_model, shared_copy
from qdexport.quant.bench import BEST_DB, Bench, record
from qdexport.quant.calibrate import Observations, observe
from qdexport.quant.layer_groups import chosen_layers, group_of, path_matches
from qdexport.quant.modules import QuantConv2d, QuantLinear, QuantSplitConv2d
from qdexport.quant.partial import ScaledRanges, partly_quantized, unused_ranges, with_bits
from qdexport.quant.result_cache import SweepRun
from qdexport.quant.sensitivity import measure_sensitivity, reference_request, sweep_tasks
from qdexport.quant.sensitivity_table import LayerSensitivity, SensitivityTable
from qdexport.quant.tasks import Job, Workers, map_tasks

ASYMMETRIC = {"symmetric": False, "signed": False}
FF = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
TO_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
SHORTCUT = "up_blocks.1.resnets.1.conv_shortcut"
FEW = [FF, "conv_in", "mid_block.resnets.0.conv1", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.*"]
SMALL = {"images": 2, "calls": 3, "activation_bits": (4, 8)}
TRAINING_STEPS = 1000

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def whole_recipe() -> Recipe:
    """All layers, split shortcuts, the first token left out."""
    rule = {"match": "*", "weight": {"bits": 8, "granularity": "per_channel"}, "activation": {"bits": 8, **ASYMMETRIC}}
    data = {"name": "whole", "rules": [rule], "split_shortcuts": True, "bos": "constant", "bit_allocation": SMALL}
    calibration = {"prompts": 2, "batch_size": 1, "steps": 2, "guidance_scale": 3.0, "seed": 7}
    return Recipe.model_validate({**data, "calibration": calibration})


@pytest.fixture(scope="module")
def whole(tiny: LoadedModel, whole_recipe: Recipe) -> tuple[list[LayerPlan], Observations]:
    plans = plan_model(tiny, whole_recipe)
    return plans, observe(tiny, plans, whole_recipe)


@pytest.fixture(scope="module")
def few_recipe(whole_recipe: Recipe) -> Recipe:
    rule = whole_recipe.rules[0].model_copy(update={"match": tuple(FEW)})
    return whole_recipe.model_copy(update={"rules": (rule,), "bos": "off", "split_shortcuts": False})


@pytest.fixture(scope="module")
def few(tiny: LoadedModel, few_recipe: Recipe) -> tuple[list[LayerPlan], Observations]:
    plans = plan_model(tiny, few_recipe)
    return plans, observe(tiny, plans, few_recipe)


def named(plans: Sequence[LayerPlan], name: str) -> LayerPlan:
    return next(plan for plan in plans if plan.name == name)


class Recorder:
    """Remembers what was measured; stops the run after some tasks, as a kill would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.stop_after = stop_after

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def track(self, total: int, description: str) -> Iterator[Any]:
        yield self._advance

    def _advance(self, count: int, note: str = "") -> None:
        self.notes.append(note)
        if self.stop_after is not None and len(self.notes) >= self.stop_after:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("ff", "blocks.0.ff.net.2", True),
        ("ff", "blocks.0.off_ramp.net", False),
        ("ff", "blocks.0.ff_in.net", False),
        ("*.ff.*", "blocks.0.ff.net.0.proj", True),
        ("*.ff.*", "ff.net", True),
        ("*.ff.*", "blocks.0.off_ff.net", False),
        ("*.attn2.*", "a.b.attn2.to_out.0", True),
        ("*.attn2.*", "a.b.attn21.to_out.0", False),
        ("conv_in", "conv_in", True),
        ("down_blocks.*.conv?", "down_blocks.0.resnets.1.conv2", True),
        ("down_blocks.0", "down_blocks.0.resnets", False),
        ("*", "a.b.c", True),
        (r"re:.*\.to_[kv]", "a.to_k", True),
    ],
)
def test_patterns_match_whole_segments(pattern: str, path: str, matches: bool) -> None:
    assert path_matches(pattern, path) is matches


def test_groups_of_the_bundled_patterns() -> None:
    content = BitAllocation().content
    assert group_of(["x.attn2.to_k"], content) == "content"
    assert group_of(["x.attn1.to_k", "x.attn1.to_q"], content) == "quality"
    assert group_of(["x.off_ff.net"], content) == "quality"


def test_a_pattern_that_protects_nothing_is_refused(few: tuple[list[LayerPlan], Observations]) -> None:
    plans, _ = few
    assert chosen_layers(["conv_in"], plans, "protect") == {"conv_in"}
    with pytest.raises(RecipeError, match="protect: 'conv_inn' matches no quantized layer; did you mean conv_in"):
        chosen_layers(["conv_inn"], plans, "protect")


@pytest.mark.parametrize("kind", ["minmax", "ema_minmax"])
def test_ranges_do_not_depend_on_the_widths_that_are_asked_for(
    tiny: LoadedModel, few_recipe: Recipe, kind: str
) -> None:
    """Trap 2.4(i): MixDQ moves its average once per requested width."""
    rule = few_recipe.rules[0]
    assert rule.activation is not None
    observer = rule.activation.observer.model_copy(update={"kind": kind})
    activation = rule.activation.model_copy(update={"observer": observer})
    recipe = few_recipe.model_copy(update={"rules": (rule.model_copy(update={"activation": activation}),)})
    plans = plan_model(tiny, recipe)
    observations = observe(tiny, plans, recipe)
    alone, among = (
        sweep_tasks(plans, BitAllocation(activation_bits=bits), observations, ["activation"])
        for bits in ((8,), (2, 3, 4, 5, 6, 8))
    )
    assert [task.ends[8] for task in alone] == [task.ends[8] for task in among]
    # min-max ranges do not know widths at all
    assert all(task.ends[bits] == task.ends[8] for task in among for bits in (2, 3, 4, 5, 6))
    # and not on who asked before
    again = sweep_tasks(plans, BitAllocation(activation_bits=(8,)), observations, ["activation"])
    assert [task.ends for task in again] == [task.ends for task in alone]


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_has_its_own_scales(
    tiny: LoadedModel, whole: tuple[list[LayerPlan], Observations], bits: int
) -> None:
    """Traps 2.4(iii) and the table of MixDQ that gives 3 bits the parameters of 2, and 6 those of 4."""
    plans, observations = whole
    plan = with_bits(named(plans, FF), weight=bits, activation=bits)
    ranges = observations.ranges([plan])
    layer = partly_quantized(tiny.denoiser, [plan], ranges, "both", TRAINING_STEPS).get_submodule(FF)
    assert isinstance(layer, QuantLinear)
    largest = layer.weight.detach().abs().amax(dim=1).double()
    assert torch.equal(layer.weight_quantizer.scale[0], (largest / (2 ** (bits - 1) - 1)).float())
    low, high = ranges.low[plan.group], ranges.high[plan.group]
    assert torch.equal(layer.input_quantizer.scale, ((high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)).float())
    codes = torch.round(layer.weight_quantizer(layer.weight) / layer.weight_quantizer.scale.T)
    assert codes.abs().amax() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_dead_channel_leaves_the_others_alone(
    tiny: LoadedModel, whole: tuple[list[LayerPlan], Observations], bits: int
) -> None:
    """Trap 2.4(ii): one channel near zero gave every channel a scale of 1e-6."""
    plans, observations = whole
    plan = with_bits(named(plans, FF), weight=bits)

    def scales(denoiser: nn.Module) -> torch.Tensor:
        twin = partly_quantized(denoiser, [plan], unused_ranges([plan], observations), "weight", TRAINING_STEPS)
        layer = twin.get_submodule(FF)
        assert isinstance(layer, QuantLinear)
        return layer.weight_quantizer.scale[0]

    before = scales(tiny.denoiser)
    damaged = shared_copy(tiny.denoiser)
    layer = damaged.get_submodule(FF)
    weight = layer.get_parameter("weight").detach().clone()
    weight[3] = 1e-12
    weight[5] = 0.0
    layer.weight = nn.Parameter(weight)  # type: ignore[assignment]  # a parameter of another module's name
    after = scales(damaged)
    others = [channel for channel in range(len(before)) if channel not in (3, 5)]
    assert torch.equal(after[others], before[others])
    assert after[3] < 1e-11


def test_only_the_weight_or_only_the_input_is_quantized(
    tiny: LoadedModel, whole: tuple[list[LayerPlan], Observations]
) -> None:
    plans, observations = whole
    plan = with_bits(named(plans, "conv_in"), weight=4, activation=4)
    ranges = observations.ranges([plan])
    conv = tiny.denoiser.get_submodule("conv_in")
    assert isinstance(conv, nn.Conv2d)
    x = torch.randn(2, 4, 8, 8)
    outputs = {}
    for parts in ("weight", "activation", "both"):
        layer = partly_quantized(tiny.denoiser, [plan], ranges, parts, TRAINING_STEPS).get_submodule("conv_in")  # type: ignore[arg-type]
        outputs[parts] = layer(x)
    twin = partly_quantized(tiny.denoiser, [plan], ranges, "both", TRAINING_STEPS).get_submodule("conv_in")
    assert isinstance(twin, QuantConv2d)
    weight, inputs = twin.weight_quantizer(conv.weight), twin.input_quantizer(x)
    scale = twin.weight_quantizer.scale[0][:, None, None, None]
    assert torch.equal(weight, fake_quantize_reference(conv.weight, scale, torch.zeros(()), -8, 7))
    assert torch.equal(outputs["weight"], conv._conv_forward(x, weight, conv.bias))
    assert torch.equal(outputs["activation"], conv._conv_forward(inputs, conv.weight, conv.bias))
    assert torch.equal(outputs["both"], conv._conv_forward(inputs, weight, conv.bias))
    # the floating-point model is as it was
    assert type(tiny.denoiser.get_submodule("conv_in")) is nn.Conv2d


def test_split_shortcuts_and_first_tokens_are_as_in_the_final_model(
    tiny: LoadedModel, whole: tuple[list[LayerPlan], Observations]
) -> None:
    plans, observations = whole
    split, keys = with_bits(named(plans, SHORTCUT), weight=4), with_bits(named(plans, TO_K), weight=2, activation=2)
    assert split.splits
    assert keys.bos
    ranges = unused_ranges([split], observations)
    layer = partly_quantized(tiny.denoiser, [split], ranges, "weight", TRAINING_STEPS).get_submodule(SHORTCUT)
    assert isinstance(layer, QuantSplitConv2d)
    assert len(layer.input_quantizers) == len(split.splits)
    first, second = (quantizer.scale for quantizer in layer.weight_quantizers)
    assert not torch.equal(torch.as_tensor(first), torch.as_tensor(second))
    linear = tiny.denoiser.get_submodule(TO_K)
    x = torch.randn(2, 5, linear.get_parameter("weight").shape[1])
    twin = partly_quantized(tiny.denoiser, [keys], observations.ranges([keys]), "both", TRAINING_STEPS)
    wanted, found = linear(x), twin.get_submodule(TO_K)(x)
    # batched otherwise, so sums may be rounded in another order: a millionth of the values, 2 bits lose a tenth
    torch.testing.assert_close(found[:, 0], wanted[:, 0], rtol=1e-5, atol=1e-6)
    assert (found[:, 1:] - wanted[:, 1:]).abs().max() > 1e-2


def test_layers_of_one_tensor_are_measured_together(whole: tuple[list[LayerPlan], Observations]) -> None:
    plans, observations = whole
    quantized = [plan for plan in plans if plan.quantized]
    tasks = sweep_tasks(plans, BitAllocation(), observations, ["weight", "activation"])
    weights = [task for task in tasks if task.part == "weight"]
    activations = {task.name: task for task in tasks if task.part == "activation"}
    assert [task.name for task in weights] == [plan.name for plan in quantized]
    assert set(activations) == {plan.group for plan in quantized}
    text = activations["encoder_hidden_states"]
    assert {plan.name for plan in text.plans} == {plan.name for plan in quantized if "attn2.to_k" in plan.name} | {
        plan.name for plan in quantized if "attn2.to_v" in plan.name
    }
    assert {task.group for task in weights if ".ff." in task.name or ".attn2." in task.name} == {"content"}
    assert {task.group for task in weights if ".ff." not in task.name and ".attn2." not in task.name} == {"quality"}
    assert next(task.widths for task in weights if task.name == FF) == (2, 4, 8)
    assert next(task.widths for task in weights if task.name == "conv_in") == (4, 8)


@pytest.fixture(scope="module")
def bench(tiny: LoadedModel, few_recipe: Recipe) -> Bench:
    request = reference_request(tiny, few_recipe, 2)
    return Bench(loaded=tiny, reference=record(tiny, request, 3, images=True))


def test_recorded_calls_are_spread(bench: Bench) -> None:
    calls = bench.reference.calls
    assert len({int(call.inputs["timestep"][0]) for call in calls}) == 2
    # two rows per image, one for either branch of the guidance
    assert sum(len(call.output) for call in calls) == 2 * 3
    for call in calls:
        assert {len(array) for name, array in call.inputs.items() if name != "timestep"} == {len(call.output)}
        text = call.inputs["encoder_hidden_states"]
        assert not np.array_equal(text[0], text[1])


class Changed(nn.Module):
    """A denoiser whose output is the original's times a factor."""

    def __init__(self, denoiser: nn.Module, factor: float) -> None:
        super().__init__()
        self.denoiser, self.factor = denoiser, factor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(part * self.factor for part in self.denoiser(*args, **{**kwargs, "return_dict": False}))


def test_the_metrics(bench: Bench) -> None:
    denoiser = bench.loaded.denoiser
    # the recorded rows are computed again in other batches, where FP32 sums of some thousand products may have another
    # order: 1e-6 of the output is 120 dB
    assert 100 < bench.sqnr_db(denoiser) <= BEST_DB
    # a tenth of the amplitude is wrong: 20 dB, up to the rounding of 1.1 y in FP32
    assert bench.sqnr_db(Changed(denoiser, 1.1)) == pytest.approx(20.0, abs=1e-4)
    assert bench.sqnr_db(Changed(denoiser, float("nan"))) == -100
    assert bench.ssim(denoiser) == pytest.approx(1.0, abs=1e-6)  # FP32 sums
    assert bench.mse(denoiser) < 1e-9  # of pictures in [-1, 1], by the same sums
    assert bench.ssim(Changed(denoiser, 0.5)) < 0.99
    assert bench.mse(Changed(denoiser, 0.5)) > 0
    assert bench.ssim(Changed(denoiser, float("nan"))) == -1
    assert bench.mse(Changed(denoiser, float("nan"))) == np.inf


@pytest.fixture(scope="module")
def swept(
    tiny: LoadedModel,
    few_recipe: Recipe,
    few: tuple[list[LayerPlan], Observations],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, SensitivityTable]:
    """A finished sweep of few layers."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, measure_sensitivity(tiny, few[0], few_recipe, few[1], SweepRun(folder=folder))


def values(table: SensitivityTable) -> dict[tuple[str, str], dict[int, float]]:
    return {(entry.part, entry.name): entry.values for entry in table.entries}


def test_more_bits_are_nearer(swept: tuple[Path, SensitivityTable]) -> None:
    _, table = swept
    assert {entry.metric for entry in table.of("weight", "content")} == {"ssim"}
    for entry in table.entries:
        ordered = [entry.values[bits] for bits in sorted(entry.values)]
        assert ordered == sorted(ordered), entry
    conv_in = table.of_layer("weight", "conv_in")
    # four bits more are a factor of 127/7 in the step: 25 dB, more or less what rounding happens to do
    assert conv_in.at(8) - conv_in.at(4) == pytest.approx(25, abs=4)


def test_a_width_that_was_not_measured_raises(swept: tuple[Path, SensitivityTable]) -> None:
    _, table = swept
    for bits in (3, 6):
        with pytest.raises(ModelError, match=f"conv_in \\(weight\\) was not measured at {bits} bits, only at 4, 8"):
            table.of_layer("weight", "conv_in").at(bits)
    with pytest.raises(ModelError, match="no weight sensitivity of layer conv_out"):
        table.of_layer("weight", "conv_out")


def test_the_table_is_a_file(swept: tuple[Path, SensitivityTable], tmp_path: Path) -> None:
    _, table = swept
    path = tmp_path / "sensitivity.json"
    table.save(path)
    assert SensitivityTable.load(path) == table
    path.write_text("{}")
    with pytest.raises(ModelError, match=r"is no SensitivityTable of qdexport.*run the sweep first"):
        SensitivityTable.load(path)
    with pytest.raises(ModelError, match="does not exist; run the sweep first"):
        SensitivityTable.load(tmp_path / "none.json")


def test_a_killed_sweep_goes_on(
    tiny: LoadedModel,
    few_recipe: Recipe,
    few: tuple[list[LayerPlan], Observations],
    swept: tuple[Path, SensitivityTable],
    tmp_path: Path,
) -> None:
    plans, observations = few
    killed, rest, none = Recorder(stop_after=4), Recorder(), Recorder()
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(tiny, plans, few_recipe, observations, SweepRun(folder=tmp_path, progress=killed))
    table = measure_sensitivity(tiny, plans, few_recipe, observations, SweepRun(folder=tmp_path, progress=rest))
    assert len(killed.notes) == 4
    assert len(killed.notes) + len(rest.notes) == len(table.entries)
    assert set(killed.notes).isdisjoint(rest.notes)
    assert values(table) == values(swept[1])
    again = measure_sensitivity(tiny, plans, few_recipe, observations, SweepRun(folder=tmp_path, progress=none))
    assert none.notes == []
    assert again == table


def test_what_a_result_depends_on_is_measured_again(
    tiny: LoadedModel,
    few_recipe: Recipe,
    few: tuple[list[LayerPlan], Observations],
    swept: tuple[Path, SensitivityTable],
    tmp_path: Path,
) -> None:
    plans, observations = few
    chosen = [replace(plan, weight=None, activation=None) if plan.name != "conv_in" else plan for plan in plans]
    recorder = Recorder()
    run = SweepRun(folder=tmp_path, progress=recorder)

    def measure(**changes: Any) -> SensitivityTable:
        settings = BitAllocation.model_validate({**SMALL, **changes})
        recipe = few_recipe.model_copy(update={"bit_allocation": settings})
        return measure_sensitivity(tiny, chosen, recipe, observations, run, ["weight"])

    first = measure()
    assert len(recorder.notes) == 1
    measure(activation_bits=(8,))  # weights do not depend on it
    assert len(recorder.notes) == 1
    other = measure(seed=3)
    assert len(recorder.notes) == 2
    assert values(other) != values(first)
    three = measure(seed=3, quality_weight_bits=(3, 4, 8))
    assert len(recorder.notes) == 3
    name = ("weight", "conv_in")
    assert {bits: values(three)[name][bits] for bits in (4, 8)} == values(other)[name]
    assert values(three)[name][3] not in values(other)[name].values()


def test_a_damaged_result_is_measured_again(
    tiny: LoadedModel,
    few_recipe: Recipe,
    few: tuple[list[LayerPlan], Observations],
    swept: tuple[Path, SensitivityTable],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, table = swept
    (folder / "sensitivity" / "weight-conv_in.json").write_text("{")
    recorder = Recorder()
    again = measure_sensitivity(tiny, few[0], few_recipe, few[1], SweepRun(folder=folder, progress=recorder))
    assert recorder.notes == ["conv_in (weight)"]
    assert "weight-conv_in.json is damaged" in caplog.text
    assert values(again) == values(table)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["two processes", "ray"])
def test_numbers_do_not_depend_on_who_computes(
    tiny: LoadedModel,
    few_recipe: Recipe,
    few: tuple[list[LayerPlan], Observations],
    swept: tuple[Path, SensitivityTable],
    tmp_path: Path,
    workers: str,
) -> None:
    who = Workers(count=2)
    if workers == "ray":
        pytest.importorskip("ray")
        who = Workers(count=2, ray="local")
    run = SweepRun(folder=tmp_path, workers=who)
    table = measure_sensitivity(tiny, few[0], few_recipe, few[1], run)
    assert values(table) == values(swept[1])


def test_a_local_cluster_is_started_whatever_record_of_another_lies_about(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def init(**options: object) -> None:
        asked.update(options)
        raise ConnectionError("enough seen")

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=init))
    job: Job[None, int, int] = Job(prepare=lambda: None, run=lambda _, task: task)
    with pytest.raises(MissingDependencyError, match="enough seen"):
        list(map_tasks(job, [1], Workers(ray="local")))
    # with None ray looks for a running cluster first, and waits for minutes for one that is gone
    assert asked["address"] == "local"


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    job: Job[None, int, int] = Job(prepare=lambda: None, run=lambda _, task: task)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qdexport\[ray\]'"):
        list(map_tasks(job, [1], Workers(ray="auto")))


def test_tasks_in_this_process_use_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        job: Job[int, int, int] = Job(prepare=torch.get_num_threads, run=lambda threads, task: threads * task)
        assert dict(map_tasks(job, [5, 7], Workers())) == {0: 5, 1: 7}
        assert torch.get_num_threads() == 2
        assert list(map_tasks(job, [], Workers(count=2))) == []
    finally:
        torch.set_num_threads(before)


def test_an_entry_without_the_width_lists_what_there_is() -> None:
    entry = LayerSensitivity(part="weight", name="l", layers=("l",), group="quality", metric="sqnr_db", values={8: 1.0})
    with pytest.raises(ModelError, match="not measured at 2 bits, only at 8"):
        entry.at(2)


def test_channel_scales_and_rows_per_step_are_as_in_the_final_model(
    tiny: LoadedModel, few_recipe: Recipe, tmp_path: Path
) -> None:
    """One layer quantized by the sweep is the same layer quantized by the pipeline."""
    name = "mid_block.resnets.0.conv1"
    rule = few_recipe.rules[0].model_copy(update={"match": name})
    changes = {
        "rules": (rule,),
        "activation_rows": "per_step",
        "channel_scale": ChannelScale(groups=2, choose_ratio=False),
    }
    recipe = few_recipe.model_copy(update=changes)
    plans = plan_model(tiny, recipe)
    settings = QuantizeSettings(target=TARGETS["onnxruntime"])
    observations, ratios = observe_model(tiny, plans, recipe, settings, Recorder())
    (group,) = ratios
    assert ratios[group].max() > 1
    ranges = ScaledRanges(observations=observations, channel_ratios=ratios)
    final = quantize_model(tiny, plans, recipe, ranges.ranges(plans))
    table = measure_sensitivity(tiny, plans, recipe, ranges, SweepRun(folder=tmp_path))
    (plan,) = (plan for plan in plans if plan.quantized)
    assert plan.channel_scale
    (task,) = sweep_tasks(plans, BitAllocation(), ranges, ["activation"])
    assert len(task.timesteps) == 2
    twin = partly_quantized(tiny.denoiser, task.planned(8), task.ranges(8), "both", TRAINING_STEPS)
    bench = Bench(loaded=tiny, reference=record(tiny, reference_request(tiny, recipe, 2), 3, images=False))
    assert bench.sqnr_db(twin) == bench.sqnr_db(final.denoiser)
    # input and weight alone are each nearer than both together
    for part in ("weight", "activation"):
        assert table.of_layer(part, name).at(8) > bench.sqnr_db(twin)  # type: ignore[arg-type]
