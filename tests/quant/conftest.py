"""A tiny pipeline, and recipes for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdexport.core.recipe import Recipe
from qdexport.models.load import LoadedModel, load_model
from qdexport.models.tiny import save_tiny_pipeline

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "sd", "sd")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model(tiny_folder)


@pytest.fixture
def make_recipe() -> MakeRecipe:
    """A recipe of one rule, W8A8 symmetric; ``activation`` and ``weight`` change its quantizers."""

    def make(activation: dict[str, Any] | None = None, weight: dict[str, Any] | None = None, **changes: Any) -> Recipe:
        rule = {
            "match": "*",
            "weight": {"bits": 8, "granularity": "per_channel", **(weight or {})},
            "activation": {"bits": 8, **(activation or {})},
        }
        data = {
            "name": "test",
            "rules": [rule],
            "calibration": {"prompts": 4, "batch_size": 2, "steps": 3, "guidance_scale": 3.0, "seed": 7},
        }
        return Recipe.model_validate({**data, **changes})

    return make
