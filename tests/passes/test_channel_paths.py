"""Channels are followed through data movement: what is claimed holds when the graph is executed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from qdexport.graph.evaluate import evaluate, subgraph
from qdexport.passes.channel_paths import Blocked, channel_scales_behind, is_channel_scale, possible_sources

CHANNELS = 24
INVERSE = np.linspace(0.5, 2, CHANNELS, dtype=np.float32)
CONSTANTS = {
    "split": np.array([0, 0, 4, -1]), "join": np.array([0, 0, 24]), "pixels": np.array([0, 24, -1]),
    "one": np.array([1]), "five": np.array([5]),
}  # fmt: skip
OTHERS = {"gate": (2, 5, 24), "row": (5, 24), "p": (2, 7, 5), "p4": (2, 4, 7, 5)}
TO_HEADS = ["{o} = Reshape({i}, split)", "{o} = Transpose<perm: ints = [0,2,1,3]>({i})"]
FROM_HEADS = ["{o} = Transpose<perm: ints = [0,2,1,3]>({i})", "{o} = Reshape({i}, join)"]


def moved(graphs, shape, steps, *, end="{o} = Mul({i}, inv)", inverse=INVERSE, constants=None):
    """``x -> Relu -> steps -> channel scale -> y``; a step reads ``{i}`` and writes ``{o}``."""
    lines, name = ['["net/Relu"] t0 = Relu(x)'], "t0"
    for index, step in enumerate(steps, 1):
        lines.append(f'["net/Op{index}"] ' + step.format(i=name, o=f"t{index}"))
        name = f"t{index}"
    lines.append('["layer.channel_scale/Mul"] ' + end.format(i=name, o="t"))
    lines.append('["net/Flatten"] y = Flatten<axis: int = 0>(t)')
    dims = ",".join(map(str, shape))
    others = "".join(f", float[{','.join(map(str, size))}] {key}" for key, size in OTHERS.items())
    arrays = {**CONSTANTS, **(constants or {}), "inv": inverse}
    return graphs.model_of(f"float[{dims}] x{others}", "float[1,n] y", "\n".join(lines), arrays)


def source_of(model):
    return next(iter(model.graph)).outputs[0]


def feeds_of(x):
    noise = np.random.default_rng(3)
    return {"x": x, **{key: noise.integers(1, 4, size).astype(np.float32) for key, size in OTHERS.items()}}


def commutes(model, axis, shape):
    """Whether scaling the channels of the source is the same as scaling where the product stands.

    Factors are positive and all sums are of few products, so that FP32 rounding stays below 1e-5; a wrong channel
    would be off by 6 % at least.
    """
    (scale,) = [node for node in model.graph if is_channel_scale(node)]
    part = subgraph(model, list(model.graph.inputs), [scale.inputs[0]])
    whole = subgraph(model, list(model.graph.inputs), [scale.outputs[0]])
    x = np.random.default_rng(0).integers(1, 64, shape).astype(np.float32)
    wide = INVERSE.reshape([-1] + [1] * (len(shape) - 1 - axis))
    (late,) = evaluate(whole, feeds_of(x)).values()
    (early,) = evaluate(part, feeds_of(x * wide)).values()
    return np.allclose(late, early, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("shape", "axis", "steps"),
    [
        ((2, 5, 24), 2, []),
        ((2, 5, 24), 2, [*TO_HEADS, *FROM_HEADS]),
        ((2, 24, 3, 5), 1, ["{o} = Reshape({i}, pixels)", "{o} = Transpose<perm: ints = [0,2,1]>({i})"]),
        ((2, 24, 5), 1, ["{o} = Transpose<perm: ints = [0,2,1]>({i})", "{o} = Identity({i})"]),
        ((2, 5, 24), 2, ["{o} = Slice({i}, one, five, one)"]),
        ((2, 5, 24), 2, ["{o} = Cast<to: int = 1>({i})", "{o} = Mul({i}, gate)"]),
        ((2, 5, 24), 2, ["{o} = Mul(row, {i})"]),
        ((2, 5, 24), 2, ["{o} = MatMul(p, {i})"]),
        ((2, 5, 24), 2, [*TO_HEADS, "{o} = MatMul(p4, {i})", *FROM_HEADS]),
    ],
)
def test_data_movement(graphs, shape, axis, steps):
    model = moved(graphs, shape, steps)
    found = channel_scales_behind(source_of(model), axis)
    assert not isinstance(found, Blocked), found
    assert [node.name for node in found] == ["layer.channel_scale/Mul"]
    assert commutes(model, axis, shape)
    (scale,) = found
    assert source_of(model) in list(possible_sources(scale.inputs[0]))


def test_channels_of_images(graphs):
    model = moved(graphs, (2, 24, 3, 5), [], inverse=INVERSE.reshape(1, 24, 1, 1))
    assert len(channel_scales_behind(source_of(model), 1)) == 1
    assert isinstance(channel_scales_behind(source_of(model), 3), Blocked)


@pytest.mark.parametrize(
    ("shape", "axis", "steps", "reason"),
    [
        ((2, 24, 5), 1, ["{o} = Reshape({i}, join5)"], "net/Op1"),  # channels and tokens mixed: no axis of either
        ((2, 5, 24), 2, [*TO_HEADS, "{o} = Reshape({i}, join)"], "net/Op3"),  # heads beside tokens, not transposed
        ((2, 24, 24), 1, [], "in order"),  # the other axis of the same size
        ((2, 24, 24), 1, ["{o} = MatMul({i}, {i})"], "no factor per channel passes|both operands"),
        ((2, 5, 24), 2, ["{o} = Mul({i}, {i})"], "both operands"),
        ((2, 5, 24), 2, ["{o} = Sigmoid({i})"], "that Sigmoid"),
        ((2, 5, 24), 2, ["{o} = Add({i}, gate)"], "that Add"),
        ((2, 5, 24), 2, ["{o} = Softmax<axis: int = -1>({i})"], "that Softmax"),
    ],
)
def test_what_stands_in_the_way(graphs, shape, axis, steps, reason):
    model = moved(graphs, shape, steps, constants={"join5": np.array([2, 5, 24])})
    found = channel_scales_behind(source_of(model), axis)
    assert isinstance(found, Blocked)
    assert any(part in found.reason for part in reason.split("|")), found


def test_another_reader_stands_in_the_way(graphs):
    body = '["net/Relu"] t = Relu(x)\n["l.channel_scale/Mul"] y = Mul(t, inv)\n["net/Exp"] z = Exp(t)'
    model = graphs.model_of("float[2,24] x", "float[2,24] y, float[2,24] z", body, {"inv": INVERSE})
    assert "net/Exp reads it too" in channel_scales_behind(source_of(model), 1).reason
    body = '["net/Relu"] t = Relu(x)\n["l.channel_scale/Mul"] y = Mul(t, inv)'
    model = graphs.model_of("float[2,24] x", "float[2,24] y, float[2,24] t", body, {"inv": INVERSE})
    assert "output of the network" in channel_scales_behind(source_of(model), 1).reason


def test_the_shape_may_be_read(graphs):
    body = '["net/Relu"] t = Relu(x)\n["l.channel_scale/Mul"] y = Mul(t, inv)\n["net/Shape"] z = Shape(t)'
    model = graphs.model_of("float[2,24] x", "float[2,24] y, int64[2] z", body, {"inv": INVERSE})
    assert len(channel_scales_behind(source_of(model), 1)) == 1


def reshaped(draw, shape):
    """One axis in two, or two neighbours in one."""
    axis = draw(st.integers(0, len(shape) - 1))
    if draw(st.booleans()) and axis + 1 < len(shape):
        return [*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]]
    size = draw(st.sampled_from([size for size in range(1, shape[axis] + 1) if shape[axis] % size == 0]))
    return [*shape[:axis], size, shape[axis] // size, *shape[axis + 1 :]]


@st.composite
def chains(draw):
    """Reshapes and transposes of 2 x 3 x 24 elements that end in a tensor with an axis of 24."""
    shape, steps, constants = [2, 3, CHANNELS], [], {}
    for index in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            perm = draw(st.permutations(range(len(shape))))
            steps.append(f"{{o}} = Transpose<perm: ints = {list(perm)}>({{i}})")
            shape = [shape[axis] for axis in perm]
        else:
            shape = reshaped(draw, shape)
            constants[f"shape{index}"] = np.array(shape)
            steps.append(f"{{o}} = Reshape({{i}}, shape{index})")
    if CHANNELS not in shape:
        shape = draw(st.sampled_from([[2, 3, CHANNELS], [6, CHANNELS], [CHANNELS, 6], [2, CHANNELS, 3]]))
        constants["shape"] = np.array(shape)
        steps.append("{o} = Reshape({i}, shape)")
    axis = draw(st.sampled_from([axis for axis, size in enumerate(shape) if size == CHANNELS]))
    return steps, constants, len(shape) - 1 - axis


@given(chains())
def test_no_false_claim(graphs, chain):
    steps, constants, trailing = chain
    inverse = INVERSE.reshape([-1] + [1] * trailing)
    model = moved(graphs, (2, 3, CHANNELS), steps, inverse=inverse, constants=constants)
    found = channel_scales_behind(source_of(model), 2)
    event("blocked" if isinstance(found, Blocked) else "followed")
    assert isinstance(found, Blocked) or commutes(model, 2, (2, 3, CHANNELS))
