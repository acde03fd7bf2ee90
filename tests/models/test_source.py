from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from qdexport.errors import ModelError
from qdexport.models.source import is_model_folder, resolve_source


def _http_error(cls: Any, text: str = "no") -> Exception:
    response = httpx2.Response(404, request=httpx2.Request("GET", "https://example.org"))
    error: Exception = cls(text, response=response)
    return error


def _answer(monkeypatch: pytest.MonkeyPatch, pipeline: Any, snapshot: Any = None) -> list[dict[str, Any]]:
    """Puts fixed answers (a folder, or an error to raise) in the place of the hub; returns the calls made."""
    calls: list[dict[str, Any]] = []

    def reply(answer: Any) -> Any:
        def call(repo: str, **options: Any) -> str:
            calls.append({"repo": repo, **options})
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        return call

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", reply(pipeline))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", reply(snapshot or pipeline))
    return calls


def test_local_folder(tiny_folders: dict[str, Path]) -> None:
    assert resolve_source(str(tiny_folders["sd"]), None) == ("sd", tiny_folders["sd"])
    assert resolve_source(tiny_folders["sd"] / "unet", None) == ("unet", tiny_folders["sd"] / "unet")
    assert not is_model_folder(tiny_folders["sd"].parent)


def test_bundled_name_survives_a_folder_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shapes").mkdir()  # for instance the output of an earlier run
    monkeypatch.chdir(tmp_path)
    name, folder = resolve_source("shapes", None)
    assert name == "shapes"
    assert is_model_folder(folder)
    assert folder.is_absolute()


def test_model_folder_wins_over_a_bundled_name(
    tmp_path: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_folders["sd"], tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)
    assert resolve_source("shapes", None) == ("shapes", Path("shapes"))


@pytest.mark.parametrize("source", ["nosuchmodel", "/no/such/folder", "./a/b", "a/b/c", "~/none/there"])
def test_nothing_there(source: str) -> None:
    with pytest.raises(
        ModelError, match=r"there is no model folder .*bundled model .shapes, shapes-turbo.*hub id"
    ):
        resolve_source(source, None)


def test_path_objects_are_never_hub_ids() -> None:
    with pytest.raises(ModelError, match="there is no model folder owner/name"):
        resolve_source(Path("owner/name"), None)


def test_single_checkpoint_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model.safetensors is a file; give the diffusers folder"):
        resolve_source(tmp_path / "model.safetensors", None)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither model_index.json \(a pipeline\) nor config.json"):
        resolve_source(tmp_path, None)


@pytest.mark.parametrize(
    ("source", "repo", "revision"),
    [("owner/name", "owner/name", None), ("owner/na.me-1@refs/pr/3", "owner/na.me-1", "refs/pr/3")],
)
def test_hub_pipeline(
    source: str,
    repo: str,
    revision: str | None,
    tiny_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = _answer(monkeypatch, tiny_folders["sd"])
    assert resolve_source(source, "fp16") == (repo, tiny_folders["sd"])
    assert len(calls) == 1
    asked = {key: calls[0][key] for key in ("repo", "revision", "variant", "trust_remote_code")}
    assert asked == {"repo": repo, "revision": revision, "variant": "fp16", "trust_remote_code": False}
    assert "safety_checker" in calls[0]  # named, so that diffusers does not download it


def test_hub_component(tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _http_error(errors.RemoteEntryNotFoundError, "404: no model_index.json")
    calls = _answer(monkeypatch, missing, tiny_folders["sd"] / "unet")
    assert resolve_source("owner/name", None)[1] == tiny_folders["sd"] / "unet"
    assert "diffusion_pytorch_model.safetensors" in calls[1]["allow_patterns"]
    assert len(calls) == 2  # no pickles were asked for


def test_hub_component_with_pickles_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "diffusion_pytorch_model.fp16.bin").write_bytes(b"")
    missing = _http_error(errors.RemoteEntryNotFoundError)
    calls = _answer(monkeypatch, missing, tmp_path)
    assert resolve_source("owner/name", "fp16")[1] == tmp_path
    assert "diffusion_pytorch_model.fp16.bin" in calls[2]["allow_patterns"]


def test_hub_repository_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _answer(monkeypatch, _http_error(errors.RemoteEntryNotFoundError, "404: no model_index.json"), tmp_path)
    with pytest.raises(ModelError, match=r"owner/name on the hub is no diffusers model.*404: no model_index"):
        resolve_source("owner/name", None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_http_error(errors.GatedRepoError), "owner/name is gated: accept its licence"),
        (_http_error(errors.RepositoryNotFoundError), "no such model on the hub; check the name"),
        (_http_error(errors.RevisionNotFoundError), "owner/name has no revision 'v9'"),
        (errors.HFValidationError("too long"), "neither a folder nor a hub id: too long"),
        (errors.OfflineModeIsEnabled("off"), r"offline mode is on \(HF_HUB_OFFLINE\)"),
        (
            httpx2.ConnectError("name not known"),
            "cannot be fetched from the hub or its cache: name not known",
        ),
    ],
)
def test_hub_errors_say_what_to_do(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = OSError("cannot load")  # diffusers wraps most of them
    wrapped.__cause__ = error
    _answer(monkeypatch, wrapped, error)
    with pytest.raises(ModelError, match=message):
        resolve_source("owner/name@v9", None)


def test_really_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    text = "there is no folder owner/none, and it cannot be fetched"
    with pytest.raises(ModelError, match=re.escape(text)):
        resolve_source("owner/none", None)
