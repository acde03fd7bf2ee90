"""Quantized checkpoints: a diffusers folder, ``quantization.safetensors`` and the resolved ``recipe.yaml``
beside it.

``quantization.safetensors`` holds, for every part of a quantized layer (its module path, or ``path#0``,
``path#1``):

- ``<part>.weight_codes``: integer codes, packed by :mod:`qdexport.quant.packing`;
- ``<part>.weight_scale``: FP32 ``[1, C]`` per output channel, or ``[1]``; zero points of weights are 0;
- ``<part>.input_scale``, ``<part>.input_zero_point``: FP32 ``[R]``, row i for the i-th of the file's
  timesteps (groups of steps have equal rows);

and where the recipe asks for them:

- ``<group>.channel_ratio``: FP32 ``[C]``, what the channels of an activation group's input are divided by; codes and
  scales of weights are those of ``W r``;
- ``<block>.softmax_scale``, ``<block>.softmax_mode``: FP32 ``[R]``, the quantizer behind the softmax of an attention
  block; mode 0 is uniform, 1 is log2;
- ``bos.embedding``: FP32 ``[D]``, the first token of the text as the denoiser reads it.

Its metadata entry ``qdexport.quantization`` is JSON: version, body, timesteps, the plan of every layer, the widths
behind softmax, a digest of the text encoders that ``bos.embedding`` came from (others are refused), and where the
floating-point weights are. Codes are stored for other tools and to prove, at loading, that the
weights are the right ones.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qdexport import __version__
from qdexport.core.files import Owner, atomic_dir
from qdexport.core.reading import reading
from qdexport.core.recipe import load_recipe
from qdexport.core.spec import NVFP4_BLOCK, LayerPlan
from qdexport.core.writing import output_errors
from qdexport.errors import ModelError, OutputError
from qdexport.models.library_logs import quiet_libraries
from qdexport.models.load import load_model
from qdexport.models.loaded import LoadedModel, SamplingDefaults
from qdexport.models.torch_types import torch_dtype
from qdexport.models.weights import open_safetensors
from qdexport.quant.affine import block_scales
from qdexport.quant.attach import (
    Body,
    QuantizedModel,
    QuantParameters,
    install,
    shared_copy,
    training_steps_of,
)
from qdexport.quant.bos import Bos, encoder_digest
from qdexport.quant.modules import ChannelScale, WeightQuantizer, quantizer_pairs
from qdexport.quant.packing import pack_codes, packed_layout, unpack_codes, weight_codes, weight_parts
from qdexport.quant.plan import activation_keys
from qdexport.quant.softmax import SoftmaxParameters, SoftmaxQuantizer
from qdexport.quant.stream import LazyTensor, write_safetensors

__all__ = ["QUANTIZATION_FILE", "RECIPE_FILE", "load_quantized", "save_quantized"]

logger = logging.getLogger(__name__)

QUANTIZATION_FILE = "quantization.safetensors"
RECIPE_FILE = "recipe.yaml"
_METADATA_KEY = "qdexport.quantization"
_VERSION = 2
_BOS = "bos.embedding"
_BLOCKED = 3  # rank of scales per block


class _Version(BaseModel):
    """The one field of the metadata that every format has."""

    version: int


class CheckpointFacts(BaseModel):
    """The metadata of a quantization file."""

    model_config = ConfigDict(extra="forbid")

    version: int
    tool_version: str
    model: str
    component: str
    body: Body
    timesteps: tuple[int | float, ...]
    weights_in: str | None  # folder of the floating-point weights; None: the checkpoint's own
    defaults: SamplingDefaults
    plans: tuple[LayerPlan, ...]
    softmax_bits: dict[str, int]
    encoder: str | None  # digest of the text encoders that the first token's embedding came from; None: no embedding


def save_quantized(
    model: QuantizedModel, folder: Path, *, with_weights: bool = True, owner: Owner | None = None
) -> None:
    """Writes a quantized checkpoint, whole or not at all.

    Args:
        model: the fake-quant model.
        folder: an earlier checkpoint there is replaced.
        with_weights: False leaves the floating-point weights where they are and stores only the reference to
            them, for models of several gigabytes.
        owner: knows which files of the folder are ours; None: all of an earlier checkpoint.

    Raises:
        OutputError: the folder cannot be written, or holds something else.
    """
    if owner is None and folder.is_dir() and any(folder.iterdir()) and not (folder / QUANTIZATION_FILE).is_file():
        raise OutputError(f"{folder} is not empty and no quantized checkpoint; choose another folder")
    needs = sum(tensor.nbytes for tensor in model.denoiser.state_dict().values()) if with_weights else None
    with atomic_dir(folder, owner) as fresh, output_errors(folder, needs):
        if with_weights:
            _save_weights(model, fresh)
        metadata = {_METADATA_KEY: _facts(model, with_weights)}
        write_safetensors(fresh / QUANTIZATION_FILE, _stored_tensors(model), metadata)
        (fresh / RECIPE_FILE).write_text(model.recipe.to_yaml(), encoding="utf-8")


def load_quantized(folder: Path, *, loaded: LoadedModel | None = None) -> QuantizedModel:
    """Reads a quantized checkpoint; the model computes what the saved one computed, bit for bit.

    Args:
        folder: of :func:`save_quantized`.
        loaded: the floating-point model, for a checkpoint without weights whose model has moved or was made
            in memory.

    Raises:
        ModelError: the folder is no quantized checkpoint, is damaged, or its weights do not have the stored
            codes.
    """
    path = folder / QUANTIZATION_FILE
    facts = read_facts(path)
    recipe_path = folder / RECIPE_FILE
    if not recipe_path.is_file():
        raise ModelError(f"{recipe_path} is missing; save the checkpoint again")
    recipe = load_recipe(str(recipe_path))
    loaded = loaded or _load_floating_point(folder, facts)
    with reading(path, ModelError, "quantize the model again", what="does not fit its model"):
        parameters = _read_parameters(path, facts)
        _check_encoder(folder, loaded, parameters.bos)
        body = None if loaded.weights_dtype == facts.body else torch_dtype(facts.body)
        denoiser = shared_copy(loaded.denoiser, body)
        context = install(denoiser, facts.plans, parameters, training_steps_of(loaded))
        _verify_codes(path, denoiser, facts.plans)
    return QuantizedModel(
        loaded=loaded,
        denoiser=denoiser,
        plans=facts.plans,
        recipe=recipe,
        body=facts.body,
        timesteps=facts.timesteps,
        context=context,
        bos=parameters.bos,
    )


def _check_encoder(folder: Path, loaded: LoadedModel, bos: Bos | None) -> None:
    """Refuses text encoders that are not those of the first token's embedding."""
    if bos is None or not bos.encoder or loaded.pipeline is None:
        return
    if encoder_digest(loaded) != bos.encoder:
        raise ModelError(
            f"{folder} was quantized with the first token of other text encoders than those of {loaded.name} (their "
            "weights, or which of their layers is read, have changed); quantize the model again"
        )


def _save_weights(model: QuantizedModel, folder: Path) -> None:
    """The pipeline with the denoiser's weights in the body's type, in diffusers' own layout."""
    loaded = model.loaded
    if loaded.pipeline is None:
        denoiser: Any = model.denoiser
        with quiet_libraries():
            denoiser.save_pretrained(folder)
        return
    pipeline = copy.copy(loaded.pipeline)  # registering on the copy leaves the caller's pipeline alone
    pipeline.register_modules(**{loaded.component: model.denoiser})
    with quiet_libraries():
        pipeline.save_pretrained(folder)
    if loaded.evaluator is not None:
        (folder / "evaluator").mkdir(exist_ok=True)
        shutil.copyfile(loaded.evaluator, folder / "evaluator" / loaded.evaluator.name)


def _facts(model: QuantizedModel, with_weights: bool) -> str:
    source = model.loaded.folder
    return CheckpointFacts(
        version=_VERSION,
        tool_version=__version__,
        model=model.loaded.name,
        component=model.loaded.component,
        body=model.body,
        timesteps=model.timesteps,
        weights_in=None if with_weights else str(source.resolve()) if source is not None else "",
        defaults=model.loaded.defaults,
        plans=model.plans,
        softmax_bits={name: quantizer.spec.bits for name, quantizer in _softmax_quantizers(model.denoiser).items()},
        encoder=None if model.bos is None else model.bos.encoder,
    ).model_dump_json()


def _softmax_quantizers(denoiser: nn.Module) -> dict[str, SoftmaxQuantizer]:
    """By attention block."""
    return {
        name.rpartition(".")[0]: module
        for name, module in denoiser.named_modules()
        if isinstance(module, SoftmaxQuantizer)
    }


def _stored_tensors(model: QuantizedModel) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for plan in model.plans:
        if plan.weight is None or not plan.quantizes_weight:
            continue
        layer = model.denoiser.get_submodule(plan.name)
        for part, (inputs, _), (weight, quantizer) in zip(
            plan.parts, quantizer_pairs(layer), weight_parts(layer), strict=True
        ):
            dtype, shape = packed_layout(plan.weight, tuple(weight.shape))
            make = partial(_packed_codes, weight, quantizer)
            tensors[f"{part}.weight_codes"] = LazyTensor(dtype=dtype, shape=shape, make=make)
            if plan.weight.format == "nvfp4":
                tensors[f"{part}.weight_block_scale"] = _block_scale(weight, quantizer)
            tensors[f"{part}.weight_scale"] = _lazy(quantizer.scale, half=quantizer.scale.dim() == _BLOCKED)
            if inputs is not None:
                tensors[f"{part}.input_scale"] = _lazy(inputs.scale)
                tensors[f"{part}.input_zero_point"] = _lazy(inputs.zero_point)
        if isinstance(layer.channel_scale, ChannelScale):
            tensors[_ratio_name(plan)] = _lazy(layer.channel_scale.ratio.reshape(-1))
    for name, softmax in _softmax_quantizers(model.denoiser).items():
        tensors[f"{name}.softmax_scale"] = _lazy(softmax.scale)
        tensors[f"{name}.softmax_mode"] = _lazy(softmax.mode)
    if model.bos is not None:
        tensors[_BOS] = _lazy(model.bos.embedding)
    return tensors


def _ratio_name(plan: LayerPlan) -> str:
    return f"{plan.group}.channel_ratio"


def _block_scale(weight: Tensor, quantizer: WeightQuantizer) -> LazyTensor:
    """NVFP4's scales of blocks, as bytes of E4M3 numbers."""
    shape = (*weight.shape[:-1], weight.shape[-1] // NVFP4_BLOCK)

    def make() -> NDArray[Any]:
        scales = block_scales(weight, quantizer.scale)[..., 0]
        array: NDArray[Any] = scales.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return array

    return LazyTensor(dtype=np.dtype(np.uint8), shape=shape, make=make)


def _packed_codes(weight: Tensor, quantizer: WeightQuantizer) -> NDArray[Any]:
    return pack_codes(weight_codes(weight, quantizer), quantizer.spec)


def _lazy(tensor: Tensor, *, half: bool = False) -> LazyTensor:
    array = tensor.detach().float().cpu().numpy()
    if half:  # scales of blocks are FP16 numbers
        array = array.astype(np.float16)
    return LazyTensor(dtype=array.dtype, shape=array.shape, make=lambda: array)


def read_facts(path: Path) -> CheckpointFacts:
    if not path.is_file():
        raise ModelError(f"{path.parent} is no quantized checkpoint: {path.name} is missing; quantize the model first")
    again = "quantize the model again"
    with reading(path, ModelError, again, what="is damaged"), open_safetensors(path, again) as file:
        text = (file.metadata() or {}).get(_METADATA_KEY)
    if text is None:
        raise ModelError(f"{path} was not written by qdexport (no {_METADATA_KEY!r} in its metadata)")
    with reading(path, ModelError, "quantize again", what="has wrong metadata"):
        version = _Version.model_validate_json(text).version
        if version == _VERSION:
            return CheckpointFacts.model_validate_json(text)
    raise ModelError(f"{path} has format {version}, this qdexport reads {_VERSION}; quantize the model again")


def _load_floating_point(folder: Path, facts: CheckpointFacts) -> LoadedModel:
    if facts.weights_in == "":
        raise ModelError(
            f"{folder} has no weights of its own, and {facts.model} was made in memory; "
            "give the model to load_quantized"
        )
    if facts.weights_in is None:
        loaded = load_model(folder, torch_dtype=torch_dtype(facts.body))
    elif Path(facts.weights_in).is_dir():
        loaded = load_model(Path(facts.weights_in))
    else:
        raise ModelError(
            f"{folder} refers to the weights in {facts.weights_in}, which is gone; restore it, or load the "
            "model from where it is now and give it to load_quantized"
        )
    return replace(loaded, name=facts.model, defaults=facts.defaults)


def _read_parameters(path: Path, facts: CheckpointFacts) -> QuantParameters:
    weight_scales: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    zero_points: dict[str, Tensor] = {}
    ratios: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for plan in facts.plans:
            if plan.quantized and plan.channel_scale:
                ratios[plan.group] = _scale(file, path, _ratio_name(plan))
            for part in plan.parts if plan.quantizes_weight else ():
                weight_scales[part] = _scale(file, path, f"{part}.weight_scale")
            for part, key in zip(plan.parts, activation_keys(plan), strict=False):
                scale, zero_point = (
                    _scale(file, path, f"{part}.input_scale"),
                    _tensor(file, path, f"{part}.input_zero_point"),
                )
                if key in scales and not (
                    torch.equal(scales[key], scale) and torch.equal(zero_points[key], zero_point)
                ):
                    raise ModelError(f"{path}: {part} and another layer read {key!r} but have different input scales")
                if scale.shape != zero_point.shape or scale.shape not in ((1,), (len(facts.timesteps),)):
                    raise ModelError(
                        f"{path}: {part}.input_scale has {list(scale.shape)} rows for {len(facts.timesteps)} steps"
                    )
                scales[key], zero_points[key] = scale, zero_point
        softmax = {name: _softmax(file, path, name, facts) for name in facts.softmax_bits}
        bos = _bos(file, path, facts)
    return QuantParameters(
        weight_scales=weight_scales,
        scales=scales,
        zero_points=zero_points,
        timesteps=facts.timesteps,
        channel_ratios=ratios,
        softmax=softmax,
        bos=bos,
    )


def _softmax(file: Any, path: Path, block: str, facts: CheckpointFacts) -> SoftmaxParameters:
    """The quantizer behind one attention block."""
    scale, mode = _scale(file, path, f"{block}.softmax_scale"), _tensor(file, path, f"{block}.softmax_mode")
    if scale.shape != mode.shape:
        raise ModelError(
            f"{path}: {block}.softmax_scale has {list(scale.shape)} rows and softmax_mode {list(mode.shape)}"
        )
    if scale.shape not in ((1,), (len(facts.timesteps),)):
        raise ModelError(f"{path}: {block}.softmax_scale has {list(scale.shape)} rows for {len(facts.timesteps)} steps")
    if not bool(((mode == 0) | (mode == 1)).all()):
        raise ModelError(f"{path}: {block}.softmax_mode holds a mode that is neither 0 (uniform) nor 1 (log2)")
    return SoftmaxParameters(bits=facts.softmax_bits[block], scale=scale, mode=mode)


def _bos(file: Any, path: Path, facts: CheckpointFacts) -> Bos | None:
    """The text's first token."""
    if facts.encoder is None:
        layer = next((plan.name for plan in facts.plans if plan.bos and plan.quantized), None)
        if layer is not None:
            raise ModelError(f"{path}: layer {layer} leaves the text's first token out, whose embedding is missing")
        return None
    embedding = _tensor(file, path, _BOS)
    if not bool(torch.isfinite(embedding).all()):
        raise ModelError(f"{path}: {_BOS} holds NaN or infinity; quantize the model again")
    return Bos(embedding=embedding, encoder=facts.encoder)


def _scale(file: Any, path: Path, name: str) -> Tensor:
    scale = _tensor(file, path, name).float()
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ModelError(f"{path}: {name} holds a scale that is not a positive number")
    return scale


def _tensor(file: Any, path: Path, name: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise ModelError(f"{path} has no tensor {name}; quantize the model again") from error
    return tensor


def _verify_codes(path: Path, denoiser: nn.Module, plans: Sequence[LayerPlan]) -> None:
    """Compares the stored codes with those of the loaded weights, one layer in memory at a time."""
    with safe_open(path, framework="pt") as file:
        for plan in plans:
            if plan.weight is None or not plan.quantizes_weight:
                continue
            parts = weight_parts(denoiser.get_submodule(plan.name))
            for part, (weight, quantizer) in zip(plan.parts, parts, strict=True):
                codes = weight_codes(weight, quantizer)
                packed = _tensor(file, path, f"{part}.weight_codes").numpy()
                try:
                    stored = unpack_codes(packed, plan.weight, codes.shape)
                except ValueError as error:
                    raise ModelError(f"{path}: {part}.weight_codes does not fit its layer: {error}") from error
                different = int(np.count_nonzero(stored != codes))
                if different:
                    raise ModelError(
                        f"layer {part}: {different} of {codes.size} weight codes in {path} are not those of "
                        "the loaded weights; the weights were changed after quantizing, quantize them again"
                    )
