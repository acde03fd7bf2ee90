"""Messages for rejected graphs: real ones from the builder, and ends that a test cannot provoke."""

from __future__ import annotations

import re
import signal

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from qdexport.build.diagnose import FailedBuild, explain
from qdexport.build.known_errors import KNOWN_ERRORS
from qdexport.build.process import ChildRun
from qdexport.errors import BuildError

Q, DQ = "QuantizeLinear", "DequantizeLinear"


def negative_scale(net):
    return net.conv("a.conv", net.input("x", [2, 32, 8, 8]), (32, 32, 3, 3), scale=-0.1)


def mixed_types_conv(net):
    x = net.node("cast/Cast", "Cast", [net.input("x", [2, 32, 8, 8])], to=TensorProto.FLOAT)
    return net.node("a.conv/Conv", "Conv", [x, net.weight("a.conv", (32, 32, 3, 3), 0)])


def mixed_types_linear(net):
    x = net.node("cast/Cast", "Cast", [net.input("x", [2, 32])], to=TensorProto.FLOAT)
    return net.node("a.linear/MatMul", "MatMul", [x, net.weight("a.linear", (32, 32), 1)])


def not_lowered(net):
    return net.node("a.q/FakeQuantize", "FakeQuantize", [net.input("x", [2, 32])], domain="qdexport")


def uint4_weights(net):
    x = net.input("x", [2, 16, 32])
    scale = net.constant("scale", np.full(32, 0.1, np.float16))
    w = net.node("a.w/DequantizeLinear", DQ, [net.int4("codes", (32, 32), TensorProto.UINT4), scale], axis=1)
    return net.node("a.linear/MatMul", "MatMul", [x, w])


def int4_conv(net, scales=(32,), **attributes):
    x, scale = net.input("x", [2, 32, 8, 8]), net.constant("scale", np.float16(0.1))
    zero = net.constant("zero", np.int8(0))
    x = net.node(
        "a.q/DequantizeLinear", DQ, [net.node("a.q/QuantizeLinear", Q, [x, scale, zero]), scale, zero]
    )
    inputs = [net.int4("codes", (32, 32, 3, 3)), net.constant("scales", np.full(scales, 0.1, np.float16))]
    w = net.node("a.w/DequantizeLinear", DQ, inputs, **(attributes or {"axis": 0}))
    return net.node("a.conv/Conv", "Conv", [x, w])


def int4_conv_blocked(net):
    return int4_conv(net, (32, 2, 3, 3), axis=1, block_size=16)


def int4_linear_blocked(net):
    x = net.quantize("a.linear", net.input("x", [2, 16, 128]))
    inputs = [net.int4("codes", (128, 64)), net.constant("scales", np.full((4, 64), 0.1, np.float16))]
    w = net.node("a.w/DequantizeLinear", DQ, inputs, axis=0, block_size=32)
    return net.node("a.linear/MatMul", "MatMul", [x, w])


def fp8(net):
    x, scale = net.input("x", [2, 16, 32]), net.constant("scale", np.float16(0.1))
    net.initializers.append(onnx.helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, (), [0.0]))
    x = net.node(
        "a.q/DequantizeLinear", DQ, [net.node("a.q/QuantizeLinear", Q, [x, scale, "zero"]), scale, "zero"]
    )
    return net.float_linear("a.linear", x, (32, 32))


def one_name_twice(net):
    x = net.quantize("a", net.input("x", [2, 32]))
    second = net.node(
        "b.input_quantizer/QuantizeLinear", Q, [x, "a.input_quantizer.scale2", "a.input_quantizer.zero_point"]
    )
    net.constant("a.input_quantizer.scale2", np.float16(0.1))
    net.nodes[-1].name = "a.input_quantizer/QuantizeLinear"
    return net.node(
        "c/DequantizeLinear", DQ, [second, "a.input_quantizer.scale2", "a.input_quantizer.zero_point"]
    )


def integer_arithmetic(net):
    net.quantize("a", net.input("x", [2, 32]))
    y = net.node("a/Add", "Add", ["a.input_quantizer/QuantizeLinear.out", net.constant("one", np.int8(1))])
    return net.node("a/Cast", "Cast", [y], to=TensorProto.FLOAT16)


def missing_node(net):
    return net.node("a/Add", "Add", [net.input("x", [2, 32]), "nowhere"])


REJECTED = [
    (negative_scale, "rejects node 'a.conv.input_quantizer/QuantizeLinear'", "calibrate again"),
    (mixed_types_conv, "rejects node 'a.conv/Conv' of torch module 'a.conv'", "legalize-types"),
    (mixed_types_linear, "rejects node 'a.linear/MatMul' of torch module 'a.linear'", "legalize-types"),
    (not_lowered, "rejects node 'a.q/FakeQuantize'", "was not lowered to standard ONNX"),
    (uint4_weights, "rejects node 'a.w/DequantizeLinear'", "store the codes as INT8"),
    (int4_conv, "nodes to look at: node 'a.conv/Conv'", "no convolution with INT4 weights"),
    (int4_conv_blocked, "rejects node 'a.w/DequantizeLinear'", "one scale per output channel"),
    (int4_linear_blocked, "nodes to look at: node 'a.linear/MatMul'", "one scale per output channel"),
    (fp8, "HW-specific datatypes: fp8_e4m3", "FP8 needs 8.9"),
    (one_name_twice, "rejects node 'a.input_quantizer/QuantizeLinear'", "two nodes have one name"),
    (integer_arithmetic, "node 'a/Add' of torch module 'a'", "no arithmetic on INT8 tensors"),
    (missing_node, "rejects node 'a/Add'", "a tensor that nothing makes"),
]


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("make", "place", "advice"), REJECTED, ids=lambda item: getattr(item, "__name__", "")
)
def test_what_the_builder_rejects(build, nets, tmp_path, make, place, advice):
    net = nets.Net()
    path = net.save(tmp_path / "model.onnx", make(net))
    with pytest.raises(BuildError) as caught:
        build(path, ("8.6",))
    message = str(caught.value)
    assert place in message
    assert advice in message
    assert "CUDA driver" not in message
    assert message.splitlines()[-1] == f"full log: {tmp_path / 'engine' / 'build.log'}"


@pytest.fixture
def failed(nets, tmp_path):
    """A failure with a log and an end of our choice, on a small graph."""
    net = nets.Net("fp32")
    x = net.conv("a.conv", net.input("x", [2, 32, 8, 8]), (32, 32, 3, 3))
    path = net.save(tmp_path / "model.onnx", net.float_linear("a.proj", x, (8, 8)))

    def make(log="", returncode=-signal.SIGSEGV, phase="compiling", onnx_path=path):
        (tmp_path / "build.log").write_text(log)
        run = ChildRun(phase=phase, returncode=int(returncode), timed_out=False, seconds=1.0, result=None)
        return explain(
            FailedBuild(
                builder="rtx", run=run, onnx_path=onnx_path, log_path=tmp_path / "build.log", timeout_s=None
            )
        )

    return make


def test_a_crash_in_the_parser_names_the_node_it_was_at(failed):
    log = "VERBOSE: Parsing node: a.conv/Conv [Conv]\nVERBOSE: other\n"
    log += "VERBOSE: Parsing node: a.proj/MatMul [MatMul]\n"
    message = failed(log, phase="reading the graph")
    assert message.startswith(
        "rtx: the builder crashed (SIGSEGV) at node 'a.proj/MatMul' of torch module 'a.proj'"
    )


def test_a_crash_later_does_not_blame_the_last_parsed_node(failed):
    assert "a.proj" not in failed("VERBOSE: Parsing node: a.proj/MatMul [MatMul]\n")


def test_a_crash_after_an_error_line_quotes_it_and_finds_the_node(failed):
    message = failed("ERROR: 4: [x.cpp:3] (a.conv/Conv: kernel weights count mismatch.)\nVERBOSE: bye\n")
    assert "at node 'a.conv/Conv' of torch module 'a.conv': 4: [x.cpp:3] (a.conv/Conv: kernel" in message


def test_warnings_are_no_last_words(failed):
    assert "it left no message" in failed("WARNING: Make sure input t has Int64 binding.\n")


def test_memory_that_ran_out(failed):
    assert "use a machine with more memory" in failed("ERROR: std::bad_alloc\n", -signal.SIGABRT)


def test_a_builder_that_was_stopped(failed):
    assert "was stopped (SIGTERM)" in failed("", -signal.SIGTERM)


def test_a_real_time_signal(failed):
    assert "crashed (signal 40)" in failed("", -40)


def test_a_file_that_is_no_onnx(failed, tmp_path):
    (tmp_path / "garbage.onnx").write_bytes(b"\xff" * 100)
    assert "crashed (SIGSEGV)" in failed("", onnx_path=tmp_path / "garbage.onnx")


def test_a_name_that_is_part_of_a_longer_one_is_not_meant(failed):
    assert "node" not in failed("ERROR: something about xa.conv/Conv_7 here\n").splitlines()[0]


def test_every_known_error_has_a_pattern_and_a_remedy():
    for known in KNOWN_ERRORS:
        re.compile(known.pattern)
        assert len(known.advice) > 40
