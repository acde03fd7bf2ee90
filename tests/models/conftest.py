"""Tiny pipelines on disk, written once per session and copied by the tests that break them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qdexport.models.load import LoadedModel, load_model
from qdexport.models.tiny import save_tiny_pipeline


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: save_tiny_pipeline(root / family, family) for family in ("sd", "sdxl", "unet2d")}


@pytest.fixture
def tiny_copy(tiny_folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(family: str = "sd") -> Path:
        return Path(shutil.copytree(tiny_folders[family], tmp_path / family))

    return copy


@pytest.fixture(scope="session")
def tiny_models(tiny_folders: dict[str, Path]) -> dict[str, LoadedModel]:
    return {family: load_model(folder) for family, folder in tiny_folders.items()}
