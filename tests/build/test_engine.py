"""Real builds, and everything that can stop one."""

from __future__ import annotations

import importlib.util
import os

import onnx
import psutil
import pytest

from qdexport.build.engine import build_engine, checked_capabilities
from qdexport.build.plan import engine_coverage, kernel_counts, plan_tensors
from qdexport.core.io_spec import Dim, Profile, TensorSpec
from qdexport.core.results import Plan
from qdexport.core.target import TARGETS
from qdexport.errors import BuildError, MissingDependencyError, OutputError, RecipeError


def signature(plan):
    """What a plan computes, without the builder's running numbers."""
    return [
        (kernel.kind, [(t.dtype, t.dims) for t in plan_tensors(kernel.inputs)], sorted(kernel.nodes))
        for kernel in plan.kernels
    ]


def static(dim):
    return Dim(low=dim, best=dim, high=dim)


@pytest.mark.parametrize(("body", "rest"), [("fp16", "fp16"), ("fp32", "fp32")])
@pytest.mark.rtx
def test_one_engine_for_several_capabilities(rtx, nets, tmp_path, body, rest):
    path = nets.conv_linear_net(tmp_path / "model.onnx", body)
    out = tmp_path / "engine"
    facts, plan = build_engine(path, out, nets.options())

    assert sorted(item.name for item in out.iterdir()) == ["build.log", "model.engine", "plan.json"]
    assert facts.bytes == (out / "model.engine").stat().st_size > 0
    assert facts.compute_capabilities == ["8.6", "8.9", "12.0"]
    assert (facts.kernels, facts.int8_compute, facts.fp_compute, facts.attention_kernels) == (6, 2, 1, 0)
    assert sum(facts.kernels_by_type.values()) == facts.kernels
    assert facts.build_seconds > 0
    assert facts.builder_version.startswith("1.")
    # the builder alone is far below the 1 GiB that the test process may have
    assert 50 < facts.peak_rss_mb < 1000
    assert Plan.load(out / "plan.json") == plan
    layers = [nets.CONV, nets.LINEAR, "proj_out", "absent"]
    assert engine_coverage(plan, layers) == dict(zip(layers, ["int8", "int8", rest, "missing"], strict=True))


@pytest.mark.rtx
def test_the_plan_names_our_nodes_and_modules_unchanged(build, nets, tmp_path):
    _, plan = build(nets.conv_linear_net(tmp_path / "model.onnx"))
    conv = next(kernel for kernel in plan.kernels if kernel.kind == "correlation")
    assert set(conv.nodes) == {
        f"{nets.CONV}/Conv",
        f"{nets.CONV}.input_quantizer/DequantizeLinear",
        f"{nets.CONV}.weight_quantizer/DequantizeLinear",
    }
    assert nets.CONV in conv.modules


@pytest.mark.rtx
@pytest.mark.parametrize(
    "layer", ["a b", "list[0]", "c,Name: x", "d{e}", "scope::f", "conv#1", "é", "g]h[ONNX Layer: i"]
)
def test_names_with_odd_characters_survive(build, nets, tmp_path, layer):
    net = nets.Net()
    y = net.conv(layer, net.input("sample", [2, 32, 8, 8]), (32, 32, 3, 3))
    _, plan = build(net.save(tmp_path / "model.onnx", y))
    assert engine_coverage(plan, [layer]) == {layer: "int8"}


@pytest.mark.rtx
def test_more_capabilities_do_not_change_the_plan(build, nets, tmp_path):
    path = nets.conv_linear_net(tmp_path / "model.onnx")
    assert signature(build(path)[1]) == signature(build(path, ("8.0", "8.6", "8.9", "12.0"))[1])


@pytest.mark.rtx
def test_dynamic_dimensions_become_a_profile(build, nets, tmp_path):
    path = nets.conv_linear_net(tmp_path / "model.onnx", dims=("batch", 32, "height", "width"))
    side = Dim(name="height", low=8, best=16, high=32)
    sample = TensorSpec(
        name="sample",
        role="sample",
        dtype="float16",
        dims=(Dim(name="batch", low=1, best=2, high=4), static(32), side, side),
    )
    facts, plan = build(path, inputs=[sample])
    assert kernel_counts(plan).int8_compute == 2
    assert [(item.name, item.kernels) for item in facts.profiles] == [("0", facts.kernels)]
    log = (tmp_path / "engine" / "build.log").read_text()
    assert "MinShape: [1,32,8,8], OptShape: [2,32,16,16], MaxShape: [4,32,32,32]" in log


@pytest.mark.rtx
def test_several_profiles_have_kernels_of_their_own(build, nets, tmp_path):
    path = nets.conv_linear_net(tmp_path / "model.onnx", dims=("batch", 32, "height", "height"))
    batch, side = Dim(name="batch", low=1, best=1, high=8), Dim(name="height", low=8, best=8, high=64)
    sample = TensorSpec(name="sample", role="sample", dtype="float16", dims=(batch, static(32), side, side))
    small = Profile(name="small", dims=(batch.model_copy(update={"high": 1}), side.model_copy(update={"high": 16})))
    large = Profile(name="large", dims=(batch, side.model_copy(update={"low": 16, "best": 32})))
    facts, plan = build(path, inputs=[sample], profiles=[small, large])
    assert [item.name for item in facts.profiles] == ["small", "large"]
    assert facts.profiles[1].shapes == {"sample": [[1, 32, 16, 16], [1, 32, 32, 32], [8, 32, 64, 64]]}
    assert [(item.int8_compute, item.fp_compute) for item in facts.profiles] == [(2, 1), (2, 1)]
    assert sum(item.kernels for item in facts.profiles) == facts.kernels
    assert {kernel.profile for kernel in plan.kernels} == {0, 1}
    # one name for both copies of a layer, so that the audit sees the worse one
    for profile in (0, 1):
        part = plan.model_copy(update={"kernels": [item for item in plan.kernels if item.profile == profile]})
        assert engine_coverage(part, [nets.CONV, nets.LINEAR]) == {nets.CONV: "int8", nets.LINEAR: "int8"}


@pytest.mark.rtx
def test_dynamic_dimensions_without_a_range(build, nets, tmp_path):
    path = nets.conv_linear_net(tmp_path / "model.onnx", dims=("batch", 32, 8, 8))
    with pytest.raises(
        BuildError, match=r"no optimization profile.*\n.*export and build with the same shapes"
    ):
        build(path)


@pytest.mark.rtx
def test_a_range_for_an_input_that_the_file_lacks(build, nets, tmp_path):
    path = nets.conv_linear_net(tmp_path / "model.onnx")
    other = TensorSpec(name="latent", role="sample", dtype="float16", dims=(Dim(low=1, best=1, high=2),))
    with pytest.raises(BuildError, match="the graph has no input latent; it has sample"):
        build(path, inputs=[other])


@pytest.mark.rtx
def test_a_rejected_node_is_named_and_nothing_else_changes(build, nets, tmp_path):
    build(nets.conv_linear_net(tmp_path / "good.onnx"))
    before = {name: (tmp_path / "engine" / name).read_bytes() for name in ("model.engine", "plan.json")}
    net = nets.Net()
    y = net.conv("down.0.conv", net.input("sample", [2, 32, 8, 8]), (32, 32, 3, 3), zero_point=3)
    with pytest.raises(BuildError) as caught:
        build(net.save(tmp_path / "bad.onnx", y))

    message = str(caught.value)
    assert "node 'down.0.conv.input_quantizer/QuantizeLinear'" in message
    assert "torch module 'down.0.conv.input_quantizer'" in message
    assert "Non-zero zero point is not supported" in message
    assert "use a symmetric quantizer" in message
    log = tmp_path / "engine" / "build.log"
    assert str(log) in message
    assert "shiftIsAllZeros" in log.read_text()
    assert {name: (tmp_path / "engine" / name).read_bytes() for name in before} == before
    assert len(list((tmp_path / "engine").iterdir())) == 3


@pytest.mark.rtx
def test_a_crash_names_the_suspect(build, nets, tmp_path):
    net = nets.Net("fp32")
    scale = net.input("scale", [], onnx.TensorProto.FLOAT)
    x = net.conv("first", net.input("sample", [2, 32, 8, 8]), (32, 32, 3, 3))
    y = net.conv("down.0.conv", x, (32, 32, 3, 3), scale=scale)
    with pytest.raises(BuildError, match=r"crashed \(SIGSEGV\) while compiling") as caught:
        build(net.save(tmp_path / "model.onnx", y))
    assert "computed at run time" in str(caught.value)
    assert "torch module 'down.0.conv.input_quantizer'" in str(caught.value)
    assert "first" not in str(caught.value)
    assert [item.name for item in (tmp_path / "engine").iterdir()] == ["build.log"]


@pytest.mark.rtx
def test_missing_external_data(build, nets, tmp_path):
    model = onnx.load(nets.conv_linear_net(tmp_path / "whole.onnx"))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, size_threshold=0)
    for item in tmp_path.iterdir():
        if item.suffix != ".onnx" and item.is_file():
            item.unlink()
    with pytest.raises(BuildError, match="external data is missing or damaged"):
        build(tmp_path / "model.onnx")


@pytest.mark.rtx
def test_a_damaged_file(build, nets, tmp_path):
    path = nets.conv_linear_net(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(BuildError, match=r"rejects the graph: .*\n.*missing or damaged"):
        build(path)


def test_no_file(nets, tmp_path, fake_builder):
    with pytest.raises(BuildError, match=r"there is no ONNX file .*gone\.onnx"):
        build_engine(tmp_path / "gone.onnx", tmp_path, nets.options(module=fake_builder("some_builder", "")))


def test_a_killed_builder(nets, tmp_path, fake_builder):
    module = fake_builder("killed_builder", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    path = nets.conv_linear_net(tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"SIGKILL.*out of memory[^\n]*\nuse a machine with more memory"):
        build_engine(path, tmp_path / "engine", nets.options(module=module))
    assert [item.name for item in (tmp_path / "engine").iterdir()] == ["build.log"]


def test_an_aborted_builder_is_quoted(nets, tmp_path, fake_builder):
    source = "import os\nos.write(2, b'terminate called after throwing bad_news')\nos.abort()\n"
    path = nets.conv_linear_net(tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"crashed \(SIGABRT\): terminate called after throwing bad_news"):
        build_engine(path, tmp_path / "engine", nets.options(module=fake_builder("aborted_builder", source)))


def test_a_builder_with_an_unknown_interface(nets, tmp_path, fake_builder):
    path = nets.conv_linear_net(tmp_path / "model.onnx")
    module = fake_builder("odd_builder", "__version__ = '99.0'\n")
    with pytest.raises(BuildError, match=r"exit code 1: AttributeError: .*odd_builder"):
        build_engine(path, tmp_path / "engine", nets.options(module=module))


# says who it is, then sleeps for longer than pytest lets a test run
SLEEPY = """
import os, pathlib, time
pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
__version__ = "99.0"
class ILogger:
    pass
class NetworkDefinitionCreationFlag:
    pass
class Builder:
    def __init__(self, logger):
        pass
    def create_network(self, flags):
        time.sleep(3600)
"""


def test_a_build_that_takes_too_long(nets, tmp_path, fake_builder):
    path = nets.conv_linear_net(tmp_path / "model.onnx")
    options = nets.options(module=fake_builder("slow_builder", SLEEPY), timeout_s=1)
    with pytest.raises(BuildError, match="took longer than 1 s"):
        build_engine(path, tmp_path / "engine", options)


def test_an_interrupt_kills_the_builder_and_leaves_nothing(nets, tmp_path, fake_builder):
    builders = []

    def interrupt(message):
        assert message.startswith("reading the graph")
        builders.append(psutil.Process(int((tmp_path / "packages" / "busy_builder" / "pid").read_text())))
        raise KeyboardInterrupt

    path = nets.conv_linear_net(tmp_path / "model.onnx")
    with pytest.raises(KeyboardInterrupt):
        build_engine(
            path,
            tmp_path / "engine",
            nets.options(module=fake_builder("busy_builder", SLEEPY)),
            on_progress=interrupt,
        )
    assert [builder.is_running() for builder in builders] == [False]
    assert list((tmp_path / "engine").iterdir()) == []


def test_a_missing_package(nets, tmp_path):
    for changes, remedy in [
        ({"module": "no_such_builder"}, "pip install no_such_builder"),
        ({"target": "tensorrt"}, r"pip install 'qdexport\[gpu\]'"),
    ]:
        if importlib.util.find_spec(changes.get("module", "tensorrt")) is not None:
            continue
        with pytest.raises(MissingDependencyError, match=remedy):
            build_engine(tmp_path / "model.onnx", tmp_path / "engine", nets.options(**changes))
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_does_not_load(nets, tmp_path, fake_builder):
    module = fake_builder(
        "broken_builder", "raise ImportError('libcudart.so.13: cannot open shared object file')\n"
    )
    with pytest.raises(MissingDependencyError, match="broken_builder does not load: libcudart"):
        build_engine(
            nets.conv_linear_net(tmp_path / "m.onnx"), tmp_path / "engine", nets.options(module=module)
        )


def test_a_target_without_builder(nets, tmp_path):
    with pytest.raises(RecipeError, match="target onnxruntime has no engine builder"):
        build_engine(tmp_path / "model.onnx", tmp_path, nets.options("onnxruntime"))


def test_a_folder_that_cannot_be_written(nets, tmp_path, fake_builder):
    (tmp_path / "file").write_text("")
    path = nets.conv_linear_net(tmp_path / "model.onnx")
    with pytest.raises(OutputError, match="not a folder"):
        build_engine(path, tmp_path / "file" / "engine", nets.options(module=fake_builder("a_builder", "")))


def test_a_builder_that_cannot_write(nets, tmp_path, fake_builder):
    module = fake_builder("full_disk_builder", "import os\nos._exit(74)\n")
    with pytest.raises(OutputError, match="free some space"):
        build_engine(
            nets.conv_linear_net(tmp_path / "m.onnx"), tmp_path / "engine", nets.options(module=module)
        )


@pytest.mark.parametrize(
    ("capability", "text"),
    [
        ("9.0", r"9\.0 \(H100, H200\); it has 8\.0, 8\.6, 8\.9, 12\.0; use target tensorrt"),
        ("8.7", r"8\.7 \(Jetson Orin\)"),
        ("7.5", "all INT8 convolutions in FP16"),
        ("89", "must be written like 8.9"),
        ("sm_89", "must be written like 8.9"),
    ],
)
def test_capabilities_that_the_target_lacks(capability, text):
    with pytest.raises(RecipeError, match=text):
        checked_capabilities(TARGETS["tensorrt-rtx"], ("8.9", capability))


def test_capabilities_to_build_for():
    rtx, tensorrt = TARGETS["tensorrt-rtx"], TARGETS["tensorrt"]
    assert checked_capabilities(rtx, None) == ("8.6", "8.9", "12.0")
    assert checked_capabilities(rtx, ["8.9", "8.0", "8.9"]) == ("8.9", "8.0")
    assert checked_capabilities(tensorrt, ()) == ()
    with pytest.raises(RecipeError, match="remove compute_capabilities"):
        checked_capabilities(tensorrt, ("9.0",))


TENSORRT = """
from tensorrt_rtx import *
__version__ = {version!r}
"""


@pytest.mark.rtx
def test_the_tensorrt_target_uses_the_same_interface(rtx, nets, tmp_path, fake_builder):
    # TensorRT proper does not run on a CPU: RTX under its name shows that the calls are the common ones
    module = fake_builder("tensorrt", TENSORRT.format(version="10.3.0"))
    path = nets.conv_linear_net(tmp_path / "model.onnx")
    options = nets.options("tensorrt-10", module=module, needs_gpu_to_build=False)
    facts, _ = build_engine(path, tmp_path / "engine", options)
    assert (facts.target, facts.compute_capabilities, facts.int8_compute) == ("tensorrt-10", [], 2)


@pytest.mark.parametrize(
    ("target", "version", "message"),
    [
        ("tensorrt-10", "8.6.1", r"tensorrt 8\.6\.1 is too old, install 10\.3 or newer$"),
        ("tensorrt", "10.13.3", r"10\.13\.3 is too old, install 11\.0 or newer, or choose target tensorrt-10"),
        ("tensorrt-10", "11.4.0", r"too new, install 10\.3 or newer, below 11\.0, or choose target tensorrt$"),
    ],
)
def test_a_tensorrt_of_another_generation(nets, tmp_path, fake_builder, target, version, message):
    fake_builder("tensorrt", f"__version__ = {version!r}\n")
    path = nets.conv_linear_net(tmp_path / "model.onnx")
    with pytest.raises(MissingDependencyError, match=message):
        build_engine(path, tmp_path / "engine", nets.options(target, needs_gpu_to_build=False))


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has a GPU")
def test_the_tensorrt_target_needs_a_gpu(nets, tmp_path, fake_builder):
    fake_builder("tensorrt", "__version__ = '11.0.0'\n")
    path = nets.conv_linear_net(tmp_path / "model.onnx")
    with pytest.raises(MissingDependencyError, match=r"but the CUDA driver .*choose target tensorrt-rtx"):
        build_engine(path, tmp_path / "engine", nets.options("tensorrt"))
