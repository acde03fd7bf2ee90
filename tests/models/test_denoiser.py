"""The facts that `qdexport.models.denoiser` derives, against what happens in a forward pass with numbers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qdexport.core.recipe import Shapes
from qdexport.errors import ModelError
from qdexport.models.denoiser import (
    call_denoiser,
    example_inputs,
    input_groups,
    io_spec,
    layer_macs,
    quantizable_layers,
    shortcut_splits,
    size_multiple,
    time_layers,
    trace_denoiser,
)
from qdexport.models.synthetic import empty_unet, random_unet

SIMPLE = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("tiny_sd", {}),
    "sdxl": ("tiny_sdxl", {}),
    "unet2d": ("tiny_unet2d", {}),
    "scale_shift": ("tiny_sd", {"resnet_time_scale_shift": "scale_shift"}),
    "time act": ("tiny_sd", {"time_embedding_act_fn": "silu", "resnet_skip_time_act": True}),
    "post act": ("tiny_sd", {"timestep_post_act": "silu"}),
    "fourier": ("tiny_sd", {"time_embedding_type": "fourier"}),
    "class embedding": ("tiny_sd", {"num_class_embeds": 4}),
    "class concat": (
        "tiny_sd",
        {
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 12,
            "class_embeddings_concat": True,
        },
    ),
    "class linear": (
        "tiny_sd",
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 12},
    ),
    "class timestep": ("tiny_sd", {"class_embed_type": "timestep"}),
    "class identity": ("tiny_sd", {"class_embed_type": "identity"}),
    "added text": ("tiny_sd", {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}),
    "projected text": ("tiny_sd", {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"}),
    "cross attention only": ("tiny_sd", {"only_cross_attention": True}),
    "simple attention": ("tiny_sd", SIMPLE),
    "normed text": ("tiny_sd", {**SIMPLE, "cross_attention_dim": 32, "cross_attention_norm": "group_norm"}),
    "no middle": ("tiny_sd", {"mid_block_type": None}),
    "unet2d, classes": ("tiny_unet2d", {"num_class_embeds": 4}),
    "unet2d, scale_shift": ("tiny_unet2d", {"resnet_time_scale_shift": "scale_shift"}),
    "unet2d, resnet sampling": ("tiny_unet2d", {"downsample_type": "resnet", "upsample_type": "resnet"}),
    "unet2d, learned time": ("tiny_unet2d", {"time_embedding_type": "learned", "num_train_timesteps": 1000}),
    "unet2d, skip blocks": (
        "tiny_unet2d",
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        },
    ),
}


@pytest.fixture(params=CASES, scope="module")
def denoiser(request: pytest.FixtureRequest) -> nn.Module:
    name, changes = CASES[request.param]
    unet, source = random_unet(name, **changes), torch.Generator().manual_seed(0)
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):  # else all norms of one tensor are equal
            module.weight.data.uniform_(0.5, 1.5, generator=source)
    return unet


def _layer_inputs(denoiser: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every Conv2d and Linear reads in one call."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].clone()}))
        for name, layer in quantizable_layers(denoiser).items()
    ]
    with torch.no_grad():
        call_denoiser(denoiser, inputs)
    for handle in handles:
        handle.remove()
    return seen


def _inputs(denoiser: nn.Module, seed: int, timestep: int) -> dict[str, Tensor]:
    size = 4 * size_multiple(denoiser)
    io = io_spec(denoiser, Shapes(batch=2, height=size, width=size, tokens=5), "fp32")
    inputs = {**example_inputs(io, seed), "timestep": torch.tensor([timestep])}
    if "class_labels" in inputs and not inputs["class_labels"].is_floating_point():
        inputs["class_labels"] = torch.tensor([seed, seed + 2])
    return inputs


def test_time_layers_depend_on_the_timestep_alone(denoiser: nn.Module) -> None:
    base = _layer_inputs(denoiser, _inputs(denoiser, 0, 100))
    other_data = _layer_inputs(denoiser, _inputs(denoiser, 1, 100))
    other_time = _layer_inputs(denoiser, _inputs(denoiser, 0, 900))
    expected = {
        name
        for name, tensor in base.items()
        if torch.equal(tensor, other_data[name]) and not torch.equal(tensor, other_time[name])
    }
    assert expected
    assert time_layers(denoiser) == expected


def test_input_groups_are_the_layers_with_equal_inputs(denoiser: nn.Module) -> None:
    seen = _layer_inputs(denoiser, _inputs(denoiser, 0, 100))
    expected: list[set[str]] = []
    for name, tensor in seen.items():
        for members in expected:
            if torch.equal(seen[next(iter(members))], tensor):
                members.add(name)
                break
        else:
            expected.append({name})
    found: defaultdict[str, set[str]] = defaultdict(set)
    for name, group in input_groups(denoiser).items():
        found[group].add(name)
    assert sorted(map(sorted, found.values())) == sorted(sorted(m) for m in expected if len(m) > 1)


def test_every_layer_runs(denoiser: nn.Module) -> None:
    inputs = _inputs(denoiser, 0, 1)
    size = inputs["sample"].shape[-1]
    io = io_spec(denoiser, Shapes(batch=2, height=size, width=size), "fp32")
    trace = trace_denoiser(denoiser, io)
    assert set(trace) == set(_layer_inputs(denoiser, inputs)) == set(quantizable_layers(denoiser))
    assert all(layer.calls == 1 for layer in trace.values())


def test_macs_are_half_the_flops_that_torch_counts(denoiser: nn.Module) -> None:
    size = 4 * size_multiple(denoiser)
    io = io_spec(denoiser, Shapes(batch=2, height=size, width=size, tokens=5), "fp32")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call_denoiser(denoiser, example_inputs(io, 0))
    counts = counter.get_flop_counts()
    root = type(denoiser).__name__
    expected = {name: sum(counts[f"{root}.{name}"].values()) // 2 for name in quantizable_layers(denoiser)}
    assert layer_macs(denoiser, io) == expected


def test_shortcut_splits_are_the_widths_that_are_joined(
    denoiser: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: dict[int, tuple[int, ...]] = {}
    alive: list[Tensor] = []
    real_cat = torch.cat

    def cat(tensors: Any, dim: int = 0, **options: Any) -> Tensor:
        result = real_cat(tensors, dim=dim, **options)
        alive.append(result)
        joined[id(result)] = tuple(tensor.shape[dim] for tensor in tensors)
        return result

    expected: dict[str, tuple[int, ...]] = {}

    def watch(name: str) -> Any:
        return lambda _, args: expected.update({name: joined[id(args[0])]}) if id(args[0]) in joined else None

    handles = [
        layer.register_forward_pre_hook(watch(name))
        for name, layer in quantizable_layers(denoiser).items()
        if name.endswith("conv_shortcut")
    ]
    monkeypatch.setattr(torch, "cat", cat)
    with torch.no_grad():
        call_denoiser(denoiser, _inputs(denoiser, 0, 1))
    for handle in handles:
        handle.remove()
    assert len(expected) >= 3
    assert shortcut_splits(denoiser) == expected


def test_one_trace_serves_all_facts() -> None:
    unet = random_unet("tiny_sdxl")
    io = io_spec(unet, Shapes(), "fp32")
    trace = trace_denoiser(unet, io)
    assert time_layers(unet, trace=trace) == time_layers(unet)
    assert input_groups(unet, trace=trace) == input_groups(unet)
    assert layer_macs(unet, io, trace=trace) == layer_macs(unet, io)


def test_group_names() -> None:
    groups = input_groups(random_unet("tiny_sd"))
    attention = "mid_block.attentions.0.transformer_blocks.0"
    assert groups[f"{attention}.attn1.to_q"] == groups[f"{attention}.attn1.to_v"] == f"{attention}.attn1.qkv"
    assert f"{attention}.attn2.to_q" not in groups
    assert (
        groups[f"{attention}.attn2.to_k"]
        == groups["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"]
    )
    assert groups[f"{attention}.attn2.to_k"] == "encoder_hidden_states"
    assert groups["mid_block.resnets.0.time_emb_proj"] == "time_emb"
    projected = input_groups(random_unet("tiny_sd", **CASES["projected text"][1]))
    assert projected[f"{attention}.attn2.to_v"] == "encoder_hidden_states"
    normed = input_groups(random_unet("tiny_sd", **CASES["normed text"][1]))
    keys = [name for name in normed if name.endswith("add_k_proj")]
    assert len({normed[name] for name in keys}) == len(keys) > 2  # every attention has its own norm


@pytest.mark.parametrize(
    ("name", "layers", "time", "gmacs"),
    # convolutions and linears of one row, 64 x 64 and 128 x 128: half a percent covers what others round away
    [("sd15", 282, 24, 339), ("sdxl", 794, 2, 2_985)],
)
def test_full_size(name: str, layers: int, time: int, gmacs: float) -> None:
    unet = empty_unet(name)  # meta: no memory
    assert len(quantizable_layers(unet)) == layers
    trace = trace_denoiser(unet, io_spec(unet, Shapes(batch=1), "fp32"))
    assert sum(layer.sources == {"timestep"} for layer in trace.values()) == time
    assert sum(layer.macs for layer in trace.values()) == pytest.approx(gmacs * 1e9, rel=0.005)


def test_half_precision_and_quantized_modules_can_be_traced() -> None:
    unet = random_unet("tiny_sd", torch.bfloat16)
    expected = time_layers(unet)
    assert len(expected) == 10
    conv = unet.get_submodule("conv_in")

    class Rounded(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
            return super().forward(input.mul(8).round_().div_(8))

    conv.__class__ = Rounded
    assert time_layers(unet) == expected


def test_tracing_leaves_no_hooks_and_changes_no_weight() -> None:
    unet = random_unet("tiny_sd")
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    time_layers(unet)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert not any(module._forward_hooks for module in unet.modules())


def test_tracing_a_module_without_weights() -> None:
    with pytest.raises(ModelError, match="no diffusers config"):
        time_layers(nn.ReLU())
    assert shortcut_splits(nn.ReLU()) == {}
