"""What passes did to one layer, from the log beside the ONNX file."""

from __future__ import annotations

import pytest

from qdexport.core.pass_log import PassFacts, PassLog
from qdexport.errors import ModelError, RecipeError

LAYER = "up.0.attn1.to_q"


def facts(name, **changes):
    return PassFacts(**{"name": name, "exact": True, "nodes_before": 4, "nodes_after": 3, **changes})


LOG = PassLog(
    passes=[
        facts("one", touched=[f"{LAYER}.weight_quantizer", "up.0.attn1.to_qkv", LAYER, LAYER]),
        facts("two", touched=["up.0.attn1"], skipped=[("up.0.attn1/MatMul", "another node")]),
        facts("three", skipped=[(f"{LAYER}.input_quantizer/FakeQuantize", "its zero point moves")]),
        facts("four", notes={LAYER: "into the norm"}),
        facts("five", touched=["conv_in", ""]),
    ]
)


def test_every_pass_is_told_apart():
    found = {item.name: (item.what, item.details) for item in LOG.explain(LAYER)}
    assert found == {
        "one": ("changed", (f"{LAYER}.weight_quantizer", LAYER)),
        "two": ("around", ("up.0.attn1",)),
        "three": ("skipped", (f"{LAYER}.input_quantizer/FakeQuantize: its zero point moves",)),
        "four": ("changed", (f"{LAYER}: into the norm",)),
        "five": ("nothing", ()),
    }


def test_parts_of_a_split_layer_belong_to_it():
    log = PassLog(passes=[facts("split", touched=["conv_shortcut#1"])])
    assert log.explain("conv_shortcut")[0].what == "changed"


def test_an_unknown_layer_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match=r"no layer 'up.0.attn1.to_p' in this network; did you mean up.0.attn1.to_q"):
        LOG.explain("up.0.attn1.to_p")
    assert [item.what for item in LOG.explain("conv_out", ["conv_out"])] == ["nothing"] * 5


def test_round_trip_and_foreign_files(tmp_path):
    path = tmp_path / "passes.json"
    LOG.save(path)
    assert PassLog.load(path) == LOG
    path.write_text('{"passes": 3}')
    with pytest.raises(ModelError, match="is no PassLog of qdexport"):
        PassLog.load(path)
    with pytest.raises(ModelError, match="does not exist; `qdexport export` writes it"):
        PassLog.load(tmp_path / "none.json")
