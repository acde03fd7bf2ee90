"""docs/results.md names every key of the result files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from qdexport.core import results
from qdexport.core.results import ArtifactKind, Manifest, Plan, Report

DOCUMENT = Path(__file__).parents[2] / "docs" / "results.md"


def models(root: type[BaseModel]) -> list[type[BaseModel]]:
    """A model and all models that its fields hold."""
    found = [root]
    for model in found:
        for field in model.model_fields.values():
            names = re.findall(r"\w+", str(field.annotation))
            inner = [getattr(results, name) for name in names if name in results.__all__]
            found.extend(item for item in inner if item not in found)
    return found


@pytest.mark.parametrize("root", [Manifest, Report, Plan])
def test_every_key_is_documented(root: type[BaseModel]) -> None:
    prose = re.sub(r"```.*?```", "", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", prose))))
    keys = {key for model in models(root) for key in model.model_fields}
    assert len(models(root)) > 1
    assert keys - words == set()


def test_every_kind_of_artifact_is_documented() -> None:
    words = set(re.findall(r"`(\w+)`", DOCUMENT.read_text(encoding="utf-8")))
    assert set(get_args(ArtifactKind)) <= words
