"""A folder that is used again: what belongs to an earlier run is never shown, and what is damaged is never used."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from qdexport import __version__
from qdexport.cli.main import cli
from qdexport.core.digests import tree_files, tree_sha256
from qdexport.core.files import atomic_dir
from qdexport.core.results import Manifest, Report
from qdexport.errors import ModelError
from qdexport.models.tiny import save_tiny_pipeline
from qdexport.pipeline.continuing import continued, recognised
from qdexport.pipeline.workspace import Made, Workspace

FEW = (
    "--companions", "none", "--target", "onnxruntime", "--set", "calibration.prompts=1", "--set", "calibration.steps=3",
    "--set", "validation.images=2", "--set", "validation.floor_seeds=1", "--set", "validation.floor_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny", "unet2d")


def compiled_folder(tmp_path_factory, model, recipe):
    out = tmp_path_factory.mktemp("reused") / "out"
    arguments = ["compile", str(model), "--recipe", recipe, "--out", str(out), *FEW]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code in (0, 8), done.output  # what becomes of pictures of random weights does not matter here
    return out


@pytest.fixture(scope="module")
def first(tmp_path_factory, model):
    return compiled_folder(tmp_path_factory, model, "w8a8")


@pytest.fixture
def out(first, tmp_path):
    return shutil.copytree(first, tmp_path / "out")


def says(result):
    return " ".join(result.output.split())


def test_another_recipe_leaves_nothing_of_the_earlier_one(out, model, qdexport):
    (out / "checkpoint" / "notes.txt").write_text("mine")
    result = qdexport("quantize", model, "--recipe", "w4a8", "--out", out, *FEW)
    assert result.exit_code == 0, result.output
    assert "PASS" not in result.output
    assert f"Next: qdexport export {out}" in says(result)
    report = Report.load(out / "report.json")
    assert report.recipe == "w4a8"
    assert (report.parity, report.quality, report.coverage, report.body) == (None, None, None, "")
    assert set(report.stages) == {"quantize"}
    assert report.notes == []
    manifest = Manifest.load(out / "manifest.json")
    assert {item.path for item in manifest.artifacts} == {"checkpoint", "report.json"}
    assert not manifest.profiles
    left = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert left == ["checkpoint", "manifest.json", "report.json"]
    assert (out / "checkpoint" / "notes.txt").read_text() == "mine"

    for verb in ("build", "validate", "sample"):
        refused = qdexport(verb, out)
        assert refused.exit_code == 3, refused.output
        assert "holds no ONNX file" in says(refused)
        assert f"qdexport export {out}" in says(refused)
        assert "integer weights" not in refused.output
    pictures = out.parent / "pictures"
    alone = qdexport("sample", out, "--with", "quantized", "--count", 1, "--out", pictures)
    assert alone.exit_code == 0, alone.output


def test_the_same_recipe_keeps_everything(out, model, qdexport):
    before = {path: tree_sha256(out / path) for path in ("checkpoint", "onnx", "golden", "images")}
    result = qdexport("quantize", model, "--recipe", "w8a8", "--out", out, *FEW)
    assert result.exit_code == 0, result.output
    assert {path: tree_sha256(out / path) for path in before} == before
    assert Report.load(out / "report.json").parity is not None


def test_fewer_images_leave_none_of_the_earlier_ones(out, model, qdexport):
    result = qdexport("compile", model, "--recipe", "w8a8", "--out", out, *FEW, "--set", "validation.images=1")
    assert result.exit_code in (0, 8), result.output
    assert {path.name for path in (out / "images").glob("*/*.png")} == {"000.png"}


READERS = {
    "checkpoint/unet/diffusion_pytorch_model.safetensors": ("export", "build", "validate", "sample", "inspect"),
    "checkpoint/quantization.safetensors": ("export", "validate", "sample", "inspect"),
    "checkpoint/recipe.yaml": ("export", "validate", "sample", "inspect"),
    "checkpoint/model_index.json": ("export", "inspect"),
    "onnx/model.onnx": ("build", "validate", "sample", "inspect"),
    "onnx/passes.json": ("inspect",),
    "golden/00.npz": ("inspect",),
    "images/fp/000.png": ("inspect",),
    "report.html": ("inspect",),
}


@pytest.mark.parametrize("how", ["bit", "cut", "empty", "gone"])
@pytest.mark.parametrize("file", READERS)
def test_a_damaged_file_stops_every_verb_that_reads_it(out, qdexport, file, how):
    path = out / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes({"bit": bytes(data), "cut": bytes(data[:-1])}.get(how, b""))
    if how == "gone":
        path.unlink()
    for verb in READERS[file]:
        result = qdexport(verb, out)
        assert result.exit_code == 10, (verb, result.output)
        assert file.rpartition("/")[2] in says(result)
        assert ("is missing" if how == "gone" else "was changed after it was written") in says(result)
        assert "Traceback" not in result.output


@pytest.mark.parametrize("file", ["checkpoint/unet/config.json", "golden/00.npz"])
def test_compile_makes_what_is_damaged_again(out, model, first, qdexport, file):
    (out / file).write_bytes(b"damaged")
    result = qdexport("compile", model, "--recipe", "w8a8", "--out", out, *FEW)
    assert result.exit_code in (0, 8), result.output
    assert (out / file).read_bytes() == (first / file).read_bytes() or file.endswith("npz")
    assert qdexport("inspect", out).exit_code == 0


def test_folders_of_two_runs_are_not_mixed(out, tmp_path, model, qdexport):
    """Each is whole, and belongs to the other manifest."""
    other = shutil.copytree(out, tmp_path / "other")
    assert qdexport("quantize", model, "--recipe", "w8a8-asym", "--out", other, *FEW).exit_code == 0
    shutil.rmtree(out / "checkpoint")
    shutil.copytree(other / "checkpoint", out / "checkpoint")
    for verb in ("export", "validate", "sample"):
        result = qdexport(verb, out)
        assert result.exit_code == 10, result.output
        assert "was changed" in says(result)


DAMAGED = ["", "{", "[]", '{"schema_version": 2}', "\x00", "NaN"]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_manifest_says_what_to_do(out, qdexport, text):
    (out / "manifest.json").write_text(text)
    for verb in ("export", "build", "validate", "sample", "inspect"):
        result = qdexport(verb, out)
        assert result.exit_code == 10, result.output
        assert "manifest.json is not a manifest file of qdexport" in says(result)
        assert "run the `qdexport compile` or `quantize` that made this folder again" in says(result)
    found = recognised(out)
    manifest = Manifest(tool_version="", model="", recipe_digest="", target="")
    assert {name.partition("/")[0] for name in found} == {
        "checkpoint", "golden", "images", "onnx", "report.html", "report.json"
    }  # fmt: skip
    continued(out, manifest, Report(tool_version="", model="", recipe="", target=""), heal=True)
    assert Manifest.load(out / "manifest.json").claimed == found
    assert (out / "manifest.json.damaged").read_text() == text


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_report_counts_for_nothing(out, text):
    (out / "report.json").write_text(text)
    manifest = Manifest(tool_version=__version__, model="", recipe_digest="", target="onnxruntime")
    header = Report(tool_version=__version__, model="", recipe="", target="onnxruntime")
    manifest, report = continued(out, manifest, header.model_copy(), heal=False)
    assert report == header
    assert {"checkpoint", "onnx", "golden"} <= {item.kind for item in manifest.artifacts}


@pytest.mark.parametrize(("name", "text"), [("manifest.json", "{"), ("report.json", "NaN")])
def test_compile_heals_a_damaged_manifest_or_report(out, model, qdexport, name, text):
    (out / name).write_text(text)
    (out / "onnx" / "notes.txt").write_text("mine")
    told = qdexport("inspect", out)
    assert told.exit_code == 10, told.output
    assert name in says(told)
    assert "run " in says(told)
    result = qdexport("compile", model, "--recipe", "w8a8", "--out", out, *FEW)
    assert result.exit_code in (0, 8), result.output
    assert Report.load(out / "report.json").parity is not None
    assert qdexport("inspect", out).exit_code == 0
    assert (out / "onnx" / "notes.txt").read_text() == "mine"


def test_a_damaged_manifest_gives_nothing_away_that_is_not_ours(tmp_path, model, qdexport):
    out = tmp_path / "out"
    for name in ("checkpoint/model.safetensors", "onnx/model.onnx", "images/fp/000.png"):
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
    (out / "manifest.json").write_text("{")
    before = tree_files(out)
    result = qdexport("compile", model, "--recipe", "w8a8", "--out", out, *FEW)
    assert result.exit_code == 10, result.output
    assert "choose another --out" in says(result)
    assert {name: digest for name, digest in tree_files(out).items() if name != ".lock"} == before


def test_a_report_that_somebody_edited_is_not_believed(out, qdexport):
    report = json.loads((out / "report.json").read_text())
    report["parity"]["layers"][0]["sqnr_db"] = 500.0
    (out / "report.json").write_text(json.dumps(report))
    assert "report.json was changed" in says(qdexport("inspect", out))
    result = qdexport("validate", out)
    assert result.exit_code in (0, 8), result.output
    parity = Report.load(out / "report.json").parity
    assert parity is not None
    assert parity.layers[0].sqnr_db < 500


def test_force_starts_from_nothing(out, model, qdexport):
    """A state that says nonsense would be found again, its checksum being right."""
    state = next((out / ".calibration").glob("*.safetensors"))
    before = state.stat().st_ino
    assert qdexport("quantize", model, "--recipe", "w8a8", "--out", out, *FEW).exit_code == 0
    assert state.stat().st_ino == before
    assert qdexport("quantize", model, "--recipe", "w8a8", "--out", out, *FEW, "--force").exit_code == 0
    assert state.stat().st_ino != before


@pytest.mark.parametrize("edited", [False, True])
def test_widths_that_were_chosen_go_with_their_checkpoint(tmp_path, edited):
    """Unless somebody edited them: then they are his."""
    manifest = Manifest(tool_version=__version__, model="m", recipe_digest="r", target="onnxruntime")
    report = Report(tool_version=__version__, model="m", recipe="r", target="onnxruntime")
    bits, checkpoint = tmp_path / "bits.yaml", tmp_path / "checkpoint"

    def quantize(text):
        with atomic_dir(checkpoint, workspace) as partial:
            (partial / "recipe.yaml").write_text(text)
        return [Made("checkpoint", checkpoint)]

    with Workspace.open(tmp_path, manifest, report) as workspace:
        workspace.run_stage("quantize", {"recipe": "1"}, lambda: quantize("first"))
        workspace.claim([bits])
        bits.write_text("chosen")
        workspace.record("bits", workspace.inputs("bits"), [Made("bit_plan", bits)])
        workspace.run_stage("quantize", {"recipe": "1"}, lambda: quantize("first"), force=True)
        assert bits.read_text() == "chosen"
        if edited:
            bits.write_text("mine")
        workspace.run_stage("quantize", {"recipe": "2"}, lambda: quantize("second"))
        assert bits.is_file() is edited
        assert {item.path for item in workspace.manifest.artifacts} == {"checkpoint", "report.json"}


def test_a_stage_that_fails_strikes_nothing(tmp_path):
    """Neither on the disk nor for the next run, although its own earlier results are out of date."""
    manifest = Manifest(tool_version=__version__, model="m", recipe_digest="r", target="onnxruntime")
    report = Report(tool_version=__version__, model="m", recipe="r", target="onnxruntime")

    def work(text):
        with atomic_dir(tmp_path / "checkpoint", workspace) as partial:
            (partial / "recipe.yaml").write_text(text)
        workspace.report.notes.append(f"{text} was made")
        return [Made("checkpoint", tmp_path / "checkpoint")]

    def fails():
        raise ModelError("it cannot be")

    with Workspace.open(tmp_path, manifest, report) as workspace:
        workspace.run_stage("quantize", {"recipe": "1"}, lambda: work("first"))
    before = tree_files(tmp_path)
    with pytest.raises(ModelError), Workspace.open(tmp_path, manifest, report) as workspace:
        workspace.run_stage("quantize", {"recipe": "2"}, fails)
    assert tree_files(tmp_path) == before
    with Workspace.open(tmp_path, manifest, report) as workspace:
        assert workspace.report.notes == ["first was made"]
        assert workspace.run_stage("quantize", {"recipe": "1"}, fails)
        workspace.run_stage("quantize", {"recipe": "2"}, lambda: work("second"))
        assert workspace.report.notes == ["second was made"]
