from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qdexport.check.calls import first_call
from qdexport.check.half_range import check_denoiser_range, why_not_half
from qdexport.check.parity import layer_parity
from qdexport.core.recipe import Shapes
from qdexport.errors import ModelError
from qdexport.models.companions import companion_facts, companion_of
from qdexport.models.denoiser_io import io_spec
from qdexport.models.load import LoadedModel
from tests.check.conftest import Compiled

if TYPE_CHECKING:
    from qdexport.models.companions import Companion

LAYER = "mid_block.resnets.0.conv1"


@contextlib.contextmanager
def changed_output(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    hook = module.register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        hook.remove()


def test_a_network_whose_numbers_fit_passes(stepped: Compiled) -> None:
    check_denoiser_range(stepped.model)


def test_an_output_beyond_fp16_is_named_with_its_size_and_the_remedy(stepped: Compiled) -> None:
    layer = stepped.model.denoiser.get_submodule(LAYER)
    with changed_output(layer, lambda y: y * 1e6), pytest.raises(ModelError, match="--body fp32") as caught:
        check_denoiser_range(stepped.model)
    assert f"the output of {LAYER} reaches" in str(caught.value)
    assert "65504" in str(caught.value)


def test_an_fp32_body_holds_it(static: Compiled) -> None:
    with changed_output(static.model.denoiser.get_submodule(LAYER), lambda y: y * 1e6):
        check_denoiser_range(static.model)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_the_first_module_that_is_not_finite_is_named(static: Compiled, number: float) -> None:
    layer = static.model.denoiser.get_submodule(LAYER)
    message = f"the output of {LAYER} holds NaN or infinity"
    with changed_output(layer, lambda y: y + number), pytest.raises(ModelError, match=message):
        check_denoiser_range(static.model)


def test_what_calibration_saw_counts(stepped: Compiled) -> None:
    quantizer: Any = stepped.model.denoiser.get_submodule(f"{LAYER}.input_quantizer")
    before = quantizer.scale
    quantizer.scale = before * 1e7
    try:
        with pytest.raises(ModelError, match=f"the input of {LAYER} reaches"):
            check_denoiser_range(stepped.model)
    finally:
        quantizer.scale = before


def test_the_first_call_is_the_samplers_own(static: Compiled) -> None:
    assert static.model.loaded.pipeline is not None
    inputs = first_call(static.model, static.io)
    assert int(inputs["timestep"]) == static.model.timesteps[0]
    assert inputs["sample"].shape == static.io.inputs[0].shape()


@pytest.mark.filterwarnings("error")
def test_layers_that_overflow_are_measured_without_a_warning(stepped: Compiled) -> None:
    layer = stepped.model.denoiser.get_submodule(LAYER)
    with changed_output(layer, lambda y: y * 1e6):
        layers = layer_parity(stepped.model, stepped.path, stepped.io, stepped.calls[:1])
    (beyond, *_) = [item for item in layers if item.beyond_fp16 is not None]
    assert beyond.name == LAYER
    assert beyond.beyond_fp16 is not None
    assert 65504 < beyond.beyond_fp16 < 1e8


def decoder(loaded: LoadedModel) -> Companion:
    shapes = Shapes()
    facts = companion_facts(loaded, "vae_decoder", io_spec(loaded, shapes, "fp32"), "fp32", "onnxruntime", shapes)
    return companion_of(loaded.pipeline.vae, facts)


def test_a_vae_fits_unless_a_weight_or_an_output_does_not(tiny: LoadedModel) -> None:
    assert why_not_half(decoder(tiny)) == ""
    convolution = tiny.pipeline.vae.decoder.mid_block.resnets[0].conv1
    with changed_output(convolution, lambda y: y * 1e7):
        reason = why_not_half(decoder(tiny))
    assert reason.startswith("the output of its decoder.mid_block.resnets.0.conv1 reaches")
    before = convolution.weight.data.clone()
    try:
        convolution.weight.data[0, 0, 0, 0] = 1e5
        reason = why_not_half(decoder(tiny))
    finally:
        convolution.weight.data = before
    assert "weight decoder.mid_block.resnets.0.conv1.weight holds 1e+05, beyond 65504" in reason
