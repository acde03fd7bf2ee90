"""Both verdicts of a whole run: in the report, on the page, on the terminal and in the exit code."""

from __future__ import annotations

import json

from qdexport.check import quality
from tests.pipeline.conftest import SMALL

QUICK = ("--quick", "--target", "onnxruntime", "--companions", "none", *SMALL)


def test_pictures_that_are_not_kept_end_with_code_8(qdexport, tmp_path, tiny_folder, monkeypatch):
    """The file is right, and its pictures are held against a limit that no quantization reaches. The weights are taken
    for trained ones.
    """
    monkeypatch.setattr(quality, "is_untrained", lambda network: False)
    out, limits = tmp_path / "out", ("--set", "validation.images=4", "--set", "validation.pictures.share=0.000001")
    arguments = ["compile", tiny_folder, "--recipe", "w8a8", "--out", out, *QUICK, *limits]
    result = qdexport(*arguments)
    assert result.exit_code == 8, result.output
    report = json.loads((out / "report.json").read_text())
    assert report["verdict"]["compiled"] == "pass"
    assert report["verdict"]["pictures"] == "not kept"
    assert "pictures of the quantized model" in report["verdict"]["why"][-2]
    assert report["parity"]["quick"] is True
    assert report["quality"]["other_seed"]["images"] == 4
    assert report["quality"]["quantized"]["share"]["low"] > report["quality"]["quantized"]["share"]["limit"]
    assert (out / "images" / "grid.png").is_file()
    assert len(list((out / "images" / "other_seed").glob("*.png"))) == 4
    page = (out / "report.html").read_text()
    assert "pictures: not kept" in page
    assert "--quick" in page
    assert "NOT KEPT" in result.stdout
    assert "--quick" in result.stdout
    ranked = report["layer_errors"]["layers"]
    assert {item["name"] for item in ranked} == {item["name"] for item in report["parity"]["layers"]}
    assert report["cost"]["quantized"]["weight_bytes"] < report["cost"]["fp16"]["weight_bytes"]
    # the next run finds all of it again, and says the same
    again = qdexport(*arguments, "--json")
    assert again.exit_code == 8
    assert json.loads(again.stdout)["verdict"] == report["verdict"]
    assert json.loads(again.stdout)["stages"]["validate"]["cached"] is True


def test_random_weights_are_not_judged(qdexport, tmp_path, tiny_folder):
    result = qdexport("compile", tiny_folder, "--recipe", "w8a8", "--out", tmp_path / "out", *QUICK, "--json")
    assert result.exit_code == 0, result.output
    verdict = json.loads(result.stdout)["verdict"]
    assert (verdict["compiled"], verdict["pictures"]) == ("pass", "not judged")
    assert "initializer" in verdict["why"][-1]
