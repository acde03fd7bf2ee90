"""Options that several commands share."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qdexport.core.gpus import GPUS
from qdexport.core.target import TARGETS
from qdexport.core.yaml_text import parse_yaml
from qdexport.errors import MissingDependencyError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Number",
    "common",
    "folder_argument",
    "form_options",
    "out_option",
    "overrides_of",
    "quick_option",
    "recipe_options",
    "target_option",
    "worker_options",
]

class Number(click.FloatRange):
    """A number within a range; NaN is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is no number.", param, ctx)
        return number


_F = TypeVar("_F", bound="Callable[..., Any]")


def common(function: _F) -> _F:
    """``--json`` and ``-v``."""
    for option in (
        click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON object on stdout; all else goes to stderr."
        ),
        click.option("-v", "--verbose", count=True, help="Say more (-v: stages and passes, -vv: everything)."),
    ):
        function = option(function)
    return function


def recipe_options(function: _F) -> _F:
    """``--recipe`` and what overrides it."""
    for option in (
        click.option(
            "--ranges",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Activation ranges from a file (.safetensors or .json) instead of calibration.",
        ),
        click.option("--variant", help="Variant of the weight files, for example fp16."),
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a value of the recipe, for example --set calibration.prompts=8.",
        ),
        click.option(
            "--companions",
            metavar="auto|none|LIST",
            help="Text encoders and VAE decoder: those that are there (auto, the default), none, or names with commas.",
        ),
        click.option(
            "--allow-re-rounding",
            is_flag=True,
            help="Let layers that read one tensor share a weight scale: fewer kernels, slightly other numbers.",
        ),
        click.option("--opset", type=int, help="ONNX opset of the file, 20 to 23; default: what suits the target."),
        click.option(
            "--body", type=click.Choice(["auto", "fp32", "fp16"]), help="Type of everything that is not quantized."
        ),
        click.option(
            "--recipe",
            default="mixdq-w8a8",
            show_default=True,
            help="A preset (see `qdexport recipes`) or a .yaml file.",
        ),
    ):
        function = option(function)
    return function


def form_options(function: _F) -> _F:
    """``--forms`` and ``--gpu``."""
    for option in (
        click.option(
            "--gpu",
            type=click.Choice(list(GPUS)),
            help="Whose rates a search compares forms by; default: a card of the first compute capability.",
        ),
        click.option(
            "--forms",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Forms of operators, a file that `qdexport search` wrote; default: those that come with qdexport.",
        ),
    ):
        function = option(function)
    return function


def ray_option(text: str) -> Callable[[_F], _F]:
    """``--ray``, refused before any work where the package is missing."""

    def check(_context: click.Context, _option: click.Parameter, address: str | None) -> str | None:
        if address is not None and importlib.util.find_spec("ray") is None:
            raise MissingDependencyError(
                "a Ray cluster needs the package ray: pip install 'qdexport[ray]' (or leave --ray out)"
            )
        return address

    return click.option("--ray", metavar="ADDRESS", callback=check, help=text)


def worker_options(function: _F) -> _F:
    """``--workers`` and ``--ray``."""
    for option in (
        ray_option("Measure sensitivities on a Ray cluster (extra [ray])."),
        click.option(
            "--workers",
            type=click.IntRange(1, 10_000),
            help="Processes that measure sensitivities; default: one per core.",
        ),
    ):
        function = option(function)
    return function


def target_option(function: _F) -> _F:
    """``--target``."""
    return click.option(
        "--target",
        type=click.Choice(list(TARGETS)),
        default="tensorrt-rtx",
        show_default=True,
        help="Where it will run.",
    )(function)


def out_option(function: _F) -> _F:
    """``--out``."""
    return click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        help="Output folder; default: qdexport-out/MODEL-RECIPE.",
    )(function)


def quick_option(function: _F) -> _F:
    """``--quick``."""
    return click.option(
        "--quick",
        is_flag=True,
        help="Check on fewer images and calls: every layer, 8 images. Says so, and leaves pictures near a limit open.",
    )(function)


def folder_argument(function: _F) -> _F:
    """The output folder of an earlier command."""
    return click.argument("folder", metavar="OUT", type=click.Path(file_okay=False, path_type=Path))(function)


def overrides_of(
    assignments: tuple[str, ...],
    body: str | None,
    *,
    allow_re_rounding: bool = False,
    companions: str | None = None,
    opset: int | None = None,
    search: bool = False,
) -> dict[str, Any]:
    """The values of ``--set`` and of the options beside it.

    Raises:
        RecipeError: an assignment has no ``=``, or is not valid YAML.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {assignment!r} is not KEY=VALUE")
        values[key] = parse_yaml(text, f"--set {assignment!r}: the value")
    if body is not None:
        values["body"] = body
    if opset is not None:
        values["opset"] = opset
    if allow_re_rounding:
        values["allow_re_rounding"] = True
    if companions is not None:
        words = [word.strip() for word in companions.split(",")]
        values["companions.networks"] = companions if companions in {"auto", "none"} else words
    if search:
        values["search"] = True
    return values
