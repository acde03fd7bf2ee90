from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from qdexport.check import parity
from qdexport.check.parity import end_to_end, layer_parity
from qdexport.core.results import LayerParity
from qdexport.errors import ModelError, ParityError
from qdexport.graph.probe import LayerProbe, find_probes
from tests.check.conftest import Compiled

Change = Callable[[Callable[[onnx.ModelProto], None]], Path]
VICTIM = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
CONV = "mid_block.resnets.0.conv2"


def probe_of(compiled: Compiled, name: str) -> LayerProbe:
    return find_probes(ir.load(compiled.path), [name])[name]


def set_constant(proto: onnx.ModelProto, name: str | None, array: np.ndarray) -> None:
    tensor = next(item for item in proto.graph.initializer if item.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def constant(proto: onnx.ModelProto, name: str | None) -> np.ndarray:
    return numpy_helper.to_array(next(item for item in proto.graph.initializer if item.name == name))


def measured(compiled: Compiled, path: Path) -> dict[str, LayerParity]:
    return {item.name: item for item in layer_parity(compiled.model, path, compiled.io, compiled.calls)}


def test_every_quantized_layer_agrees_on_its_own_inputs(static: Compiled) -> None:
    layers = layer_parity(static.model, static.path, static.io, static.calls)
    assert [item.name for item in layers] == [plan.name for plan in static.model.plans if plan.quantized]
    assert {item.steps for item in layers} == {3}
    assert all(item.code_flip_rate == item.weight_flip_rate == 0 for item in layers)
    # sums of at most 576 products, in another order: 1e-6 relative at the very worst, 110 dB with cancellation
    assert min(item.sqnr_db for item in layers) > 110


def test_half_precision_step_tables_and_split_layers_agree(stepped: Compiled) -> None:
    layers = layer_parity(stepped.model, stepped.path, stepped.io, stepped.calls)
    names = [part for plan in stepped.model.plans if plan.quantized for part in plan.parts]
    assert [item.name for item in layers] == names
    assert any("#1" in name for name in names)
    assert all(item.code_flip_rate == item.weight_flip_rate == 0 for item in layers)
    # operands and results are rounded to 11 bits: 2^-12 relative each is 72 dB, less some for cancellation
    assert min(item.sqnr_db for item in layers) > 60


def test_chunks_change_nothing(static: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = layer_parity(static.model, static.path, static.io, static.calls[:1])
    monkeypatch.setattr(parity, "_CHUNK_BYTES", 0)
    assert layer_parity(static.model, static.path, static.io, static.calls[:1]) == whole


def test_a_layer_that_is_called_twice_is_compared_twice(static: Compiled) -> None:
    """As DiT's first block's embedding, which its last layers call again."""

    def call_again(block: Any, args: tuple[Any, ...]) -> None:
        block.resnets[0].conv2(2 * args[0])

    block = static.model.denoiser.get_submodule("mid_block")
    hook = block.register_forward_pre_hook(call_again)
    try:
        layers = measured(static, static.path)
    finally:
        hook.remove()
    assert layers[CONV].code_flip_rate == 0
    assert layers[CONV].sqnr_db > 100  # both calls: the worst counts


def test_hooks_are_gone_afterwards(static: Compiled) -> None:
    layer_parity(static.model, static.path, static.io, static.calls[:1])
    modules = list(static.model.denoiser.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_progress_counts_calls(static: Compiled) -> None:
    seen: list[tuple[int, int]] = []
    layer_parity(static.model, static.path, static.io, static.calls[:2], lambda *state: seen.append(state))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("name", [VICTIM, CONV])
def test_one_corrupt_weight_code_is_caught_and_named(static: Compiled, changed: Change, name: str) -> None:
    stored = probe_of(static, name).weight.name

    def edit(proto: onnx.ModelProto) -> None:
        codes = constant(proto, stored).copy()
        codes.flat[7] += 1 if codes.flat[7] < 0 else -1
        set_constant(proto, stored, codes)

    layers = measured(static, changed(edit))
    size = probe_of(static, name).weight.const_value.size
    assert layers[name].weight_flip_rate == 1 / size
    assert layers[name].code_flip_rate == 0  # of activations, which no weight changes
    assert [item.name for item in layers.values() if item.weight_flip_rate > 0] == [name]


def test_a_weight_scale_off_by_one_percent_is_caught(static: Compiled, changed: Change) -> None:
    probe = probe_of(static, VICTIM)
    dequantize = probe.node.inputs[1].producer()
    name = dequantize.inputs[1].name

    layers = measured(
        static, changed(lambda proto: set_constant(proto, name, constant(proto, name) * np.float32(1.01)))
    )
    # the whole output is 1 % off, which is 40 dB
    assert layers[VICTIM].sqnr_db == pytest.approx(40, abs=1)
    assert [item.name for item in layers.values() if item.sqnr_db < 100] == [VICTIM]


def test_an_activation_scale_off_by_one_percent_is_caught(static: Compiled, changed: Change) -> None:
    name = probe_of(static, CONV).codes.producer().inputs[1].name
    layers = measured(
        static, changed(lambda proto: set_constant(proto, name, constant(proto, name) * np.float32(1.01)))
    )
    assert layers[CONV].code_flip_rate > 1e-2  # a code beyond 50 moves by half a step or more
    assert [item.name for item in layers.values() if item.code_flip_rate > 0] == [CONV]


def test_swapped_layers_are_caught(static: Compiled, changed: Change) -> None:
    first, second = probe_of(static, VICTIM).weight.name, probe_of(static, OTHER).weight.name

    def edit(proto: onnx.ModelProto) -> None:
        a, b = constant(proto, first), constant(proto, second)
        set_constant(proto, first, b)
        set_constant(proto, second, a)

    layers = measured(static, changed(edit))
    assert {item.name for item in layers.values() if item.weight_flip_rate > 0.5} == {VICTIM, OTHER}
    assert layers[VICTIM].sqnr_db < 10


def test_a_weight_of_another_shape_fails_alone(static: Compiled, changed: Change) -> None:
    stored = probe_of(static, VICTIM).weight.name

    def edit(proto: onnx.ModelProto) -> None:
        set_constant(proto, stored, np.ascontiguousarray(constant(proto, stored)[:-1]))

    layers = measured(static, changed(edit))
    assert layers[VICTIM].weight_flip_rate == layers[VICTIM].code_flip_rate == 1
    assert layers[VICTIM].sqnr_db < 0
    assert all(item.code_flip_rate == 0 for name, item in layers.items() if name != VICTIM)


def test_a_layer_that_is_not_in_the_file_is_named(static: Compiled, changed: Change) -> None:
    def edit(proto: onnx.ModelProto) -> None:
        next(node for node in proto.graph.node if node.name == f"{CONV}/Conv").name = "elsewhere"

    path = changed(edit)
    with pytest.raises(ParityError, match=rf"no node {CONV}/Conv"):
        layer_parity(static.model, path, static.io, static.calls)


def test_a_file_that_is_not_there(static: Compiled, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        layer_parity(static.model, tmp_path / "model.onnx", static.io, static.calls)


def test_end_to_end_is_one_number_for_each_call(static: Compiled) -> None:
    numbers = end_to_end(static.model, static.path, static.io, static.calls)
    assert end_to_end(static.model, static.path, static.io, static.calls[1:2]) == numbers[1:2]
    # a flipped code costs this network no more than half its digits
    assert min(numbers) > 20


def test_end_to_end_sees_what_no_layer_shows(static: Compiled, changed: Change) -> None:
    def edit(proto: onnx.ModelProto) -> None:
        # the time embedding is added between quantized layers, inside none of them
        name = next(item.name for item in proto.graph.initializer if item.name.startswith("time_table/rows"))
        set_constant(proto, name, constant(proto, name) + np.float32(1))

    assert max(end_to_end(static.model, changed(edit), static.io, static.calls)) < 10
