"""A small lowered network: a chain of resnets with one norm, SiLU, quantizer and convolution each."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from qdexport.core.forms import FormTable
from qdexport.core.io_spec import IoSpec
from qdexport.core.target import TARGETS
from qdexport.graph.dialect import LAYER_KEY
from qdexport.graph.runner import PassContext, run_passes
from qdexport.passes.expand_group_norm import ExpandGroupNorm
from qdexport.search.search import as_exported

GROUPS = 2


def context(forms: FormTable | None = None) -> PassContext:
    return PassContext(
        target=TARGETS["tensorrt-rtx"],
        body="fp16",
        io=IoSpec(inputs=(), outputs=()),
        layers=(),
        timesteps=None,
        training_steps=1000,
        forms=forms,
    )


def network(
    *, resnets: int = 2, channels: int = 8, size: int = 4, batch: int = 2, seed: int = 0, equal_scales: bool = False
) -> ir.Model:
    """``x + conv(Q(silu(norm(x))))``, several times, in FP16 and lowered."""
    random = np.random.default_rng(seed)
    constants: dict[str, np.ndarray] = {
        "grouped": np.array([0, GROUPS, -1]),
        "image": np.array([0, channels, size, size]),
        "one": np.ones(GROUPS, np.float16),
        "none": np.zeros(GROUPS, np.float16),
        "zero": np.int8(0),
        "zeros": np.zeros(channels, np.int8),
    }
    lines, x = [], "x"
    for index in range(resnets):
        part, end = f"down_blocks.0.resnets.{index}", "y" if index == resnets - 1 else f"x{index}"
        constants |= {
            f"codes{index}": random.integers(-127, 128, (channels, channels, 3, 3)).astype(np.int8),
            f"scales{index}": random.uniform(1e-3, 2e-3, channels).astype(np.float32),
            f"scale{index}": np.float32(0.03),
            f"again{index}": np.float32(0.03 if equal_scales else 0.02),
            f"gain{index}": random.normal(size=(channels, 1, 1)).astype(np.float16),
            f"bias{index}": random.normal(size=channels).astype(np.float16),
        }
        lines += [
            f'["{part}.norm1/Reshape"] g{index} = Reshape({x}, grouped)',
            (f'["{part}.norm1/InstanceNormalization"] n{index} = '
            f"InstanceNormalization<epsilon: float = 1e-5>(g{index}, one, none)"),
            f'["{part}.norm1/Back"] m{index} = Reshape(n{index}, image)',
            f'["{part}.norm1/Mul"] a{index} = Mul(m{index}, gain{index})',
            f'["{part}.norm1/Add"] b{index} = Add(a{index}, gain{index})',
            f'["{part}.act/Sigmoid"] s{index} = Sigmoid(b{index})',
            f'["{part}.act/Mul"] t{index} = Mul(b{index}, s{index})',
            f'["{part}.conv1/Cast"] w{index} = Cast<to: int = 1>(t{index})',
            f'["{part}.conv1/Q"] q{index} = QuantizeLinear(w{index}, scale{index}, zero)',
            (f'["{part}.conv1/DQ"] d{index} = DequantizeLinear(q{index}, {"again" if equal_scales else "scale"}'
            f"{index}, zero)"),
            f'["{part}.conv1/Cast_1"] e{index} = Cast<to: int = 10>(d{index})',
            (f'["{part}.conv1.weight/DQ"] f{index} = '
            f"DequantizeLinear<axis: int = 0>(codes{index}, scales{index}, zeros)"),
            f'["{part}.conv1.weight/Cast"] h{index} = Cast<to: int = 10>(f{index})',
            f'["{part}.conv1/Conv"] c{index} = Conv<pads: ints = [1, 1, 1, 1]>(e{index}, h{index}, bias{index})',
            f'["{part}/Add"] {end} = Add({x}, c{index})',
        ]
        x = end
    shape = f"float16[{batch}, {channels}, {size}, {size}]"
    body = "\n".join(lines)
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]>\nnet ({shape} x) => ({shape} y) {{\n{body}\n}}'
    )
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True))
    for node in model.graph:
        node.metadata_props[LAYER_KEY] = str(node.name).rpartition("/")[0]
    # marks the norms with their signatures and leaves them alone
    run_passes(model, [ExpandGroupNorm()], context(as_exported(FormTable(target="tensorrt-rtx"))))
    return model


@pytest.fixture
def lowered():
    return network


@pytest.fixture
def make_context():
    return context
