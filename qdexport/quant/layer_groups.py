"""Which layers are judged by images and which by the denoiser's output, and how large each layer is."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn

from qdexport.core.cost_model import LayerShape
from qdexport.core.patterns import limited, matches
from qdexport.core.spec import LayerPlan
from qdexport.errors import ModelError, RecipeError
from qdexport.quant.sensitivity_table import Group

__all__ = ["chosen_layers", "group_of", "layer_shapes", "path_matches", "runs"]


def path_matches(pattern: str, path: str) -> bool:
    """Whether a pattern means a module path, segment by segment.

    A segment ``*`` stands for any number of segments, none included; other segments are globs over one segment. A
    pattern of one segment is looked for anywhere in the path. So ``ff`` and ``*.ff.*`` match ``blocks.0.ff.net.2`` and
    never ``blocks.0.off_ramp`` or ``blocks.0.ff_in``. ``re:`` marks a regular expression for the whole path.
    """
    if pattern.startswith("re:"):
        return matches(pattern, path)
    wanted = pattern.split(".")
    if len(wanted) == 1 and pattern != "*":
        wanted = ["*", pattern, "*"]
    with limited(pattern):
        return _segments_match(wanted, path.split("."))


def _segments_match(wanted: list[str], segments: list[str]) -> bool:
    if not wanted:
        return not segments
    if wanted[0] == "*":
        return any(_segments_match(wanted[1:], segments[start:]) for start in range(len(segments) + 1))
    return bool(segments) and fnmatch.fnmatchcase(segments[0], wanted[0]) and _segments_match(wanted[1:], segments[1:])


def group_of(layers: Sequence[str], content: Sequence[str]) -> Group:
    """``content`` when a pattern means one of the layers, else ``quality``."""
    return "content" if any(path_matches(pattern, name) for pattern in content for name in layers) else "quality"


def chosen_layers(patterns: Sequence[str], plans: Sequence[LayerPlan], what: str) -> frozenset[str]:
    """Names of the quantized layers that patterns mean.

    Args:
        patterns: as in :func:`path_matches`.
        plans: of the model.
        what: the recipe's key, for the message.

    Raises:
        RecipeError: a pattern means no quantized layer.
    """
    names = [plan.name for plan in plans if plan.quantized]
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if path_matches(pattern, name)]
        if not found:
            near = difflib.get_close_matches(pattern, names, n=2, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise RecipeError(f"{what}: {pattern!r} matches no quantized layer{hint}")
        chosen.update(found)
    return frozenset(chosen)


def runs(plan: LayerPlan) -> bool:
    """Whether a layer is there at run time: folded layers are a table by then, and some never run."""
    return not plan.folded and plan.macs > 0


def layer_shapes(denoiser: nn.Module, plans: Sequence[LayerPlan]) -> dict[str, LayerShape]:
    """Sizes of every layer that is there at run time.

    Args:
        denoiser: the floating-point network.
        plans: with multiply-accumulates.

    Raises:
        ModelError: a quantized layer has no multiply-accumulates, so that its activations have no size.
    """
    shapes = {}
    for plan in plans:
        if plan.quantized and not plan.macs:
            raise ModelError(f"the size of {plan.name}'s activation is unknown; plan the layers with their macs")
        if not runs(plan):
            continue
        layer = denoiser.get_submodule(plan.name)
        weight = layer.get_parameter("weight")
        # one multiply-accumulate per weight and output position
        positions = plan.macs // weight.numel()
        stride = layer.stride[0] * layer.stride[1] if isinstance(layer, nn.Conv2d) else 1
        width = layer.in_channels if isinstance(layer, nn.Conv2d) else weight.shape[1]
        shapes[plan.name] = LayerShape(
            name=plan.name,
            kind=plan.kind,
            macs=plan.macs,
            weights=weight.numel(),
            channels=weight.shape[0],
            inputs=positions * stride * width,
            outputs=positions * weight.shape[0],
        )
    return shapes
