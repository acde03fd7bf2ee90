"""Every parser of qdexport with valid inputs: what the fuzzer changes, and what may be raised about it."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reliability.hostile_run import Seeds

__all__ = ["Parser", "all_parsers"]

_ROW = "Strides: [64,1], StrideOrder: [1,0], Datatype: {}, Format: (Linear) Row major linear format"
_TENSOR = f"{{{{ Name: {{}}, Dimensions: [{{}}], {_ROW} }}}}"
_KERNEL = (
    "Name: to_v/MatMul_myl0_1, LayerType: gemm, Inputs: [ " + _TENSOR.format("x", "128,64", "Int8") + "], Constants: [ "
    + _TENSOR.format("w_dconst", "64,192", "Int8") + "], Outputs: [ " + _TENSOR.format("y", "128,192", "Float")
    + "], TacticName: to_v_0x12, StreamId: 0, Metadata: [ONNX Layer: to_v/MatMul]\x1f[ONNX Layer: to_k/MatMul]"
)  # fmt: skip
_LOG = f"INFO: before\nVERBOSE: Layers:\n{_KERNEL}\n{_KERNEL}\n\nI/O Tensors:\n"
_NAMES = ("conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.resnets.1.conv2", "")


@dataclass(frozen=True, slots=True)
class Parser:
    """One parser.

    Attributes:
        name: of the parser.
        suffix: of the file that holds an input.
        parse: reads the file; may raise nothing but a ``QdExportError``.
        inputs: valid ones.
    """

    name: str
    suffix: str
    parse: Callable[[Path], object]
    inputs: tuple[bytes, ...]


def all_parsers(seeds: Seeds) -> list[Parser]:
    """All parsers; their valid inputs come from an output folder, a model folder, and what the package ships."""
    return [*_texts(), *_records(seeds), *_models(seeds), *_graphs(seeds)]


def _texts() -> list[Parser]:
    from qdexport.cli.options import overrides_of
    from qdexport.core.bit_plan import BitPlan
    from qdexport.core.patterns import check_pattern, matches
    from qdexport.core.reading import reading
    from qdexport.core.recipe import load_recipe, preset_names, preset_text
    from qdexport.errors import RecipeError

    def settings(path: Path) -> object:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        return load_recipe("w8a8", overrides_of(tuple(text.split("\n")), None))

    def pattern(path: Path) -> object:
        text = path.read_bytes().decode("utf-8", "replace")
        with reading("pattern", RecipeError):
            return [matches(check_pattern(text), name) for name in _NAMES]

    presets = tuple(preset_text(name).encode() for name in preset_names())
    plan = "schema_version: 1\nmodel: m\nrecipe: r\naverage_weight_bits: 8\naverage_activation_bits: 8.5\nlayers:\n"
    layers = "  conv_in: {weight: 8, activation: 8, why: x}\n  mid.conv: {weight: 16, activation: 16}\n"
    values = (b"calibration.prompts=8\nrules.0.match=down.*\nshapes.batch=[1, 2, 4]", b"body=fp16", b"bit_plan=b.yaml")
    patterns = (b"*.attn2.to_k", b"re:.*\\.(to_q|to_k)$", b"re:(?!up).*[0-9]+", b"*[ab]?.conv*")
    return [
        Parser("recipe", ".yaml", lambda path: load_recipe(str(path)), presets),
        Parser("--set", ".txt", settings, values),
        Parser("bit plan", ".yaml", BitPlan.load, ((plan + layers).encode(),)),
        Parser("pattern", ".txt", pattern, patterns),
    ]


def _records(seeds: Seeds) -> list[Parser]:
    from rich.console import Console

    from qdexport.build.inspect import cost_facts, plan_facts
    from qdexport.build.plan import parse_plan
    from qdexport.build.plan_cost import plan_cost
    from qdexport.core.forms import FormTable
    from qdexport.core.gpus import gpu_named
    from qdexport.core.json_text import json_text
    from qdexport.core.pass_log import PassLog
    from qdexport.core.reading import reading
    from qdexport.core.results import Manifest, Plan, Report
    from qdexport.core.sealed import read_sealed, write_sealed
    from qdexport.errors import BuildError
    from qdexport.quant.sensitivity_table import SensitivityTable
    from qdexport.report.terminal import summary

    def plan(path: Path) -> object:
        loaded = Plan.load(path)
        with reading(path):  # as `inspect` does
            return json_text([plan_facts(loaded), cost_facts(plan_cost(loaded, gpu_named("a100")))])

    def report(path: Path) -> None:
        loaded = Report.load(path)
        with reading(path):
            summary(loaded, Console(file=io.StringIO(), markup=False))

    def log(path: Path) -> object:
        with reading(path, BuildError):  # as `build` does
            return parse_plan(path.read_text(encoding="utf-8", errors="replace"), "tensorrt-rtx")

    sealed = seeds.out.with_name("sealed.json")
    write_sealed(sealed, {"question": "x", "answer": {"kernels": 7, "seconds": 1.5}})
    kernel = {"index": 0, "name": "k", "kind": "gemm", "inputs": ["int8[4,4] x", "const int8[4,4] w"],
              "outputs": ["fp16[4,4] y"], "modules": ["conv_in"], "nodes": ["conv_in/Conv"]}  # fmt: skip
    forms = Path(__file__).resolve().parents[2] / "qdexport" / "assets" / "forms" / "tensorrt-rtx.json"
    table = json.loads(forms.read_text(encoding="utf-8"))
    entry = {"part": "weight", "group": "content", "name": "conv_in", "layers": ["conv_in"], "metric": "sqnr_db",
             "values": {"4": 20.0, "8": 44.0}, "seconds": 1.0}  # fmt: skip
    sweep = {"model": "m", "recipe": "r", "entries": [entry]}
    few = {**table, "entries": table["entries"][:3]}
    return [
        Parser("manifest.json", ".json", Manifest.load, ((seeds.out / "manifest.json").read_bytes(),)),
        Parser("report.json", ".json", report, ((seeds.out / "report.json").read_bytes(),)),
        Parser("plan.json", ".json", plan, (json.dumps({"target": "tensorrt-rtx", "kernels": [kernel] * 2}).encode(),)),
        Parser("passes.json", ".json", lambda path: PassLog.load(path).explain("conv_in", ["conv_in"]),
               tuple(file.read_bytes() for file in (seeds.out / "onnx").glob("passes.json"))),
        Parser("forms", ".json", lambda path: FormTable.load(path).choose("group-norm", {"elements": 64}, "x"),
               (json.dumps(few).encode(),)),
        Parser("sensitivities", ".json", SensitivityTable.load, (json.dumps(sweep).encode(),)),
        Parser("sealed answer", ".json", read_sealed, (sealed.read_bytes(),)),
        Parser("build log", ".log", log, (_LOG.encode(),)),
    ]  # fmt: skip


def _models(seeds: Seeds) -> list[Parser]:
    import torch

    from qdexport.core.reading import reading
    from qdexport.core.recipe import load_recipe
    from qdexport.models.denoiser_classes import check_denoiser
    from qdexport.models.limits import check_numbers
    from qdexport.models.weights import WeightFiles, check_weights, find_weights, read_json, stored_dtype, stored_extent
    from qdexport.quant.checkpoint import read_facts
    from qdexport.quant.inspect import checkpoint_facts
    from qdexport.quant.ranges import given_ranges, load_ranges

    def weights(pickled: bool) -> Callable[[Path], object]:
        def parse(path: Path) -> object:
            files = WeightFiles(files=(path,), pickled=pickled)
            with reading(path):  # as `load_model` does
                check_weights(files)
                return stored_dtype(files), stored_extent(files)

        return parse

    def config(path: Path) -> None:
        with reading(path):  # as `load_model` does
            value = read_json(path)
            check_numbers(path, value)
            check_denoiser(value)

    def index(path: Path) -> object:
        folder = path.with_suffix(".index")
        folder.mkdir(exist_ok=True)
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_bytes(path.read_bytes())
        return find_weights(folder, None)

    def checkpoint(path: Path) -> object:
        folder = path.with_suffix(".checkpoint")
        folder.mkdir(exist_ok=True)
        (folder / "quantization.safetensors").write_bytes(path.read_bytes())
        return checkpoint_facts(folder)

    pickles = io.BytesIO()
    torch.save({"conv.weight": torch.ones(2, 2), "conv.bias": torch.zeros(2, dtype=torch.float16)}, pickles)
    quantized = seeds.out / "checkpoint" / "quantization.safetensors"
    plans = read_facts(quantized).plans
    ranges = seeds.out.with_name("ranges.safetensors")
    given_ranges(plans, -1.0, 1.0).save(ranges)
    load_recipe("w8a8")
    header = b'{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    small = struct.pack("<Q", len(header)) + header + b"\0" * 16
    shards = {"metadata": {"total_size": 8}, "weight_map": {"a": "diffusion_pytorch_model.safetensors.index.json"}}
    names = {plan.name: [-1.0, 1.5] for plan in plans if plan.quantized}
    return [
        Parser("weights", ".safetensors", weights(False), (small,)),
        Parser("pickled weights", ".bin", weights(True), (pickles.getvalue(),)),
        Parser("index of shards", ".json", index, (json.dumps(shards).encode(),)),
        Parser("config.json", ".json", config, ((seeds.nano / "unet" / "config.json").read_bytes(),)),
        Parser("quantization.safetensors", ".safetensors", checkpoint, (quantized.read_bytes(),)),
        Parser("ranges, safetensors", ".safetensors", lambda path: load_ranges(path, plans), (ranges.read_bytes(),)),
        Parser("ranges, JSON", ".json", lambda path: load_ranges(path, plans), (json.dumps(names).encode(),)),
    ]


def _graphs(seeds: Seeds) -> list[Parser]:
    from qdexport.core.companion_facts import COMPANION_KEY, CompanionFacts
    from qdexport.core.network_facts import METADATA_KEY, NetworkFacts
    from qdexport.emit.inspect import load_onnx, onnx_facts

    def network(path: Path) -> object:
        return NetworkFacts.from_metadata({METADATA_KEY: path.read_bytes().decode("utf-8", "replace")}, str(path))

    def companion(path: Path) -> object:
        return CompanionFacts.from_metadata({COMPANION_KEY: path.read_bytes().decode("utf-8", "replace")}, str(path))

    model = seeds.out / "onnx" / "model.onnx"
    facts: dict[str, Any] = json.loads(load_onnx(model).metadata_props[METADATA_KEY])
    beside = {
        "network": "vae_decoder", "component": "vae", "model": "m", "target": "t", "why_body": "x", "usage": "x",
        "class_name": "AutoencoderKL", "body": "fp16", "io": facts["io"],
    }  # fmt: skip
    return [
        Parser("ONNX file", ".onnx", onnx_facts, (model.read_bytes(),)),
        Parser("facts of a network", ".json", network, (json.dumps(facts).encode(),)),
        Parser("facts of a companion", ".json", companion, (json.dumps(beside).encode(),)),
    ]
