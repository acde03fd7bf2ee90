"""What is made from what: one change makes exactly what was made from it stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdexport.core.results import Artifact, CompanionResult, Manifest, Report, StageFacts
from qdexport.errors import DamagedError, ModelError
from qdexport.pipeline.lineage import (
    STAGES,
    Lineage,
    check_made,
    clear_results,
    next_command,
    order_of,
    stage_named,
)

NET = "vae_decoder"
FILES = {
    "quantize": [("checkpoint", "checkpoint")],
    "search": [("forms", "search/forms.json"), ("log", "search/search.json")],
    "export": [("log", "onnx/passes.json"), ("onnx", "onnx/model.onnx")],
    f"export:{NET}": [("companion_onnx", f"{NET}/onnx/model.onnx")],
    "build": [("engine", "engine/model.engine"), ("plan", "engine/plan.json"), ("log", "engine/build.log")],
    f"build:{NET}": [("companion_engine", f"{NET}/engine/model.engine"), ("companion_plan", f"{NET}/engine/plan.json")],
    "validate": [("golden", "golden"), ("images", "images")],
    "validate:companions": [("companion_golden", f"{NET}/golden")],
    "bits": [("bit_plan", "bits.yaml")],
    "report": [("report", "report.html")],
}
RECIPE = 'schema_version: 1\nname: r\nrules:\n  - {match: "*", weight: {bits: 8}}\n'
CHECKPOINT = {
    "unet/w.safetensors": "unet", "vae/w.safetensors": "vae", "vae/config.json": "{}", "recipe.yaml": RECIPE,
    "quantization.safetensors": "codes",
}  # fmt: skip


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make(root: Path, manifest: Manifest, stage: str, text: str = "first") -> None:
    """Does a stage: writes its files, and enters them with what they were made from."""
    inputs = Lineage(root, manifest).inputs(stage)
    assert inputs is not None, stage
    manifest.artifacts = [item for item in manifest.artifacts if item.stage != stage]
    for kind, name in FILES[stage]:
        if kind == "checkpoint":
            for file, content in CHECKPOINT.items():
                if not (root / name / file).exists():
                    write(root / name / file, content)
        elif "." in name:
            write(root / name, f"{text} {name}")
        else:
            write(root / name / "00.npz", f"{text} {name}")
        manifest.artifacts.append(Artifact.of(root, root / name, kind, stage, inputs))


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Manifest]:
    """An output folder in which every stage was made."""
    manifest = Manifest(tool_version="1", model="m", recipe_digest="r", target="tensorrt-rtx")
    for stage in sorted(FILES, key=order_of):
        make(tmp_path, manifest, stage)
    return tmp_path, manifest


def stale(root: Path, manifest: Manifest) -> set[str]:
    """Names of the stages that would be struck, one after the other."""
    found: set[str] = set()
    for stage in Lineage(root, manifest).made():
        if Lineage(root, manifest).is_stale(stage):
            found.add(stage)
            manifest.artifacts = [item for item in manifest.artifacts if item.stage != stage]
    return found


def test_every_key_of_a_report_belongs_to_a_stage() -> None:
    """A key that no stage fills would outlive what it tells of."""
    header = {"schema_version", "tool_version", "model", "recipe", "target"}
    by_itself = {"companions", "stages", "notes"}  # struck stage by stage
    filled = [section for stage in STAGES for section in stage.sections]
    assert len(filled) == len(set(filled))
    assert set(filled) == set(Report.model_fields) - header - by_itself


def test_stages_stand_behind_what_they_are_made_from() -> None:
    names = [stage.name for stage in STAGES]
    for place, stage in enumerate(STAGES):
        read = {*stage.made_from, *stage.also_reads} - {"target", "component", "networks", "everything"}
        assert read <= set(names[:place]), stage.name
        assert set(stage.unless_absent) <= set(stage.made_from)


def test_nothing_is_stale_when_nothing_changed(made: tuple[Path, Manifest]) -> None:
    assert stale(*made) == set()


@pytest.mark.parametrize("stage", sorted(FILES))
def test_a_stage_that_made_the_same_again_leaves_the_rest(made: tuple[Path, Manifest], stage: str) -> None:
    make(*made, stage)
    assert stale(*made) == set()


NETWORKS = {f"export:{NET}", f"build:{NET}"}


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("checkpoint/unet/w.safetensors", {*FILES} - {"quantize"} - NETWORKS),
        ("checkpoint/quantization.safetensors", {*FILES} - {"quantize"} - NETWORKS),
        ("checkpoint/vae/w.safetensors", {*FILES} - {"quantize"}),
        ("checkpoint/vae/config.json", {*FILES} - {"quantize"}),
        ("search/forms.json", {"export", "build", "validate", "validate:companions", "report"}),
        ("search/search.json", {"report"}),
        ("onnx/model.onnx", {"build", "validate", "validate:companions", "report"}),
        ("onnx/passes.json", {"report"}),
        ("engine/plan.json", {"validate", "report"}),
        ("engine/model.engine", {"report"}),
        (f"{NET}/onnx/model.onnx", {f"build:{NET}", "validate:companions", "report"}),
        (f"{NET}/engine/plan.json", {"report"}),
        ("golden/00.npz", {"report"}),
    ],
)
def test_what_is_made_from_a_file_is_stale_when_that_is_another(
    made: tuple[Path, Manifest], file: str, stages: set[str]
) -> None:
    root, manifest = made
    stage = next(name for name, files in FILES.items() if any(f"{file}/".startswith(f"{path}/") for _, path in files))
    inputs = Lineage(root, manifest).inputs(stage)
    assert inputs is not None
    write(root / file, "{}" if file.endswith("config.json") else "second")
    if file.endswith("config.json"):
        write(root / file, '{"scaling_factor": 1}')
    again = [Artifact.of(root, root / item.path, item.kind, stage, inputs) for item in Lineage(*made).artifacts(stage)]
    manifest.artifacts = [item for item in manifest.artifacts if item.stage != stage] + again
    assert stale(root, manifest) == stages


@pytest.mark.parametrize(
    ("change", "networks_too"),
    [
        ("companions: {body: fp32}\n", True),
        ("companions: {networks: none}\n", True),
        ("body: fp16\n", True),
        ("opset: 22\n", True),
        ("shapes: {batch: 4}\n", True),
        ("validation: {images: 3}\n", False),
        ("calibration: {prompts: 3}\n", False),
    ],
)
def test_what_a_recipe_says_about_networks(made: tuple[Path, Manifest], change: str, networks_too: bool) -> None:
    root, manifest = made
    write(root / "checkpoint" / "recipe.yaml", RECIPE + change)
    make(root, manifest, "quantize")
    assert (stale(root, manifest) >= NETWORKS) is networks_too


def test_another_target_leaves_the_checkpoint_alone(made: tuple[Path, Manifest]) -> None:
    root, manifest = made
    manifest.target = "onnxruntime"
    assert stale(root, manifest) == {*FILES} - {"quantize", "bits"}


def test_a_search_that_was_taken_back(made: tuple[Path, Manifest]) -> None:
    root, manifest = made
    manifest.artifacts = [item for item in manifest.artifacts if item.stage != "search"]
    assert {"export", "build", "validate"} <= stale(root, manifest)


def test_what_a_report_says_goes_with_its_stage() -> None:
    network = CompanionResult(
        class_name="c", body="fp16", why_body="", usage="", nodes=1, onnx_bytes=1,
        layers={"onnx": {"fp16": 1}, "engine": {"fp32": 1}},
        mismatches=["a: planned fp16, fp32 in the ONNX file", "b: planned fp16, fp32 in the engine"],
    )  # fmt: skip
    facts = StageFacts(seconds=1, peak_rss_mb=1, cached=False)
    report = Report(
        tool_version="1", model="m", recipe="r", target="t", body="fp32", companions={NET: network},
        notes=["of the build", "of the export"],
        stages={
            "export": facts.model_copy(update={"notes": ["of the export"]}),
            "build": facts.model_copy(update={"notes": ["of the build"]}), f"build:{NET}": facts,
        },
    )  # fmt: skip
    clear_results(report, "build")
    assert (report.notes, set(report.stages)) == (["of the export"], {"export", f"build:{NET}"})
    clear_results(report, f"build:{NET}")
    assert report.companions is not None
    assert report.companions[NET].layers["engine"] == {}
    assert report.companions[NET].mismatches == ["a: planned fp16, fp32 in the ONNX file"]
    clear_results(report, "validate")
    assert report.body == ""
    clear_results(report, f"export:{NET}")
    assert report.companions is None


@pytest.mark.parametrize(
    ("gone", "verb", "remedy"),
    [
        ("quantize", "export", "qdexport quantize m --out"),
        ("export", "build", "qdexport export"),
        ("export", "validate", "qdexport export"),
        (f"export:{NET}", f"build:{NET}", "qdexport export"),
    ],
)
def test_what_is_missing_says_what_makes_it(made: tuple[Path, Manifest], gone: str, verb: str, remedy: str) -> None:
    root, manifest = made
    manifest.artifacts = [item for item in manifest.artifacts if item.stage != gone]
    with pytest.raises(ModelError, match=f"holds no .*run `{remedy}"):
        check_made(root, manifest, verb)


@pytest.mark.parametrize("how", ["bit", "cut", "gone"])
@pytest.mark.parametrize(
    ("file", "verbs", "remedy"),
    [
        ("checkpoint/unet/w.safetensors", ("search", "export", "build", "validate", f"export:{NET}"), "quantize"),
        ("checkpoint/recipe.yaml", ("export", "build", "validate", "validate:companions"), "quantize"),
        ("search/forms.json", ("export",), "search"),
        ("onnx/model.onnx", ("build", "validate", "validate:companions"), "export"),
        ("engine/model.engine", ("validate",), "build"),
        ("engine/plan.json", ("validate",), "build"),
        (f"{NET}/onnx/model.onnx", (f"build:{NET}", "validate:companions"), "export"),
        (f"{NET}/engine/model.engine", ("validate:companions",), "build"),
    ],
)
def test_a_damaged_file_stops_who_reads_it(
    made: tuple[Path, Manifest], file: str, verbs: tuple[str, ...], remedy: str, how: str
) -> None:
    root, manifest = made
    path = root / file
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data if how == "bit" else data[:-1])
    if how == "gone":
        path.unlink()
    for verb in verbs:
        with pytest.raises(DamagedError, match=f"{file} (was changed|is missing).*run `qdexport {remedy}") as caught:
            check_made(root, manifest, verb)
        assert caught.value.exit_code == 10
    others = {stage_named(name).name for name in FILES} - {stage_named(verb).name for verb in verbs}
    assert "report" in others
    check_made(root, manifest, "report")


def test_files_of_the_user_in_a_folder_of_ours_do_not_count(made: tuple[Path, Manifest]) -> None:
    root, manifest = made
    write(root / "checkpoint" / "notes.txt", "mine")
    write(root / "onnx" / "notes.txt", "mine")
    check_made(root, manifest, "validate")


def test_an_older_file_is_no_file_of_this_checkpoint(made: tuple[Path, Manifest]) -> None:
    root, manifest = made
    write(root / "checkpoint" / "quantization.safetensors", "other codes")
    make(root, manifest, "quantize")
    with pytest.raises(ModelError, match=r"the ONNX file in .* was made from another checkpoint .*qdexport export"):
        check_made(root, manifest, "validate")
    manifest.target = "onnxruntime"
    make(root, manifest, "search")
    with pytest.raises(ModelError, match=r"was made for another target .*qdexport export"):
        check_made(root, manifest, "build")


def test_an_engine_of_another_onnx_file_is_not_validated(made: tuple[Path, Manifest]) -> None:
    """The file was exported again, and is what the manifest says; the engine beside it was not built from it."""
    root, manifest = made
    make(root, manifest, "export", "second")
    with pytest.raises(ModelError, match=r"the engine in .* was made from another ONNX file .*qdexport build"):
        check_made(root, manifest, "validate")


def test_a_stage_of_a_manifest_from_elsewhere(made: tuple[Path, Manifest]) -> None:
    root, manifest = made
    write(root / "a", "")
    for stage in ("mystery", "mystery:x", "build:x"):
        manifest.artifacts.append(Artifact.of(root, root / "a", "log", stage, {}))
    assert stale(root, manifest) == {"build:x", "report"}
    clear_results(Report(tool_version="1", model="m", recipe="r", target="t"), "mystery")


def test_what_comes_next(made: tuple[Path, Manifest]) -> None:
    root, manifest = made
    assert next_command(root, manifest, builds=True) is None
    manifest.artifacts = [item for item in manifest.artifacts if item.stage in {"quantize", "export", "validate"}]
    assert next_command(root, manifest, builds=True) == f"qdexport build {root}"
    assert next_command(root, manifest, builds=False) is None
