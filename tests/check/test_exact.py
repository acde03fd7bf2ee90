from __future__ import annotations

import numpy as np
import torch

from qdexport.check.calls import fit_inputs
from qdexport.check.exact import exact_predictions
from qdexport.check.measure import sqnr_db
from qdexport.models.denoiser import call_denoiser
from qdexport.quant.attach import shared_copy
from tests.check.conftest import Compiled


def test_single_precision_is_the_model_itself(static: Compiled) -> None:
    (found,) = exact_predictions(static.model.denoiser, [static.calls[0].inputs])
    with torch.no_grad():
        plain = call_denoiser(static.model.denoiser, static.calls[0].inputs).numpy()
    np.testing.assert_array_equal(found, plain, strict=True)


def test_half_precision_is_computed_in_single(stepped: Compiled) -> None:
    # the same network with its weights widened once and for all
    wide = shared_copy(stepped.model.denoiser, torch.float32)
    found = exact_predictions(stepped.model.denoiser, [call.inputs for call in stepped.calls])
    for call, array in zip(stepped.calls, found, strict=True):
        inputs = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in fit_inputs(call.inputs, stepped.io).items()
        }
        with torch.no_grad():
            expected = call_denoiser(wide, inputs).numpy()
        assert array.dtype == np.float32
        # FP32 both, so that only a code at a tie could differ
        assert sqnr_db(expected, array) > 100


def test_weights_and_hooks_are_as_before(stepped: Compiled) -> None:
    denoiser = stepped.model.denoiser
    before = [(parameter, parameter.data_ptr()) for parameter in denoiser.parameters()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in denoiser.modules())
    exact_predictions(denoiser, [stepped.calls[0].inputs])
    assert all(parameter.data_ptr() == pointer for parameter, pointer in before)
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float16}
    after = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in denoiser.modules())
    assert after == hooks


def test_progress_counts_runs(static: Compiled) -> None:
    seen: list[tuple[int, int]] = []
    exact_predictions(
        static.model.denoiser, [call.inputs for call in static.calls[:2]], lambda *state: seen.append(state)
    )
    assert seen == [(1, 2), (2, 2)]
