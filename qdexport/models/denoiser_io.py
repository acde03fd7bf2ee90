"""What goes into a denoiser and what comes out: named tensors, their shapes and types, and calls by name.

The names are those of the exported network, in this order, as far as a model has them: `sample`, `timestep`
(int64, one number for all rows), `encoder_hidden_states`, `text_embeds`, `time_ids`, `class_labels`; the
output is `noise_pred`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.core.recipe import Shapes
from qdexport.errors import ModelError, RecipeError
from qdexport.models.loaded import LoadedModel
from qdexport.models.shape_ranges import dims_of

__all__ = [
    "call_denoiser",
    "check_denoiser",
    "denoiser_class",
    "example_inputs",
    "io_spec",
    "latent_size",
    "named_inputs",
    "size_multiple",
]

_BODY_DTYPES: Final = {"fp32": "float32", "fp16": "float16"}
_ADDED: Final = ("text_embeds", "time_ids")
_DEFAULT_TOKENS: Final = 77  # every CLIP text encoder
_TIME_ID_COUNT: Final = 6  # SDXL: original size, crop corner, target size


def denoiser_class(name: str) -> type[nn.Module]:
    """The diffusers class of a denoiser, by the `_class_name` of its config.

    Raises:
        ModelError: qdexport does not compile this class.
    """
    from diffusers import UNet2DConditionModel, UNet2DModel

    classes: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (UNet2DConditionModel, UNet2DModel)}
    if name not in classes:
        raise ModelError(
            f"{name!r} is not a denoiser that qdexport compiles; supported: {', '.join(classes)}"
        )
    return classes[name]


def check_denoiser(config: Mapping[str, Any]) -> None:
    """Refuses denoisers that need inputs which the exported network does not have.

    Args:
        config: A UNet's configuration.

    Raises:
        ModelError: Says which config entry, with its value.
    """
    allowed = {
        "addition_embed_type": (None, "text", "text_time"),
        "encoder_hid_dim_type": (None, "text_proj"),
        "time_cond_proj_dim": (None,),
        "attention_type": (None, "default"),
    }
    for key, values in allowed.items():
        value = config.get(key)
        if value not in values:
            inputs = "sample, timestep, text, pooled text, time ids and class labels"
            raise ModelError(
                f"the denoiser's config has {key}={value!r}, so it reads more than the inputs that "
                f"qdexport exports ({inputs}); use a model with {key} {' or '.join(map(repr, values))}"
            )


def latent_size(denoiser: nn.Module) -> tuple[int | None, int | None]:
    """Height and width that the config of a denoiser calls its own; None where it does not say."""
    size = _config(denoiser).get("sample_size")
    if size is None or isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def size_multiple(denoiser: nn.Module) -> int:
    """What the height and width of a sample must be a multiple of: 2 to the number of downsampling blocks."""
    _config(denoiser)
    blocks = denoiser.get_submodule("down_blocks").children()
    count = sum(getattr(block, "downsamplers", None) is not None for block in blocks)
    return 1 << count


def io_spec(model: LoadedModel | nn.Module, shapes: Shapes, body: str) -> IoSpec:
    """The inputs and the output of the exported network.

    Args:
        model: A loaded model, or a bare denoiser (then the text length defaults to 77 tokens).
        shapes: Sizes, fixed or ranges. The best of a range that names none is the model's own size, or the
            nearest inside the range.
        body: `fp32` or `fp16`, the type of the floating-point inputs and of the output.

    Raises:
        RecipeError: A size is not a multiple of what the downsampling needs, a range is out of order, a profile leaves
            its range, or a size is neither in the recipe nor in the model's config.
    """
    if body not in _BODY_DTYPES:
        raise RecipeError(f"no body type {body!r}; use {' or '.join(_BODY_DTYPES)}")
    denoiser = model.denoiser if isinstance(model, LoadedModel) else model
    config, dtype = _config(denoiser), _BODY_DTYPES[body]
    ranges, profiles = dims_of(shapes, _own_sizes(model, denoiser), size_multiple(denoiser))
    batch, height, width = (ranges[name] for name in ("batch", "height", "width"))
    rows = (batch, _fixed(config["in_channels"]), height, width)
    inputs = [
        TensorSpec(name="sample", role="sample", dtype=dtype, dims=rows),
        TensorSpec(name="timestep", role="timestep", dtype="int64", dims=(_fixed(1),)),
    ]
    if _reads_text(denoiser):
        dims = (batch, ranges["tokens"], _fixed(_text_width(config)))
        inputs.append(TensorSpec(name="encoder_hidden_states", role="text", dtype=dtype, dims=dims))
    if config.get("addition_embed_type") == "text_time":
        pooled, ids = _added_widths(model, config)
        text = (batch, _fixed(pooled))
        inputs.append(TensorSpec(name="text_embeds", role="text_pooled", dtype=dtype, dims=text))
        inputs.append(TensorSpec(name="time_ids", role="time_ids", dtype=dtype, dims=(batch, _fixed(ids))))
    if getattr(denoiser, "class_embedding", None) is not None:
        inputs.append(_class_spec(denoiser, batch, dtype))
    outputs = (batch, _fixed(config["out_channels"]), height, width)
    prediction = TensorSpec(name="noise_pred", role="prediction", dtype=dtype, dims=outputs)
    return IoSpec(inputs=tuple(inputs), outputs=(prediction,), profiles=profiles)


def call_denoiser(denoiser: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    """Calls a diffusers denoiser with the named inputs of the exported network.

    Args:
        denoiser: Anything with the call signature of a diffusers UNet.
        inputs: `sample` [N, C, H, W], `timestep` int64 [1], and the model's others.

    Returns:
        The prediction, [N, C, H, W].
    """
    others = {name: tensor for name, tensor in inputs.items() if name not in ("sample", "timestep", *_ADDED)}
    added = {name: inputs[name] for name in _ADDED if name in inputs}
    if added:
        others["added_cond_kwargs"] = added  # type: ignore[assignment]  # diffusers groups these two
    output: tuple[Tensor, ...] = denoiser(inputs["sample"], inputs["timestep"], **others, return_dict=False)
    return output[0]


def named_inputs(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turns the arguments of a diffusers call into the named inputs of the exported network.

    Args:
        denoiser: The UNet whose forward signature the arguments follow.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The tensors as passed, without copies; `timestep` as int64 [1].

    Raises:
        ModelError: The call passes something that the exported network has no input for (residuals of a
            ControlNet, a mask), mixes timesteps, or has a fractional one.
    """
    signature = inspect.signature(type(denoiser).forward)
    bound = signature.bind(denoiser, *args, **kwargs).arguments
    values = {name: value for name, value in list(bound.items())[1:] if value is not None}
    values.pop("return_dict", None)
    inputs: dict[str, Tensor] = {
        "sample": values.pop("sample"),
        "timestep": _timestep(values.pop("timestep")),
    }
    if "encoder_hidden_states" in values:
        inputs["encoder_hidden_states"] = values.pop("encoder_hidden_states")
    inputs.update(values.pop("added_cond_kwargs", {}))
    if "class_labels" in values:
        inputs["class_labels"] = values.pop("class_labels")
    foreign = sorted(
        {name for name in inputs if name not in _NAMES} | {name for name in values if values[name] != {}}
    )
    if foreign:
        raise ModelError(
            f"the pipeline passes {', '.join(foreign)} to the denoiser, no input of the exported network: "
            "use a plain text-to-image or unconditional pipeline"
        )
    return inputs


def example_inputs(
    io: IoSpec, seed: int, device: torch.device | str = "cpu", *, train_timesteps: int = 1000
) -> dict[str, Tensor]:
    """Random inputs at the best sizes: normal floats, a timestep inside the training range, legal labels.

    Args:
        io: The network's inputs.
        seed: Equal seeds give equal numbers, up to rounding to the input's type.
        device: Where the tensors go; they are drawn on the CPU.
        train_timesteps: Length of the training schedule.
    """
    source = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for spec in io.inputs:
        shape, dtype = spec.shape(), getattr(torch, spec.dtype)
        if spec.role == "timestep":
            # from 1: a network with Fourier time features divides by the timestep
            tensor = torch.randint(1, train_timesteps, shape, generator=source)
        elif spec.role == "time_ids":
            tensor = torch.randint(0, 129, shape, generator=source) * 8  # image sizes in pixels
        elif spec.role == "class_labels" and not dtype.is_floating_point:
            tensor = torch.randint(0, 2, shape, generator=source)  # every model has two classes at least
        else:
            tensor = torch.randn(shape, generator=source)
        inputs[spec.name] = tensor.to(device=device, dtype=dtype)
    return inputs


_NAMES: Final = ("sample", "timestep", "encoder_hidden_states", *_ADDED, "class_labels")


def _config(denoiser: nn.Module) -> Mapping[str, Any]:
    config = getattr(denoiser, "config", None)
    if not isinstance(config, Mapping):
        raise ModelError(f"{type(denoiser).__name__} has no diffusers config; pass a diffusers UNet")
    return config


def _reads_text(denoiser: nn.Module) -> bool:
    return "encoder_hidden_states" in inspect.signature(type(denoiser).forward).parameters


def _text_width(config: Mapping[str, Any]) -> int:
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    return int(width if isinstance(width, int) else width[0])


def _token_count(model: LoadedModel | nn.Module) -> int:
    tokenizer = getattr(model.pipeline, "tokenizer", None) if isinstance(model, LoadedModel) else None
    if tokenizer is None and isinstance(model, LoadedModel):
        tokenizer = getattr(model.pipeline, "tokenizer_2", None)  # the SDXL refiner has only this one
    return _DEFAULT_TOKENS if tokenizer is None else int(tokenizer.model_max_length)


def _added_widths(model: LoadedModel | nn.Module, config: Mapping[str, Any]) -> tuple[int, int]:
    """Width of the pooled text, and count of the time ids: they fill the added embedding's input together."""
    total, each = int(config["projection_class_embeddings_input_dim"]), int(config["addition_time_embed_dim"])
    encoder = getattr(model.pipeline, "text_encoder_2", None) if isinstance(model, LoadedModel) else None
    if encoder is not None:
        pooled = int(encoder.config.projection_dim)
        return pooled, (total - pooled) // each
    # The refiner has five ids; its text encoder's pooled output is as wide as its tokens
    pooled = _text_width(config)
    if total == pooled + (_TIME_ID_COUNT - 1) * each:
        return pooled, _TIME_ID_COUNT - 1
    return total - _TIME_ID_COUNT * each, _TIME_ID_COUNT


def _class_spec(denoiser: nn.Module, batch: Dim, dtype: str) -> TensorSpec:
    embedding, kind = denoiser.get_submodule("class_embedding"), _config(denoiser).get("class_embed_type")
    if isinstance(embedding, nn.Embedding) or kind == "timestep":
        return TensorSpec(name="class_labels", role="class_labels", dtype="int64", dims=(batch,))
    first = next((layer for layer in embedding.modules() if isinstance(layer, nn.Linear)), None)
    # `identity` adds the labels to the time embedding as they are
    time_width = denoiser.get_submodule("time_embedding.linear_2").out_features
    width = time_width if first is None else first.in_features
    dims = (batch, _fixed(int(width)))  # type: ignore[arg-type]  # a Linear's width is an int
    return TensorSpec(name="class_labels", role="class_labels", dtype=dtype, dims=dims)


def _own_sizes(model: LoadedModel | nn.Module, denoiser: nn.Module) -> dict[str, int | None]:
    """The sizes that a model calls its own; no `tokens` where it reads no text."""
    height, width = latent_size(denoiser)
    cfg = _reads_text(denoiser)
    if isinstance(model, LoadedModel):
        height, width, cfg = model.defaults.height, model.defaults.width, model.defaults.cfg
    own = {"batch": 2 if cfg else 1, "height": height, "width": width}
    return {**own, "tokens": _token_count(model)} if _reads_text(denoiser) else own


def _fixed(size: int) -> Dim:
    return Dim(low=size, best=size, high=size)


def _timestep(value: Any) -> Tensor:
    steps = torch.as_tensor(value).detach().reshape(-1)
    first = steps[:1]
    if bool((steps != first).any()):
        raise ModelError(f"one denoiser call mixes the timesteps {steps.tolist()}; sample with one per call")
    whole = first.to(torch.int64)
    if bool((whole != first).any()):
        raise ModelError(
            f"the scheduler asks for timestep {first.item()}, the exported network takes whole numbers; "
            "set timestep_spacing to 'leading' or 'trailing' in scheduler_config.json"
        )
    return whole
