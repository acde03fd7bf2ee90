"""The scale benchmark: what it makes up for random models, and every preset on tiny ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qdexport.core.recipe import Recipe, load_recipe, preset_names
from qdexport.core.results import KernelFact, Plan
from qdexport.core.target import target_named
from qdexport.models.load import LoadedModel, loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.quant.plan import activation_keys, average_weight_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qdexport.quant.ranges import ActivationRanges

ROOT = Path(__file__).parents[2]
STEPS = 7


@pytest.fixture(autouse=True, scope="module")
def tool_modules() -> Iterator[None]:
    """Makes `benchmarks` importable, as it is for the script beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield


@pytest.fixture(scope="module")
def models() -> Callable[[str], LoadedModel]:
    made: dict[str, LoadedModel] = {}

    def model(name: str) -> LoadedModel:
        if name not in made:
            made[name] = loaded_from_denoiser(random_unet(name, torch.float16), name=name)
        return made[name]

    return model


def given(loaded: LoadedModel, recipe: Recipe, seed: int = 0) -> tuple[Any, ActivationRanges]:
    from benchmarks.synthetic import ddim_timesteps, synthetic_plans, synthetic_ranges

    plans = synthetic_plans(loaded, recipe, seed)
    ranges: ActivationRanges = synthetic_ranges(loaded, plans, recipe, ddim_timesteps(STEPS), seed)
    return plans, ranges


# --- what is made up ---


def test_rows_per_step_differ_and_the_text_has_one(models: Callable[[str], LoadedModel]) -> None:
    plans, ranges = given(models("tiny_sd"), load_recipe("tcaq-w8a8-init"))
    assert set(ranges.low) == {key for plan in plans for key in activation_keys(plan)}
    assert len(ranges.low["encoder_hidden_states"]) == 1
    others = [low for key, low in ranges.low.items() if key != "encoder_hidden_states"]
    assert others
    assert all(len(low.unique()) == STEPS for low in others)


@pytest.mark.parametrize(
    ("rows", "groups"),
    [("static", None), ("per_step", 7), ({"method": "uniform", "count": 3}, 3), ({"count": 4}, 4), ({}, 1)],
)
def test_groups_of_steps(rows: object, groups: int | None) -> None:
    from benchmarks.synthetic import step_groups

    data = load_recipe("w8a8").model_dump() | {"activation_rows": rows}
    found = step_groups(Recipe.model_validate(data), STEPS, 3)
    if groups is None:
        assert found is None
        return
    assert found is not None
    assert len(found) == STEPS
    assert list(dict.fromkeys(found)) == list(range(groups))  # numbered in their order, each a stretch
    assert sorted(found) == list(found)


def test_steps_of_a_group_have_equal_rows(models: Callable[[str], LoadedModel]) -> None:
    from benchmarks.synthetic import step_groups

    recipe = load_recipe("tcaq-w8a8-init", {"activation_rows": {"method": "clustered", "count": 3}})
    _, ranges = given(models("tiny_sd"), recipe)
    groups = step_groups(recipe, STEPS, 0)
    assert groups is not None
    tables = [low for low in ranges.low.values() if len(low) > 1]
    tables += [parameters.scale for parameters in ranges.softmax.values() if len(parameters.scale) > 1]
    assert tables
    for table in tables:
        assert len(table) == STEPS
        assert [float(value) for value in table] == [float(table[groups.index(group)]) for group in groups]


def test_channel_ratios_are_powers_of_two_or_anything_between(models: Callable[[str], LoadedModel]) -> None:
    plans, ranges = given(models("tiny_sd"), load_recipe("tcaq-w4a4-init", {"channel_scale.max_ratio": 10.0}))
    assert set(ranges.channel_ratios) == {plan.group for plan in plans if plan.channel_scale and plan.quantized}
    values = torch.cat(list(ranges.channel_ratios.values()))
    assert set(values.tolist()) == {1.0, 2.0, 4.0, 8.0}
    changes = {"channel_scale.max_ratio": 10.0, "channel_scale.power_of_two": False}
    _, free = given(models("tiny_sd"), load_recipe("tcaq-w4a4-init", changes))
    values = torch.cat(list(free.channel_ratios.values()))
    assert 1 <= float(values.min()) < 1.5
    assert 9 < float(values.max()) <= 10
    assert not given(models("tiny_sd"), load_recipe("w8a8"))[1].channel_ratios


def test_softmax_modes_are_mixed_by_block_and_row(models: Callable[[str], LoadedModel]) -> None:
    _, ranges = given(models("tiny_sdxl"), load_recipe("tcaq-w4a4-init"))
    shares = {float(parameters.mode.mean()) for parameters in ranges.softmax.values()}
    assert {0.0, 1.0} < shares  # blocks with one mode, and some with both
    assert all(bool((item.scale[item.mode == 1] == 1).all()) for item in ranges.softmax.values())
    for mode, value in (("uniform", 0.0), ("log2", 1.0)):
        _, ranges = given(models("tiny_sd"), load_recipe("tcaq-w4a4-init", {"softmax.mode": mode}))
        assert all(bool((item.mode == value).all()) for item in ranges.softmax.values())


def test_the_first_token_has_an_outlier(models: Callable[[str], LoadedModel]) -> None:
    _, ranges = given(models("tiny_sd"), load_recipe("mixdq-w8a8"))
    assert ranges.bos is not None
    assert ranges.bos.embedding.shape == (16,)
    assert float(ranges.bos.embedding.abs().max()) > 20
    assert given(models("tiny_sd"), load_recipe("w8a8"))[1].bos is None


def test_a_mechanism_does_not_change_the_ranges_of_another(models: Callable[[str], LoadedModel]) -> None:
    _, plain = given(models("tiny_sd"), load_recipe("w8a8"))
    _, again = given(models("tiny_sd"), load_recipe("w8a8", {"softmax": {}}))
    _, other = given(models("tiny_sd"), load_recipe("w8a8"), seed=1)
    assert {key: low.tolist() for key, low in plain.low.items()} == {
        key: low.tolist() for key, low in again.low.items()
    }
    assert plain.low["conv_in"] != other.low["conv_in"]


@pytest.mark.parametrize(("name", "target"), [("mixdq-w4a8", 4.0), ("mixdq-w5a8", 5.0)])
def test_random_widths_are_allowed_ones_about_the_target(
    name: str, target: float, models: Callable[[str], LoadedModel]
) -> None:
    loaded, recipe = models("tiny_sdxl"), load_recipe(name)
    plans, _ = given(loaded, recipe)
    settings = recipe.bit_allocation
    assert settings is not None
    # 83 layers of which none is a tenth of the network: later ones even out what earlier ones drew
    assert average_weight_bits(loaded.denoiser, plans) == pytest.approx(target, abs=0.15)
    for plan in plans:
        if plan.weight is None:
            continue
        content = ".ff." in plan.name or ".attn2." in plan.name
        protected = plan.name in settings.protect
        allowed = settings.content_weight_bits if content else settings.quality_weight_bits
        assert plan.weight.bits in ((8,) if protected else allowed)
    assert len({plan.weight.bits for plan in plans if plan.weight}) >= 5
    assert [plan.weight for plan in plans] == [plan.weight for plan in given(loaded, recipe)[0]]
    assert [plan.weight for plan in plans] != [plan.weight for plan in given(loaded, recipe, seed=1)[0]]


def test_random_activation_widths_are_equal_where_layers_share_a_tensor(models: Callable[[str], LoadedModel]) -> None:
    from qdexport.quant.attach import quantize_model

    loaded = models("tiny_sd")
    recipe = load_recipe("mixdq-w8a8", {"bit_allocation": {"activation_target": 6.0, "objective": "average_bits"}})
    plans, ranges = given(loaded, recipe)
    widths: dict[str, set[int]] = {}
    for plan in plans:
        if plan.activation is not None and plan.quantized:
            widths.setdefault(plan.group, set()).add(plan.activation.bits)
    assert all(len(found) == 1 for found in widths.values())
    assert {bits for found in widths.values() for bits in found} == {4, 8}
    quantize_model(loaded, plans, recipe, ranges)


# --- every preset ---


# the others differ from these in widths alone
_DISTINCT = ("emf-w4a8-init", "mixdq-w4a8", "tcaq-w4a4-init", "w8a8-asym")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    # the others differ in widths alone; `tools/bench_scale.py --recipe all` runs every one on every model
    [*((name, "tiny_sd") for name in _DISTINCT), ("mixdq-w4a8", "tiny_sdxl"), ("tcaq-w4a4-init", "tiny_sdxl")],
)
def test_a_preset_lowers_to_what_was_planned(
    name: str, model: str, models: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    from benchmarks.export_child import ExportSettings, export_quantized
    from benchmarks.scale import audited

    body = "fp16" if model == "tiny_sd" else "fp32"
    settings = ExportSettings(
        recipe=load_recipe(name, {"body": body}),
        target=target_named("tensorrt-rtx"),
        steps=STEPS,
        seed=0,
        parity=True,
        folder=tmp_path,
    )
    facts = export_quantized(models(model), settings, {})
    found = audited(facts["planned"], facts["onnx"], None)
    assert found["mismatches"] == []
    assert found["layers_by_type"]["onnx"] == found["layers_by_type"]["planned"]
    assert facts["parity"]["problems"] == []
    assert facts["parity"]["largest_flip_rate"] == 0
    assert facts["parity"]["layers"] >= facts["layers_quantized"]
    assert facts["body"] == body
    json.dumps(facts)


@pytest.mark.rtx
@pytest.mark.slow
def test_a_whole_run_finds_the_planned_types_in_the_engine(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from benchmarks.scale import ScaleJob, run_scale

    from qdexport.core.progress import SilentProgress

    job = ScaleJob(
        model="tiny_sd",
        recipe=load_recipe("tcaq-w4a4-init"),
        target=target_named("tensorrt-rtx"),
        capabilities=("8.9",),
        steps=STEPS,
        seed=0,
        parity=True,
        fp16_baseline=False,
        naive_baseline=True,
        folder=tmp_path,
    )
    result = run_scale(job, SilentProgress())
    assert result["mismatches"] == []
    assert result["parity"]["problems"] == []
    assert result["layers_by_type"]["engine"] == {"folded": 10, "int8": 77}
    assert result["layers_by_type"]["planned"]["int4"] == result["layers_by_type"]["onnx"]["int4"] > 0
    assert result["fp_compute"] == 0
    assert result["naive_kernels"] > result["kernels"] > 0
    assert result["naive_moved_ratio"] < 1
    assert 4 < result["average_weight_bits"] < 4.1
    assert set(result["stages"]) == {"import", "load", "quantize", "export", "parity", "build"}


# --- what is said about it ---


def kernel(node: str, dtype: str) -> KernelFact:
    operands = [f"{dtype}[2,8,4,4] x", f"const {dtype}[8,8,3,3] w"]
    return KernelFact(index=0, name="conv", kind="gemm", inputs=operands, outputs=["fp16[2,8,4,4] y"], nodes=[node])


def test_types_that_differ_are_named() -> None:
    from benchmarks.scale import audited

    planned = {"a": "int8", "b": "int8", "time": "folded"}
    plan = Plan(target="tensorrt-rtx", kernels=[kernel("a/Conv", "int8"), kernel("b/Conv", "fp16")])
    found = audited(planned, planned, plan)
    assert found["layers_by_type"]["engine"] == {"folded": 1, "fp16": 1, "int8": 1}
    assert found["mismatches"] == ["b: planned int8, int8 in the ONNX file, fp16 in the engine"]
    assert audited(planned, planned, None)["mismatches"] == []
    assert audited(planned, {**planned, "a": "fp16"}, None)["mismatches"] == ["a: planned int8, fp16 in the ONNX file"]


@pytest.mark.parametrize(
    ("mismatches", "problems", "code"),
    [([], [], 0), (["b: planned int8, fp16 in the ONNX file"], [], 8), ([], ["integer weights differ in 1 layer"], 8)],
)
def test_a_difference_fails_after_the_results_are_shown(
    mismatches: list[str],
    problems: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import bench_scale

    seen = []

    def run(job: Any, progress: object) -> dict[str, Any]:
        del progress
        seen.append((job.recipe.name, job.model, job.parity))
        return {
            "model": job.model,
            "recipe": job.recipe.name,
            "mismatches": mismatches,
            "parity": {"problems": problems},
        }

    monkeypatch.setattr(bench_scale, "run_scale", run)
    monkeypatch.setattr("sys.argv", ["bench_scale.py", "--model", "tiny_sd", "--recipe", "all", "--parity", "--json"])
    with pytest.raises(SystemExit) as ended:
        bench_scale.main()
    said = capsys.readouterr()
    assert ended.value.code == code
    assert len(json.loads(said.out)["models"]) == len(preset_names())
    assert seen == [(name, "tiny_sd", True) for name in preset_names()]
    for problem in [*mismatches, *problems]:
        assert f"tiny_sd w8a8: {problem}" in said.err
