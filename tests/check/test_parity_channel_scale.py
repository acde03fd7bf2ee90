"""Layers whose output carries the 1 / r of the layer behind them in the ONNX file, but not in PyTorch."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from qdexport.check.calls import check_calls
from qdexport.check.parity import layer_parity
from qdexport.core.progress import SilentProgress
from qdexport.core.target import target_named
from qdexport.graph.dialect import SCALED_FOR_KEY
from qdexport.models.loaded import LoadedModel
from qdexport.pipeline.lower import lower_to_onnx
from qdexport.pipeline.quantize import QuantizeSettings, make_quantized
from tests.check.conftest import SYMMETRIC, Compiled, recipe_of

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
PRODUCERS = [f"{BLOCK}.attn1.to_v", f"{BLOCK}.attn2.to_v", f"{BLOCK}.ff.net.0.proj"]


@pytest.fixture(scope="module")
def scaled(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Compiled, dict[str, str]]:
    """One block whose linear layers have channel scales, and what fold-reparam did with them."""
    folder = tmp_path_factory.mktemp("scaled")
    channel_scale = {"match": f"{BLOCK}.*", "kinds": ["linear"], "max_ratio": 8}
    recipe = recipe_of([{"match": f"{BLOCK}.*", "activation": SYMMETRIC}], channel_scale=channel_scale)
    target = target_named("onnxruntime")
    model = make_quantized(tiny, recipe, QuantizeSettings(target=target, folder=folder / "state"), SilentProgress())
    lowered = lower_to_onnx(model, folder / "onnx", target)
    calls = check_calls(model, lowered.facts.io, 3, seed=0)
    (report,) = (report for report in lowered.passes if report.name == "fold-reparam")
    return Compiled(model=model, path=lowered.file.path, io=lowered.facts.io, calls=calls), report.notes


def test_products_are_compared_with_what_they_carry(scaled: tuple[Compiled, dict[str, str]]) -> None:
    compiled, notes = scaled
    assert notes[f"{BLOCK}.attn1.to_out.0"] == f"1 / r folded into {BLOCK}.attn1.to_v"
    assert notes[f"{BLOCK}.attn1.to_q"] == f"1 / r folded into {BLOCK}.norm1"
    assert notes[f"{BLOCK}.ff.net.2"] == f"1 / r folded into {BLOCK}.ff.net.0.proj"
    assert "stays in front of the quantizer" in notes[f"{BLOCK}.attn2.to_v"]
    layers = layer_parity(compiled.model, compiled.path, compiled.io, compiled.calls)
    assert all(item.code_flip_rate == item.weight_flip_rate == 0 for item in layers)
    # sums of at most 576 products in another order, and scales rounded once more: 110 dB with cancellation
    assert min(item.sqnr_db for item in layers) > 110


def test_a_factor_that_the_file_does_not_mention_is_caught(
    scaled: tuple[Compiled, dict[str, str]], tmp_path: Path
) -> None:
    compiled, _ = scaled
    proto = onnx.load(compiled.path)
    for node in proto.graph.node:
        kept = [item for item in node.metadata_props if item.key != SCALED_FOR_KEY]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(proto, tmp_path / "model.onnx")
    layers = layer_parity(compiled.model, tmp_path / "model.onnx", compiled.io, compiled.calls)
    assert sorted(item.name for item in layers if item.sqnr_db < 60) == sorted(PRODUCERS)
