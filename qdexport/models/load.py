"""Loads a denoiser, and its pipeline when there is one, after a check that its files are whole and safe.

Whatever is wrong with a folder is found here and named; diffusers is called last. Weights keep the type
they are stored in, and stay in the file's memory map until something writes to them.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn

from qdexport.core.paths import below, why_unsafe
from qdexport.core.precision import NUMPY
from qdexport.core.reading import reading
from qdexport.errors import ModelError
from qdexport.models.denoiser_classes import (
    FLUX,
    TRANSFORMERS,
    UNETS,
    check_denoiser,
    config_of,
    denoiser_class,
    family_of,
)
from qdexport.models.denoiser_io import latent_size
from qdexport.models.library_logs import quiet_libraries
from qdexport.models.limits import check_construction, check_numbers
from qdexport.models.loaded import LoadedModel, SamplingDefaults, WeightsDtype
from qdexport.models.source import UNUSED_COMPONENTS, resolve_source
from qdexport.models.torch_types import torch_dtype
from qdexport.models.weights import (
    WeightFiles,
    check_weights,
    find_weights,
    read_json,
    stored_dtype,
    stored_extent,
    variants_in,
)

__all__ = ["LoadedModel", "SamplingDefaults", "load_model", "loaded_from_denoiser"]

logger = logging.getLogger(__name__)

_DTYPES: Final[dict[str, torch.dtype]] = {name: torch_dtype(name) for name in NUMPY}
_REMEDY: Final = "mend its configuration, or download the model again"
_FEW_STEP_SCHEDULERS: Final = ("LCMScheduler", "TCDScheduler")
_NO_WEIGHTS: Final = ("Tokenizer", "Processor", "FeatureExtractor", "Scheduler")


def load_model(
    source: str | Path, *, variant: str | None = None, torch_dtype: str | torch.dtype | None = None
) -> LoadedModel:
    """Loads a model by bundled name, folder or hub id.

    Args:
        source: `shapes` or `shapes-turbo`; a diffusers folder, a whole pipeline or one component; or
            `owner/name[@revision]` of the Hugging Face hub.
        variant: Which weight files (`fp16`); components without this variant fall back to their plain
            weights, the denoiser does not.
        torch_dtype: `fp32`, `fp16` or `bf16` (or the torch type) to convert to; by default the denoiser keeps
            the type of its file, and the other components take the same. Few CPUs compute in half precision:
            an `fp16` model is sampled there up to 40 times faster after a conversion to `fp32`.

    Returns:
        The denoiser in eval mode on the CPU. Of a component folder alone, pipeline and scheduler are None.

    Raises:
        ModelError: The source cannot be found, is incomplete, damaged or unsafe, holds NaN or infinity, or
            is of a kind that qdexport does not compile. The message names the file.
    """
    name, folder = resolve_source(source, variant)
    with reading(folder, ModelError, _REMEDY, what="is a model that cannot be loaded"):
        return _load(name, folder, variant, _dtype(torch_dtype))


def _load(name: str, folder: Path, variant: str | None, dtype: torch.dtype | None) -> LoadedModel:
    if not (folder / "model_index.json").is_file():
        denoiser, stored = _load_denoiser(folder, variant, dtype)
        loaded = _loaded(name=name, folder=folder, pipeline=None, denoiser=denoiser, component=_usual_name(denoiser))
        return replace(loaded, stored_dtype=stored, variant=variant)
    index = read_json(folder / "model_index.json")
    _check_names(folder, index)
    component = _denoiser_component(folder, index)
    if not (folder / component).is_dir():
        raise ModelError(_missing_component(folder, component))
    find_weights(folder / component, variant)  # a wrong variant is wrong here first: the others may lack it
    others = [(part, entry) for part, entry in index.items() if _is_component(part, entry) and part != component]
    weights = [_check_component(folder / part, entry, variant) for part, entry in others]
    denoiser, stored = _load_denoiser(folder / component, variant, dtype)
    pickled = any(files is not None and files.pickled for files in weights)
    pipeline = _load_pipeline(folder, index, {component: denoiser}, variant=variant, pickled=pickled)
    loaded = _loaded(name=name, folder=folder, pipeline=pipeline, denoiser=denoiser, component=component)
    return replace(loaded, stored_dtype=stored, variant=variant)


def loaded_from_denoiser(denoiser: nn.Module, *, name: str) -> LoadedModel:
    """Wraps a denoiser that was made in memory, without pipeline, scheduler and folder.

    Raises:
        ModelError: It is not of a supported class, or its weights are not of a supported type.
    """
    component = _usual_name(denoiser)
    return _loaded(name=name, folder=None, pipeline=None, denoiser=denoiser.eval(), component=component)


def _usual_name(denoiser: nn.Module) -> str:
    return "transformer" if family_of(denoiser) in TRANSFORMERS else "unet"


def _loaded(
    *, name: str, folder: Path | None, pipeline: Any | None, denoiser: nn.Module, component: str
) -> LoadedModel:
    denoiser_class(type(denoiser).__name__)
    evaluator = None if folder is None else folder / "evaluator" / "model.safetensors"
    evaluator = evaluator if evaluator is not None and evaluator.is_file() else None
    defaults = _sampling_defaults(pipeline, denoiser, has_evaluator=evaluator is not None)
    return LoadedModel(
        name=name,
        folder=folder,
        pipeline=pipeline,
        denoiser=denoiser,
        component=component,
        scheduler=getattr(pipeline, "scheduler", None),
        weights_dtype=_weights_dtype(denoiser),
        evaluator=evaluator,
        defaults=defaults,
    )


def _dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    if value is None or value in _DTYPES.values():
        return cast("torch.dtype | None", value)
    if value not in _DTYPES:
        raise ModelError(f"unknown torch_dtype {value!r}; use {', '.join(_DTYPES)}")
    return _DTYPES[value]


def _weights_dtype(denoiser: nn.Module) -> WeightsDtype:
    sizes: dict[torch.dtype, int] = {}
    for parameter in denoiser.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    most = max(sizes, key=lambda dtype: sizes[dtype])
    for name, dtype in _DTYPES.items():
        if dtype == most:
            return cast("WeightsDtype", name)
    raise ModelError(f"the denoiser's weights are {most}; convert them to one of {', '.join(_DTYPES)}")


def _is_component(part: str, entry: Any) -> bool:
    is_pair = isinstance(entry, list) and len(entry) == 2 and all(isinstance(item, str) for item in entry)
    return is_pair and not part.startswith("_") and part not in UNUSED_COMPONENTS


def _denoiser_component(folder: Path, index: dict[str, Any]) -> str:
    components = {part: entry for part, entry in index.items() if _is_component(part, entry)}
    if not isinstance(index.get("_class_name"), str):
        raise ModelError(
            f"{folder / 'model_index.json'} names no diffusers pipeline (_class_name is "
            f"{index.get('_class_name')!r}); pipelines that bring their own code are not run"
        )
    for part, (library, class_name) in components.items():
        if library == "diffusers" and class_name in (*UNETS, *TRANSFORMERS):
            return part
    for part in ("unet", "transformer", "prior"):
        if part in components:
            denoiser_class(components[part][1])
    raise ModelError(
        f"{folder} ({index['_class_name']}) has none of {', '.join((*UNETS, *TRANSFORMERS))}; its components are "
        f"{', '.join(components) or 'not listed'}"
    )


def _missing_component(folder: Path, part: str) -> str:
    return f"{folder / 'model_index.json'} lists the component {part!r}, but there is no folder {folder / part}"


def _check_names(folder: Path, index: dict[str, Any]) -> None:
    """Refuses names of components that are no folders below the model's; a component's folder may be a link."""
    for part in index:
        reason = why_unsafe(part)
        if reason is not None:
            raise ModelError(f"{folder / 'model_index.json'} names the component {part!r}, {reason}")


def _check_tokenizer(folder: Path) -> None:
    """Refuses names of further files that are not beside a tokenizer's configuration."""
    path = folder / "tokenizer_config.json"
    names = read_json(path).get("fast_tokenizer_files") if path.is_file() else None
    for name in names if isinstance(names, list) else ():
        below(folder, str(name), path)


def _check_component(folder: Path, entry: list[str], variant: str | None) -> WeightFiles | None:
    """Checks a component that diffusers will load; returns its weight files, None when it has none."""
    with quiet_libraries():
        from diffusers import pipelines

    library, class_name = entry
    if library not in ("diffusers", "transformers") and not hasattr(pipelines, library):
        raise ModelError(f"the component {folder.name!r} needs code from {library!r}, which is not run")
    if not folder.is_dir():
        raise ModelError(_missing_component(folder.parent, folder.name))
    for file in (folder / "config.json", folder / "scheduler_config.json"):
        if file.exists():
            check_numbers(file, read_json(file))
    if any(word in class_name for word in _NO_WEIGHTS):
        if not any(folder.iterdir()):
            raise ModelError(f"the component folder {folder} is empty; download the model again")
        _check_tokenizer(folder)
        return None
    config = read_json(folder / "config.json")
    weights = find_weights(folder, variant if variant in variants_in(folder) else None)
    check_weights(weights)
    check_construction(partial(_build, library, class_name, config), folder / "config.json", *stored_extent(weights))
    return weights


def _build(library: str, class_name: str, config: dict[str, Any]) -> None:
    """Makes a component without weights; pipelines' own classes are left to diffusers."""
    if library == "transformers":
        import transformers

        cls = getattr(transformers, class_name)
        cls(cls.config_class.from_dict(config))
    elif library == "diffusers":
        import diffusers

        getattr(diffusers, class_name).from_config(config)


def _load_denoiser(
    folder: Path, variant: str | None, dtype: torch.dtype | None
) -> tuple[nn.Module, WeightsDtype | None]:
    """The denoiser, and the type of its weights on disk (None when only a conversion makes it usable)."""
    config = read_json(folder / "config.json")
    if "_class_name" not in config:
        raise ModelError(f"{folder / 'config.json'} names no diffusers class; give the folder of a UNet or a pipeline")
    try:
        cls = denoiser_class(str(config["_class_name"]))
        check_denoiser(config)
    except ModelError as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None
    if config.get("quantization_config") is not None:
        raise ModelError(f"{folder} is quantized already (quantization_config); start from the original weights")
    check_numbers(folder / "config.json", config)
    weights = find_weights(folder, variant)
    check_weights(weights)
    build = partial(cls.from_config, config)  # type: ignore[attr-defined]  # diffusers is untyped
    check_construction(build, folder / "config.json", *stored_extent(weights))
    stored = stored_dtype(weights, strict=dtype is None)
    with reading(f"diffusers cannot load {folder}", ModelError, _REMEDY, what=""), quiet_libraries():
        denoiser, info = cls.from_pretrained(  # type: ignore[attr-defined]  # diffusers is untyped
            folder,
            variant=variant,
            dtype=dtype or _DTYPES[stored],
            use_safetensors=not weights.pickled,
            low_cpu_mem_usage=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(f"{weights.files[0]} lacks {len(missing)} weights of the config, for instance {missing[0]!r}")
    if info["unexpected_keys"]:
        extra = sorted(info["unexpected_keys"])
        logger.warning("%s: %d tensors have no place in the model, e.g. %s", folder, len(extra), extra[0])
    return cast("nn.Module", denoiser).eval(), cast("WeightsDtype | None", stored if stored in _DTYPES else None)


def _load_pipeline(
    folder: Path, index: dict[str, Any], parts: dict[str, Any], *, variant: str | None, pickled: bool
) -> Any:
    import diffusers

    with quiet_libraries():  # the first look at a class imports it, with warnings about optional packages
        cls: Any = getattr(diffusers, index["_class_name"], None)
    if not _is_pipeline(cls):
        raise ModelError(
            f"diffusers {diffusers.__version__} has no pipeline {index['_class_name']!r} "
            f"({folder / 'model_index.json'}); install the diffusers that wrote it"
        )
    options = {**dict.fromkeys(UNUSED_COMPONENTS), "requires_safety_checker": False, "add_watermarker": False}
    options |= {part: None for part, entry in index.items() if entry == [None, None]}  # saved without it
    accepted = inspect.signature(cls.__init__).parameters
    denoiser = next(iter(parts.values()))
    with reading(f"diffusers cannot load the pipeline {folder}", ModelError, _REMEDY, what=""), quiet_libraries():
        pipeline = cls.from_pretrained(
            folder,
            **parts,
            **{key: value for key, value in options.items() if key in accepted},
            variant=variant,
            dtype=denoiser.dtype,
            use_safetensors=None if pickled else True,
            low_cpu_mem_usage=True,
            local_files_only=True,
        )
        pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _is_pipeline(kind: Any) -> bool:
    from diffusers import DiffusionPipeline

    return isinstance(kind, type) and issubclass(kind, DiffusionPipeline)


def _sampling_defaults(pipeline: Any | None, denoiser: nn.Module, *, has_evaluator: bool) -> SamplingDefaults:
    known = {} if pipeline is None else inspect.signature(pipeline.__call__).parameters
    conditional = "encoder_hidden_states" in inspect.signature(type(denoiser).forward).parameters
    conditional = conditional or {"class_labels", "guidance_scale"} <= set(known)
    # distilled: the guidance scale is an input, and the call is not doubled
    embedded = family_of(denoiser) == FLUX or config_of(denoiser).get("time_cond_proj_dim") is not None
    few_steps = type(getattr(pipeline, "scheduler", None)).__name__ in _FEW_STEP_SCHEDULERS
    guidance_scale = 7.5
    if pipeline is not None:
        own = known.get("guidance_scale")
        guidance_scale = 1.0 if own is None else float(own.default)
    if has_evaluator:  # the shapes models were measured at 4
        guidance_scale = 4.0
    if (few_steps and not embedded) or not conditional:
        guidance_scale = 1.0
    height, width = latent_size(denoiser)
    steps = 4 if few_steps else 25 if conditional else 50
    cfg = guidance_scale > 1 and not embedded
    return SamplingDefaults(steps=steps, guidance_scale=guidance_scale, height=height, width=width, cfg=cfg)
