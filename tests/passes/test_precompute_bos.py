"""The first token's keys and values are constants; what is no known first token cannot pass unnoticed."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qdexport.errors import GraphPassError
from qdexport.passes.fold_adapters import FoldAdapters
from qdexport.passes.fold_time_embedding import FoldTimeEmbedding
from qdexport.passes.precompute_bos import PrecomputeBos

WIDTH, KEYS, VALUES = 8, 3, 5
LOOKUP = ["Sub", "Mul", "ReduceSum", "LessOrEqual", "Abs", "ReduceSum", "Equal", "Where", "Where", "Gather", "Split"]


def constants_of(noise, dtype=np.float32):
    return {
        "wk": noise.normal(size=(KEYS, WIDTH)).astype(dtype), "wv": noise.normal(size=(WIDTH, VALUES)).astype(dtype),
        "bv": noise.normal(size=VALUES).astype(dtype),
        "sx": np.float32([0.02]), "zx": np.float32([3]),
        "sk": np.full((1, KEYS), 0.02, np.float32), "zk": np.zeros((1, KEYS), np.float32),
        "sv": np.full((1, VALUES), 0.02, np.float32), "zv": np.zeros((1, VALUES), np.float32),
        "zero": np.array([0]), "one": np.array([1]), "end": np.array([np.iinfo(np.int64).max]),
        "wo": noise.normal(size=(KEYS + VALUES, 2)).astype(dtype), "so": np.float32([0.05]), "zo": np.float32([0]),
    }  # fmt: skip


def network(graphs, noise, *, body="float", text="2,4", x="x", before="", **more):
    """``to_k`` without bias (its weight transposed in the graph), ``to_v`` with one, and a quantizer behind both."""
    dtype = np.float16 if body == "float16" else np.float32
    lines = [
        before,
        f'["attn2.to_k.first_token/Slice"] token = Slice({x}, zero, one, one)',
        f'["attn2.to_k/Slice"] rest = Slice({x}, one, end, one)',
        graphs.quantize("attn2.to_k.input_quantizer", "q", "rest, sx, zx", 0, 255),
        graphs.quantize("attn2.to_k.weight_quantizer", "kq", "wk, sk, zk", -128, 127, axis=0),
        graphs.quantize("attn2.to_v.weight_quantizer", "vq", "wv, sv, zv", -128, 127, axis=1),
        '["attn2.to_k/Transpose"] kt = Transpose<perm: ints = [1,0]>(kq)',
        '["attn2.to_k/MatMul"] k1 = MatMul(q, kt)',
        '["attn2.to_k.first_token/Transpose"] wkt = Transpose<perm: ints = [1,0]>(wk)',
        '["attn2.to_k.first_token/MatMul"] k0 = MatMul(token, wkt)',
        '["attn2.to_k.first_token/Concat"] k = Concat<axis: int = 1>(k0, k1)',
        '["attn2.to_v/MatMul"] v1p = MatMul(q, vq)',
        '["attn2.to_v/Add"] v1 = Add(v1p, bv)',
        '["attn2.to_v.first_token/MatMul"] v0p = MatMul(token, wv)',
        '["attn2.to_v.first_token/Add"] v0 = Add(bv, v0p)',
        '["attn2.to_v.first_token/Concat"] v = Concat<axis: int = 1>(v0, v1)',
        '["attn2/Concat"] kv = Concat<axis: int = 2>(k, v)',
        graphs.quantize("attn2.to_out.input_quantizer", "kvq", "kv, so, zo", -128, 127),
        '["attn2.to_out/MatMul"] y = MatMul(kvq, wo)',
    ]
    interface = f"{body}[{text},{WIDTH}] x", f"{body}[{text},{KEYS + VALUES}] kv, {body}[{text},2] y"
    return graphs.model_of(*interface, "\n".join(lines), {**constants_of(noise, dtype), **more})


def context_of(graphs, bos, body="fp32"):
    context = graphs.context_of(timestep_input=False, body=body)
    return dataclasses.replace(context, bos=bos)


def bos_of(noise):
    """Some values a hundred times the others, as in CLIP."""
    bos = noise.normal(size=WIDTH)
    bos[2] *= 500
    return bos.astype(np.float32)


def text_of(noise, bos, kinds, tokens=4, dtype=np.float32):
    """Rows whose first token is the embedding, zeros, or another token."""
    x = noise.normal(size=(len(kinds), tokens, WIDTH))
    for row, kind in enumerate(kinds):
        if kind == "bos":
            x[row, 0] = bos
        elif kind == "zero":
            x[row] = 0
    return x.astype(dtype)


def assert_near(ran, magnitude, unit):
    """FP32 (or FP16) products of 8 terms against FP64 ones rounded once; behind them equal codes but at ties."""
    for before, after in zip(ran.before, ran.after, strict=True):
        np.testing.assert_allclose(after["kv"], before["kv"], rtol=0, atol=2 * 9 * unit * magnitude)


def test_the_constant_and_a_zeroed_prompt(graphs, noise):
    bos = bos_of(noise)
    feeds = [{"x": text_of(noise, bos, kinds)} for kinds in (["bos", "bos"], ["zero", "bos"], ["zero", "zero"])]
    model = network(graphs, noise)
    ran = graphs.run(model, PrecomputeBos(), feeds, context_of(graphs, bos))
    assert [node.name for node in ran.model.graph if ".first_token/" in node.name] == [
        "attn2.to_k.first_token/Slice",
        "attn2.to_k.first_token/Concat",
        "attn2.to_v.first_token/Concat",
    ]
    assert [node.op_type for node in ran.model.graph if node.name.startswith("bos_table/")] == [
        *LOOKUP, "Unsqueeze", "Unsqueeze", "Reshape", "Add", "Reshape", "Add",
    ]  # fmt: skip
    table = ran.nodes("Gather")[0].inputs[0].const_value.numpy()
    constants = constants_of(np.random.default_rng(0))  # shapes alone
    assert table.shape == (3, KEYS + VALUES + 1)
    assert set(constants) >= set(ran.model.graph.initializers) - {
        name for name in ran.model.graph.initializers if name.startswith("bos_table/")
    }
    assert np.isnan(table[2]).all()
    assert not table[:2, -1].any()
    assert not table[1, :KEYS].any()
    assert ran.report.touched == ["attn2.to_k", "attn2.to_v"]
    magnitude = 5 * np.abs(bos).sum()
    assert_near(ran, magnitude, 2.0**-24)
    for item in ran.after:
        assert np.isfinite(item["y"]).all()


def test_constants_are_rounded_once(graphs, noise):
    bos = bos_of(noise)
    model = network(graphs, noise)
    arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    ran = graphs.run(model, PrecomputeBos(), {"x": text_of(noise, bos, ["bos", "zero"])}, context_of(graphs, bos))
    table = ran.nodes("Gather")[0].inputs[0].const_value.numpy()
    wide = bos.astype(np.float64)
    expected = np.concatenate([wide @ arrays["wk"].T.astype(np.float64), wide @ arrays["wv"] + arrays["bv"]])
    np.testing.assert_array_equal(table[0, :-1], expected.astype(np.float32))
    np.testing.assert_array_equal(table[1, :-1], np.concatenate([np.zeros(KEYS), arrays["bv"]]).astype(np.float32))


def test_any_other_first_token_reads_nan_past_every_quantizer(graphs, noise):
    bos = bos_of(noise)
    feeds = {"x": text_of(noise, bos, ["bos", "other"])}
    with np.errstate(invalid="ignore"):
        ran = graphs.run(network(graphs, noise), PrecomputeBos(), feeds, context_of(graphs, bos))
    (after,) = ran.after
    for name in ("kv", "y"):
        assert np.isfinite(after[name][0]).all()
        assert np.isnan(after[name][1]).all()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda x, bos: x * np.float32(1.005), 0),
        (lambda x, bos: x.astype(np.float16).astype(np.float32), 0),
        (lambda x, bos: x * np.float32(1.02), 2),
        (lambda x, bos: -x, 2),
        (lambda x, bos: np.zeros_like(x), 1),
        (lambda x, bos: np.full_like(x, -0.0), 1),
        # squares of these vanish in FP32
        (lambda x, bos: np.full_like(x, 1e-30), 2),
        (lambda x, bos: np.where(x == x[2], np.float32(np.nan), x), 2),
        (lambda x, bos: np.where(x == x[2], np.float32(np.nan), np.float32(0)), 2),
        (lambda x, bos: np.where(x == x[2], np.float32(np.inf), x), 2),
    ],
    ids=["0.5 %", "half", "2 %", "negative", "zeros", "negative zeros", "tiny", "nan", "nan and zeros", "infinite"],
)
def test_which_kind_a_token_is(graphs, noise, change, kind):
    """Judged by numpy and by ONNX Runtime alike."""
    bos = bos_of(noise)
    x = text_of(noise, bos, ["bos", "bos"])
    x[1, 0] = change(bos, bos)
    with np.errstate(all="ignore"):
        ran = graphs.run(network(graphs, noise), PrecomputeBos(), {"x": x}, context_of(graphs, bos))
        FoldAdapters().apply(ran.model, context_of(graphs, bos), ran.report)
        assert ran.at("bos_table/Where_1", {"x": x}).tolist() == [0, kind]
    values = next(node for node in ran.model.graph if node.name == "bos_table/Where_1").outputs
    lookup = ir.convenience.extract(ran.model.graph, [ran.model.graph.inputs[0]], list(values))
    lookup.opset_imports.update({"": 21})
    session = onnxruntime.InferenceSession(
        ir.to_proto(ir.Model(lookup, ir_version=10)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert session.run(None, {"x": x})[0].tolist() == [0, kind]


@pytest.mark.parametrize("tokens", [2, 4, 9])
def test_batch_and_tokens_may_be_dynamic(graphs, noise, tokens):
    bos = bos_of(noise)
    kinds = ["zero", "bos", "bos", "zero", "bos"]
    feeds = {"x": text_of(noise, bos, kinds, tokens)}
    ran = graphs.run(network(graphs, noise, text="N,T"), PrecomputeBos(), feeds, context_of(graphs, bos))
    assert [str(dim) for dim in ran.nodes("Unsqueeze")[0].outputs[0].shape] == ["N", "1", str(KEYS)]
    assert_near(ran, 5 * np.abs(bos).sum(), 2.0**-24)


def test_a_half_precision_body(graphs, noise):
    """Constants come from the FP16 weights, and are rounded to FP16; the token is judged in FP32."""
    bos = bos_of(noise)
    bos[2] = 820  # its square is above what FP16 holds
    model = network(graphs, noise, body="float16")
    weight = model.graph.initializers["wk"].const_value.numpy()
    feeds = [{"x": text_of(noise, bos, kinds, dtype=np.float16)} for kinds in (["bos", "zero"], ["zero", "bos"])]
    ran = graphs.run(model, PrecomputeBos(), feeds, context_of(graphs, bos, "fp16"))
    table = ran.nodes("Gather")[0].inputs[0].const_value.numpy()
    assert table.dtype == np.float16
    expected = (bos.astype(np.float64) @ weight.T.astype(np.float64)).astype(np.float16)
    np.testing.assert_array_equal(table[0, :KEYS], expected)
    assert "Cast" in ran.ops
    assert_near(ran, 5 * np.abs(bos).sum(), 2.0**-11)


def test_a_constant_that_half_precision_cannot_hold_is_refused(graphs, noise):
    bos = np.full(WIDTH, 4e4, np.float32)
    model = network(graphs, noise, body="float16", wk=np.ones((KEYS, WIDTH), np.float16))
    with pytest.raises(GraphPassError, match=r"attn2\.to_k: the projection .* reaches 3\.2e\+05, which FLOAT16 cannot"):
        graphs.run(model, PrecomputeBos(), {"x": np.zeros((2, 4, WIDTH), np.float16)}, context_of(graphs, bos, "fp16"))


@pytest.mark.parametrize("first", [FoldAdapters, PrecomputeBos])
def test_weights_may_be_folded_before_or_after(graphs, noise, first):
    bos = bos_of(noise)
    context = context_of(graphs, bos)
    feeds = {"x": text_of(noise, bos, ["bos", "zero"])}
    model = network(graphs, noise)
    second = PrecomputeBos if first is FoldAdapters else FoldAdapters
    graphs.run(model, first(), feeds, context)
    ran = graphs.run(model, second(), feeds, context)
    assert not {"wk", "wv"} & set(ran.model.graph.initializers)
    assert len(ran.nodes("MatMul")) == 3
    assert len(ran.nodes("DequantizeLinear")) == 2
    assert_near(ran, 5 * np.abs(bos).sum(), 2.0**-24)


def test_layers_that_read_another_tensor_have_a_lookup_of_their_own(graphs, noise):
    """One layer reads the text, one a tensor computed from it; both begin with the stored embedding."""
    bos = bos_of(noise)
    lines = [
        '["a/Identity"] u = Identity(x)',
        '["a.first_token/Slice"] ta = Slice(x, zero, one, one)',
        '["b.first_token/Slice"] tb = Slice(u, zero, one, one)',
        '["a.first_token/MatMul"] a = MatMul(ta, wv)',
        '["b.first_token/MatMul"] b = MatMul(tb, wv)',
        '["c.first_token/MatMul"] c = MatMul(tb, wo8)',
        '["/Concat"] y = Concat<axis: int = 2>(a, b, c)',
    ]
    constants = {name: array for name, array in constants_of(noise).items() if name in ("wv", "zero", "one")} | {
        "wo8": noise.normal(size=(WIDTH, 2)).astype(np.float32)
    }
    model = graphs.model_of(f"float[2,4,{WIDTH}] x", f"float[2,1,{2 * VALUES + 2}] y", "\n".join(lines), constants)
    feeds = {"x": text_of(noise, bos, ["bos", "zero"])}
    ran = graphs.run(model, PrecomputeBos(), feeds, context_of(graphs, bos))
    assert [node.inputs[0].const_value.shape[1] for node in ran.nodes("Gather")] == [VALUES + 1, VALUES + 3]
    assert ran.report.touched == ["a", "b", "c"]
    assert "MatMul" not in ran.ops
    np.testing.assert_allclose(
        ran.after[0]["y"], ran.before[0]["y"], rtol=0, atol=2 * 9 * 2.0**-24 * 5 * np.abs(bos).sum()
    )


def test_beside_a_time_table(graphs, noise):
    """Both guards reach the output: an unknown timestep or an unknown token is NaN."""
    bos = bos_of(noise)
    lines = [
        '["t/Cast"] tf = Cast<to: int = 1>(timestep)',
        '["t/Sin"] emb = Sin(tf)',
        '["a.first_token/Slice"] token = Slice(x, zero, one, one)',
        '["a.first_token/MatMul"] a = MatMul(token, wv)',
        '["/Add"] y = Add(a, emb)',
    ]
    constants = {name: array for name, array in constants_of(noise).items() if name in ("wv", "zero", "one")}
    interface = f"float[2,4,{WIDTH}] x, int64[1] timestep", f"float[2,1,{VALUES}] y"
    context = dataclasses.replace(graphs.context_of((7, 3)), bos=bos)
    for first, second in ((PrecomputeBos, FoldTimeEmbedding), (FoldTimeEmbedding, PrecomputeBos)):
        model = graphs.model_of(*interface, "\n".join(lines), constants)
        known, other = (text_of(noise, bos, kinds) for kinds in (["bos", "zero"], ["other", "bos"]))
        feeds = [{"x": known, "timestep": np.array([3])}, {"x": known, "timestep": np.array([4])}]
        feeds.append({"x": other, "timestep": np.array([7])})
        graphs.run(model, first(), feeds, context)
        ran = graphs.run(model, second(), feeds, context)
        good, wrong_step, wrong_text = (item["y"] for item in ran.after)
        assert np.isfinite(good).all()
        assert np.isnan(wrong_step).all()
        assert np.isnan(wrong_text[0]).all()
        assert np.isfinite(wrong_text[1]).all()


def test_an_embedding_that_is_not_known_is_refused(graphs, noise):
    with pytest.raises(GraphPassError, match=r"attn2\.to_k treats the first token .* embedding is not known"):
        graphs.run(network(graphs, noise), PrecomputeBos(), {"x": np.zeros((2, 4, WIDTH), np.float32)})


def test_an_embedding_of_another_width_is_refused(graphs, noise):
    context = context_of(graphs, np.ones(WIDTH + 1, np.float32))
    with pytest.raises(GraphPassError, match=r"attn2\.to_k reads text of width 8, but .* has shape \[9\]"):
        graphs.run(network(graphs, noise), PrecomputeBos(), {"x": np.zeros((2, 4, WIDTH), np.float32)}, context)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("MatMul(token, computed)", r"^.*a: the weight of the first token's projection is not constant"),
        ("MatMul(x, wv)", r"a: the first token's projection reads a network input"),
        ("MatMul(second, wv)", r"a: the first token's projection reads a/Slice, not the first token"),
    ],
)
def test_another_form_is_refused(graphs, noise, line, message):
    lines = [
        '["a/Slice"] second = Slice(x, one, two, one)',
        '["a/Slice"] token = Slice(x, zero, one, one)',
        '["a/Mul"] computed = Mul(w, wv)',
        f'["a.first_token/MatMul"] y = {line}',
    ]
    constants = {name: array for name, array in constants_of(noise).items() if name in ("wv", "zero", "one")}
    interface = f"float[2,4,{WIDTH}] x, float[1] w", f"float[2,t,{VALUES}] y"
    model = graphs.model_of(*interface, "\n".join(lines), constants | {"two": np.array([2])})
    feeds = {"x": np.ones((2, 4, WIDTH), np.float32), "w": np.ones(1, np.float32)}
    with pytest.raises(GraphPassError, match=message):
        graphs.run(model, PrecomputeBos(), feeds, context_of(graphs, bos_of(noise)))


def test_a_network_without_first_tokens_is_left_alone(graphs, noise):
    model = graphs.model_of("float[2,3] x", "float[2,3] y", '["a/Relu"] y = Relu(x)', {})
    ran = graphs.run(model, PrecomputeBos(), {"x": noise.normal(size=(2, 3)).astype(np.float32)})
    assert not ran.report.changed
    ran.assert_equal()
