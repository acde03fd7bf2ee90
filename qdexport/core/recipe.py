"""Recipes: one YAML file says what to quantize, how to calibrate, what to build and what to check."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qdexport.core.companion_facts import CompanionName
from qdexport.core.digests import digest_of
from qdexport.core.patterns import check_pattern, matches
from qdexport.core.precision import LayerKind
from qdexport.core.reading import read_text, reading
from qdexport.core.spec import Granularity, QuantSpec
from qdexport.core.yaml_text import YAML_LIMIT, line_of, parse_yaml
from qdexport.errors import RecipeError

__all__ = [
    "BitAllocation",
    "Calibration",
    "ChannelScale",
    "Companions",
    "Recipe",
    "Rule",
    "ShapeProfile",
    "Shapes",
    "SoftmaxQuant",
    "StepGroups",
    "Validation",
    "load_recipe",
    "preset_names",
    "preset_text",
]


# a typing slip must not become a run of weeks, or of more memory than there is
_Count = Annotated[int, Field(ge=1, le=100_000)]
_Steps = Annotated[int, Field(ge=1, le=10_000)]
_Size = Annotated[int, Field(ge=1, le=1_000_000)]
_Seed = Annotated[int, Field(ge=0, le=2**62)]  # image i has seed + i, which PyTorch takes up to 2**63


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Matching(_Part):
    """What chooses modules by their paths.

    ``match`` is one pattern or a list: a glob over module paths (``*.attn2.to_k``), or ``re:`` and a regular
    expression that must match the whole path.
    """

    match: str | tuple[str, ...] = "*"

    @model_validator(mode="after")
    def _check_patterns(self) -> Self:
        for pattern in self.patterns:
            check_pattern(pattern)
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        """All patterns."""
        return (self.match,) if isinstance(self.match, str) else self.match

    def chooses(self, name: str) -> bool:
        """Whether a module path is meant."""
        return any(matches(pattern, name) for pattern in self.patterns)


class Rule(_Matching):
    """Which layers get which quantizers; the last rule that matches a layer wins.

    ``weight`` alone is weight-only: codes are stored, and the product is computed in the type of the body.
    """

    match: str | tuple[str, ...]
    kinds: tuple[LayerKind, ...] = ("conv", "linear")
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> Rule:
        weight, activation = self.weight, self.activation
        if weight is None:
            if activation is not None:
                raise ValueError(
                    "a rule with activation needs weight too (weight alone is weight-only, neither is floating point)"
                )
            return self
        if not weight.symmetric:
            raise ValueError("weights are quantized symmetrically: set weight.symmetric to true")
        if activation is None:
            if weight.format != "int":
                raise ValueError(f"format {weight.format} needs activation of the same format; weight-only has int")
            return self
        if activation.granularity != "per_tensor":
            raise ValueError("activations have one scale per tensor: remove activation.granularity")
        if weight.format != activation.format:
            raise ValueError(f"weight is {weight.format} and activation {activation.format}: a product has one format")
        if weight.granularity is Granularity.PER_BLOCK:
            raise ValueError(
                "weights with a scale per block are weight-only (no builder multiplies them with quantized inputs): "
                "remove activation, or use granularity: per_channel"
            )
        return self

    @property
    def weight_only(self) -> bool:
        """Whether the rule stores weights as codes and leaves the product in floating point."""
        return self.weight is not None and self.activation is None

    def matches(self, name: str, kind: str) -> bool:
        """Whether a layer with this module path and kind is meant."""
        return kind in self.kinds and self.chooses(name)


class ChannelScale(_Matching):
    """Timestep-channel joint reparameterization (TCAQ-DM): ``conv(W, x) = conv(W r, x / r)``, ``r`` per input channel.

    ``r_t[j] = p_t[j] / min_j p_t[j]`` with ``p_t[j] = max |x_t[:, j]|`` per group of steps; ``r`` is their average over
    the groups weighted by ``p_t[j]``, cut off at ``max_ratio``.
    """

    kinds: tuple[LayerKind, ...] = ("conv",)
    groups: _Count = Field(default=5, description="equal stretches of the schedule that statistics are taken over")
    max_ratio: float = Field(default=10.0, gt=1, description="where r is cut off; a layer may get less (choose_ratio)")
    choose_ratio: bool = Field(
        default=True, description="per layer the cut-off, up to max_ratio, of least error of the layer's output"
    )
    power_of_two: bool = Field(
        default=True, description="round r to powers of two: moving it then changes no bit anywhere"
    )


class SoftmaxQuant(_Matching):
    """Quantizers behind the softmax of attention (TCAQ-DM): log2 or uniform, per layer and row of the step table."""

    bits: int = Field(default=8, ge=2, le=8)
    mode: Literal["adaptive", "log2", "uniform"] = Field(
        default="adaptive", description="adaptive: log2 where a power law is likelier than an exponential"
    )


class StepGroups(_Part):
    """Rows of step tables for groups of steps."""

    method: Literal["uniform", "clustered"] = "clustered"
    count: _Count | None = Field(default=None, description="how many groups; uniform: required, clustered: at most")
    budget: float = Field(
        default=0.05,
        ge=0,
        description="clustered: how much more squared quantization error than rows per step is allowed, as a share",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.method == "uniform" and self.count is None:
            raise ValueError("uniform groups need a count")
        return self


class BitAllocation(_Part):
    """Mixed precision by integer programming over measured sensitivities (MixDQ)."""

    objective: Literal["average_bits", "stored_bytes", "predicted_time"] = "average_bits"
    weight_target: float | None = Field(
        default=None,
        gt=0,
        description="average bits per weight; or a share (0 to 1) of the bytes or the time at 8 bits",
    )
    activation_target: float | None = Field(
        default=None, gt=0, description="average bits per activation value; none keeps the rules' widths"
    )
    content: tuple[str, ...] = Field(
        default=("*.ff.*", "*.attn2.*"), description="layers judged by the similarity of images; the others by SQNR"
    )
    content_weight_bits: tuple[int, ...] = (2, 4, 8)
    quality_weight_bits: tuple[int, ...] = (4, 8)
    activation_bits: tuple[int, ...] = (4, 8)
    protect: tuple[str, ...] = Field(default=(), description="layers that keep the widths of their rules")
    protect_fp_share: float = Field(
        default=0.0, ge=0, lt=1, description="share of the most sensitive layers of each group left in floating point"
    )
    images: _Count = Field(default=8, description="images per measurement of a content layer")
    calls: _Count = Field(default=32, description="recorded denoiser calls per measurement of a quality layer")
    candidate_images: _Count = Field(default=4, description="images on which the plans of the scan are compared")
    candidates: _Count = Field(default=12, description="how many different plans of the scan are compared on images")
    seed: _Seed = Field(default=2000)

    @model_validator(mode="after")
    def _check_patterns(self) -> Self:
        for pattern in (*self.content, *self.protect):
            check_pattern(pattern)
        return self


class Calibration(_Part):
    """The run of the real sampler from which activation ranges come."""

    prompts: _Count = Field(default=32, description="how many prompts")
    prompts_file: str | None = Field(default=None, description="one prompt per line; default: the model's own")
    batch_size: _Count = Field(default=16, description="images sampled at once")
    steps: _Steps | None = Field(default=None, description="default: the model's usual number")
    guidance_scale: float | None = Field(default=None, ge=0, description="default: the model's usual one")
    seed: _Seed = Field(default=1000)


_Sizes = _Size | tuple[_Size, _Size] | tuple[_Size, _Size, _Size]


class ShapeProfile(_Part):
    """One optimization profile: the sizes that the builder makes kernels of their own for.

    A size is a number, or two or three (low, best, high); one that is left out is that of ``shapes``.
    """

    name: str | None = Field(default=None, pattern=r"\S", description="default: its number, counted from 0")
    batch: _Sizes | None = None
    height: _Sizes | None = None
    width: _Sizes | None = None
    tokens: _Sizes | None = None


class Shapes(_Part):
    """Shapes of the exported network; two numbers, or three (low, best, high), make a dimension dynamic."""

    batch: _Sizes = Field(default=2, description="rows of one call: two per image with classifier-free guidance")
    height: _Sizes | None = Field(default=None, description="latent; default: the model's")
    width: _Sizes | None = Field(default=None, description="latent; default: the model's")
    tokens: _Sizes | None = Field(default=None, description="text length; default: the tokenizer's")
    controlnet: bool = Field(
        default=False, description="inputs for the residuals of a ControlNet: down_block_res_0 and on, mid_block_res"
    )
    profiles: tuple[ShapeProfile, ...] = Field(
        default=(),
        max_length=32,
        description="optimization profiles; each lies in the ranges above, a fixed size above is widened",
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = self.profile_names
        if len(set(names)) < len(names):
            raise ValueError(f"two profiles have one name: {', '.join(names)}")
        return self

    @property
    def profile_names(self) -> list[str]:
        """Names of the profiles; the number of one that has none."""
        return [entry.name or str(index) for index, entry in enumerate(self.profiles)]


class Companions(_Part):
    """The networks beside the denoiser that are compiled with it."""

    networks: Literal["auto", "none"] | tuple[CompanionName, ...] = Field(
        default="auto", description="auto: those that the model has and qdexport compiles; of a list each must be there"
    )
    body: Literal["auto", "fp32", "fp16"] = Field(
        default="auto",
        description="auto: fp16 (of T5 not its residual stream and wo); fp32 for a VAE that overflows by its config",
    )


class PictureLimits(_Part):
    """When the pictures of the quantized model count as those of the floating-point model."""

    share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="squared error as a share of what another seed makes of the same prompts; at most",
    )
    alignment_fall: float = Field(
        default=0.03, gt=0, le=1, description="loss of alignment with the prompt, where an evaluator is; less than"
    )
    texture: float = Field(
        default=1.5, gt=1, le=10, description="factor by which neighbouring pixels differ more (noise) or less; below"
    )
    contrast: float = Field(
        default=1.2, gt=1, le=10, description="factor by which the deviation of a picture rises or falls; below"
    )
    extend: int = Field(
        default=8, ge=1, le=1000, description="up to how many times as many images where a verdict is near its limit"
    )


class Validation(_Part):
    """What is sampled and compared after the build."""

    images: _Count = Field(default=32)
    pictures: PictureLimits = PictureLimits()
    seed: _Seed = Field(default=0)
    parity_steps: _Steps = Field(
        default=3, ge=3, description="denoiser calls compared layer by layer: first, last and between"
    )
    floor_seeds: _Count = Field(default=2, description="sampling runs in which the noise floor is measured")
    floor_steps: _Count = Field(default=4, description="timesteps at which the noise floor is measured")
    golden: _Count = Field(default=2, description="denoiser calls stored as golden inputs and outputs")

    def quick(self) -> Validation:
        """The same with less: every layer is compared, on as many calls; what is sampled is cut to a quarter or so."""
        fewer = {"images": min(8, self.images), "floor_seeds": min(2, self.floor_seeds)}
        pictures = self.pictures.model_copy(update={"extend": 1})
        return self.model_copy(update={**fewer, "floor_steps": min(2, self.floor_steps), "pictures": pictures})


class Recipe(_Part):
    """A whole recipe."""

    schema_version: Literal[1] = 1
    name: str
    description: str = ""
    opset: int | None = Field(default=None, description="ONNX opset of the file; default: the target's")
    body: Literal["auto", "fp32", "fp16"] = Field(default="auto", description="auto: the type of the model's weights")
    rules: tuple[Rule, ...] = Field(min_length=1)
    activation_rows: Literal["static", "per_step"] | StepGroups = "static"
    time_embedding: Literal["auto", "steps", "all", "keep"] = Field(
        default="auto",
        description="a row of the time table for each timestep of the schedule (steps) or of the training (all); auto: "
        "all where that table has at most 32 MiB, or a tenth of the weights at a byte each; keep: no table",
    )
    split_shortcuts: bool = Field(
        default=False, description="own quantizers for the hidden and skip halves of up-block shortcuts (UNets)"
    )
    bos: Literal["off", "auto", "constant"] = Field(
        default="off",
        description="constant: keys and values of the text's first token are constants (MixDQ); auto: where they are",
    )
    channel_scale: ChannelScale | None = None
    softmax: SoftmaxQuant | None = None
    bit_allocation: BitAllocation | None = None
    bit_plan: str | None = Field(default=None, description="a YAML file of widths per layer; replaces bit_allocation")
    int4_storage: Literal["auto", "never"] = Field(
        default="auto", description="auto: weights of up to 4 bits are stored as INT4 where the target computes with it"
    )
    allow_re_rounding: bool = Field(
        default=False,
        description="8-bit linear layers that read one tensor share one weight scale: fewer kernels, other roundings",
    )
    search: bool = Field(
        default=False, description="build blocks of the network in several forms, and write operators in the best ones"
    )
    calibration: Calibration = Calibration()
    shapes: Shapes = Shapes()
    companions: Companions = Companions()
    compute_capabilities: tuple[str, ...] | None = None
    validation: Validation = Validation()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.activation_rows != "static":
            for number, rule in enumerate(self.rules, 1):
                if rule.weight is not None and rule.weight.format == "nvfp4":
                    raise ValueError(
                        f"rule {number} has format nvfp4, whose blocks are scaled at run time: no builder takes a "
                        "scale that depends on the step beside that; set activation_rows: static"
                    )
        if self.bit_allocation is not None:
            for number, rule in enumerate(self.rules, 1):
                if rule.weight_only or (rule.weight is not None and rule.weight.format != "int"):
                    raise ValueError(
                        f"bit_allocation chooses widths of integer weights and activations, which rule {number} does "
                        "not have; remove bit_allocation, or give that rule both as int"
                    )
        return self

    def digest(self) -> str:
        """A SHA-256 over everything the recipe says."""
        return digest_of(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """The recipe with all its defaults, readable and loadable."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110)


_PARTS = (
    Recipe, Rule, ChannelScale, SoftmaxQuant, StepGroups, BitAllocation, Calibration, Shapes, ShapeProfile, Companions,
    Validation, PictureLimits,
)  # fmt: skip


def preset_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("qdexport.recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The YAML text of a recipe that comes with the package.

    Raises:
        RecipeError: there is none of this name; the message lists the nearest.
    """
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"no recipe {name!r}{hint} (presets: {', '.join(preset_names())}; or name a .yaml file)")
    return (resources.files("qdexport.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(source: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Reads a preset by name or a YAML file by path.

    Args:
        source: the name of a preset, or a path that ends in .yaml or .yml.
        overrides: values that replace the file's, keys with dots (``calibration.seed``).

    Raises:
        RecipeError: no such recipe, no YAML, an unknown key (with a suggestion) or a value out of range.
    """
    is_path = source.endswith((".yaml", ".yml"))
    text = read_text(Path(source), RecipeError, limit=YAML_LIMIT) if is_path else preset_text(source)
    data = parse_yaml(text, source)
    if not isinstance(data, dict):
        raise RecipeError(f"{source} must hold a mapping with `name` and `rules`, not {type(data).__name__}")
    for key, value in (overrides or {}).items():
        _assign(data, key.split("."), value)
    with reading(source, RecipeError):
        try:
            return Recipe.model_validate(data)
        except ValidationError as error:
            raise RecipeError(_explain(source, text, overrides or {}, error)) from error


def _assign(data: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets one value inside nested mappings and lists; mappings that are missing are made."""
    item: Any = data
    for index, part in enumerate(path):
        parent, key = ".".join(path[:index]), part if isinstance(item, dict) else _position(item, path, index)
        if index == len(path) - 1:
            item[key] = value
        elif isinstance(item, dict) and item.get(key) is None:
            item[key] = item = {}
        else:
            item = item[key]
            if not isinstance(item, dict | list):
                raise RecipeError(f"cannot set {'.'.join(path)}: {f'{parent}.{part}'.lstrip('.')} is no mapping")


def _position(item: list[Any], path: list[str], index: int) -> int:
    parent = ".".join(path[:index])
    if not (path[index].isascii() and path[index].isdigit() and len(path[index]) < 10):
        raise RecipeError(f"cannot set {'.'.join(path)}: {parent} is a list; number its entries, as in {parent}.0")
    if int(path[index]) >= len(item):
        raise RecipeError(f"cannot set {'.'.join(path)}: {parent} has {len(item)} entries, counted from 0")
    return int(path[index])


def _explain(source: str, text: str, overrides: dict[str, Any], error: ValidationError) -> str:
    """A line for each problem, which begins with the place of the value: a line of the file, or an override."""
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        key = path[-1] if path else ""
        given = any(f"{'.'.join(path)}.".startswith(f"{name}.") for name in overrides)
        line = line_of(text, problem["loc"])
        where = "--set" if given else f"{source}:{line}" if line else source
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, _known_keys(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            lines.append(f"{where}: unknown key {'.'.join(path)!r}{hint}")
        else:
            lines.append(f"{where}: {'.'.join(path)}: {problem['msg']}")
    return "\n".join(lines)


def _known_keys() -> list[str]:
    keys: set[str] = set()
    for part in (*_PARTS, QuantSpec):
        keys |= set(part.model_fields)
    return sorted(keys | {"kind", "momentum", "percentile", "grid", "exponent"})
