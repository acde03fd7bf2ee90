"""Blocks are cut with what is fused with them; digests see shapes and wiring, not weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qdexport.graph.dialect import LAYER_KEY
from qdexport.search.blocks import block_digest, cut_blocks


def test_a_block_begins_at_the_convolution_before_it(lowered):
    (first, second) = cut_blocks(lowered())
    assert first.name == "down_blocks.0.resnets.0"
    assert second.name == "down_blocks.0.resnets.1"
    ops = [node.op_type for node in second.model.graph]
    # the convolution of the block before with its quantizer, and the own one
    assert ops.count("Conv") == 2
    assert [value.dtype for value in second.model.graph.outputs] == [ir.DataType.FLOAT16]
    (site,) = second.sites
    assert site.operator == "group-norm"
    assert site.signature["then"] == "silu+quantize"


def test_a_block_ends_at_the_quantizer_behind_it(lowered):
    """As at the end of a UNet, where norm, activation and convolution are modules of their own."""
    model = lowered()
    for node in model.graph:
        name = node.metadata_props[LAYER_KEY].removeprefix("down_blocks.0.resnets.1")
        if name.startswith("."):
            node.metadata_props[LAYER_KEY] = {".norm1": "conv_norm_out", ".act": "conv_act"}.get(name, "conv_out")
    last = cut_blocks(model)[-1]
    assert last.name == "conv_norm_out"
    ops = [node.op_type for node in last.model.graph]
    assert ops.count("Conv") == 1
    assert ops[-2:] == ["Cast", "QuantizeLinear"]
    assert ir.DataType.INT8 in {value.dtype for value in last.model.graph.outputs}


def test_equal_blocks_have_equal_digests_whatever_their_weights(lowered):
    digests = [block.digest for block in cut_blocks(lowered(resnets=4, seed=1))]
    others = [block.digest for block in cut_blocks(lowered(resnets=4, seed=2))]
    assert digests == others
    # the first has no block before it, and what is behind the last is the network's output
    assert len(set(digests[1:-1])) == 1
    assert len(set(digests)) > 1


@pytest.mark.parametrize("changes", [{"channels": 16}, {"size": 6}, {"batch": 1}, {"equal_scales": True}])
def test_other_shapes_and_other_wiring_have_other_digests(lowered, changes):
    assert cut_blocks(lowered())[1].digest != cut_blocks(lowered(**changes))[1].digest


def test_whole_numbers_count_by_value(lowered):
    block = cut_blocks(lowered())[0]
    before = block_digest(block.model)
    reshape = next(node for node in block.model.graph if node.op_type == "Reshape")
    shape = reshape.inputs[1]
    assert shape is not None
    shape.const_value = ir.tensor(np.array([0, 4, -1], np.int64), name=shape.name)
    assert block_digest(block.model) != before


def test_residual_connections_do_not_pull_the_network_in(lowered):
    blocks = cut_blocks(lowered(resnets=6))
    assert len({len(block.model.graph) for block in blocks[2:-1]}) == 1
