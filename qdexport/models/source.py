"""Turns what a user calls a model into a folder: a bundled name, a path, or an id of the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Final, cast

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qdexport.core.reading import reading
from qdexport.errors import ModelError
from qdexport.models.library_logs import quiet_libraries
from qdexport.models.shapes import bundled_model_path
from qdexport.models.weights import find_weights

__all__ = ["UNUSED_COMPONENTS", "is_model_folder", "resolve_source"]

logger = logging.getLogger(__name__)

# parts of a text-to-image pipeline that sampling does not need: neither downloaded nor loaded
UNUSED_COMPONENTS: Final = ("safety_checker", "feature_extractor", "image_encoder")

_BUNDLED: Final = ("shapes", "shapes-turbo")
_HUB_ID: Final = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
# the base is the error of whatever HTTP client this version of huggingface_hub uses
_HUB_ERRORS: Final[tuple[type[Exception], ...]] = (
    cast("type[Exception]", HfHubHTTPError.__bases__[0]),
    OSError,
    ValueError,
    EntryNotFoundError,
)


def is_model_folder(folder: Path) -> bool:
    """Whether a folder is a whole diffusers pipeline or one component of one."""
    return (folder / "model_index.json").is_file() or (folder / "config.json").is_file()


def resolve_source(source: str | Path, variant: str | None) -> tuple[str, Path]:
    """Finds the folder of a model; downloads it when it is a hub id.

    A model folder that exists wins over a bundled name, and both win over the hub.

    Args:
        source: A bundled name (`shapes`), a folder, or `owner/name[@revision]` of the hub.
        variant: Which weights to download.

    Returns:
        The name to show, and the folder.

    Raises:
        ModelError: Nothing is there, the path is a file or no model folder, or the hub cannot deliver.
    """
    with reading(f"model {source}", ModelError, what="cannot be looked for"):
        return _resolved(source, variant)


def _resolved(source: str | Path, variant: str | None) -> tuple[str, Path]:
    text, folder = str(source), Path(source).expanduser()
    if folder.is_file():
        raise ModelError(
            f"{folder} is a file; give the diffusers folder (diffusers' from_single_file and save_pretrained "
            "make one of a single checkpoint)"
        )
    if folder.is_dir() and is_model_folder(folder):
        return folder.resolve().name, folder
    if text in _BUNDLED:
        return text, bundled_model_path(text)
    if folder.is_dir():
        raise ModelError(
            f"{folder} is no diffusers model: it has neither model_index.json (a pipeline) nor config.json "
            "(one component)"
        )
    match = _HUB_ID.fullmatch(text)
    if match is None or isinstance(source, Path):
        raise ModelError(
            f"there is no model folder {text}; give a folder, a bundled model ({', '.join(_BUNDLED)}) or a "
            "hub id (owner/name or owner/name@revision)"
        )
    return match["repo"], _download(match["repo"], match["revision"], variant)


def _download(repo: str, revision: str | None, variant: str | None) -> Path:
    from diffusers import DiffusionPipeline

    logger.info("looking for %s on the Hugging Face hub", repo)
    unused = dict.fromkeys(UNUSED_COMPONENTS)
    try:
        with quiet_libraries(progress_bars=True):
            return Path(
                DiffusionPipeline.download(
                    repo, revision=revision, variant=variant, trust_remote_code=False, **unused
                )
            )
    except _HUB_ERRORS as error:
        if _cause(error, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) is not None:
            raise ModelError(_hub_message(repo, revision, error)) from error
        # no model_index.json there, or the hub is out of reach: it may be one component, perhaps a cached one
        return _download_component(repo, revision, variant, error)


def _download_component(repo: str, revision: str | None, variant: str | None, first: Exception) -> Path:
    dot = "" if variant is None else f".{variant}"
    for suffix in ("safetensors", "bin"):
        stem = "diffusion_pytorch_model"
        patterns = [f"{stem}{dot}.{suffix}", f"{stem}{dot}-*.{suffix}", f"{stem}.{suffix}.index{dot}.json"]
        folder = _snapshot(repo, revision, ["config.json", *patterns], first)
        if not is_model_folder(folder):
            raise ModelError(
                f"{repo} on the hub is no diffusers model: it has neither model_index.json (a pipeline) "
                f"nor config.json (one component); {_first_line(first)}"
            )
        if any(folder.glob(f"*.{suffix}")):
            break
    find_weights(folder, variant)
    return folder


def _snapshot(repo: str, revision: str | None, patterns: list[str], first: Exception) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except _HUB_ERRORS as error:
        raise ModelError(_hub_message(repo, revision, first)) from error


def _hub_message(repo: str, revision: str | None, error: BaseException) -> str:
    if (illegal := _cause(error, HFValidationError)) is not None:
        return f"{repo!r} is neither a folder nor a hub id: {_first_line(illegal)}"
    if _cause(error, GatedRepoError) is not None:
        return f"{repo} is gated: accept its licence on the hub and log in with `hf auth login`"
    if _cause(error, RevisionNotFoundError) is not None:
        return f"{repo} has no revision {revision!r}; leave @{revision} out for the newest"
    if _cause(error, RepositoryNotFoundError) is not None:
        return (
            f"there is no folder {repo}, and no such model on the hub; check the name, or log in with "
            "`hf auth login` when it is private"
        )
    reason = _first_line(_cause(error, _HUB_ERRORS[0]) or error)
    if _cause(error, OfflineModeIsEnabled) is not None:
        reason = "offline mode is on (HF_HUB_OFFLINE)"
    return (
        f"there is no folder {repo}, and it cannot be fetched from the hub or its cache: {reason}; "
        "give a local folder, or download the model once while online"
    )


def _cause(error: BaseException | None, *kinds: type[BaseException]) -> BaseException | None:
    """The first of these errors in the chain of causes: diffusers wraps what the hub raises."""
    seen: set[int] = set()  # chains of contexts can be circular
    while error is not None and id(error) not in seen:
        if isinstance(error, kinds):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
