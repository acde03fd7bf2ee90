"""1 / r moves into norms and layers; codes of weights stay, and with powers of two every number does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qdexport.graph.evaluate import evaluate, fake_quantize_codes
from qdexport.graph.query import is_fake_quantize, scaled_for
from qdexport.graph.runner import run_passes
from qdexport.passes.expand_group_norm import ExpandGroupNorm
from qdexport.passes.fold_reparam import FoldReparam
from qdexport.passes.lower_timestep_scale import LowerTimestepScale
from qdexport.passes.lower_zero_point import LowerZeroPoint

STEP = 2.0**-5
EPS = 2.0**-24
KINDS = ["powers of two", "any"]


def inverse_of(noise, channels, kind):
    """``1 / r`` with r from 1 to 8."""
    r = 2.0 ** noise.integers(0, 4, channels) if kind == "powers of two" else 1 + 7 * noise.random(channels)
    r[0] = 4.0  # never all ones
    return (1 / r).astype(np.float32)


def quantized(graphs, layer, x, out, *, scale="s", zero_point="z", bias="", qmin=-128, qmax=127):
    """Lines of a quantized linear layer ``out = Q(x) W [+ b]`` with the constants ``{layer}_w``."""
    name = layer.replace(".", "_")
    lines = [
        graphs.quantize(f"{layer}.input_quantizer", f"{name}_q", f"{x}, {scale}, {zero_point}", qmin, qmax),
        graphs.weight_of(layer, f"{name}_w", axis=1),
        f'["{layer}/MatMul"] {f"{out}_0" if bias else out} = MatMul({name}_q, {name}_w)',
    ]
    return lines + ([f'["{layer}/Add"] {out} = Add({out}_0, {bias})'] if bias else [])


def weights(graphs, noise, layer, rows, columns):
    scale = 2.0**-8 * (1 + noise.random(columns))
    return graphs.weight_constants(f"{layer.replace('.', '_')}_w", noise.integers(-128, 128, (rows, columns)), scale)


STATIC = {"s": np.float32([STEP]), "z": np.float32([0])}


def check(ran, kind, quantizers, feeds, bounds=(-128, 127), step=STEP):
    """Powers of two: bit for bit. Any r: what a quantizer reads is as close as roundings say, and codes differ only
    next to a tie.
    """
    if kind == "powers of two":
        ran.assert_equal()
        return
    for name in quantizers:
        new, old = (input_at(model, name, feeds) for model in (ran.model, ir.from_proto(ran.original)))
        # Both forms do the same sums but for the factor, which moves into FP32 constants: a rounding in gamma, beta or
        # a weight's scale, and one in each product and sum, of numbers that are at most the largest one of the tensor.
        # 24 products at most enter a sum.
        reach = np.abs(old).max()
        np.testing.assert_allclose(new, old, rtol=0, atol=2 * (24 + 6) * EPS * reach)
        codes = [fake_quantize_codes(x, np.float32(step), np.float32(0), *bounds) for x in (new, old)]
        near_tie = np.abs(old / step % 1 - 0.5) < 2 * (24 + 6) * EPS * reach / step
        np.testing.assert_array_equal(codes[0][~near_tie], codes[1][~near_tie])


def input_at(model, name, feeds):
    """What a quantizer reads."""
    value = next(node for node in model.graph if node.name == f"{name}.input_quantizer/FakeQuantize").inputs[0]
    part = ir.Model(ir.convenience.extract(model.graph, list(model.graph.inputs), [value]), ir_version=model.ir_version)
    part.graph.opset_imports.update(model.graph.opset_imports)
    return next(iter(evaluate(part, feeds).values()))


def scales_left(model):
    return [node.name for node in model.graph if ".channel_scale/" in node.name]


def layer_norm(graphs, noise, kind, *, other=""):
    """LayerNormalization in front of to_q and to_v, whose constants of the norm a second norm shares."""
    lines = [
        '["norm1/LayerNormalization"] n = LayerNormalization<axis: int = -1>(x, gamma, beta)',
        '["norm2/LayerNormalization"] y3 = LayerNormalization<axis: int = -1>(x, gamma, beta)',
        '["to_q.channel_scale/Mul"] nq = Mul(n, inv)',
        f'["to_v.channel_scale/Mul"] nv = Mul(n, {other or "inv"})',
        *quantized(graphs, "to_q", "nq", "y1"),
        *quantized(graphs, "to_v", "nv", "y2", bias="b"),
    ]
    constants = {
        **STATIC, "gamma": noise.random(8).astype(np.float32) * 2, "beta": noise.normal(size=8).astype(np.float32),
        "inv": inverse_of(noise, 8, kind), "inv2": inverse_of(noise, 8, kind), "b": np.float32([1, 2, 3]),
        **weights(graphs, noise, "to_q", 8, 4), **weights(graphs, noise, "to_v", 8, 3),
    }  # fmt: skip
    outputs = "float[2,5,4] y1, float[2,5,3] y2, float[2,5,8] y3"
    return graphs.model_of("float[2,5,8] x", outputs, "\n".join(lines), constants)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_norm(graphs, noise, kind):
    feeds = {"x": noise.normal(size=(2, 5, 8)).astype(np.float32)}
    ran = graphs.run(layer_norm(graphs, noise, kind), FoldReparam(), feeds)
    assert scales_left(ran.model) == []
    assert ran.report.touched == ["to_q", "to_v"]
    assert ran.report.notes == dict.fromkeys(["to_q", "to_v"], "1 / r folded into norm1")
    assert not ran.report.exact
    check(ran, kind, ["to_q", "to_v"], feeds)
    np.testing.assert_array_equal(ran.before[0]["y3"], ran.after[0]["y3"])  # the other norm keeps its constants
    assert not any(map(scaled_for, ran.model.graph))


def test_different_channel_scales_stay(graphs, noise):
    feeds = {"x": noise.normal(size=(2, 5, 8)).astype(np.float32)}
    ran = graphs.run(layer_norm(graphs, noise, "any", other="inv2"), FoldReparam(), feeds)
    assert not ran.report.changed
    assert len(scales_left(ran.model)) == 2
    assert ran.report.notes["to_q"].startswith("1 / r stays in front of the quantizer: the layers that read norm1/")
    assert {item.node for item in ran.report.skipped} == {"to_q.channel_scale/Mul", "to_v.channel_scale/Mul"}


def test_a_norm_in_half_precision(graphs, noise):
    """The product is FP32 between casts there, which stay for legalize-types."""
    lines = [
        '["norm/LayerNormalization"] n = LayerNormalization<axis: int = -1>(x, gamma, beta)',
        '["to_q.channel_scale/Cast"] wide = Cast<to: int = 1>(n)',
        '["to_q.channel_scale/Mul"] scaled = Mul(wide, inv)',
        '["to_q.channel_scale/Cast_1"] narrow = Cast<to: int = 10>(scaled)',
        *quantized(graphs, "to_q", "narrow", "wide_y")[:1],
        '["net/Identity"] y = Identity(to_q_q)',
    ]
    constants = {
        **STATIC, "gamma": noise.random(8).astype(np.float16), "beta": noise.normal(size=8).astype(np.float16),
        "inv": inverse_of(noise, 8, "powers of two"),
    }  # fmt: skip
    model = graphs.model_of("float16[2,5,8] x", "float16[2,5,8] y", "\n".join(lines), constants)
    ran = graphs.run(model, FoldReparam(), {"x": noise.normal(size=(2, 5, 8)).astype(np.float16)})
    assert scales_left(ran.model) == ["to_q.channel_scale/Cast", "to_q.channel_scale/Cast_1"]
    assert ran.report.touched == ["to_q"]
    assert {str(value.dtype) for value in ran.node("norm/LayerNormalization").inputs} == {"FLOAT16"}
    ran.assert_equal()


def group_norm(graphs, noise, kind, *, linear, silu=False):
    """GroupNorm as captured, in front of proj_in as a convolution or as a linear layer behind a permutation."""
    lines = [
        '["norm/Reshape"] g = Reshape(x, groups)',
        '["norm/InstanceNormalization"] i = InstanceNormalization(g, ones, zeros)',
        '["norm/Reshape_1"] h = Reshape(i, image)',
        '["norm/Mul"] hg = Mul(h, gamma)',
        '["norm/Add"] n0 = Add(hg, beta)',
        *(['["act/Sigmoid"] a = Sigmoid(n0)', '["act/Mul"] n = Mul(n0, a)'] if silu else
          ['["net/Identity"] n = Identity(n0)']),
    ]  # fmt: skip
    if linear:
        lines += [
            '["net/Transpose"] t = Transpose<perm: ints = [0,2,3,1]>(n)',
            '["net/Reshape"] tokens = Reshape(t, flat)',
            '["proj_in.channel_scale/Mul"] ns = Mul(tokens, inv)',
            *quantized(graphs, "proj_in", "ns", "y", bias="b"),
        ]
    else:
        lines += [
            '["proj_in.channel_scale/Mul"] ns = Mul(n, inv)',
            graphs.quantize("proj_in.input_quantizer", "q", "ns, s, z", -128, 127),
            graphs.weight_of("proj_in", "w"),
            '["proj_in/Conv"] y = Conv(q, w, b)',
        ]
    inverse = inverse_of(noise, 8, kind)
    constants = {
        **STATIC, "groups": np.array([0, 4, -1]), "image": np.array([2, 8, 3, 5]), "flat": np.array([2, 15, 8]),
        "ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32),
        "gamma": noise.random((8, 1, 1)).astype(np.float32) * 2,
        "beta": noise.normal(size=(8, 1, 1)).astype(np.float32),
        "inv": inverse if linear else inverse.reshape(1, 8, 1, 1), "b": np.float32([1, 2, 3]),
        **weights(graphs, noise, "proj_in", 8, 3),
        **graphs.weight_constants("w", noise.integers(-128, 128, (3, 8, 1, 1)), 2.0**-8 * (1 + noise.random(3))),
    }  # fmt: skip
    return graphs.model_of(
        "float[2,8,3,5] x", "float[2,d,e] y" if linear else "float[2,3,3,5] y", "\n".join(lines), constants
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("linear", [False, True])
def test_group_norm(graphs, noise, kind, linear):
    feeds = {"x": noise.normal(size=(2, 8, 3, 5)).astype(np.float32)}
    ran = graphs.run(group_norm(graphs, noise, kind, linear=linear), FoldReparam(), feeds)
    assert scales_left(ran.model) == []
    assert ran.report.notes == {"proj_in": "1 / r folded into norm"}
    check(ran, kind, ["proj_in"], feeds)


@pytest.mark.parametrize("first", [ExpandGroupNorm, FoldReparam])
def test_group_norm_written_out_before_or_after(graphs, noise, first):
    model = group_norm(graphs, noise, "powers of two", linear=True)
    feeds = {"x": noise.normal(size=(2, 8, 3, 5)).astype(np.float32)}
    second = FoldReparam if first is ExpandGroupNorm else ExpandGroupNorm
    reports = run_passes(model, [first(), second()], graphs.context_of())
    assert [report.changed for report in reports] == [True, True]
    reference = group_norm(graphs, np.random.default_rng(20240607), "powers of two", linear=True)
    run_passes(reference, [ExpandGroupNorm()], graphs.context_of())
    np.testing.assert_array_equal(evaluate(model, feeds)["y"], evaluate(reference, feeds)["y"])


def test_silu_stands_in_the_way(graphs, noise):
    feeds = {"x": noise.normal(size=(2, 8, 3, 5)).astype(np.float32)}
    ran = graphs.run(group_norm(graphs, noise, "any", linear=False, silu=True), FoldReparam(), feeds)
    assert not ran.report.changed
    assert scales_left(ran.model) == ["proj_in.channel_scale/Mul"]
    assert "act/Sigmoid reads it too" in ran.report.notes["proj_in"]
    ran.assert_equal()


def attention(graphs, noise, kind, *, bos=False, scale="s", zero_point="z", bounds=(-128, 127), weight="quantized"):
    """``V = to_v(x)``; heads; ``P V``; heads joined; ``to_out.0``. Two heads of four channels."""
    qmin, qmax = bounds
    value = quantized(graphs, "to_v", "rest" if bos else "x", "vr" if bos else "v", bias="bv", scale=scale,
                      zero_point=zero_point, qmin=qmin, qmax=qmax)  # fmt: skip
    if weight == "float":
        value = [
            '["to_v/Transpose"] wt = Transpose<perm: ints = [1,0]>(wf)',
            '["to_v/MatMul"] v_0 = MatMul(x, wt)', '["to_v/Add"] v = Add(v_0, bv)',
        ]  # fmt: skip
    elif weight == "per tensor":
        value[1] = '["to_v.weight_quantizer/DequantizeLinear"] to_v_w = DequantizeLinear(to_v_w_codes, ws, wz)'
    lines = [
        *(['["to_v/Slice"] rest = Slice(x, one, all, one)'] if bos else []),
        *value,
        *([
            '["to_v.first_token/Slice"] first = Slice(x, zero, one, one)',
            '["to_v.first_token/Transpose"] wft = Transpose<perm: ints = [1,0]>(wf)',
            '["to_v.first_token/MatMul"] vf_0 = MatMul(first, wft)',
            '["to_v.first_token/Add"] vf = Add(vf_0, bv)',
            '["to_v.first_token/Concat"] v = Concat<axis: int = 1>(vf, vr)',
        ] if bos else []),
        '["to_k/Transpose"] wkt = Transpose<perm: ints = [1,0]>(wf)',
        '["to_k/MatMul"] y2 = MatMul(x, wkt)',
        '["attn/Reshape"] vh = Reshape(v, heads)',
        '["attn/Transpose"] vt = Transpose<perm: ints = [0,2,1,3]>(vh)',
        '["attn/MatMul"] o = MatMul(p, vt)',
        '["attn/Transpose_1"] ot = Transpose<perm: ints = [0,2,1,3]>(o)',
        '["attn/Reshape_1"] oj = Reshape(ot, joined)',
        '["to_out.0.channel_scale/Mul"] os = Mul(oj, inv)',
        *quantized(graphs, "to_out.0", "os", "y"),
    ]  # fmt: skip
    constants = {
        **STATIC, "zu": np.float32([77]), "sr": np.float32([0.02, 0.05]), "zr": np.float32([90, 130]),
        "zero": np.array([0]), "one": np.array([1]), "all": np.array([2**31 - 1]),
        "heads": np.array([0, 0, 2, 4]), "joined": np.array([0, 0, 8]),
        "wf": noise.normal(size=(8, 6)).astype(np.float32), "ws": np.float32(0.01), "wz": np.int8(0),
        "bv": noise.normal(size=8).astype(np.float32), "inv": inverse_of(noise, 8, kind),
        **weights(graphs, noise, "to_v", 6, 8), **weights(graphs, noise, "to_out.0", 8, 3),
    }  # fmt: skip
    inputs = "float[2,5,6] x, float[2,2,7,5] p" + (", int64[1] row" if "row" in zero_point else "")
    return graphs.model_of(inputs, "float[2,7,3] y, float[2,5,8] y2", "\n".join(lines), constants)


def attention_feeds(noise):
    p = noise.random((2, 2, 7, 5))
    p /= p.sum(axis=-1, keepdims=True)
    return {"x": noise.normal(size=(2, 5, 6)).astype(np.float32), "p": p.astype(np.float32)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [False, True])
def test_values_of_attention(graphs, noise, kind, bos):
    feeds = attention_feeds(noise)
    model = attention(graphs, noise, kind, bos=bos)
    codes = model.graph.initializers["to_v_w_codes"]
    ran = graphs.run(model, FoldReparam(), feeds)
    assert scales_left(ran.model) == []
    makers = "to_v, to_v.first_token" if bos else "to_v"
    assert ran.report.notes == {"to_out.0": f"1 / r folded into {makers}"}
    weight = ran.node("to_v.weight_quantizer/DequantizeLinear")
    assert weight.inputs[0] is codes
    assert scaled_for(ran.node("to_v/MatMul")) == [("to_out.0", 0)]
    assert scaled_for(ran.node("to_k/MatMul")) == []
    check(ran, kind, ["to_out.0"], feeds)
    np.testing.assert_array_equal(ran.before[0]["y2"], ran.after[0]["y2"])  # another reader of the FP weight


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_attention_in_floating_point(graphs, noise, kind):
    feeds = attention_feeds(noise)
    ran = graphs.run(attention(graphs, noise, kind, weight="float"), FoldReparam(), feeds)
    assert ran.report.touched == ["to_out.0"]
    check(ran, kind, ["to_out.0"], feeds)
    np.testing.assert_array_equal(ran.before[0]["y2"], ran.after[0]["y2"])


def test_a_weight_with_one_scale_is_left_alone(graphs, noise):
    ran = graphs.run(attention(graphs, noise, "any", weight="per tensor"), FoldReparam(), attention_feeds(noise))
    assert not ran.report.changed
    assert "does not have one scale per output channel" in ran.report.notes["to_out.0"]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_producer_with_zero_points(graphs, noise, rows):
    """Unsigned 8 bits, static and by step: the passes that take scale and bias out of the layer run later."""
    operands = {"zero_point": "zu"} if rows == 1 else {"scale": "sr", "zero_point": "zr, row"}
    feeds = attention_feeds(noise)
    every = [{**feeds, "row": np.array([row])} for row in range(rows)] if rows > 1 else [feeds]
    outputs = []
    for passes in (
        [],
        [LowerZeroPoint(), LowerTimestepScale()],
        [FoldReparam(), LowerZeroPoint(), LowerTimestepScale()],
    ):
        fresh = np.random.default_rng(7)
        model = attention(graphs, fresh, "powers of two", bounds=(0, 255), **operands)
        reports = run_passes(model, passes, graphs.context_of())
        assert all(
            report.changed
            for report in reports
            if report.name != ("lower-zero-point", "lower-timestep-scale")[rows == 1]
        )
        assert bool(scales_left(model)) == (len(passes) < 3)
        outputs.append([evaluate(model, item)["y"] for item in every])
    np.testing.assert_array_equal(outputs[1], outputs[2])
    # the same numbers before lowering, but for sums in another order and codes that they move: 1 of 8 products
    np.testing.assert_allclose(outputs[0], outputs[2], atol=1.1 * STEP * 2**-7 * 128)


def geglu(graphs, noise, kind, *, value="first"):
    """``hidden * gelu(gate)`` between two quantized layers; a square stands for the gate's activation."""
    hidden, gate = ("u", "g") if value == "first" else ("g", "u")
    lines = [
        *quantized(graphs, "ff.net.0.proj", "x", "h", bias="b"),
        '["ff.net.0/Split"] u, g = Split<axis: int = -1, num_outputs: int = 2>(h)',
        f'["ff.net.0/Tanh"] gg = Tanh({gate})',
        f'["ff.net.0/Mul"] m = Mul({hidden}, gg)',
        '["ff.net.2.channel_scale/Mul"] ms = Mul(m, inv)',
        *quantized(graphs, "ff.net.2", "ms", "y"),
    ]
    constants = {
        **STATIC, "b": noise.normal(size=16).astype(np.float32), "inv": inverse_of(noise, 8, kind),
        **weights(graphs, noise, "ff.net.0.proj", 6, 16), **weights(graphs, noise, "ff.net.2", 8, 3),
    }  # fmt: skip
    return graphs.model_of("float[2,5,6] x", "float[2,5,3] y", "\n".join(lines), constants)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", ["first", "second"])
def test_the_value_half_of_a_gated_layer(graphs, noise, kind, value):
    feeds = {"x": noise.normal(size=(2, 5, 6)).astype(np.float32)}
    model = geglu(graphs, noise, kind, value=value)
    old = {name: model.graph.initializers[name].const_value.numpy() for name in ("ff_net_0_proj_w_scale", "b", "inv")}
    ran = graphs.run(model, FoldReparam(), feeds)
    assert scales_left(ran.model) == []
    assert ran.report.notes == {"ff.net.2": "1 / r folded into ff.net.0.proj"}
    assert scaled_for(ran.node("ff.net.0.proj/MatMul")) == [("ff.net.2", 0 if value == "first" else 8)]
    scale = ran.node("ff.net.0.proj.weight_quantizer/DequantizeLinear").inputs[1].const_value.numpy()
    bias = ran.node("ff.net.0.proj/Add").inputs[1].const_value.numpy()
    scaled, kept = (slice(0, 8), slice(8, 16)) if value == "first" else (slice(8, 16), slice(0, 8))
    for new, before in ((scale, old["ff_net_0_proj_w_scale"]), (bias, old["b"])):
        np.testing.assert_array_equal(new[kept], before[kept])
        expected = before[scaled].astype(np.float64) * old["inv"].astype(np.float64)
        np.testing.assert_array_equal(new[scaled], expected.astype(np.float32))  # rounded once
    check(ran, kind, ["ff.net.2"], feeds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_in_front_of_a_convolution(graphs, noise, kind):
    lines = [
        graphs.quantize("a.input_quantizer", "xq", "x, s, z", -128, 127),
        graphs.weight_of("a", "wa"),
        '["a/Conv"] h = Conv<pads: ints = [1,1,1,1]>(xq, wa, b)',
        '["b.channel_scale/Mul"] hs = Mul(h, inv)',
        graphs.quantize("b.input_quantizer", "hq", "hs, s, z", -128, 127),
        graphs.weight_of("b", "wb"),
        '["b/Conv"] y = Conv(hq, wb)',
    ]
    constants = {
        **STATIC, "b": noise.normal(size=8).astype(np.float32),
        "inv": inverse_of(noise, 8, kind).reshape(1, 8, 1, 1),
        **graphs.weight_constants("wa", noise.integers(-128, 128, (8, 2, 3, 3)), 2.0**-9 * (1 + noise.random(8))),
        **graphs.weight_constants("wb", noise.integers(-128, 128, (3, 8, 1, 1)), 2.0**-9 * (1 + noise.random(3))),
    }  # fmt: skip
    feeds = {"x": noise.normal(size=(2, 2, 5, 5)).astype(np.float32)}
    model = graphs.model_of("float[2,2,5,5] x", "float[2,3,5,5] y", "\n".join(lines), constants)
    ran = graphs.run(model, FoldReparam(), feeds)
    assert ran.report.notes == {"b": "1 / r folded into a"}
    assert scaled_for(ran.node("a/Conv")) == [("b", 0)]
    check(ran, kind, ["b"], feeds)


STAY = {
    "an input": ([], "x", "it comes from an input of the network"),
    "a residual sum": (['["net/Add"] h = Add(x, x2)'], "h", "net/Add joins it with something computed"),
    "another reader": (
        ['["n/LayerNormalization"] h = LayerNormalization(x, inv, inv)', '["net/Exp"] y2 = Exp(h)'], "h",
        "net/Exp reads it too",
    ),
    "a nonlinear maker": (['["net/Tanh"] h = Tanh(x)'], "h", "net/Tanh makes it, and a Tanh takes no factor"),
    "joined channels": (['["net/Slice"] a = Slice(x, c0, c4, c2)', '["net/Slice_1"] b = Slice(x, c4, c8, c2)',
                         '["net/Concat"] h = Concat<axis: int = 2>(a, b)'], "h", "net/Slice makes"),
}  # fmt: skip


@pytest.mark.parametrize("case", STAY)
def test_what_stays(graphs, noise, case):
    lines, x, reason = STAY[case]
    body = [*lines, f'["to_q.channel_scale/Mul"] hs = Mul({x}, inv)', *quantized(graphs, "to_q", "hs", "y")]
    if not any("y2" in line for line in lines):
        body.append('["net/Identity"] y2 = Identity(x2)')
    constants = {
        **STATIC, "inv": inverse_of(noise, 8, "any"), **weights(graphs, noise, "to_q", 8, 3),
        "c0": np.array([0]), "c2": np.array([2]), "c4": np.array([4]), "c8": np.array([8]),
    }  # fmt: skip
    model = graphs.model_of(
        "float[2,5,8] x, float[2,5,8] x2", "float[2,5,3] y, float[2,5,8] y2", "\n".join(body), constants
    )
    feeds = {name: noise.normal(size=(2, 5, 8)).astype(np.float32) for name in ("x", "x2")}
    ran = graphs.run(model, FoldReparam(), feeds)
    assert not ran.report.changed
    assert scales_left(ran.model) == ["to_q.channel_scale/Mul"]
    assert [item.node for item in ran.report.skipped] == ["to_q.channel_scale/Mul"]
    assert reason in ran.report.notes["to_q"], ran.report.notes
    ran.assert_equal()


def test_a_computed_factor_passes_the_channels_on(graphs, noise):
    """The scale of an adaptive norm commutes; its shift, an Add of something computed, would not."""
    lines = [
        '["n/LayerNormalization"] h0 = LayerNormalization(x, gamma, gamma)',
        '["ada/Mul"] h = Mul(h0, x2)',
        '["to_q.channel_scale/Mul"] hs = Mul(h, inv)',
        *quantized(graphs, "to_q", "hs", "y"),
    ]
    constants = {
        **STATIC, "inv": inverse_of(noise, 8, "powers of two"), **weights(graphs, noise, "to_q", 8, 3),
        "gamma": noise.random(8).astype(np.float32),
    }  # fmt: skip
    model = graphs.model_of("float[2,5,8] x, float[2,1,8] x2", "float[2,5,3] y", "\n".join(lines), constants)
    feeds = {"x": noise.normal(size=(2, 5, 8)).astype(np.float32), "x2": noise.random((2, 1, 8)).astype(np.float32)}
    ran = graphs.run(model, FoldReparam(), feeds)
    assert ran.report.notes == {"to_q": "1 / r folded into n"}
    assert sum(map(is_fake_quantize, ran.model.graph)) == 1
    ran.assert_equal()


@pytest.mark.parametrize("tokens", [0, -1])
def test_batches_of_unknown_size(graphs, noise, tokens):
    """Heads are split and joined by sizes that are known; the others are equal symbols on both sides, or nameless."""
    lines = [
        *quantized(graphs, "to_v", "x", "v"),
        '["attn/Reshape"] vh = Reshape(v, heads)',
        '["attn/Transpose"] vt = Transpose<perm: ints = [0,2,1,3]>(vh)',
        '["attn/MatMul"] o = MatMul(p, vt)',
        '["attn/Transpose_1"] ot = Transpose<perm: ints = [0,2,1,3]>(o)',
        '["attn/Reshape_1"] oj = Reshape(ot, joined)',
        '["to_out.0.channel_scale/Mul"] os = Mul(oj, inv)',
        *quantized(graphs, "to_out.0", "os", "y"),
    ]
    constants = {
        **STATIC, "heads": np.array([0, tokens, 2, 4]), "joined": np.array([0, tokens, 8]),
        "inv": inverse_of(noise, 8, "powers of two"),
        **weights(graphs, noise, "to_v", 6, 8), **weights(graphs, noise, "to_out.0", 8, 3),
    }  # fmt: skip
    model = graphs.model_of("float[n,t,6] x, float[n,2,u,t] p", "float[n,u,3] y", "\n".join(lines), constants)
    ran = graphs.run(model, FoldReparam(), attention_feeds(noise))
    assert ran.report.touched == ["to_out.0"]
    ran.assert_equal()


def modulated(graphs, noise, kind, *, second_reader=False, table=False):
    """adaLN: a norm times ``1 + s`` plus ``b``, which are rows 8 to 15 and 0 to 7 of a quantized modulation, or columns
    of a table.
    """
    row = ['["time_table/Gather"] m = Gather<axis: int = 0>(rows, t)'] if table else [
        *quantized(graphs, "norm1.linear", "c", "m0", scale="sc"),
        '["norm1.linear/Add"] m = Add(m0, mb)',
    ]  # fmt: skip
    lines = [
        *row,
        '["norm1/Split"] shift, stretch, gate = Split<axis: int = 1>(m, widths)',
        '["norm1/Unsqueeze"] s1 = Unsqueeze(stretch, one)',
        '["norm1/Add"] s2 = Add(s1, unit)',
        '["norm1.norm/LayerNormalization"] n = LayerNormalization<axis: int = -1>(x, gamma)',
        '["norm1/Mul"] ns = Mul(n, s2)',
        '["norm1/Unsqueeze_1"] b1 = Unsqueeze(shift, one)',
        '["norm1/Add_1"] a = Add(ns, b1)',
        '["to_q.channel_scale/Mul"] aq = Mul(a, inv)',
        *quantized(graphs, "to_q", "aq", "y1"),
        '["gate/Identity"] y2 = Identity(gate)',
        *(['["other/Neg"] y3 = Neg(n)'] if second_reader else []),
    ]
    scale = 2.0 ** -noise.integers(6, 9, 24).astype(np.float64)  # with integers below: sums are exact
    constants = {
        **STATIC, "sc": np.float32([2.0**-4]), "inv": inverse_of(noise, 8, kind), "one": np.array([1], np.int64),
        "unit": np.float32(1), "gamma": np.ones(8, np.float32), "widths": np.array([8, 8, 8], np.int64),
        **weights(graphs, noise, "to_q", 8, 4),
    }  # fmt: skip
    if table:
        constants["rows"] = noise.normal(size=(4, 24)).astype(np.float32)
    else:
        constants |= graphs.weight_constants("norm1_linear_w", noise.integers(-128, 128, (6, 24)), scale)
        constants["mb"] = noise.integers(-4, 5, 24).astype(np.float32)
    inputs = "float[2,5,8] x, " + ("int64[1] t" if table else "float[2,6] c")
    rows = 1 if table else 2
    outputs = f"float[2,5,4] y1, float[{rows},8] y2" + (", float[2,5,8] y3" if second_reader else "")
    return graphs.model_of(inputs, outputs, "\n".join(lines), constants)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("second_reader", [False, True])
def test_a_modulated_norm(graphs, noise, kind, second_reader):
    feeds = {"x": noise.normal(size=(2, 5, 8)).astype(np.float32), "c": noise.normal(size=(2, 6)).astype(np.float32)}
    ran = graphs.run(modulated(graphs, noise, kind, second_reader=second_reader), FoldReparam(), feeds)
    assert scales_left(ran.model) == []
    makers = "norm1, norm1.linear" if second_reader else "norm1.linear, norm1.norm"
    assert ran.report.notes == {"to_q": f"1 / r folded into {makers}"}
    # the rows of b, and those of 1 + s where the norm is read by others
    firsts = [("to_q", 8), ("to_q", 0)] if second_reader else [("to_q", 0)]
    assert sorted(scaled_for(ran.node("norm1.linear/MatMul"))) == sorted(firsts)
    check(ran, kind, ["to_q"], feeds)
    np.testing.assert_array_equal(ran.before[0]["y2"], ran.after[0]["y2"])  # the gate's rows keep their numbers


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_modulated_by_a_table(graphs, noise, kind):
    feeds = {"x": noise.normal(size=(2, 5, 8)).astype(np.float32), "t": np.array([2])}
    ran = graphs.run(modulated(graphs, noise, kind, table=True), FoldReparam(), feeds)
    assert scales_left(ran.model) == []
    assert ran.report.notes == {"to_q": "1 / r folded into norm1.norm, time_table"}
    check(ran, kind, ["to_q"], feeds)
    np.testing.assert_array_equal(ran.before[0]["y2"], ran.after[0]["y2"])


def test_a_modulation_that_others_read_keeps_the_scale(graphs, noise):
    model = modulated(graphs, noise, "any")
    split = next(node for node in model.graph if node.op_type == "Split")
    reader = ir.node("Identity", [split.outputs[0]], name="other/Identity")
    reader.outputs[0].name = "y9"
    reader.outputs[0].type, reader.outputs[0].shape = split.outputs[0].type, split.outputs[0].shape
    model.graph.append(reader)
    model.graph.outputs.append(reader.outputs[0])
    feeds = {"x": noise.normal(size=(2, 5, 8)).astype(np.float32), "c": noise.normal(size=(2, 6)).astype(np.float32)}
    ran = graphs.run(model, FoldReparam(), feeds)
    assert scales_left(ran.model) == ["to_q.channel_scale/Mul"]
    assert "is read by others than norm1/Unsqueeze_1" in ran.report.notes["to_q"]
    ran.assert_equal()
