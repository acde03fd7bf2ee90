"""Random denoisers and recipes that fit them: UNets with all their conditions, and transformers of four families."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

__all__ = ["STEPS", "TRANSFORMERS", "UNETS", "Draw", "draw", "without_blocks"]

STEPS = 4
UNETS = ("tiny_sd", "tiny_sd21", "tiny_sdxl", "tiny_unet2d", "tiny_lcm", "tiny_class")
TRANSFORMERS = ("tiny_dit", "tiny_pixart", "tiny_sd3", "tiny_flux")
_WITHOUT_TEXT = ("tiny_unet2d", "tiny_class", "tiny_dit")
_FLOW = ("tiny_sd3", "tiny_flux")  # their timesteps are fractions


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One random case.

    Attributes:
        seed: makes it again.
        model: name of a synthetic configuration.
        changes: entries that replace the configuration's.
        recipe: as a mapping.
    """

    seed: int
    model: str
    changes: dict[str, Any]
    recipe: dict[str, Any]

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.model} {self.changes} {self.recipe}"


def draw(seed: int, *, small: bool = False, models: tuple[str, ...] = (*UNETS, *TRANSFORMERS)) -> Draw:
    """A denoiser with attention and a time path (UNets with shortcuts, too), and a recipe that fits it.

    Args:
        seed: makes the same case again.
        small: two levels of one layer each, or two blocks, for tests.
        models: configurations to choose from.
    """
    source = random.Random(seed)
    model = source.choice(models)
    if model in TRANSFORMERS:
        changes = _TRANSFORMER_CHANGES[model](source, small)
    else:
        levels = 2 if small else source.choice([2, 2, 3])
        changes = _unet_changes(source, model, levels)
        changes["layers_per_block"] = 1 if small else source.choice([1, 1, 2])
    return Draw(seed=seed, model=model, changes=changes, recipe=_recipe(source, model, changes, seed))


def _unet_changes(source: random.Random, model: str, levels: int) -> dict[str, Any]:
    widths = tuple(source.choice([16, 24, 32, 48]) for _ in range(levels))
    changes: dict[str, Any] = {
        "block_out_channels": widths,
        "norm_num_groups": source.choice([4, 8]),
        "sample_size": source.choice([8, 12]),
        "act_fn": source.choice(["silu", "silu", "gelu"]),
        "resnet_time_scale_shift": source.choice(["default", "default", "scale_shift"]),
    }
    cross = model not in _WITHOUT_TEXT
    down, up = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D") if cross else ("AttnDownBlock2D", "AttnUpBlock2D")
    attended = [source.random() < 0.6 for _ in range(levels)]
    attended[source.randrange(levels)] = True
    changes["down_block_types"] = tuple(down if here else "DownBlock2D" for here in attended)
    changes["up_block_types"] = tuple(up if here else "UpBlock2D" for here in reversed(attended))
    if cross:
        changes["attention_head_dim"] = tuple(source.choice([2, 4]) for _ in range(levels))
        changes["use_linear_projection"] = source.random() < 0.5
        changes["transformer_layers_per_block"] = tuple(source.choice([1, 1, 2]) for _ in range(levels))
        changes["cross_attention_dim"] = source.choice([16, 24, 32])
    else:
        changes["attention_head_dim"] = source.choice([4, 8])
    if model == "tiny_class":
        changes["class_embed_type"] = source.choice([None, None, "timestep", "identity"])
    return changes


def _dit_changes(source: random.Random, small: bool) -> dict[str, Any]:
    return {**_plain_changes(source, small), "num_embeds_ada_norm": source.choice([10, 1000])}


def _pixart_changes(source: random.Random, small: bool) -> dict[str, Any]:
    changes = _plain_changes(source, small)
    width = changes["num_attention_heads"] * changes["attention_head_dim"]
    return {
        **changes,
        "cross_attention_dim": width,
        "caption_channels": source.choice([None, 16, 40]),
        # it makes thirds of the width
        "use_additional_conditions": width % 3 == 0 and source.random() < 0.5,
        "interpolation_scale": source.choice([1, 2]),
    }


def _plain_changes(source: random.Random, small: bool) -> dict[str, Any]:
    return {
        "num_attention_heads": source.choice([1, 2, 3]),
        "attention_head_dim": source.choice([8, 12, 16]),
        "num_layers": 2 if small else source.choice([2, 3]),
        "sample_size": source.choice([8, 12]),
        "activation_fn": source.choice(["gelu-approximate", "gelu-approximate", "geglu", "gelu"]),
        "norm_elementwise_affine": source.random() < 0.3,
        "attention_bias": source.random() < 0.7,
    }


def _sd3_changes(source: random.Random, small: bool) -> dict[str, Any]:
    heads, depth = source.choice([1, 2, 3]), source.choice([8, 12, 16])
    layers = 2 if small else source.choice([2, 3])
    return {
        "num_attention_heads": heads,
        "attention_head_dim": depth,
        "num_layers": layers,
        "caption_projection_dim": heads * depth,
        "sample_size": source.choice([8, 12]),
        "joint_attention_dim": source.choice([16, 24]),
        "pooled_projection_dim": source.choice([8, 16]),
        "pos_embed_max_size": source.choice([8, 12]),
        "qk_norm": source.choice([None, "rms_norm"]),
        "dual_attention_layers": tuple(layer for layer in range(layers) if source.random() < 0.4),
    }


def _flux_changes(source: random.Random, small: bool) -> dict[str, Any]:
    axes = source.choice([(4, 6, 6), (4, 4, 4), (2, 2, 4)])
    return {
        "num_attention_heads": source.choice([1, 2, 3]),
        "attention_head_dim": sum(axes),
        "axes_dims_rope": axes,
        "num_layers": 1 if small else source.choice([1, 2]),
        "num_single_layers": 1 if small else source.choice([1, 2]),
        "joint_attention_dim": source.choice([16, 24]),
        "pooled_projection_dim": source.choice([8, 16]),
        "guidance_embeds": source.random() < 0.6,
    }


_TRANSFORMER_CHANGES = {
    "tiny_dit": _dit_changes,
    "tiny_pixart": _pixart_changes,
    "tiny_sd3": _sd3_changes,
    "tiny_flux": _flux_changes,
}


def _recipe(source: random.Random, model: str, changes: dict[str, Any], seed: int) -> dict[str, Any]:
    unet = model in UNETS
    recipe: dict[str, Any] = {
        "name": f"fuzz-{seed}",
        "body": source.choice(["fp32", "fp32", "fp16"]),
        "rules": [{"match": "*", **_quantizers(source)}],
        "activation_rows": source.choice(["static", "static", "per_step", {"method": "uniform", "count": 2}]),
        "time_embedding": source.choice(["steps", "steps", "all", "keep"]),
        "split_shortcuts": unet and source.random() < 0.5,
        "allow_re_rounding": source.random() < 0.3,
        "int4_storage": source.choice(["auto", "auto", "never"]),
        "shapes": _shapes(source, model),
        "calibration": {"steps": STEPS, "prompts": 2},
    }
    if model in _FLOW and recipe["time_embedding"] == "all":
        recipe["time_embedding"] = "steps"
    if source.random() < 0.5:
        recipe["rules"].append({"match": source.choice(_patterns(model)), **_quantizers(source)})
    if source.random() < 0.2:
        recipe["rules"].append({"match": {"tiny_dit": "proj_out_2"}.get(model, "conv_out" if unet else "proj_out")})
    if source.random() < 0.4:
        kinds = source.choice([["conv"], ["conv", "linear"]]) if unet else ["linear"]
        recipe["channel_scale"] = {"match": "*", "kinds": kinds, "power_of_two": source.random() < 0.7}
    if model not in _FLOW and source.random() < 0.4:
        recipe["softmax"] = {"bits": source.choice([4, 8]), "mode": source.choice(["adaptive", "log2", "uniform"])}
    if _text_as_it_is(model, changes) and source.random() < 0.4:
        recipe["bos"] = "constant"
    if source.random() < 0.4:
        recipe["rules"].append(_format_rule(source, unet=unet))
        if "activation" not in recipe["rules"][-1]:
            recipe.pop("channel_scale", None)  # it may be left without a layer whose input is quantized
    return recipe


def _format_rule(source: random.Random, *, unet: bool) -> dict[str, Any]:
    """FP8, or weights alone (in blocks where they may be), for some layers; NVFP4 is not for every target."""
    kinds = source.choice([["linear"], ["conv"], ["conv", "linear"]]) if unet else ["linear"]
    match = source.choice(["*", "*.attentions.*"]) if unet else "*"
    # attentions may have no convolution
    rule: dict[str, Any] = {"match": match if "linear" in kinds else "*", "kinds": kinds}
    granularity = source.choice(["per_channel", "per_channel", "per_tensor"])
    if source.random() < 0.5:
        return {
            **rule,
            "weight": {"format": "fp8", "granularity": granularity},
            "activation": {"format": "fp8", "observer": {"kind": source.choice(["minmax", "mse"])}},
        }
    if kinds == ["linear"] and source.random() < 0.6:
        return {**rule, "weight": {"bits": 4, "granularity": "per_block", "block_size": source.choice([16, 32, 64])}}
    return {**rule, "weight": {"bits": source.choice([8, 4]), "granularity": granularity}}


def without_blocks(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with a scale per channel instead of one per block, for a target without blocks."""
    rules = []
    for rule in recipe["rules"]:
        weight = dict(rule.get("weight") or {})
        if weight.get("granularity") == "per_block":
            del weight["block_size"]
            rule = {**rule, "weight": {**weight, "granularity": "per_channel"}}  # noqa: PLW2901  a changed copy
        rules.append(rule)
    return {**recipe, "rules": rules}


def _shapes(source: random.Random, model: str) -> dict[str, Any]:
    shapes: dict[str, Any] = {"batch": source.choice([1, 2, 2, 3])}
    if model in TRANSFORMERS:
        shapes["tokens"] = source.choice([5, 8, 11])
    if model == "tiny_flux":
        shapes |= {"height": source.choice([8, 12]), "width": source.choice([8, 12])}
    if model in {"tiny_sd", "tiny_sd21", "tiny_sdxl"}:
        shapes["controlnet"] = source.random() < 0.2
    return shapes


def _patterns(model: str) -> list[str]:
    if model in TRANSFORMERS:
        return ["*.attn*", "transformer_blocks.0.*", "time_text_embed.*" if model in _FLOW else "*.ff.*"]
    return ["*.resnets.*", "conv_in", *([] if model in _WITHOUT_TEXT else ["*.ff.*"])]


def _text_as_it_is(model: str, changes: dict[str, Any]) -> bool:
    if model == "tiny_pixart":
        return changes["caption_channels"] is None
    return model in UNETS and model not in _WITHOUT_TEXT


def _quantizers(source: random.Random) -> dict[str, Any]:
    symmetric = source.random() < 0.5
    return {
        "weight": {
            "bits": source.choice([8, 8, 8, 6, 5, 4, 3, 2]),
            "granularity": source.choice(["per_channel", "per_channel", "per_tensor"]),
        },
        "activation": {
            "bits": source.choice([8, 8, 8, 6, 4]),
            "symmetric": symmetric,
            "signed": symmetric or source.random() < 0.3,
        },
    }
