"""ModelOpt's share of the comparison; runs in an environment of its own, without qdexport's dependencies.

Two routes: ``example`` is what ModelOpt's diffusers example does for INT8 (TorchScript exporter on the fake-quant
module); ``deploy`` is ``get_onnx_bytes_and_metadata`` of ``modelopt.torch._deploy``.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.children import answer
from benchmarks.costs import Cost, measured, resident_mb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

__all__ = ["main"]

_OPSET = 20
_ATTENTION_QUANTIZERS = r"(bmm|softmax|bmm2_output)_quantizer"


def main(spec_path: str) -> None:
    """Quantizes one of the comparison's UNets and exports it.

    The specification holds ``model``, ``format``, ``route``, ``dtype`` (of the module), ``weights_dtype`` (of the
    deploy route), ``threads`` and ``folder``.
    """
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    costs: dict[str, Cost] = {}
    with measured(costs, "import"):
        import modelopt.torch.quantization as mtq
        import torch

        from benchmarks import peer_model
    torch.set_num_threads(spec["threads"])
    base = resident_mb()
    with measured(costs, "load"):
        unet = peer_model.unet(spec["model"])
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters())
    with measured(costs, "quantize"), torch.inference_mode():
        given = peer_model.inputs(spec["model"], torch.float32)
        calls = [{**given, "timestep": _timestep(step)} for step in peer_model.TIMESTEPS]
        config = _config(spec["format"], spec["dtype"])
        mtq.quantize(unet, config, lambda model: [model(**call, return_dict=False) for call in calls])
        mtq.disable_quantizer(unet, lambda name: re.match(peer_model.OPTIONAL_LAYERS, name) is not None)
        mtq.disable_quantizer(unet, lambda name: re.search(_ATTENTION_QUANTIZERS, name) is not None)
        if spec["dtype"] == "fp16":
            unet.half()
    given = peer_model.inputs(spec["model"], next(unet.parameters()).dtype)
    example = {**given, "timestep": _timestep(500), "return_dict": False}
    folder = Path(spec["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with measured(costs, "export"), torch.inference_mode():
        if spec["route"] == "example":
            _export_example(unet, example, folder / "model.onnx")
        else:
            _export_deploy(unet, example, folder, spec["weights_dtype"])
    parts = ("weight_quantizer",) if spec["format"] == "int4" else ("input_quantizer", "weight_quantizer")
    quantized, excluded = _layers(unet, parts)
    answer(
        spec,
        {
            "costs": {name: asdict(cost) for name, cost in costs.items()},
            "base_mb": base,
            "weight_bytes": weight_bytes,
            "layers_quantized": quantized,
            "layers_excluded": excluded,
            "weights": {name: unet.get_submodule(name).weight.numel() for name in quantized},
            "versions": _versions(),
        },
    )


def _config(name: str, dtype: str) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq

    presets = {
        "int8": mtq.INT8_DEFAULT_CFG,
        "fp8": mtq.FP8_DEFAULT_CFG,
        "int4": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
        "w4a8": mtq.W4A8_AWQ_BETA_CFG,
    }
    config: dict[str, Any] = copy.deepcopy(presets[name])
    if dtype == "fp16":
        for entry in config["quant_cfg"]:
            if isinstance(entry.get("cfg"), dict) and "num_bits" in entry["cfg"]:
                entry["cfg"]["trt_high_precision_dtype"] = "Half"
    return config


def _timestep(step: int) -> Any:
    import torch

    return torch.tensor([float(step)])


def _export_example(unet: nn.Module, example: dict[str, Any], path: Path) -> None:
    import torch

    torch.onnx.export(
        unet,
        (),
        f=str(path),
        kwargs=example,
        opset_version=_OPSET,
        dynamo=False,
        input_names=_input_names(example),
        output_names=["latent"],
    )


def _input_names(example: dict[str, Any]) -> list[str]:
    """In the order of the network's arguments, which is that of the traced graph."""
    return ["sample", "timestep", "encoder_hidden_states", *example.get("added_cond_kwargs", ())]


def _export_deploy(unet: nn.Module, example: dict[str, Any], folder: Path, weights_dtype: str) -> None:
    from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata

    packed, _ = get_onnx_bytes_and_metadata(
        unet, (example,), model_name="model", onnx_opset=_OPSET, weights_dtype=weights_dtype
    )
    OnnxBytes.from_bytes(packed).write_to_disk(str(folder))


def _layers(unet: nn.Module, parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the convolutions and linear layers with and without all of these quantizers."""
    from torch import nn

    quantized: list[str] = []
    excluded: list[str] = []
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            every = all(getattr(getattr(module, part, None), "is_enabled", False) for part in parts)
            (quantized if every else excluded).append(name)
    return quantized, excluded


def _versions() -> dict[str, str]:
    import importlib.metadata as metadata

    names = ("nvidia-modelopt", "torch", "diffusers", "onnx")
    return {name: metadata.version(name) for name in names}


if __name__ == "__main__":
    main(sys.argv[1])
