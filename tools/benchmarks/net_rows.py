"""The rows of the net: every preset on the small model of every family for every target, and every command line."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

__all__ = ["DOZEN", "FAMILIES", "PRESETS", "ROWS", "TARGETS", "Row", "drawn"]

FAMILIES: Final = ("shapes", "sd", "sdxl", "unet2d", "lcm", "class", "dit", "pixart", "sd3", "flux")
PRESETS: Final = (
    "w8a8", "w8a8-asym", "w8a8-timestep", "w6a6", "w4a8", "w8a16", "w4a16", "fp8", "nvfp4",
    "mixdq-w8a8", "mixdq-w5a8", "mixdq-w4a8", "tcaq-w8a8-init", "tcaq-w6a6-init", "tcaq-w4a4-init", "emf-w4a8-init",
)  # fmt: skip
TARGETS: Final = ("onnxruntime", "tensorrt", "tensorrt-10", "tensorrt-rtx")
_VERBS: Final = (
    "allocate", "build", "compile", "doctor", "export", "inspect", "passes", "quantize", "recipes", "sample", "search",
    "sensitivity", "validate",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One command, or more of them as long as they end well.

    Attributes:
        name: of its folder.
        commands: arguments of ``qdexport``; ``MODEL``, ``PRESET`` and ``OUT`` stand for paths.
        family: whose model ``MODEL`` is; empty when none is made.
        preset: whose file ``PRESET`` is, without its search for widths; empty when none is made.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    family: str = ""
    preset: str = ""


def _settings(**values: object) -> tuple[str, ...]:
    return tuple(part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}"))


_SMALL: Final = _settings(
    calibration__steps=3, calibration__prompts=2, validation__images=2, validation__floor_seeds=1,
    validation__floor_steps=1, validation__golden=1,
)  # fmt: skip
# T5's tokenizer says no length, and transformers take any size of picture
_SIZES: Final = _settings(shapes__height=8, shapes__width=8, shapes__tokens=96)


def _compiled(family: str, preset: str, target: str, *more: str, called: str = "") -> Row:
    sizes = _SIZES if family in {"pixart", "sd3", "flux"} else ()
    # the networks beside a denoiser do not depend on its recipe
    beside = () if preset == "w8a8" else ("--companions", "none")
    options = ("MODEL", "--recipe", "PRESET", "--target", target, *_SMALL, *sizes, *beside, *more, "--out", "OUT")
    commands: tuple[tuple[str, ...], ...] = (("compile", "--quick", *options),)
    if target.partition("-")[0] == "tensorrt" and target != "tensorrt-rtx":  # whose builder is seldom there
        commands = (("quantize", *options), ("export", "OUT"))
    name = "-".join(part for part in (family, preset, target, called) if part)
    return Row(name=name, commands=commands, family=family, preset=preset)


def _variants() -> list[Row]:
    """What presets do not say, each on two families."""
    changes = {
        "re-rounding": ("--allow-re-rounding",),
        "fp32": ("--body", "fp32"),
        "opset-21": ("--opset", "21"),
        "keep": _settings(time_embedding="keep"),
        "steps": _settings(time_embedding="steps"),
        "softmax": _settings(softmax="{form: auto}"),
        "profiles": _settings(profiles="[{name: one, batch: 1}, {name: two, batch: 4}]"),
    }
    return [
        _compiled(family, "w8a8", "tensorrt-rtx", *more, called=called)
        for family in ("sd", "dit")
        for called, more in changes.items()
    ]


def _commands() -> list[Row]:
    helps = [Row(name=f"help-{verb}", commands=((verb, "--help"),)) for verb in _VERBS]
    told = {
        "help": ("--help",),
        "version": ("--version",),
        "recipes": ("recipes",),
        "passes": ("passes",),
        "code-2-verb": ("compil",),
        "code-2-recipe": ("compile", "shapes", "--recipe", "w9a9", "--out", "OUT"),
        "code-2-key": ("compile", "shapes", "--set", "no.such=1", "--out", "OUT"),
        "code-3-model": ("compile", "OUT/no-such-model", "--out", "OUT"),
        "code-6-file": ("inspect", "pyproject.toml"),
        "code-3-nothing": ("validate", "OUT"),
        "code-10-foreign": ("compile", "shapes", "--out", "docs"),
    }
    failing = _compiled("shapes", "w8a8", "onnxruntime", *_settings(validation__pictures__share=1e-9), called="code-8")
    presets = [Row(name=f"recipes-{preset}", commands=(("recipes", preset),)) for preset in PRESETS]
    return [*helps, *(Row(name=name, commands=(arguments,)) for name, arguments in told.items()), failing, *presets]


ROWS: Final = (
    *_commands(),
    *_variants(),
    *(
        _compiled(family, preset, target)
        for family in FAMILIES
        for preset in PRESETS
        for target in TARGETS
    ),
)  # fmt: skip
DOZEN: Final = (
    "code-2-recipe", "code-3-model", "help-compile", "sd-w8a8-tensorrt-rtx", "sd-mixdq-w5a8-tensorrt-rtx",
    "sdxl-w4a16-tensorrt-rtx", "unet2d-w8a8-timestep-tensorrt", "class-tcaq-w4a4-init-onnxruntime",
    "dit-w8a8-asym-tensorrt-rtx", "flux-fp8-tensorrt-10", "sd3-emf-w4a8-init-tensorrt-rtx", "lcm-nvfp4-onnxruntime",
)  # fmt: skip


def drawn(seed: int, share: float) -> tuple[Row, ...]:
    """About this share of the rows, another for each seed and the same for one."""
    limit = int(share * 2**32)
    return tuple(row for row in ROWS if _number(f"{seed} {row.name}") < limit)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
