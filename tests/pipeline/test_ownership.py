"""An output folder: who may write there, what is removed, and what of the user's stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qdexport.core.files import atomic_dir, write_text
from qdexport.core.results import Artifact, Manifest, Report
from qdexport.errors import ModelError, OutputError
from qdexport.pipeline.workspace import Made, Workspace


def opened(root: Path, version: str = "") -> object:
    from qdexport import __version__

    header = {"tool_version": version or __version__, "model": "m", "target": "t"}
    return Workspace.open(root, Manifest(recipe_digest="d", **header), Report(recipe="r", **header))


def stage(workspace: Workspace, *files: str) -> None:
    folder = workspace.root / "checkpoint"

    def work() -> list[Made]:
        with atomic_dir(folder, workspace) as partial:
            for file in files:
                write_text(partial / file, "ours")
        return [Made("checkpoint", folder)]

    workspace.run_stage("quantize", {"n": str(len(files))}, work)


def names(root: Path) -> list[str]:
    return sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path.suffix != ".json"
    )


@pytest.mark.parametrize("name", ["notes.txt", "onnx/m.onnx", "golden/x", ".secret", "images/fp/0", "manifest2.json"])
def test_a_folder_with_files_and_no_manifest_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text("user")
    with pytest.raises(OutputError, match="no output folder of qdexport") as caught, opened(tmp_path):
        pass
    assert caught.value.exit_code == 10
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


@pytest.mark.parametrize("name", [".lock", ".calibration/calibration.safetensors", ".gitkeep", ".qdexport-new.x.a"])
def test_what_a_run_leaves_that_was_stopped_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with opened(tmp_path) as workspace:
        stage(workspace, "a")


def test_files_of_the_user_stay_in_a_stages_folder(tmp_path: Path) -> None:
    with opened(tmp_path) as workspace:
        stage(workspace, "a", "b")
    (tmp_path / "checkpoint" / "deep").mkdir()
    (tmp_path / "checkpoint" / "deep" / "mine").write_text("user")
    (tmp_path / "checkpoint" / "link").symlink_to("deep")
    with opened(tmp_path) as workspace:
        stage(workspace, "a")
    with opened(tmp_path) as workspace:
        stage(workspace, "c", "d", "e")
        assert list(workspace.manifest.artifacts[0].files or {}) == ["c", "d", "e"]
        workspace.strike("quantize")
        workspace.save()
    assert names(tmp_path / "checkpoint") == ["deep/mine"]
    assert (tmp_path / "checkpoint" / "link").is_symlink()


def test_a_folder_of_the_users_with_a_stages_name(tmp_path: Path) -> None:
    with opened(tmp_path) as workspace:
        stage(workspace, "a")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_text("user")
    with pytest.raises(OutputError, match=r"onnx/model.onnx is not of qdexport"), opened(tmp_path):
        pass
    (tmp_path / "onnx" / "model.onnx").rename(tmp_path / "onnx" / "mine")
    with opened(tmp_path) as workspace:
        with atomic_dir(tmp_path / "onnx", workspace) as partial:
            (partial / "model.onnx").write_text("ours")
        assert names(tmp_path / "onnx") == ["mine", "model.onnx"]
        (tmp_path / "onnx" / "model.onnx").unlink()
        workspace.save()
    with opened(tmp_path):  # what is struck leaves a folder that holds the user's alone
        assert names(tmp_path / "onnx") == ["mine"]
    (tmp_path / "images").write_text("user")
    with pytest.raises(OutputError, match=r"images is not of qdexport"), opened(tmp_path):
        pass
    (tmp_path / "images").unlink()
    with opened(tmp_path) as workspace:
        (tmp_path / "onnx" / "model").write_text("user")

        def emit(workspace: Workspace) -> None:
            with atomic_dir(tmp_path / "onnx", workspace) as partial:
                (partial / "model").write_text("ours")

        with pytest.raises(OutputError, match=r"onnx/model is not of qdexport"):
            emit(workspace)
    assert (tmp_path / "onnx" / "model").read_text() == "user"


def test_a_run_that_was_stopped_before_its_stage_was_recorded(tmp_path: Path) -> None:
    def stop() -> None:
        with opened(tmp_path) as workspace, atomic_dir(tmp_path / "checkpoint", workspace) as partial:
            (partial / "a").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    (tmp_path / "checkpoint" / "mine").write_text("user")
    with opened(tmp_path) as workspace:
        stage(workspace, "b")
    assert names(tmp_path / "checkpoint") == ["b", "mine"]


def test_what_an_older_version_wrote_is_still_ours(tmp_path: Path) -> None:
    with opened(tmp_path, "0.0.1") as workspace:
        stage(workspace, "a")
    with opened(tmp_path) as workspace:
        assert workspace.manifest.artifact("checkpoint") is None
        (tmp_path / "checkpoint" / "mine").write_text("user")
        stage(workspace, "b")
    assert names(tmp_path / "checkpoint") == ["b", "mine"]


@pytest.mark.parametrize("name", ["onnx", "images", "manifest.json", ".calibration", "vae_decoder", "bits.yaml"])
def test_links_in_the_place_of_a_stage(tmp_path: Path, name: str) -> None:
    root, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("user")
    with opened(root) as workspace:
        stage(workspace, "a")
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(other)
    with pytest.raises(OutputError, match=r"is a link|no output folder"), opened(root):
        pass
    assert names(other) == ["mine"]


def test_an_output_folder_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with opened(tmp_path / "out") as workspace:
        stage(workspace, "a")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "checkpoint" / "a").is_file()
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(OutputError, match="not there"), opened(tmp_path / "gone"):
        pass


@pytest.mark.parametrize("name", ["../victim", "/etc", "a/../../b", "onnx\\..\\x", ""])
def test_a_manifest_that_names_what_is_outside(tmp_path: Path, name: str) -> None:
    entry = {"kind": "golden", "sha256": "x", "stage": "s"}
    for value in ({**entry, "path": name}, {**entry, "path": "golden", "files": {name: "x"}}):
        with pytest.raises(ValueError, match="below the output folder"):
            Artifact.model_validate(value)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "a").write_text("user")
    with opened(tmp_path / "out") as workspace:
        entry = Artifact(path="checkpoint", sha256="x", stage="quantize", kind="checkpoint", files={"a": "x"})
        workspace.manifest.artifacts = [entry]
        workspace.save()
        (tmp_path / "out" / "checkpoint").symlink_to(victim)
        with pytest.raises(OutputError, match="link that leaves"):
            workspace.strike("quantize")
        with pytest.raises(ModelError, match="link that leaves"):
            workspace.path("checkpoint")
    assert (victim / "a").is_file()


def test_the_lock_is_that_of_a_file_that_stays(tmp_path: Path) -> None:
    with opened(tmp_path):
        inode = (tmp_path / ".lock").stat().st_ino
        with pytest.raises(OutputError, match="another process"), opened(tmp_path):
            pass
    assert (tmp_path / ".lock").stat().st_ino == inode


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = f"""
import os, pathlib
from qdexport.core.lock import locked
with locked(pathlib.Path({str(tmp_path)!r})):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with opened(tmp_path):
        pass
