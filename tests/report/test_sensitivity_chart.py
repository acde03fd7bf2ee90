"""Charts of sensitivities and scans: they are pictures, and they hold every layer and every compared plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from qdexport.quant.allocation import ScannedPlan
from qdexport.quant.sensitivity_table import LayerSensitivity, SensitivityTable
from qdexport.report import sensitivity_chart
from qdexport.report.sensitivity_chart import save_scan_chart, save_sensitivity_chart


def entry(part: Any, name: str, group: Any, values: dict[int, float]) -> LayerSensitivity:
    metric: Any = "ssim" if group == "content" else "sqnr_db"
    return LayerSensitivity(part=part, name=name, layers=(name,), group=group, metric=metric, values=values)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All words of the figures that are saved."""
    found: list[str] = []
    save = sensitivity_chart._save

    def watched(figure: Any, path: Path) -> None:
        save(figure, path)
        found.extend(item.get_text() for item in figure.findobj(mpl.text.Text))

    monkeypatch.setattr(sensitivity_chart, "_save", watched)
    return found


def test_every_layer_has_a_row(tmp_path: Path, texts: list[str]) -> None:
    table = SensitivityTable(
        model="m",
        recipe="r",
        entries=(
            entry("weight", "conv_in", "quality", {4: 20.0, 8: 44.0}),
            entry("weight", "block.ff", "content", {2: 0.8, 4: 0.99, 8: 1.0}),
            entry("activation", "encoder_hidden_states", "content", {4: 0.9, 8: 0.999}),
        ),
    )
    save_sensitivity_chart(tmp_path / "s.png", table)
    assert {"conv_in", "block.ff", "encoder_hidden_states", "2 bits", "quality layers, weights"} <= set(texts)
    assert "quality layers, activations" not in texts
    with Image.open(tmp_path / "s.png") as image:
        picture = np.asarray(image.convert("RGB"))
    blue = (np.abs(picture.astype(int) - (0x1F, 0x5F, 0xA8)) < 8).all(axis=2)
    assert blue.sum() > 50  # marks of 8 bits


@pytest.mark.parametrize("errors", [(1e-3, 2e-3), (None, None), (0.0, None)])
def test_a_scan(tmp_path: Path, texts: list[str], errors: tuple[float | None, float | None]) -> None:
    plans = [
        ScannedPlan(
            part="weight",
            level=4.0,
            split=0.5 + number,
            average_bits=4.0,
            scores={"content": 1.0, "quality": 2.0},
            mse=mse,
            chosen=number == 0,
        )
        for number, mse in enumerate(errors)
    ]
    save_scan_chart(tmp_path / "a.png", plans)
    assert "weights: 2 plans" in texts
    assert "taken" in texts
    assert ("compared on images" in texts) == (errors[0] is not None)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 400
