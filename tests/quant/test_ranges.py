"""Files of activation ranges."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qdexport.core.spec import LayerPlan, QuantSpec
from qdexport.errors import ModelError
from qdexport.quant.bos import Bos
from qdexport.quant.ranges import ActivationRanges, given_ranges, load_ranges
from qdexport.quant.softmax import SoftmaxParameters

W8 = QuantSpec(bits=8, granularity="per_channel")
A8 = QuantSpec(bits=8)
PLANS = [
    LayerPlan(name="a.to_q", kind="linear", weight=W8, activation=A8, group="a.qkv"),
    LayerPlan(name="a.to_k", kind="linear", weight=W8, activation=A8, group="a.qkv"),
    LayerPlan(name="conv", kind="conv", weight=W8, activation=A8, group="conv"),
    LayerPlan(name="cut", kind="conv", weight=W8, activation=A8, group="cut", splits=(2, 2)),
    LayerPlan(name="rest", kind="conv", weight=None, activation=None),
]
KEYS = {"a.qkv", "conv", "cut#0", "cut#1"}


def _ends(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_given_ranges_cover_every_key() -> None:
    ranges = given_ranges(PLANS, -2.0, 3.0)
    assert set(ranges.low) == set(ranges.high) == KEYS
    assert ranges.rows == 1
    assert ranges.timesteps == ()
    assert ranges.low["cut#1"].tolist() == [-2.0]


def test_given_ranges_must_be_ranges() -> None:
    with pytest.raises(ModelError, match=r"low 3\.0 above high -2\.0"):
        given_ranges(PLANS, 3.0, -2.0)


def test_round_trip(tmp_path: Path) -> None:
    third = 1 / 3  # float64 is kept
    ranges = ActivationRanges(
        low={key: _ends(-third, -1) for key in KEYS},
        high={key: _ends(third, 1) for key in KEYS},
        timesteps=(901, 1),
    )
    ranges.save(tmp_path / "ranges.safetensors")
    loaded = load_ranges(tmp_path / "ranges.safetensors", PLANS)
    assert loaded.timesteps == (901, 1)
    assert loaded.rows == 2
    assert all(torch.equal(loaded.low[key], ranges.low[key]) for key in KEYS)
    assert all(torch.equal(loaded.high[key], ranges.high[key]) for key in KEYS)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all", b"\x10\0\0\0\0\0\0\0{}"])
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ranges.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"ranges\.safetensors .*; calibrate again"):
        ActivationRanges.load(path)


def test_foreign_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a/low": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="holds no activation ranges of qdexport"):
        ActivationRanges.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["x.safetensors", "x.json"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"do(es)? not exist"):
        load_ranges(tmp_path / name, PLANS)


def _json(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps(value))
    return path


def test_json_by_layer_or_group(tmp_path: Path) -> None:
    path = _json(tmp_path, {"a.to_k": [-1, 1], "conv": [0, 6.5], "cut#0": [-2, 2], "cut#1": [-30, 30]})
    ranges = load_ranges(path, PLANS)
    assert ranges.high["a.qkv"].tolist() == [1]
    assert ranges.high["conv"].tolist() == [6.5]
    assert ranges.low["cut#1"].tolist() == [-30]
    path = _json(tmp_path, {"a.qkv": [-1, 1], "conv": [0, 1], "cut#0": [-2, 2], "cut#1": [-3, 3]})
    assert load_ranges(path, PLANS).low["a.qkv"].tolist() == [-1]


@pytest.mark.parametrize("part", ["cut#0", "cut#1"])
@pytest.mark.parametrize("whole_first", [True, False])
def test_json_names_a_split_layer_as_a_whole(tmp_path: Path, part: str, whole_first: bool) -> None:
    ends = {"cut": [-5, 5], part: [-2, 2]} if whole_first else {part: [-2, 2], "cut": [-5, 5]}
    ranges = load_ranges(_json(tmp_path, {"a.qkv": [-1, 1], "conv": [0, 1], **ends}), PLANS)
    assert {key: ranges.high[key].tolist() for key in ("cut#0", "cut#1")} == {
        key: [2] if key == part else [5] for key in ("cut#0", "cut#1")
    }


def test_json_with_rows(tmp_path: Path) -> None:
    rows = [[-1, -2], [1, 2]]
    value = {"timesteps": [901, 1], "a.qkv": rows, "conv": [0, 1], "cut#0": rows, "cut#1": rows}
    ranges = load_ranges(_json(tmp_path, value), PLANS)
    assert ranges.timesteps == (901, 1)
    assert ranges.rows == 2
    assert ranges.high["conv"].tolist() == [1]


GOOD = {"a.qkv": [-1, 1], "conv": [0, 1], "cut#0": [-2, 2], "cut#1": [-3, 3]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "must hold an object"),
        ({"a.to_x": [0, 1]}, r"'a\.to_x' is no quantized layer of this model; did you mean a\.to"),
        ({"rest": [0, 1]}, "'rest' is no quantized layer"),
        ({**GOOD, "conv": 3}, r"'conv' must be \[low, high\], not 3"),
        ({**GOOD, "conv": [1, 2, 3]}, r"'conv' must be \[low, high\]"),
        ({**GOOD, "conv": ["x", 1]}, r"'conv' must be \[low, high\]"),
        ({**GOOD, "conv": [2, 1]}, r"low 2\.0 above high 1\.0 in row 0"),
        ({**GOOD, "conv": [0, float("nan")]}, "NaN or infinity"),
        ({**GOOD, "conv": [[0, 0], [1, 1]]}, "2 rows for 0 timesteps"),
        ({**GOOD, "conv": [[0, 0], [1]]}, "has shapes"),
        ({"conv": [0, 1]}, r"no range for 'a\.qkv', the input of layer a\.to_q"),
        ({**GOOD, "timesteps": "soon"}, "timesteps"),
    ],
)
def test_json_that_cannot_be_used(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_ranges(_json(tmp_path, value), PLANS)


def test_no_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        load_ranges(tmp_path / "x.json", PLANS)


def _whole(plans: list[LayerPlan]) -> ActivationRanges:
    given = given_ranges(plans, -1, 2)
    softmax = {"mid.attn1": SoftmaxParameters(bits=4, scale=torch.tensor([0.1, 1.0]), mode=torch.tensor([0.0, 1.0]))}
    return replace(
        given,
        channel_ratios={plans[0].group: torch.tensor([1.0, 2.5])},
        softmax=softmax,
        bos=Bos(embedding=torch.randn(4), encoder="digest"),
    )


def test_everything_beside_ranges_is_saved(tmp_path: Path) -> None:
    plan = LayerPlan(name="a", kind="conv", weight=W8, activation=A8, group="a")
    before = _whole([plan])
    before.save(tmp_path / "ranges.safetensors")
    after = ActivationRanges.load(tmp_path / "ranges.safetensors")
    assert torch.equal(after.low["a"], before.low["a"])
    assert set(after.low) == set(after.high) == {"a"}
    assert torch.equal(after.channel_ratios["a"], before.channel_ratios["a"])
    assert after.softmax["mid.attn1"].bits == 4
    assert torch.equal(after.softmax["mid.attn1"].scale, before.softmax["mid.attn1"].scale)
    assert torch.equal(after.softmax["mid.attn1"].mode, before.softmax["mid.attn1"].mode)
    assert after.bos is not None
    assert before.bos is not None
    assert torch.equal(after.bos.embedding, before.bos.embedding)
    assert after.bos.encoder == "digest"


def test_a_lost_softmax_quantizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ranges.safetensors"
    _whole([LayerPlan(name="a", kind="conv", weight=W8, activation=A8, group="a")]).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    del tensors["mid.attn1/softmax_mode"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ModelError, match=r"lack the softmax quantizer of mid\.attn1; calibrate again"):
        ActivationRanges.load(path)


def test_scaled_layers_need_ratios() -> None:
    plan = LayerPlan(name="a", kind="conv", weight=W8, activation=A8, group="a", channel_scale=True)
    with pytest.raises(ModelError, match="no channel ratios for 'a', the input of layer a"):
        given_ranges([plan], -1, 1)
