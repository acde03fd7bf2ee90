"""The commands sensitivity and allocate: their files, their output, and that a second run finds everything again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from qdexport.cli.main import cli
from qdexport.errors import MissingDependencyError
from qdexport.models.tiny import save_tiny_pipeline

FEW = ["conv_in", "mid_block.attentions.0.transformer_blocks.0.ff.*"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "sd", "sd")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rule = {
        "match": FEW,
        "weight": {"bits": 8, "granularity": "per_channel"},
        "activation": {"bits": 8, "symmetric": False, "signed": False},
    }
    data = {
        "name": "few",
        "rules": [rule],
        "calibration": {"prompts": 1, "steps": 2, "guidance_scale": 3.0},
        "bit_allocation": {"images": 1, "calls": 2, "candidate_images": 1, "candidates": 2},
    }
    path = tmp_path / "few.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(item) for item in arguments])


def test_sensitivity_writes_numbers_and_a_picture(model: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = invoke("sensitivity", model, "--recipe", recipe, "--out", out)
    assert first.exit_code == 0, first.output
    assert "most sensitive quality layers, weights (sqnr_db):\n  conv_in: 4 bits" in first.output
    data = json.loads((out / "sensitivity.json").read_text())
    assert [entry["name"] for entry in data["entries"] if entry["part"] == "weight"] == [
        "conv_in",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    ]
    assert (out / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    kept = {path: path.stat().st_mtime_ns for path in (out / ".calibration" / "sensitivity").iterdir()}
    again = invoke("sensitivity", model, "--recipe", recipe, "--out", out, "--json")
    assert json.loads(again.stdout) == data
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_allocate_writes_a_plan_that_a_recipe_can_name(model: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # most layers have no rule and count 16 bits: the share of bytes leaves them alone
    arguments = ["--recipe", recipe, "--out", out, "--objective", "stored_bytes", "--target-bits", 1.9]
    settings = ["--set", "time_embedding=keep", "--set", "body=fp16"]
    result = invoke("allocate", model, *arguments, *settings, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    plan = yaml.safe_load((out / "bits.yaml").read_text())
    assert facts == {
        "bits": str(out / "bits.yaml"),
        "layers": 3,
        "average_weight_bits": plan["average_weight_bits"],
        "average_activation_bits": plan["average_activation_bits"],
    }
    assert plan["objective"] == "stored_bytes"
    assert {name: set(bits) for name, bits in plan["layers"].items()}["conv_in"] == {"weight", "activation", "why"}
    scanned = json.loads((out / "allocation.json").read_text())["scanned"]
    assert sum(item["chosen"] for item in scanned) == 1
    assert (out / "allocation.png").read_bytes().startswith(b"\x89PNG")
    used = invoke("sensitivity", model, "--recipe", recipe, "--out", out, "--set", f"bit_plan={out / 'bits.yaml'}")
    assert used.exit_code == 0, used.output


def test_without_a_target_nothing_is_allocated(model: Path, recipe: Path, tmp_path: Path) -> None:
    result = invoke("allocate", model, "--recipe", recipe, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "bit allocation needs bit_allocation.weight_target" in result.output
    assert "--target-bits" in result.output


@pytest.mark.parametrize("verb", ["compile", "quantize", "allocate", "sensitivity"])
def test_a_cluster_without_its_package_is_refused_before_any_work(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "ray" else object())
    command = [verb, "shapes", "--ray", "auto", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == MissingDependencyError.exit_code
    assert "pip install 'qdexport[ray]'" in result.output
    assert not (tmp_path / "out").exists()
