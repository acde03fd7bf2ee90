"""Passes are named, ordered, timed and may be dumped; a refusal says which pass and where."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import onnx
import onnx_ir as ir
import pytest

from qdexport.core.io_spec import IoSpec
from qdexport.core.spec import LayerPlan
from qdexport.core.target import TARGETS
from qdexport.errors import GraphPassError, RecipeError
from qdexport.graph.runner import PassContext, PassReport, WhyNot, run_passes

TEXT = '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { t = Relu(x)\n y = Neg(t) }'
LAYER = LayerPlan(name="conv_in", kind="conv", weight=None, activation=None)


@pytest.fixture
def context() -> PassContext:
    return PassContext(
        target=TARGETS["tensorrt-rtx"], body="fp32", io=IoSpec(inputs=(), outputs=()), layers=(LAYER,),
        timesteps=None, training_steps=1000,
    )  # fmt: skip


class First:
    name: ClassVar[str] = "first"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ()

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        report.skipped.append(WhyNot("a/Relu", "nothing to do"))


class Second:
    """Removes the Neg."""

    name: ClassVar[str] = "second"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = ("first", "absent")

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        node = next(item for item in model.graph if item.op_type == "Neg")
        model.graph.outputs[0].name = None
        model.graph.outputs[0] = node.inputs[0]
        node.inputs[0].name = "y"
        model.graph.remove(node, safe=True)
        report.touched.append("a")


class Refusing:
    name: ClassVar[str] = "refusing"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ()

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        raise self.error


def test_reports_in_order(context: PassContext) -> None:
    model = ir.from_onnx_text(TEXT)
    first, second = run_passes(model, [First(), Second()], context)
    assert (first.name, first.exact, first.changed) == ("first", True, False)
    assert first.skipped == [WhyNot("a/Relu", "nothing to do")]
    assert (second.name, second.exact, second.changed) == ("second", False, True)
    assert (second.nodes_before, second.nodes_after) == (2, 1)
    assert second.seconds >= 0
    assert all(node.name for node in model.graph)


def test_a_wrong_order_is_refused_before_anything_runs(context: PassContext) -> None:
    model = ir.from_onnx_text(TEXT)
    with pytest.raises(GraphPassError, match="pass 'second' must run after first"):
        run_passes(model, [Second(), First()], context)
    assert len(model.graph) == 2


def test_what_a_pass_must_follow_may_be_left_out(context: PassContext) -> None:
    (report,) = run_passes(ir.from_onnx_text(TEXT), [Second()], context)
    assert report.changed


@pytest.mark.parametrize("kind", [GraphPassError, RecipeError])
def test_a_refusal_names_the_pass(context: PassContext, kind: type[Exception]) -> None:
    error = kind("conv_in: cannot")
    with pytest.raises(GraphPassError, match="pass 2 'refusing': conv_in: cannot") as caught:
        run_passes(ir.from_onnx_text(TEXT), [First(), Refusing(error)], context)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("mistake", [ZeroDivisionError("by zero"), SystemExit(0), AttributeError(), RecursionError()])
def test_a_mistake_in_a_pass_is_named_and_its_traceback_kept(context: PassContext, mistake: BaseException) -> None:
    with pytest.raises(GraphPassError, match="pass 1 'refusing' failed with") as caught:
        run_passes(ir.from_onnx_text(TEXT), [Refusing(mistake)], context)
    assert caught.value.__cause__ is mistake
    assert caught.value.keep_traceback


def test_dumps_are_numbered_and_loadable(context: PassContext, tmp_path: Path) -> None:
    folder = tmp_path / "dumps" / "here"
    run_passes(ir.from_onnx_text(TEXT), [First(), Second()], context, folder)
    models = sorted(item.name for item in folder.iterdir() if item.suffix == ".onnx")
    assert models == ["01-first.onnx", "02-second.onnx"]
    assert [len(onnx.load(folder / name).graph.node) for name in models] == [2, 1]


def test_the_plan_of_a_layer(context: PassContext) -> None:
    assert context.plan_of("conv_in") is LAYER
    assert context.plan_of("conv_out") is None
