"""What depends on the timestep alone becomes a row of a table; a timestep without a row reads NaN."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from qdexport.core.timesteps import TOLERANCE
from qdexport.errors import GraphPassError
from qdexport.graph.dialect import LAYER_KEY
from qdexport.graph.runner import PassReport
from qdexport.passes.fold_time_embedding import FoldTimeEmbedding, time_columns

STEPS = (981, 500, 1, 0)
CHANNELS = 6
# the table, the network, and the guard of its output
FOLDED = ["Max", "Min", "Gather", "Gather", "Split", "Reshape", "Reshape", "Add", "Mul", "Reshape", "Add"]


def constants_of(noise, dtype=np.float32):
    def draw(*shape):
        return noise.normal(size=shape).astype(dtype)

    return {
        "freqs": noise.uniform(1e-3, 1, (1, 4)).astype(np.float32),
        "w1": draw(8, 5), "b1": draw(5), "w2": draw(5, CHANNELS), "b2": draw(CHANNELS),
        "w3": draw(5, CHANNELS),
        "minus1": np.array([-1]), "last": np.array([2, 3]),
    }  # fmt: skip


# as in diffusers: sinusoids in FP32, two linear layers with SiLU between, one projection per resnet
EMBEDDING = """
["time_proj/Unsqueeze"] t2 = Unsqueeze(timestep, minus1)
["time_proj/Cast"] tf = Cast<to: int = 1>(t2)
["time_proj/Mul"] angles = Mul(tf, freqs)
["time_proj/Sin"] sines = Sin(angles)
["time_proj/Cos"] cosines = Cos(angles)
["time_proj/Concat"] embedding32 = Concat<axis: int = -1>(cosines, sines)
["time_embedding.linear_1/MatMul"] p1 = MatMul(embedding, w1)
["time_embedding.linear_1/Add"] l1 = Add(p1, b1)
["time_embedding.act/Sigmoid"] g1 = Sigmoid(l1)
["time_embedding.act/Mul"] emb = Mul(l1, g1)
"""
PROJECTIONS = """
["resnets.0.time_emb_proj/MatMul"] e1 = MatMul(emb, w2)
["resnets.0/Unsqueeze"] e14 = Unsqueeze(e1, last)
["resnets.0/Add"] h = Add(x, e14)
["resnets.1.time_emb_proj/MatMul"] e2 = MatMul(emb, w3)
["resnets.1/Unsqueeze"] e24 = Unsqueeze(e2, last)
["resnets.1/Mul"] y = Mul(h, e24)
"""


def unet(
    graphs,
    noise,
    *,
    timestep="1",
    body="float",
    extra="",
    embedding=EMBEDDING,
    projections=PROJECTIONS,
    **more,
):
    dtype = np.float16 if body == "float16" else np.float32
    text = embedding + extra + projections
    if body == "float16":
        text = text.replace("embedding, w1", "half, w1")
        text = text.replace(
            '["time_embedding.linear_1/MatMul"]',
            '["time_proj/Cast"] half = Cast<to: int = 10>(embedding32)\n["time_embedding.linear_1/MatMul"]',
        )
    else:
        text = text.replace("embedding32", "embedding")
    interface = f"{body}[2,{CHANNELS},4,4] x, int64[{timestep}] timestep", f"{body}[2,{CHANNELS},4,4] y"
    return graphs.model_of(*interface, text, {**constants_of(noise, dtype), **more})


def feeds_of(noise, steps=STEPS, dtype=np.float32, rows=1):
    x = noise.normal(size=(2, CHANNELS, 4, 4)).astype(dtype)
    return [{"x": x, "timestep": np.full(rows, step)} for step in steps]


def assert_first_close(ran, count):
    """The first feeds alone have rows."""
    replace(ran, before=ran.before[:count], after=ran.after[:count]).assert_close_to_rows()


def test_one_timestep_for_the_batch(graphs, noise):
    feeds = feeds_of(noise)
    ran = graphs.run(unet(graphs, noise), FoldTimeEmbedding(), feeds, graphs.context_of(STEPS))
    assert ran.ops == FOLDED
    lookup, rows = ran.nodes("Gather")
    assert lookup.inputs[1] is ran.nodes("Min")[0].outputs[0]
    assert ran.nodes("Max")[0].inputs[0].name == "timestep"
    index = lookup.inputs[0].const_value.numpy()
    assert index.shape == (1001,)
    assert [index[step] for step in STEPS] == [0, 1, 2, 3]
    table = rows.inputs[0].const_value.numpy()
    assert table.shape == (len(STEPS) + 1, 2 * CHANNELS + 1)
    assert np.isnan(table[-1]).all()
    assert not table[:-1, -1].any()
    assert np.isfinite(table[:-1]).all()
    assert ran.report.touched == ["resnets.0", "resnets.1"]
    assert not {"w1", "w2", "w3", "freqs"} & set(ran.model.graph.initializers)
    ran.assert_close_to_rows()


def test_a_timestep_without_a_row_can_not_pass_unnoticed(graphs, noise):
    """Neither one of the training, nor those before and behind it, which a Gather takes from the table's other end."""
    feeds = feeds_of(noise, steps=(2, 999, -1, -2, -20, -1001, 1000, 1001, 5000))
    ran = graphs.run(unet(graphs, noise), FoldTimeEmbedding(), feeds, graphs.context_of(STEPS))
    assert all(np.isnan(item["y"]).all() for item in ran.after)
    assert all(np.isfinite(item["y"]).all() for item in ran.before)


def test_every_timestep_is_its_own_row(graphs, noise):
    steps = (*STEPS, 0, 999)
    feeds = feeds_of(noise, steps=(*steps, -1, -999, 1000, 5000))
    every = graphs.context_of(tuple(range(1000)))
    ran = graphs.run(unet(graphs, noise), FoldTimeEmbedding(), feeds, every)
    assert ran.ops == FOLDED[:2] + FOLDED[3:]  # one lookup less
    assert_first_close(ran, len(steps))
    assert all(np.isnan(item["y"]).all() for item in ran.after[len(steps) :])


@pytest.mark.parametrize("many", ["", '["time/Expand"] many = Expand(timestep, two)\n'])
def test_columns_of_the_table_are_known_before(graphs, noise, many):
    embedding = many + (EMBEDDING.replace("(timestep, ", "(many, ") if many else EMBEDDING)
    model = unet(graphs, noise, embedding=embedding, **({"two": np.array([2])} if many else {}))
    names = [node.op_type for node in model.graph]
    assert time_columns(model, graphs.context_of().io) == 2 * CHANNELS
    assert [node.op_type for node in model.graph] == names
    assert time_columns(model, graphs.context_of(timestep_input=False).io) == 0


@pytest.mark.parametrize("rows", [1, 2])
def test_a_quantizer_does_not_swallow_the_warning(graphs, noise, rows):
    """INT8 has no NaN: behind the next quantizer a missing row would be a code like any other."""
    projections = PROJECTIONS.replace("y = Mul(h, e24)", "m = Mul(h, e24)") + "\n".join(
        [
            '["conv2.input_quantizer/QuantizeLinear"] q = QuantizeLinear(m, s, zero)',
            '["conv2.input_quantizer/DequantizeLinear"] y = DequantizeLinear(q, s, zero)',
        ]
    )
    model = unet(
        graphs, noise, projections=projections, timestep=str(rows), s=np.float32(0.5), zero=np.int8(0)
    )
    feeds = feeds_of(noise, steps=(981, 2), rows=rows)
    if rows == 2:
        feeds[1]["timestep"] = np.array([981, 2])
    with np.errstate(invalid="ignore"):
        ran = graphs.run(model, FoldTimeEmbedding(), feeds, graphs.context_of(STEPS))
    # a sum of another order may fall on the other side of a rounding: one step of 0.5
    np.testing.assert_allclose(ran.after[0]["y"], ran.before[0]["y"], rtol=0, atol=0.5)
    assert np.isnan(ran.after[1]["y"][-1]).all()
    assert np.isfinite(ran.after[1]["y"][0]).all() == (rows == 2)


def test_a_timestep_per_sample(graphs, noise):
    feeds = feeds_of(noise, rows=2)
    feeds.append({"x": feeds[0]["x"], "timestep": np.array([500, 1])})
    ran = graphs.run(unet(graphs, noise, timestep="2"), FoldTimeEmbedding(), feeds, graphs.context_of(STEPS))
    assert [str(dim) for dim in ran.nodes("Split")[0].outputs[0].shape] == ["2", str(CHANNELS)]
    ran.assert_close_to_rows()


def test_the_shared_timestep_is_not_expanded_to_the_batch(graphs, noise):
    """diffusers expands one timestep to all rows; the table keeps one row and the sum broadcasts it."""
    embedding = EMBEDDING.replace("Unsqueeze(timestep, minus1)", "Unsqueeze(expanded, minus1)")
    expand = '["/Expand"] expanded = Expand(timestep, two)'
    model = graphs.model_of(
        f"float[2,{CHANNELS},4,4] x, int64[1] timestep",
        f"float[2,{CHANNELS},4,4] y",
        (expand + embedding + PROJECTIONS).replace("embedding32", "embedding"),
        {**constants_of(noise), "two": np.array([2])},
    )
    ran = graphs.run(model, FoldTimeEmbedding(), feeds_of(noise), graphs.context_of(STEPS))
    assert "Expand" not in ran.ops
    assert ran.nodes("Split")[0].outputs[0].shape[0] == 1
    ran.assert_close_to_rows()


def test_the_batch_may_be_dynamic(graphs, noise):
    """The expansion then reads the shape of the sample, which goes with it."""
    embedding = EMBEDDING.replace("Unsqueeze(timestep, minus1)", "Unsqueeze(expanded, minus1)")
    expand = (
        '["/Shape"] batch = Shape<start: int = 0, end: int = 1>(x)\n'
        '["/Expand"] expanded = Expand(timestep, batch)'
    )
    model = graphs.model_of(
        f"float[N,{CHANNELS},4,4] x, int64[1] timestep",
        f"float[N,{CHANNELS},4,4] y",
        (expand + embedding + PROJECTIONS).replace("embedding32", "embedding"),
        constants_of(noise),
    )
    ran = graphs.run(model, FoldTimeEmbedding(), feeds_of(noise), graphs.context_of(STEPS))
    assert not {"Expand", "Shape"} & set(ran.ops)
    ran.assert_close_to_rows()


@pytest.mark.parametrize(
    ("ones", "bypassed"),
    [
        ("", True),
        ('["/ConstantOfShape"] many = ConstantOfShape<value: tensor = int64[1] {1}>(batch)', True),
        ('["/ConstantOfShape"] many = ConstantOfShape<value: tensor = int64[1] {2}>(batch)', False),
        ('["/Expand"] many = Expand(one, batch)', True),
    ],
    ids=["constant", "filled", "filled with 2", "expanded"],
)
def test_a_timestep_repeated_by_a_product_with_ones(graphs, noise, ones, bypassed):
    """UNet2DModel writes ``timesteps * ones(batch)``; a product with anything else is part of the network."""
    repeat = (
        f'["/Shape"] batch = Shape<start: int = 0, end: int = 1>(x)\n{ones}\n'
        '["/Mul"] repeated = Mul(timestep, many)\n'
    )
    embedding = EMBEDDING.replace("Unsqueeze(timestep, minus1)", "Unsqueeze(repeated, minus1)")
    constants = {**constants_of(noise), "one": np.array([1])}
    if not ones:
        constants["many"] = np.array([1, 1])
    model = graphs.model_of(
        f"float[N,{CHANNELS},4,4] x, int64[1] timestep",
        f"float[N,{CHANNELS},4,4] y",
        (repeat + embedding + PROJECTIONS).replace("embedding32", "embedding"),
        constants,
    )
    if not bypassed:
        with pytest.raises(GraphPassError, match="/Mul reads the raw timestep beside other inputs"):
            graphs.run(model, FoldTimeEmbedding(), feeds_of(noise), graphs.context_of(STEPS))
        return
    ran = graphs.run(model, FoldTimeEmbedding(), feeds_of(noise), graphs.context_of(STEPS))
    assert ran.ops == FOLDED
    ran.assert_close_to_rows()


def test_constants_that_are_computed(graphs, noise):
    """Not every exporter folds ``exp(-log(10000) i / n)``: what reads constants alone depends on no input."""
    embedding = EMBEDDING.replace("Mul(tf, freqs)", "Mul(tf, powers)")
    model = unet(graphs, noise, embedding='["time_proj/Exp"] powers = Exp(freqs)\n' + embedding)
    ran = graphs.run(model, FoldTimeEmbedding(), feeds_of(noise), graphs.context_of(STEPS))
    assert "Exp" not in ran.ops
    ran.assert_close_to_rows()


def test_quantized_time_layers_go_into_the_table(graphs, noise):
    """A recipe may quantize them; folded rows hold what their quantizers made."""
    fake = graphs.quantize("time_embedding.linear_1.input_quantizer", "eq", "embedding, s, z", -128, 127)
    weight = graphs.quantize("time_embedding.linear_1.weight_quantizer", "wq", "w1, s, z", -8, 7)
    embedding = EMBEDDING.replace("MatMul(embedding, w1)", "MatMul(eq, wq)").replace(
        "embedding32", "embedding"
    )
    embedding = embedding.replace(
        '["time_embedding.linear_1/MatMul"]', f'{fake}\n{weight}\n["time_embedding.linear_1/MatMul"]'
    )
    model = graphs.model_of(
        f"float[2,{CHANNELS},4,4] x, int64[1] timestep",
        f"float[2,{CHANNELS},4,4] y",
        embedding + PROJECTIONS,
        {**constants_of(noise), "s": np.float32([0.1]), "z": np.float32([0])},
    )
    ran = graphs.run(model, FoldTimeEmbedding(), feeds_of(noise), graphs.context_of(STEPS))
    assert "FakeQuantize" not in ran.ops
    ran.assert_close_to_rows()


def test_added_conditions_keep_their_part(graphs, noise):
    """SDXL: the text enters the sum, so only the part of the timestep is tabled."""
    added = """
["add_embedding/MatMul"] text = MatMul(pooled, w4)
["/Add"] joint = Add(emb, text)
"""
    projections = PROJECTIONS.replace("MatMul(emb,", "MatMul(joint,")
    model = graphs.model_of(
        f"float[2,{CHANNELS},4,4] x, int64[1] timestep, float[2,3] pooled",
        f"float[2,{CHANNELS},4,4] y",
        (EMBEDDING + added + projections).replace("embedding32", "embedding"),
        {**constants_of(noise), "w4": noise.normal(size=(3, 5)).astype(np.float32)},
    )
    feeds = [{**item, "pooled": noise.normal(size=(2, 3)).astype(np.float32)} for item in feeds_of(noise)]
    ran = graphs.run(model, FoldTimeEmbedding(), feeds, graphs.context_of(STEPS))
    names = [node.name for node in ran.model.graph]
    assert "add_embedding/MatMul" in names
    assert "resnets.0.time_emb_proj/MatMul" in names
    assert "time_embedding.linear_1/MatMul" not in names
    assert ran.report.touched == ["time_embedding.act"]
    assert ran.nodes("Gather")[1].inputs[0].shape == ir.Shape([len(STEPS) + 1, 5 + 1])
    ran.assert_close_to_rows()


def test_a_half_precision_body_is_tabled_in_fp32_and_rounded_once(graphs, noise):
    model = unet(graphs, noise, body="float16")
    x = np.zeros((2, CHANNELS, 4, 4), np.float16)
    feeds = [{"x": x, "timestep": np.array([step])} for step in STEPS]
    ran = graphs.run(model, FoldTimeEmbedding(), feeds, graphs.context_of(STEPS, body="fp16"))
    rows = ran.nodes("Gather")[1].inputs[0]
    assert rows.dtype == ir.DataType.FLOAT16
    # the same layers by hand in FP32, from the FP16 weights
    constants = constants_of(np.random.default_rng(20240607), np.float16)
    for step, row in zip(STEPS, rows.const_value.numpy(), strict=False):
        angles = np.float32(step) * constants["freqs"]
        hidden = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1) @ constants["w1"].astype(
            np.float32
        )
        hidden = hidden + constants["b1"].astype(np.float32)
        hidden = hidden / (1 + np.exp(-hidden))
        expected = np.concatenate([hidden @ constants[w].astype(np.float32) for w in ("w2", "w3")], axis=-1)[
            0
        ]
        # FP32 sums of a different order round to the same FP16 number or its neighbour
        np.testing.assert_array_max_ulp(row, np.append(expected, np.float32(0)).astype(np.float16), maxulp=1)
    # the network's own FP16 layers round seven times on the way: 11 bits, a few of them lost
    for before, after in zip(ran.before, ran.after, strict=True):
        np.testing.assert_allclose(after["y"], before["y"], rtol=0.02, atol=0.02)


def test_constants_of_the_rest_keep_their_type(graphs, noise):
    """The table is evaluated on a widened copy; a constant of both parts stays FP16 in the network."""
    extra = '["other/Mul"] x2 = Mul(x, gain)\n["time_embedding/Mul"] emb2 = Mul(emb, gain)\n'
    projections = PROJECTIONS.replace("MatMul(emb,", "MatMul(emb2,").replace("Add(x, e14)", "Add(x2, e14)")
    model = unet(graphs, noise, body="float16", extra=extra, projections=projections, gain=np.float16([1.5]))
    feeds = feeds_of(noise, dtype=np.float16)
    ran = graphs.run(model, FoldTimeEmbedding(), feeds, graphs.context_of(STEPS, body="fp16"))
    kept = ran.model.graph.initializers["gain"]
    assert kept.dtype == ir.DataType.FLOAT16
    assert kept.const_value.dtype == ir.DataType.FLOAT16


def test_a_quantizer_table_keeps_its_own_lookup(graphs, noise):
    """Rows of activation scales are chosen by the same timestep; their pass comes later."""
    projections = PROJECTIONS.replace("Add(x, e14)", "Add(xq, e14)")
    lookup = '["step_rows/Gather"] row = Gather(row_of, timestep)\n'
    fake = graphs.quantize("resnets.0.conv1.input_quantizer", "xq", "x, s, z, row", -128, 127)
    model = graphs.model_of(
        f"float[2,{CHANNELS},4,4] x, int64[1] timestep",
        f"float[2,{CHANNELS},4,4] y",
        (lookup + fake + EMBEDDING + projections).replace("embedding32", "embedding"),
        {
            **constants_of(noise),
            "row_of": np.arange(1000) // 500,
            "s": np.float32([0.1, 0.01]),
            "z": np.float32([0, 0]),
        },
    )
    ran = graphs.run(model, FoldTimeEmbedding(), feeds_of(noise), graphs.context_of(STEPS))
    assert sorted(node.metadata_props[LAYER_KEY] for node in ran.nodes("Gather")) == [
        "step_rows",
        "time_table",
        "time_table",
    ]
    ran.assert_close_to_rows()


@pytest.mark.parametrize("context", ["keep", "no input"])
def test_a_recipe_that_keeps_the_time_layers(graphs, noise, context):
    facts = graphs.context_of(None) if context == "keep" else graphs.context_of(STEPS, timestep_input=False)
    ran = graphs.run(unet(graphs, noise), FoldTimeEmbedding(), feeds_of(noise), facts)
    assert not ran.report.changed
    assert "Sin" in ran.ops


def test_a_network_without_time_layers_is_left_alone(graphs, noise):
    model = graphs.model_of("float[2,3] x, int64[1] timestep", "float[2,3] y", '["a/Relu"] y = Relu(x)', {})
    feeds = {"x": noise.normal(size=(2, 3)).astype(np.float32), "timestep": np.array([1])}
    ran = graphs.run(model, FoldTimeEmbedding(), feeds, graphs.context_of(STEPS))
    assert not ran.report.changed


def test_a_raw_timestep_beside_other_inputs_is_refused(graphs, noise):
    body = '["a/Cast"] c = Cast<to: int = 7>(x)\n["b/Add"] y = Add(c, timestep)'
    model = graphs.model_of("float[2,3] x, int64[1] timestep", "int64[2,3] y", body, {})
    feeds = {"x": noise.normal(size=(2, 3)).astype(np.float32), "timestep": np.array([1])}
    with pytest.raises(
        GraphPassError, match="b/Add reads the raw timestep beside other inputs; say `time_embedding: keep`"
    ):
        graphs.run(model, FoldTimeEmbedding(), feeds, graphs.context_of(STEPS))


def test_an_embedding_that_is_not_broadcast_is_refused(graphs, noise):
    projections = '["attn/MatMul"] y = MatMul(x, square)\n'
    extra = (
        '["a/MatMul"] m = MatMul(emb, w2)\n'
        '["a/Transpose"] mt = Transpose(m)\n'
        '["a/MatMul"] square = MatMul(mt, m)\n'
    )
    model = graphs.model_of(
        f"float[2,{CHANNELS}] x, int64[1] timestep",
        f"float[2,{CHANNELS}] y",
        (EMBEDDING + extra + projections).replace("embedding32", "embedding"),
        constants_of(noise),
    )
    feeds = {"x": noise.normal(size=(2, CHANNELS)).astype(np.float32), "timestep": np.array([1])}
    with pytest.raises(
        GraphPassError, match=r"square depends on the timestep alone, but attn/MatMul does not broadcast"
    ):
        graphs.run(model, FoldTimeEmbedding(), feeds, graphs.context_of(STEPS))


@pytest.mark.parametrize("step", [1000, -1])
def test_a_timestep_outside_the_training_range_is_refused(graphs, noise, step):
    with pytest.raises(GraphPassError, match=rf"timestep {step} is outside 0\.\.999"):
        graphs.run(unet(graphs, noise), FoldTimeEmbedding(), feeds_of(noise), graphs.context_of((1, step)))


def test_parts_of_different_types_keep_them(graphs, noise):
    """Some models compute one resnet in FP32 (upcast): each part of the table arrives in its own type."""
    projections = """
["resnets.0.time_emb_proj/MatMul"] e1 = MatMul(emb, w2)
["resnets.0/Add"] h = Add(x, e1)
["resnets.1/Cast"] wide = Cast<to: int = 1>(h)
["resnets.1.time_emb_proj/MatMul"] e2 = MatMul(emb, w3)
["resnets.1/Cast"] e2wide = Cast<to: int = 1>(e2)
["resnets.1/Sin"] e2s = Sin(e2wide)
["resnets.1/Mul"] p = Mul(wide, e2s)
["resnets.1/Cast"] y = Cast<to: int = 10>(p)
"""
    text = (EMBEDDING + projections).replace("embedding, w1", "half, w1")
    text = text.replace(
        '["time_embedding.linear_1/MatMul"]',
        '["time_proj/Cast"] half = Cast<to: int = 10>(embedding32)\n["time_embedding.linear_1/MatMul"]',
    )
    interface = f"float16[2,{CHANNELS}] x, int64[1] timestep", f"float16[2,{CHANNELS}] y"
    model = graphs.model_of(*interface, text, constants_of(noise, np.float16))
    x = noise.normal(size=(2, CHANNELS)).astype(np.float16)
    feeds = [{"x": x, "timestep": np.array([step])} for step in STEPS]
    ran = graphs.run(model, FoldTimeEmbedding(), feeds, graphs.context_of(STEPS, body="fp16"))
    kinds = {value.name: value.dtype for node in ran.nodes("Mul") for value in node.inputs}
    assert set(kinds.values()) == {ir.DataType.FLOAT}
    for before, after in zip(ran.before, ran.after, strict=True):
        np.testing.assert_allclose(after["y"], before["y"], rtol=0.02, atol=0.02)


FRACTIONS = (1000.0, 857.142822265625, 400.5)


def with_fractions(model):
    """The same network with a float timestep."""
    timestep = next(value for value in model.graph.inputs if value.name == "timestep")
    timestep.dtype = ir.DataType.FLOAT
    for use in timestep.uses():
        use.node.outputs[0].dtype = ir.DataType.FLOAT
    return model


def fractional_feeds(noise, steps):
    x = noise.normal(size=(2, CHANNELS, 4, 4)).astype(np.float32)
    return [{"x": x, "timestep": np.float32([step])} for step in steps]


def flow(graphs, steps):
    return replace(graphs.context_of(steps), timestep_rounding=TOLERANCE)


def test_fractions_find_their_rows(graphs, noise):
    feeds = fractional_feeds(noise, FRACTIONS)
    ran = graphs.run(with_fractions(unet(graphs, noise)), FoldTimeEmbedding(), feeds, graphs.context_of(FRACTIONS))
    assert [node.op_type for node in ran.model.graph][:8] == [
        "Sub", "Abs", "Sub", "ArgMin", "ReduceMin", "LessOrEqual", "Where", "Gather",
    ]  # fmt: skip
    ran.assert_close_to_rows()


def test_fractions_rounded_by_a_pipeline_find_their_rows_and_others_do_not(graphs, noise):
    rounded = [float(np.float16(step)) for step in FRACTIONS]
    assert rounded[1] != FRACTIONS[1]
    x = fractional_feeds(noise, [0])[0]["x"]
    others = (FRACTIONS[1] + 2, 0.0, -1.0, np.nan)
    feeds = [{"x": x, "timestep": np.float32([step])} for step in (*FRACTIONS, *rounded, *others)]
    ran = graphs.run(with_fractions(unet(graphs, noise)), FoldTimeEmbedding(), feeds, flow(graphs, FRACTIONS))
    for exact, near in zip(ran.after[:3], ran.after[3:6], strict=True):
        np.testing.assert_array_equal(near["y"], exact["y"])
    assert all(np.isnan(item["y"]).all() for item in ran.after[6:])


def test_fractions_that_rounding_would_mix_up(graphs, noise):
    near = (1000.0, 998.5, 400.5)
    with pytest.raises(GraphPassError, match=r"timesteps 998.5 and 1000.0 are too near to be told apart"):
        FoldTimeEmbedding().apply(with_fractions(unet(graphs, noise)), flow(graphs, near), None)


def test_whole_steps_and_fractions_in_one_table(graphs, noise):
    """A scheduler whose steps are fractions has rows of its own beside those of every whole step."""
    rows = (*(float(step) for step in range(1000)), 856.2857, 142.7143)
    near = (856.2861, 142.7147, 41.001)  # as KDPM2 ancestral names a step the second time
    steps = (856.2857, 142.7143, 41.0, 999.0, *near, 856.5, -1.0, 1000.0)
    feeds = fractional_feeds(noise, steps)
    ran = graphs.run(with_fractions(unet(graphs, noise)), FoldTimeEmbedding(), feeds, graphs.context_of(rows))
    assert_first_close(ran, 4)
    for exact, again in zip(ran.after[:3], ran.after[4:7], strict=True):
        np.testing.assert_array_equal(again["y"], exact["y"])
    assert all(np.isnan(item["y"]).all() for item in ran.after[7:])


def test_negative_steps_have_rows(graphs, noise):
    """EDM's timesteps are logarithms of noise levels."""
    steps = (1.0955, 0.3835, -0.3297, -1.5537)
    feeds = fractional_feeds(noise, (*steps, 0.39, -1.0))
    ran = graphs.run(with_fractions(unet(graphs, noise)), FoldTimeEmbedding(), feeds, graphs.context_of(steps))
    assert_first_close(ran, 4)
    assert all(np.isnan(item["y"]).all() for item in ran.after[4:])


def test_fractions_need_a_float_timestep(graphs, noise):
    with pytest.raises(GraphPassError, match=r"timestep 400.5 is a fraction"):
        FoldTimeEmbedding().apply(unet(graphs, noise), graphs.context_of((981, 400.5)), None)


def test_a_reshape_to_the_batch_keeps_one_row(graphs, noise):
    """PixArt repeats the timestep for the batch and reshapes what it makes of it to one row per sample."""
    embedding = '["adaln/Expand"] expanded = Expand(timestep, two)' + EMBEDDING.replace("(timestep, ", "(expanded, ")
    projections = """
["adaln.linear/MatMul"] e1 = MatMul(emb, w2)
["block/Reshape"] e14 = Reshape(e1, per_sample)
["block/Add"] h = Add(x, e14)
["block/Split"] a, b = Split<axis: int = 1, num_outputs: int = 2>(e14)
["block/Concat"] swapped = Concat<axis: int = 1>(b, a)
["block/Mul"] y = Mul(h, swapped)
"""
    constants = {"two": np.array([2]), "per_sample": np.array([2, CHANNELS, 1, 1])}
    model = unet(graphs, noise, embedding=embedding, projections=projections, **constants)
    ran = graphs.run(model, FoldTimeEmbedding(), feeds_of(noise), graphs.context_of(STEPS))
    assert not {"Expand", "MatMul"} & {node.op_type for node in ran.model.graph}
    ran.assert_close_to_rows()


def test_deep_networks_are_walked_once(graphs, noise):
    """Behind the embedding stands a network deeper than Python's stack, whose every value is read twice."""
    deep = 1500
    sums = "\n".join(f'["deep/Add"] d{step + 1} = Add(d{step}, d{step})' for step in range(deep))
    start = PROJECTIONS.replace("y = Mul(h, e24)", "m = Mul(h, e24)") + '["deep/Mul"] d0 = Mul(m, tiny)\n'
    end = f'\n["deep/Identity"] y = Identity(d{deep})\n'
    model = unet(graphs, noise, projections=start + sums + end, tiny=np.float32(0))
    report = PassReport("fold-time-embedding")
    FoldTimeEmbedding().apply(model, graphs.context_of(STEPS), report)
    assert report.touched == ["resnets.0", "resnets.1"]
