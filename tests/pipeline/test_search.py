"""``qdexport search`` on a tiny pipeline, and what is done with its results."""

from __future__ import annotations

import pytest

from qdexport.core.forms import FormTable
from qdexport.core.pass_log import PassLog
from qdexport.errors import RecipeError
from qdexport.pipeline.search import SearchFacts, gpu_to_search_on
from qdexport.search.judge import BlockCost
from tests.pipeline.conftest import SMALL


class Judge:
    """In place of the builder: a node costs a microsecond. What a builder finds is tested in tests/search."""

    def __init__(self, target, gpu):
        del target
        self.identity, self.version = f"nodes, {gpu.name}", "0"

    def __call__(self, model):
        count = len(model.graph)
        return BlockCost(kernels=count, moved_bytes=count, seconds=count * 1e-6)


def test_a_search_is_kept_and_used(qdexport, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("qdexport.pipeline.search.BuilderJudge", Judge)
    monkeypatch.setattr("qdexport.pipeline.compilation.BuilderJudge", Judge)
    out, table = tmp_path / "out", tmp_path / "forms.json"
    arguments = [tiny_folder, "--out", out, "--json", *SMALL]
    result = qdexport("search", *arguments, "--write", table)
    assert result.exit_code == 0, result.output
    facts = SearchFacts.model_validate_json(result.stdout)
    assert facts.kept
    assert facts.built > 0
    assert facts.after.kernels < facts.before.kernels
    assert {entry.operator: entry.form for entry in facts.entries} == {
        "attention": "plain", "group-norm": "operator", "tokens": "sequence-first"
    }  # fmt: skip
    assert FormTable.load(table).entries[: len(facts.entries)] == tuple(facts.entries)

    # the graph is written with the table that was found, and says so
    exported = qdexport("export", out, "--json")
    assert exported.exit_code == 0, exported.output
    log = PassLog.load(out / "onnx" / "passes.json")
    chosen = next(item.chosen for item in log.passes if item.name == "expand-group-norm")
    assert all(why.startswith("operator, measured for this shape (operator: ") for why in chosen.values())
    explained = {item.name: item for item in log.explain("down_blocks.0.resnets.0.norm1")}
    assert "; channel-parts: " in explained["expand-group-norm"].details[-1]


def test_the_gpu_follows_the_recipe():
    assert gpu_to_search_on("rtx-3090", ("8.9",)).name == "RTX 3090"
    assert gpu_to_search_on(None, ("8.6", "8.9")).name == "RTX 3090"
    assert gpu_to_search_on(None, None).name == "RTX 4090"
    with pytest.raises(RecipeError, match=r"no rates are known for compute capability 7\.5"):
        gpu_to_search_on(None, ("7.5",))


def test_what_cannot_be_searched_is_refused(qdexport, tiny_folder, tmp_path):
    arguments = ["search", tiny_folder, "--out", tmp_path / "out", *SMALL]
    refused = qdexport(*arguments, "--target", "onnxruntime")
    assert refused.exit_code == 2
    assert "target onnxruntime has no engine builder" in refused.output
