"""Calibration on the real sampler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdexport.core.recipe import Calibration, Recipe
from qdexport.errors import ModelError, RecipeError
from qdexport.models.denoiser import shortcut_splits
from qdexport.models.load import LoadedModel, load_model
from qdexport.models.sampling import SampleRequest, prompts_for, sample
from qdexport.models.tiny import TinyOptions, save_tiny_pipeline
from qdexport.quant import calibrate as calibrate_module
from qdexport.quant.calibrate import Observations, calibrate, calibration_prompts, observe, schedule_timesteps
from qdexport.quant.modules import ChannelScale
from qdexport.quant.plan import plan_layers
from qdexport.quant.ranges import ActivationRanges

MakeRecipe = Callable[..., Recipe]
STEPS = 3


def _run(model: LoadedModel, recipe: Recipe, **options: Any) -> ActivationRanges:
    return calibrate(model, plan_layers(model.denoiser, recipe), recipe, **options)


def _same(first: ActivationRanges, second: ActivationRanges) -> bool:
    return (
        first.timesteps == second.timesteps
        and set(first.low) == set(second.low)
        and all(torch.equal(first.low[key], second.low[key]) for key in first.low)
        and all(torch.equal(first.high[key], second.high[key]) for key in first.high)
    )


def _watch_by_hand(model: LoadedModel, layers: list[str], recipe: Recipe) -> dict[str, dict[int, list[Tensor]]]:
    """Every input of some layers in the same sampler run, by timestep, with hooks of the test's own."""
    seen: dict[str, dict[int, list[Tensor]]] = {layer: {} for layer in layers}
    now = 0

    def at(_step: int, timestep: int, _inputs: dict[str, Tensor]) -> None:
        nonlocal now
        now = timestep

    def hook(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: seen[layer].setdefault(now, []).append(args[0].clone())

    handles = [model.denoiser.get_submodule(layer).register_forward_pre_hook(hook(layer)) for layer in layers]
    settings = recipe.calibration
    request = SampleRequest(
        prompts=tuple(prompts_for(model, settings.prompts, settings.seed)),
        seed=settings.seed,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        batch_size=settings.batch_size,
    )
    sample(model, request, on_call=at)
    for handle in handles:
        handle.remove()
    return seen


def test_ranges_are_those_of_the_sampler(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(activation_rows="per_step")
    ranges = _run(tiny, recipe)
    static = _run(tiny, make_recipe())
    seen = _watch_by_hand(tiny, ["conv_in", "conv_out"], recipe)
    assert ranges.timesteps == static.timesteps == schedule_timesteps(tiny, recipe.calibration)
    assert ranges.rows == STEPS
    assert static.rows == 1
    for layer, by_step in seen.items():
        # two batches of two prompts, each call with both halves of the guidance
        assert [len(calls) for calls in by_step.values()] == [2] * STEPS
        assert by_step[ranges.timesteps[0]][0].shape[0] == 4
        for row, timestep in enumerate(ranges.timesteps):
            values = torch.cat(by_step[timestep])
            assert ranges.low[layer][row] == values.min()
            assert ranges.high[layer][row] == values.max()
        assert static.low[layer].tolist() == [ranges.low[layer].min()]
        assert static.high[layer].tolist() == [ranges.high[layer].max()]


def test_shared_inputs_are_observed_once_and_hooks_are_removed(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    plans = plan_layers(tiny.denoiser, recipe)
    ranges = calibrate(tiny, plans, recipe)
    assert set(ranges.low) == {plan.group for plan in plans if plan.quantized}
    assert len(ranges.low) < sum(plan.quantized for plan in plans)
    assert not any(module._forward_pre_hooks for module in tiny.denoiser.modules())


def test_split_layers_have_a_range_per_part(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    splits = shortcut_splits(tiny.denoiser)
    name, (hidden, _) = next(iter(splits.items()))
    plans = plan_layers(tiny.denoiser, recipe, splits=splits)
    ranges = calibrate(tiny, plans, recipe)
    values = torch.cat([x for calls in _watch_by_hand(tiny, [name], recipe)[name].values() for x in calls])
    group = next(plan.group for plan in plans if plan.name == name)
    assert ranges.high[f"{group}#0"].item() == values[:, :hidden].max()
    assert ranges.low[f"{group}#1"].item() == values[:, hidden:].min()


@pytest.mark.parametrize("kind", ["ema_minmax", "percentile", "mse"])
def test_other_observers_stay_inside_minmax(tiny: LoadedModel, make_recipe: MakeRecipe, kind: str) -> None:
    calibration = {"prompts": 2, "batch_size": 1, "steps": 2, "seed": 7}
    observer = {"kind": kind, "percentile": 99.0}
    activation = {"bits": 6, "symmetric": False, "signed": False, "observer": observer}
    ranges = _run(tiny, make_recipe(activation, calibration=calibration))
    widest = _run(tiny, make_recipe(calibration=calibration))
    for key in ranges.low:
        assert widest.low[key] <= ranges.low[key] <= ranges.high[key] <= widest.high[key]
    assert any(ranges.high[key] < widest.high[key] for key in ranges.high)


def test_ranges_do_not_depend_on_the_requested_width(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    eight = _run(tiny, make_recipe({"bits": 8, "observer": {"kind": "ema_minmax"}}))
    two = _run(tiny, make_recipe({"bits": 2, "observer": {"kind": "ema_minmax"}}))
    assert _same(eight, two)


def test_seed_and_guidance_matter(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    base = {"prompts": 2, "batch_size": 2, "steps": 2, "guidance_scale": 3.0, "seed": 7}
    first = _run(tiny, make_recipe(calibration=base))
    assert _same(first, _run(tiny, make_recipe(calibration=base)))
    assert not _same(first, _run(tiny, make_recipe(calibration={**base, "seed": 8})))
    # the first step sees pure noise, the second what guidance made of it
    assert not _same(first, _run(tiny, make_recipe(calibration={**base, "guidance_scale": 9.0})))


def test_progress_counts_denoiser_calls(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    seen: list[tuple[int, int]] = []
    _run(tiny, make_recipe(), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 2 * STEPS) for done in range(1, 2 * STEPS + 1)]


class _InterruptError(KeyboardInterrupt):
    pass


def _interrupt_after(calls: int) -> Callable[[int, int], None]:
    def on_progress(done: int, _total: int) -> None:
        if done == calls:
            raise _InterruptError

    return on_progress


@pytest.mark.parametrize("kind", ["minmax", "mse"])
@pytest.mark.parametrize("rows", ["static", "per_step"])
def test_interrupted_calibration_goes_on_to_the_same_bits(
    tiny: LoadedModel, make_recipe: MakeRecipe, tmp_path: Path, kind: str, rows: str
) -> None:
    calibration = {"prompts": 5, "batch_size": 2, "steps": 2, "seed": 7}
    activation = {"bits": 6, "symmetric": False, "observer": {"kind": kind}}
    recipe = make_recipe(activation, activation_rows=rows, calibration=calibration)
    whole = _run(tiny, recipe)
    with pytest.raises(_InterruptError):
        _run(tiny, recipe, state_dir=tmp_path, on_progress=_interrupt_after(3))  # in the second batch
    assert not any(module._forward_pre_hooks for module in tiny.denoiser.modules())
    calls: list[int] = []
    resumed = _run(tiny, recipe, state_dir=tmp_path, on_progress=lambda done, _: calls.append(done))
    assert calls == [3, 4, 5, 6]  # the first batch was not sampled again
    assert _same(whole, resumed)
    calls.clear()
    assert _same(whole, _run(tiny, recipe, state_dir=tmp_path, on_progress=lambda done, _: calls.append(done)))
    assert calls == []


def test_saved_state_serves_other_widths_but_not_other_settings(
    tiny: LoadedModel, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    calibration = {"prompts": 2, "batch_size": 2, "steps": 2, "seed": 7}
    calls: list[int] = []

    def run(recipe: Recipe, model: LoadedModel = tiny) -> int:
        calls.clear()
        _run(model, recipe, state_dir=tmp_path, on_progress=lambda done, _: calls.append(done))
        return len(calls)

    assert run(make_recipe(calibration=calibration)) == 2
    assert run(make_recipe({"bits": 4, "symmetric": False}, calibration=calibration)) == 0
    assert run(make_recipe(calibration={**calibration, "seed": 8})) == 2
    assert run(make_recipe({"observer": {"kind": "percentile"}}, calibration=calibration)) == 2
    assert run(make_recipe(calibration=calibration, activation_rows="per_step")) == 2
    assert run(make_recipe(calibration={**calibration, "steps": 3})) == 3


def test_saved_state_of_other_weights_is_not_used(tiny_folder: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(calibration={"prompts": 1, "steps": 1})
    model = load_model(tiny_folder)
    _run(model, recipe, state_dir=tmp_path)
    with torch.no_grad():
        model.denoiser.get_parameter("conv_out.weight")[0, 0, 0, 0] += 0.5
    calls: list[int] = []
    _run(model, recipe, state_dir=tmp_path, on_progress=lambda done, _: calls.append(done))
    assert calls == [1]


def test_the_threads_of_every_batch_are_noted(tiny: LoadedModel, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Last bits depend on them: an interrupted run may go on with another number, and says so."""
    recipe = make_recipe(calibration={"prompts": 2, "batch_size": 1, "steps": 1})
    plans, before = plan_layers(tiny.denoiser, recipe), torch.get_num_threads()

    def run(threads: int, **options: Any) -> tuple[int, ...]:
        torch.set_num_threads(threads)
        return observe(tiny, plans, recipe, state_dir=tmp_path, **options).threads

    try:
        with pytest.raises(_InterruptError):
            run(1, on_progress=_interrupt_after(2))  # in the second batch
        assert run(2) == (1, 2)
        assert run(1) == (1, 2)  # found again
        assert observe(tiny, plans, recipe).threads == (1,)
    finally:
        torch.set_num_threads(before)


def test_saved_state_of_another_text_encoder_is_not_used(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    model = load_model(save_tiny_pipeline(tmp_path / "model", "sd"))
    recipe = make_recipe(calibration={"prompts": 1, "steps": 1})
    _run(model, recipe, state_dir=tmp_path)
    assert model.pipeline is not None
    with torch.no_grad():
        next(model.pipeline.text_encoder.parameters()).add_(1)
    calls: list[int] = []
    _run(model, recipe, state_dir=tmp_path, on_progress=lambda done, _: calls.append(done))
    assert calls == [1]


@pytest.mark.parametrize("damage", ["cut", "a bit of a range", "a bit of the header", "swapped", "empty"])
def test_a_damaged_state_is_thrown_away(
    tiny: LoadedModel, make_recipe: MakeRecipe, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(calibration={"prompts": 1, "steps": 1})
    right = _run(tiny, recipe, state_dir=tmp_path)
    path = tmp_path / "calibration.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "a bit of a range":
        data[-3] ^= 1
    elif damage == "a bit of the header":
        data[data.index(b"conv_in")] ^= 1
    elif damage == "swapped":
        data[-16:-8], data[-8:] = data[-8:], data[-16:-8]
        assert data != path.read_bytes()
    path.write_bytes({"cut": data[:-100], "empty": b""}.get(damage, bytes(data)))
    calls: list[int] = []
    assert _same(right, _run(tiny, recipe, state_dir=tmp_path, on_progress=lambda done, _: calls.append(done)))
    assert calls == [1]
    assert "calibration.safetensors is damaged" in caplog.text


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_name_layer_and_step(tiny_folder: Path, make_recipe: MakeRecipe, bad: float) -> None:
    model = load_model(tiny_folder)
    recipe = make_recipe()
    timesteps = schedule_timesteps(model, recipe.calibration)
    plans = plan_layers(model.denoiser, recipe)  # runs the denoiser, on fake tensors
    now = [0]

    def poison(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        now[0] += 1
        return output * bad if now[0] == 2 else output  # in the second step

    model.denoiser.get_submodule("conv_in").register_forward_hook(poison)
    message = rf"the input of layer down_blocks\S+ is not finite at timestep {timesteps[1]}"
    with pytest.raises(ModelError, match=message):
        calibrate(model, plans, recipe)


def test_layer_that_does_not_run_in_a_step(tiny_folder: Path, make_recipe: MakeRecipe) -> None:
    model = load_model(tiny_folder)
    recipe = make_recipe()
    block = model.denoiser.get_submodule("conv_out")
    parent_forward, calls = block.forward, [0]

    class Lazy(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            calls[0] += 1
            # past the planned layer, as a cache of blocks would
            return parent_forward(x) if calls[0] % STEPS == 0 else self.inner(x)

    plans = plan_layers(model.denoiser, recipe)
    renamed = [
        plan if plan.name != "conv_out" else type(plan)(**{**_fields(plan), "name": "conv_out.inner"}) for plan in plans
    ]
    model.denoiser.conv_out = Lazy(block)
    last = schedule_timesteps(model, recipe.calibration)[-1]
    with pytest.raises(ModelError, match=rf"layer conv_out\.inner did not run at timestep {last} \(1 of 3 steps"):
        calibrate(model, renamed, recipe)


def _fields(plan: Any) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def test_timestep_outside_the_schedule(
    tiny: LoadedModel, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_module, "schedule", lambda *_: [901, 1])
    with pytest.raises(
        ModelError, match=r"called the denoiser at timestep \d+, which is none of its schedule \(901, 1\)"
    ):
        _run(tiny, make_recipe())


def test_fractional_timesteps(tmp_path: Path) -> None:
    options = TinyOptions(scheduler="EulerDiscreteScheduler")
    model = load_model(save_tiny_pipeline(tmp_path / "euler", "sd", options))
    steps = schedule_timesteps(model, Calibration(steps=7))
    assert steps == (999, 832.5, 666, 499.5, 333, 166.5, 0)


def test_second_order_samplers_share_the_row_of_a_timestep(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    model = load_model(save_tiny_pipeline(tmp_path / "heun", "sd", TinyOptions(scheduler="HeunDiscreteScheduler")))
    recipe = make_recipe(activation_rows="per_step", calibration={"prompts": 1, "steps": 4})
    seen: list[tuple[int, int]] = []
    ranges = _run(model, recipe, on_progress=lambda done, total: seen.append((done, total)))
    assert ranges.rows == len(ranges.timesteps) == len(set(ranges.timesteps)) == 4
    assert seen[-1] == (7, 7)  # the second call of each step but the last


def test_unconditional_models(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    model = load_model(save_tiny_pipeline(tmp_path / "unet2d", "unet2d"))
    ranges = _run(model, make_recipe(calibration={"prompts": 2, "steps": 2}))
    assert ranges.high["conv_in"] > 0


def test_prompts_from_a_file(tiny: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \nthird\n")
    assert calibration_prompts(tiny, Calibration(prompts=2, prompts_file=str(path))) == ["a cat", "a dog"]
    with pytest.raises(RecipeError, match=r"has 3 prompts, calibration\.prompts asks for 4"):
        calibration_prompts(tiny, Calibration(prompts=4, prompts_file=str(path)))
    with pytest.raises(RecipeError, match="does not exist"):
        calibration_prompts(tiny, Calibration(prompts_file=str(tmp_path / "none.txt")))


# channel scales and groups of steps

TWO = {"prompts": 3, "batch_size": 2, "steps": STEPS, "guidance_scale": 3.0, "seed": 7}


def _scaled_recipe(make_recipe: MakeRecipe, **changes: Any) -> Recipe:
    scale = {"kinds": ["conv", "linear"], "match": ["conv_in", "*.attn2.to_[kv]"]}
    return make_recipe(calibration=TWO, channel_scale=scale, **changes)


def _ratios(observations: Observations) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        group: 1 + 5 * torch.rand(observer.peaks.shape[1], generator=generator)
        for group, observer in observations.channels.items()
    }


def test_channels_are_observed_beside_ranges(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    recipe = _scaled_recipe(make_recipe, bos="constant")
    observations = observe(tiny, plan_layers(tiny.denoiser, recipe), recipe)
    text = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    seen = _watch_by_hand(tiny, ["conv_in", text], recipe)
    assert set(observations.channels) == {"conv_in", "encoder_hidden_states"}
    for row, timestep in enumerate(observations.timesteps):
        images = torch.cat(seen["conv_in"][timestep])
        assert torch.equal(observations.channels["conv_in"].peaks[row], images.abs().amax(dim=(0, 2, 3)))
        tokens = torch.cat(seen[text][timestep])[:, 1:]
        assert torch.equal(observations.channels["encoder_hidden_states"].peaks[row], tokens.abs().amax(dim=(0, 1)))


def test_ranges_behind_channel_scales_are_those_of_the_quotients(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    recipe = _scaled_recipe(make_recipe, activation_rows="per_step")
    plans = plan_layers(tiny.denoiser, recipe)
    ratios = _ratios(observe(tiny, plans, recipe))
    observations = observe(tiny, plans, recipe, channel_ratios=ratios)
    assert not observations.channels
    ranges = observations.ranges(plans)
    text = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    seen = _watch_by_hand(tiny, ["conv_in", text, "conv_out"], recipe)
    for layer, group in (("conv_in", "conv_in"), (text, "encoder_hidden_states"), ("conv_out", "conv_out")):
        for row, timestep in enumerate(ranges.timesteps):
            x = torch.cat(seen[layer][timestep])
            if group in ratios:
                x = ChannelScale(ratios[group], "conv" if layer == "conv_in" else "linear")(x)
            assert ranges.low[group][row] == x.min()
            assert ranges.high[group][row] == x.max()
    assert "conv_out" not in ratios


def test_interrupted_second_run_goes_on_to_the_same_bits(
    tiny: LoadedModel, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = _scaled_recipe(make_recipe)
    plans = plan_layers(tiny.denoiser, recipe)
    calls: list[int] = []

    def first(**options: Any) -> Observations:
        return observe(tiny, plans, recipe, state_dir=tmp_path, **options)

    ratios = _ratios(first())
    whole = observe(tiny, plans, recipe, channel_ratios=ratios).ranges(plans)
    with pytest.raises(_InterruptError):
        first(channel_ratios=ratios, on_progress=_interrupt_after(STEPS + 1))  # in the second batch
    resumed = first(channel_ratios=ratios, on_progress=lambda done, _: calls.append(done))
    assert calls == [STEPS + 1, STEPS + 2, 2 * STEPS]
    assert _same(resumed.ranges(plans), whole)
    calls.clear()
    # both runs are found again, and the channels of the first with them
    again = first(on_progress=lambda done, _: calls.append(done))
    assert _same(first(channel_ratios=ratios, on_progress=lambda done, _: calls.append(done)).ranges(plans), whole)
    assert calls == []
    for group, ratio in _ratios(again).items():
        assert torch.equal(ratio, ratios[group])
    # other ratios are another calibration
    other = {group: ratio + 1 for group, ratio in ratios.items()}
    assert not _same(first(channel_ratios=other, on_progress=lambda done, _: calls.append(done)).ranges(plans), whole)
    assert len(calls) == 2 * STEPS


def test_saved_state_of_other_mechanisms_is_not_used(
    tiny: LoadedModel, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    calibration = {"prompts": 1, "batch_size": 1, "steps": 1, "seed": 7}
    calls: list[int] = []

    def run(**changes: Any) -> int:
        calls.clear()
        _run(
            tiny,
            make_recipe(calibration=calibration, **changes),
            state_dir=tmp_path,
            on_progress=lambda done, _: calls.append(done),
        )
        return len(calls)

    assert run() == 1
    assert run(bos="constant") == 1
    assert run(bos="constant") == 0
    assert run(softmax={"bits": 8}) == 1
    assert run(softmax={"bits": 4}) == 0
    assert run(channel_scale={"kinds": ["conv"]}) == 1


def test_steps_of_a_group_have_equal_rows(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(activation_rows={"method": "uniform", "count": 2}, softmax={"bits": 4, "mode": "uniform"})
    plans = plan_layers(tiny.denoiser, recipe)
    single = observe(tiny, plans, recipe)
    grouped = single.grouped((0, 1, 0))
    before, after = single.ranges(plans), grouped.ranges(plans)
    assert after.rows == STEPS  # tables always have a row per step
    assert after.timesteps == before.timesteps
    for key in before.low:
        shared = before.low[key][[0, 2]].min(), before.high[key][[0, 2]].max()
        assert after.low[key].tolist() == [shared[0], before.low[key][1], shared[0]]
        assert after.high[key].tolist() == [shared[1], before.high[key][1], shared[1]]
    assert any(before.high[key][0] != before.high[key][2] for key in before.high)
    settings = recipe.softmax
    assert settings is not None
    rows = [item for item in grouped.softmax_parameters(settings).values() if len(item.scale) > 1]
    assert rows
    for item in rows:
        assert item.scale.shape == (STEPS,)
        assert item.scale[0] == item.scale[2]
        assert torch.equal(item.mode, torch.zeros(STEPS))


def test_one_observation_serves_all_widths(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    """Ranges of a width are the same whether other widths were asked for before (methods.md 2.4 i)."""
    observer = {"kind": "mse", "exponent": 2.0}
    recipes = {bits: make_recipe({"bits": bits, "observer": observer}, calibration=TWO) for bits in (2, 4, 8)}
    plans = {bits: plan_layers(tiny.denoiser, recipe) for bits, recipe in recipes.items()}
    shared = observe(tiny, plans[8], recipes[8])
    for bits in (8, 2, 4):
        alone = observe(tiny, plans[bits], recipes[bits])
        assert _same(shared.ranges(plans[bits]), alone.ranges(plans[bits]))
