"""The search: what it builds, what it may choose, and that it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qdexport.core.forms import FormTable
from qdexport.errors import BuildError
from qdexport.search.blocks import cut_blocks
from qdexport.search.judge import BlockCost, BuilderJudge
from qdexport.search.numbers import difference
from qdexport.search.results import AnswerCache
from qdexport.search.search import SearchSettings, in_forms, search_forms

EMPTY = FormTable(target="tensorrt-rtx")


class CountingJudge:
    """Costs by the number of nodes, or by a rule; it keeps what it was asked."""

    def __init__(self, seconds: Callable[[ir.Model], float] = lambda model: len(model.graph) * 1e-6) -> None:
        self.identity = "counting"
        self.seconds = seconds
        self.asked: list[list[str]] = []

    def __call__(self, model: ir.Model) -> BlockCost:
        self.asked.append([node.op_type for node in model.graph])
        return BlockCost(kernels=len(model.graph), moved_bytes=1, seconds=self.seconds(model))


def splits(model: ir.Model) -> int:
    return sum(node.op_type == "Split" for node in model.graph)


def settings(make_context, judge, folder, **changes) -> SearchSettings:
    return SearchSettings(context=make_context(), judge=judge, cache=AnswerCache(folder), **changes)


def test_repeated_blocks_are_built_once(lowered, make_context, tmp_path):
    judge = CountingJudge()
    blocks = cut_blocks(lowered(resnets=5))
    entries = search_forms(blocks, EMPTY, settings(make_context, judge, tmp_path))
    # one signature: three forms of the first block, and nothing for the four that repeat it
    assert len(entries) == 1
    assert len(judge.asked) == 3
    assert [trial.form for trial in entries[0].tried] == ["operator", "two-pass", "channel-parts"]
    assert entries[0].form == "operator"  # the fewest nodes
    assert entries[0].block == blocks[0].digest[:12]


def test_a_better_form_is_chosen_and_its_alternatives_are_kept(lowered, make_context, tmp_path):
    judge = CountingJudge(lambda model: 1e-4 if not splits(model) else 1e-5)
    (entry,) = search_forms(cut_blocks(lowered()), EMPTY, settings(make_context, judge, tmp_path))
    assert entry.form == "channel-parts"
    assert [trial.microseconds for trial in entry.tried] == [100.0, 100.0, 10.0]


def test_what_was_built_is_found_again_after_an_interruption(lowered, make_context, tmp_path):
    class Interrupted(CountingJudge):
        def __call__(self, model: ir.Model) -> BlockCost:
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().__call__(model)

    blocks = cut_blocks(lowered())
    with pytest.raises(KeyboardInterrupt):
        search_forms(blocks, EMPTY, settings(make_context, Interrupted(), tmp_path))
    judge = CountingJudge()
    first = search_forms(blocks, EMPTY, settings(make_context, judge, tmp_path))
    assert len(judge.asked) == 1
    again = CountingJudge()
    assert search_forms(blocks, EMPTY, settings(make_context, again, tmp_path)) == first
    assert again.asked == []
    other = CountingJudge()
    other.identity = "another version of the builder"
    search_forms(blocks, EMPTY, settings(make_context, other, tmp_path))
    assert len(other.asked) == 3


def test_a_damaged_answer_is_worked_out_again(lowered, make_context, tmp_path):
    blocks = cut_blocks(lowered())
    first = search_forms(blocks, EMPTY, settings(make_context, CountingJudge(), tmp_path))
    for file in tmp_path.iterdir():
        file.write_text("{")
    assert search_forms(blocks, EMPTY, settings(make_context, CountingJudge(), tmp_path)) == first


def test_a_form_that_changes_numbers_is_never_chosen(lowered, make_context, tmp_path, monkeypatch):
    """The pass is broken on purpose: it leaves the variance of the channels' means out."""
    from qdexport.passes import expand_group_norm

    original = expand_group_norm._by_channel

    def broken(writer, x, image):
        centred, variance = original(writer, x, image)
        return centred, writer.op("Mul", [variance, writer.constant("wrong", np.float32(0.5))], like=variance)

    monkeypatch.setattr(expand_group_norm, "_by_channel", broken)
    judge = CountingJudge(lambda model: 1e-4 if not splits(model) else 1e-5)
    (entry,) = search_forms(cut_blocks(lowered()), EMPTY, settings(make_context, judge, tmp_path))
    assert entry.form == "operator"
    refused = next(trial for trial in entry.tried if trial.form == "channel-parts")
    assert refused.why_not.startswith("it changes numbers: output ")


def test_all_forms_compute_the_same(lowered, make_context):
    """Executed in FP32 without quantizers: the forms differ by the order of sums."""
    block = cut_blocks(lowered(resnets=3))[1]
    (site,) = block.sites
    exported = in_forms(block, {site.key: "operator"}, make_context())
    for form in ("two-pass", "channel-parts"):
        assert difference(exported, in_forms(block, {site.key: form}, make_context())) == ""
    assert [node.op_type for node in block.model.graph].count("InstanceNormalization") == 1  # the block itself stays


def test_another_quantizer_is_another_result(lowered, make_context):
    block = cut_blocks(lowered())[0]
    model = block.model.clone()
    quantizer = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    scale = quantizer.inputs[1]
    assert scale is not None
    scale.const_value = ir.tensor(np.float32(0.04), name=scale.name)
    assert difference(block.model, model) == "it has other quantizers"


def test_a_form_that_the_builder_refuses_does_not_win(lowered, make_context, tmp_path):
    class Refusing(CountingJudge):
        def __call__(self, model: ir.Model) -> BlockCost:
            if splits(model):
                raise BuildError("no implementation for Split\nfull log: x")
            return super().__call__(model)

    (entry,) = search_forms(cut_blocks(lowered()), EMPTY, settings(make_context, Refusing(), tmp_path))
    assert entry.form == "operator"
    assert entry.tried[2].why_not == "no implementation for Split"
    assert entry.tried[2].kernels is None


def test_of_equal_costs_the_present_form_stays(lowered, make_context, tmp_path):
    class Same(CountingJudge):
        def __call__(self, model: ir.Model) -> BlockCost:
            super().__call__(model)
            return BlockCost(kernels=1, moved_bytes=1, seconds=1e-6)

    for number, form in enumerate(("two-pass", "channel-parts", "operator")):
        start = EMPTY.forced({"group-norm": form})
        (entry,) = search_forms(
            cut_blocks(lowered()), start, settings(make_context, Same(), tmp_path / str(number))
        )
        assert entry.form == form


@pytest.mark.rtx
def test_a_real_builder_agrees_that_small_groups_are_written_out(lowered, make_context, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from qdexport.core.gpus import gpu_named

    context = make_context()
    judge = BuilderJudge(context.target, gpu_named("rtx-4090"))
    found = settings(make_context, judge, tmp_path, builder=judge.version, gpu="rtx-4090")
    (entry,) = search_forms(cut_blocks(lowered(channels=32, size=8))[1:], EMPTY, found)
    costs = {trial.form: trial.kernels for trial in entry.tried}
    assert entry.form == "two-pass"
    assert costs["two-pass"] < costs["channel-parts"] < costs["operator"]
