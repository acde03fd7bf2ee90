"""Facts about a denoiser's structure, read from the module itself: no list of layer names, no model families.

`time_layers`, `input_groups` and `layer_macs` come from a pass without data, 1 to 2 s for SDXL; who asks for
several of them makes one `trace_denoiser` and gives it to all. `shortcut_splits` is read from the widths of
the blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import nn

from qdexport.core.io_spec import IoSpec
from qdexport.core.recipe import Shapes
from qdexport.models.denoiser_io import (
    call_denoiser,
    check_denoiser,
    denoiser_class,
    example_inputs,
    io_spec,
    latent_size,
    named_inputs,
    size_multiple,
)
from qdexport.models.trace import LayerTrace, trace_denoiser

__all__ = [
    "LayerTrace",
    "Trace",
    "call_denoiser",
    "check_denoiser",
    "denoiser_class",
    "example_inputs",
    "input_groups",
    "io_spec",
    "latent_size",
    "layer_macs",
    "named_inputs",
    "quantizable_layers",
    "shortcut_splits",
    "size_multiple",
    "smallest_io",
    "time_layers",
    "trace_denoiser",
]

Trace = Mapping[str, LayerTrace]


def quantizable_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Every Conv2d and Linear (subclasses too) by module path, in the order of the module tree."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def time_layers(denoiser: nn.Module, *, trace: Trace | None = None) -> frozenset[str]:
    """The layers whose input depends on the timestep alone: their outputs are rows of a table.

    In a UNet without added conditions, the time embedding and every block's time projection; with class
    labels or added text (SDXL) in the sum, the time embedding only.
    """
    trace = trace or trace_denoiser(denoiser, smallest_io(denoiser))
    return frozenset(name for name, layer in trace.items() if layer.sources == {"timestep"})


def input_groups(denoiser: nn.Module, *, trace: Trace | None = None) -> dict[str, str]:
    """The layers that read equal tensors, as layer to group name; a layer that shares with none is left out.

    Names: `<attention>.qkv` for a self-attention, `encoder_hidden_states` for the keys and values of all
    cross-attentions that read the text as it is, `time_emb` for the time projections of all blocks.
    """
    trace = trace or trace_denoiser(denoiser, smallest_io(denoiser))
    by_value: defaultdict[int, list[LayerTrace]] = defaultdict(list)
    for layer in trace.values():
        if layer.value is not None:
            by_value[layer.value].append(layer)
    groups: dict[str, str] = {}
    for members in by_value.values():
        if len(members) > 1:
            name = _group_name(members)
            if name in groups.values():  # two different tensors of the same nature
                name = f"{name}.{members[0].name}"
            groups.update((layer.name, name) for layer in members)
    return groups


def layer_macs(denoiser: nn.Module, io: IoSpec, *, trace: Trace | None = None) -> dict[str, int]:
    """Multiply-accumulates of every layer in one call at the best sizes; 0 for a layer that does not run."""
    trace = trace or trace_denoiser(denoiser, io)
    return {name: trace[name].macs if name in trace else 0 for name in quantizable_layers(denoiser)}


def shortcut_splits(denoiser: nn.Module) -> dict[str, tuple[int, int]]:
    """Widths of the two parts that the shortcut convolutions of up blocks read: hidden state, then skip.

    `torch.cat([hidden, skip], dim=1)` joins tensors of different ranges before the resnets of an up block;
    what a resnet reads beyond the hidden state's width is the skip connection. Transformers have none.
    """
    children = dict(denoiser.named_children())
    if "up_blocks" not in children:
        return {}
    before = children.get("mid_block") or list(children["down_blocks"].children())[-1]
    hidden = _width(_resnets(before)[-1][1], "out_channels")
    splits: dict[str, tuple[int, int]] = {}
    for index, block in enumerate(children["up_blocks"].children()):
        for number, resnet in _resnets(block):
            skip = _width(resnet, "in_channels") - hidden
            if resnet.conv_shortcut is not None and skip > 0:
                splits[f"up_blocks.{index}.resnets.{number}.conv_shortcut"] = (hidden, skip)
            hidden = _width(resnet, "out_channels")
    return splits


def _resnets(block: nn.Module) -> list[tuple[int, nn.Module]]:
    return list(enumerate(block.get_submodule("resnets").children()))


def _width(resnet: nn.Module, side: str) -> int:
    return int(getattr(resnet, side))


def smallest_io(denoiser: nn.Module) -> IoSpec:
    """Inputs of the least size at which a denoiser runs; for facts that do not depend on the size."""
    # what depends on what, and what is equal to what, is the same at every size
    size = size_multiple(denoiser)
    return io_spec(denoiser, Shapes(batch=2, height=size, width=size, tokens=4), "fp32")


def _group_name(members: Iterable[LayerTrace]) -> str:
    layers = list(members)
    parents = {layer.name.rpartition(".")[0] for layer in layers}
    leaves = {layer.name.rpartition(".")[2] for layer in layers}
    if layers[0].input_name is not None:
        return layers[0].input_name
    if len(parents) == 1:
        suffix = "qkv" if leaves == {"to_q", "to_k", "to_v"} else "input"
        return f"{parents.pop()}.{suffix}"
    if leaves == {"time_emb_proj"}:
        return "time_emb"
    if layers[0].sources == {"encoder_hidden_states"}:
        return "encoder_hidden_states"
    return f"{layers[0].name}.input"
