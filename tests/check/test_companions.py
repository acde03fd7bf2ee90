"""ONNX files of tiny text encoders and VAE decoders, against PyTorch; the checks fail when they must."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderTiny

from qdexport.check.companions import OnnxCompanion, companion_parity, try_pipeline
from qdexport.core.recipe import Shapes
from qdexport.core.target import target_named
from qdexport.emit.facts import read_companion_facts
from qdexport.models.companions import companion_facts, companion_of, example_companion_inputs, load_companion
from qdexport.models.denoiser_io import io_spec
from qdexport.models.load import load_model
from qdexport.models.sampling import SampleRequest
from qdexport.models.tiny import TinyOptions, save_tiny_pipeline
from qdexport.pipeline.companions import audited_layers, lower_companion

if TYPE_CHECKING:
    from pathlib import Path

    from qdexport.models.companions import Companion

TARGET = target_named("tensorrt-rtx")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    made = {family: save_tiny_pipeline(root / family, family) for family in ("sd", "sdxl")}
    options = TinyOptions(text_encoders=True)
    return made | {family: save_tiny_pipeline(root / family, family, options) for family in ("pixart", "flux")}


@pytest.fixture(scope="module")
def text_file(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> OnnxCompanion:
    """The text encoder of the Stable Diffusion model in FP16."""
    return lowered(network(folders["sd"], "text_encoder", "fp16"), tmp_path_factory.mktemp("text") / "onnx")


@pytest.fixture(scope="module")
def image_file(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> OnnxCompanion:
    """Its VAE decoder in FP16."""
    return lowered(network(folders["sd"], "vae_decoder", "fp16"), tmp_path_factory.mktemp("image") / "onnx")


def network(folder: Path, name: Any, body: Any, shapes: Shapes | None = None, outer: str = "fp32") -> Companion:
    loaded = load_model(folder)
    io = io_spec(loaded, shapes or Shapes(), outer)
    return load_companion(folder, companion_facts(loaded, name, io, body, TARGET.name, shapes or Shapes()))


def lowered(companion: Companion, folder: Path) -> OnnxCompanion:
    path = lower_companion(companion, folder, TARGET).path
    return OnnxCompanion(path, read_companion_facts(path))


def calls(companion: Companion, count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [example_companion_inputs(companion, seed) for seed in range(count)]


def types(path: Path) -> set[int]:
    """Types of all floating-point weights; written-out group norms have an epsilon in FP32."""
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
    return {item.data_type for item in onnx.load(path).graph.initializer if item.dims} & floats


@pytest.mark.parametrize(
    ("family", "name", "least"),
    [
        # only the order of sums differs, some 1e-7 relative, more where a norm divides by a small deviation
        ("sdxl", "text_encoder_2", 110.0),
        ("sdxl", "vae_decoder", 100.0),
        ("pixart", "text_encoder", 110.0),
        ("flux", "text_encoder", 110.0),
    ],
)
def test_files_compute_what_pytorch_computes(
    family: str, name: str, least: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    companion = network(folders[family], name, "fp32")
    found = companion_parity(companion, lowered(companion, tmp_path / "onnx"), calls(companion))
    assert found.reasons == []
    assert found.verdict == "pass"
    assert found.calls == 3 * companion.facts.io.inputs[0].dims[0].best
    assert found.sqnr_db >= least
    assert found.noise_floor_db < found.sqnr_db + 1
    assert types(tmp_path / "onnx" / "model.onnx") == {onnx.TensorProto.FLOAT}


def test_t5_in_fp16_for_texts_of_any_length(folders: dict[str, Path], tmp_path: Path) -> None:
    """The file has FP32 weights in ``wo`` alone. Its stream exceeds FP16 and passes; a module inside that does not."""
    companion = network(folders["pixart"], "text_encoder", "fp16", Shapes(batch=4, tokens=(8, 40)))
    with torch.no_grad():
        for name, item in companion.network.named_parameters():
            if name.endswith("wo.weight"):
                item.mul_(1e5)
    file = lowered(companion, tmp_path / "onnx")
    layers = audited_layers(file.path, companion.facts, None)
    assert layers["layers"]["onnx"] == layers["layers"]["planned"] == {"fp16": 12, "fp32": 2}
    assert layers["mismatches"] == []
    short = {name: item[:, :8] for name, item in example_companion_inputs(companion, seed=9).items()}
    drawn = [*calls(companion), short]
    found = companion_parity(companion, file, drawn)
    assert found.reasons == []
    assert found.largest_activation < 65504
    with torch.no_grad():
        companion.network.get_submodule("encoder.block.1.layer.1.DenseReluDense.wi_1").weight.mul_(1e6)
    assert any("above 65504" in text for text in companion_parity(companion, file, drawn).reasons)


def test_a_decoder_for_any_batch_and_size(folders: dict[str, Path], tmp_path: Path) -> None:
    """FP16 between FP16 networks; other numbers of rows and other sizes than the example's."""
    shapes = Shapes(batch=(2, 2, 8), height=(8, 16))
    companion = network(folders["sd"], "vae_decoder", "fp16", shapes, "fp16")
    file = lowered(companion, tmp_path / "onnx")
    source = torch.Generator().manual_seed(0)
    sizes = [(3, 4, 8, 8), (1, 4, 16, 8), (5, 4, 10, 8)]  # the last has more rows than one call of the file takes
    drawn = [{"latents": torch.randn(size, generator=source).half()} for size in sizes]
    assert companion_parity(companion, file, drawn, most=9).verdict == "pass"
    for call, (rows, _, height, width) in zip(drawn, sizes, strict=True):
        image = file(call)["image"]
        assert image.shape == (rows, 3, 2 * height, 2 * width)
        assert image.dtype == torch.float16


def test_an_autoencoder_tiny(folders: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    loaded = load_model(folders["sd"])
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).half()  # fmt: skip
    loaded.pipeline.register_modules(vae=vae)
    facts = companion_facts(loaded, "vae_decoder", io_spec(loaded, Shapes(), "fp32"), "auto", TARGET.name, Shapes())
    companion = companion_of(vae, facts)
    found = companion_parity(companion, lowered(companion, tmp_path / "onnx"), calls(companion))
    assert (facts.body, found.verdict) == ("fp16", "pass")


def test_a_file_of_other_weights_is_noticed(folders: dict[str, Path], text_file: OnnxCompanion) -> None:
    """One weight of hundreds: far above rounding."""
    companion = network(folders["sd"], "text_encoder", "fp16")
    assert types(text_file.path) == {onnx.TensorProto.FLOAT16}
    right = companion_parity(companion, text_file, calls(companion))
    # every operator rounds to 11 bits, one rounding alone leaves 73 dB
    assert (right.verdict, right.noise_floor_db < 66, right.sqnr_db > 60) == ("pass", True, True)
    with torch.no_grad():
        companion.network.get_submodule("encoder.layers.0.mlp.fc1").weight[0, 0] += 0.5
    found = companion_parity(companion, text_file, calls(companion))
    assert found.verdict == "fail"
    assert "text_encoder, encoder.layers.0.mlp.fc1: it differs in float64" in found.reasons[0]
    assert "below the noise floor" in found.reasons[-1]


@pytest.mark.parametrize("module", ["decoder.mid_block.resnets.0.norm2", "decoder.conv_out", "post_quant_conv"])
def test_one_number_of_a_file_that_rounding_would_hide_is_named(
    module: str, folders: dict[str, Path], image_file: OnnxCompanion, tmp_path: Path
) -> None:
    """One element of FP16, by two units in the last place; all other modules are right."""
    proto = onnx.load(image_file.path)
    known = {item.name: item for item in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.name.startswith(f"{module}/")]
    tensor = known[[name for node in nodes for name in node.input if name in known and known[name].data_type == 10][-1]]
    array = onnx.numpy_helper.to_array(tensor).copy()
    place = np.unravel_index(np.abs(array).argmax(), array.shape)
    array[place] = array[place] * np.float16(1.002) if array[place] else np.float16(0.002)
    copy = onnx.numpy_helper.from_array(array, "changed")
    proto.graph.initializer.append(copy)
    for node in nodes:
        node.input[:] = ["changed" if name == tensor.name else name for name in node.input]
    onnx.save(proto, tmp_path / "model.onnx")
    companion = network(folders["sd"], "vae_decoder", "fp16")
    right = companion_parity(companion, image_file, calls(companion, 1))
    assert (right.reasons, right.float64_left_out) == ([], "")
    found = companion_parity(companion, OnnxCompanion(tmp_path / "model.onnx", companion.facts), calls(companion, 1))
    (reason,) = found.reasons
    assert f"vae_decoder, {module}: it differs in float64" in reason


def test_overflow_is_named(folders: dict[str, Path], image_file: OnnxCompanion) -> None:
    """Convolutions of large weights: FP32 holds their output, FP16 does not. It is named before anything else."""
    companion = network(folders["sd"], "vae_decoder", "fp16")
    with torch.no_grad():
        companion.network.get_submodule("post_quant_conv").weight *= 30_000
        companion.network.get_submodule("decoder.conv_in").weight *= 10
    found = companion_parity(companion, image_file, calls(companion, 2))
    assert found.verdict == "fail"
    assert found.largest_activation > 65504
    assert any("above 65504, the largest fp16 number; set companions.body to fp32" in text for text in found.reasons)


def test_whole_pipeline(folders: dict[str, Path], text_file: OnnxCompanion, image_file: OnnxCompanion) -> None:
    """Right files stay at the floor of mere rounding; a decoder of other weights does not."""
    loaded = load_model(folders["sd"])
    request = SampleRequest(prompts=("a", "b", "c", "d"), steps=2, guidance_scale=4.0)
    files = {"text_encoder": text_file, "vae_decoder": image_file}
    pairs = {name: (network(folders["sd"], name, "fp16"), file) for name, file in files.items()}
    done: list[tuple[int, int]] = []
    right = try_pipeline(loaded, request, None, pairs, lambda *counts: done.append(counts))
    assert right.result.verdict == "pass"
    assert right.result.networks == ["denoiser", "text_encoder", "vae_decoder"]
    # an FP32 denoiser flips no codes, so that images are as close as the networks themselves
    assert right.result.psnr_db > 60
    assert done[-1] == (6, 6)
    assert {name: len(made) for name, made in right.calls.items()} == {"text_encoder": 2, "vae_decoder": 1}
    assert right.calls["vae_decoder"][0]["latents"].shape == (4, 4, 8, 8)
    with torch.no_grad():
        pairs["vae_decoder"][0].network.get_submodule("decoder.conv_out").bias += 0.05
    wrong = try_pipeline(loaded, request, None, pairs)
    assert wrong.result.verdict == "fail"
    assert "images of the whole pipeline" in wrong.result.reasons[0]
