"""Random denoisers and recipes through the whole compiler; ``tools/fuzz_compile.py`` draws hundreds."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from qdexport.passes.lower_bitwidth import LowerBitwidth

pytestmark = [pytest.mark.slow, pytest.mark.rtx]


@pytest.fixture(scope="module")
def fuzz():
    """The tool's module, importable as it is for the script beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
        import benchmarks.fuzz

        yield benchmarks.fuzz


@pytest.mark.parametrize("seed", range(10))
def test_random_cases_hold(fuzz, seed, tmp_path):
    case = fuzz.draw(seed, small=True)
    seen = fuzz.check_draw(case, tmp_path, build=True)
    assert seen.layers > 10, str(case)
    assert seen.kernels > 25
    assert len(seen.passes_db) >= 3, "the passes that change something were executed before and after"


def test_a_draw_is_made_again_from_its_seed(fuzz):
    assert fuzz.draw(7) == fuzz.draw(7)
    assert fuzz.draw(7) != fuzz.draw(8)


def test_a_pass_that_breaks_the_network_is_named(fuzz, monkeypatch, tmp_path):
    original = LowerBitwidth.apply

    def broken(self, model, context, report):
        original(self, model, context, report)
        scales = [node.inputs[1] for node in model.graph if node.op_type == "DequantizeLinear"]
        scale = next(value for value in scales if value.const_value.size > 1)
        scale.const_value = ir.tensor(scale.const_value.numpy() * 100, name=scale.name)

    monkeypatch.setattr(LowerBitwidth, "apply", broken)
    with pytest.raises(fuzz.FuzzError, match="lower-bitwidth changes the network's output"):
        fuzz.check_draw(fuzz.draw(0, small=True, models=("tiny_sd",)), tmp_path, build=False)
