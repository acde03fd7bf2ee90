"""The benchmark of verdicts: its recipes, what it keeps, and how it counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

from qdexport.core.recipe import load_recipe
from qdexport.core.results import Margin, Quality, QualityScores, Report
from qdexport.errors import OutputError, RecipeError
from qdexport.models.sampling import SampleRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.verdict_runs import Settings

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(autouse=True, scope="module")
def tool_modules() -> Iterator[None]:
    """Makes `benchmarks` importable, as it is for the script beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield


def _settings(cache: Path, **changes: Any) -> Settings:
    from benchmarks.quality_rows import load_rows
    from benchmarks.verdict_rows import ROWS
    from benchmarks.verdict_runs import Settings

    sources = load_rows(TOOLS / "benchmarks" / "quality_rows.yaml").recipes
    usual = Settings(
        cache=cache, models=("shapes",), rows=ROWS[:2], sources=sources, seeds=3, compiled=False, build=False,
        target="onnxruntime", workers=1, threads=1, reuse=False, again=False,
    )  # fmt: skip
    return replace(usual, **changes)


def _report(share: float, limit: float = 0.5) -> Report:
    margin = Margin(value=share, low=share / 2, high=share * 2, limit=limit)
    scores = QualityScores(images=32, mse=1e-3, share=margin)
    quality = Quality(
        images=32, steps=4, seed=0, fp=QualityScores(), quantized=scores, other_seed=QualityScores(images=32)
    )
    return Report(tool_version="0", model="m", recipe="r", target="t", quality=quality)


def test_the_rows_go_from_eight_bits_to_two_and_their_recipes_load() -> None:
    from benchmarks.verdict_rows import ROWS

    settings = _settings(Path())
    recipes = {row.name: row.recipe(settings.sources) for row in ROWS}
    assert len(recipes) == 12
    widths = [recipe.rules[0].weight.bits for recipe in recipes.values() if recipe.rules[0].weight]
    assert (widths[0], widths[-1]) == (8, 2)
    assert all(row.kept for row in ROWS if row.source == row.name)  # presets
    assert not any(row.kept for row in ROWS if "2" in row.name.partition("-")[2] or "naive" in row.name)


def test_pictures_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import verdict_child

    made: list[object] = []

    def draw(_: object, request: SampleRequest, *, denoiser: object = None, **__: object) -> Any:
        made.append((request.seed, denoiser))
        return np.full((1, 3, 2, 2), len(made), np.float32)

    monkeypatch.setattr(verdict_child, "sample", draw)
    eight, four = load_recipe("w8a8"), load_recipe("w4a8")
    model: Any = object()
    request, other = SampleRequest(prompts=("a",)), SampleRequest(prompts=("a",), seed=1)
    for _ in range(2):
        for recipe, denoiser in ((eight, None), (four, None), (eight, "x"), (four, "x")):
            first, second = (
                float(verdict_child.KeptPictures(tmp_path, recipe)(model, item, denoiser=denoiser)[0, 0, 0, 0])
                for item in (request, other)
            )
            assert first != second
    assert made == [(0, None), (1, None), (0, "x"), (1, "x"), (0, "x"), (1, "x")]


def test_verdicts_are_counted_with_their_least_margin(tmp_path: Path) -> None:
    from benchmarks.verdict_child import _result
    from benchmarks.verdict_docs import table_text
    from benchmarks.verdict_runs import _result_path, gather

    settings = _settings(tmp_path)
    for row, shares in zip(settings.rows, ([0.1, 0.125, 0.01], [0.1, 2.0, 0.1]), strict=True):
        for seed, share in zip(settings.seed_list, shares, strict=True):
            path = _result_path(settings, "shapes", row, "pictures", seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_result(seed, _report(share))))
    found = gather(settings)["models"]["shapes"]
    assert found["w8a8"]["pictures"]["verdicts"] == ["kept"] * 3
    # the upper ends are 0.2, 0.25 and 0.02, the limit is 0.5
    assert found["w8a8"]["pictures"]["margins"] == [2.5, 2.0, 25.0]
    assert found["w8a8-asym"]["pictures"]["verdicts"] == ["kept", "not kept", "kept"]
    text = table_text(gather(settings))
    assert "| w8a8 | 1.00e-03 | 0.0783 |  |  | 3 of 3 | 2.00 x | yes |" in text
    assert "2 of 3 (!)" in text
    assert "`shapes`: 5 of 6 verdicts on pictures are the same" in text


def test_what_other_code_made_is_taken_only_when_asked(tmp_path: Path) -> None:
    from benchmarks.verdict_runs import run

    nothing = _settings(tmp_path, rows=())
    assert run(nothing, print) == {}
    (tmp_path / "source.txt").write_text("other")
    with pytest.raises(OutputError, match="--reuse takes it"):
        run(nothing, print)
    assert run(replace(nothing, reuse=True), print) == {}


def test_help_has_examples_and_a_wrong_row_is_named() -> None:
    from bench_verdict import cli

    shown = CliRunner().invoke(cli, ["--help"])
    assert "python tools/bench_verdict.py --compiled" in shown.output
    with pytest.raises(RecipeError, match="no row is named 'w1a1'; there are w8a8"):
        CliRunner().invoke(cli, ["--row", "w1a1"], catch_exceptions=False)
