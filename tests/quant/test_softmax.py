"""Quantizers behind the softmax of attention: their choice, their codes, and the attention that shows them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from qdexport.core.recipe import Recipe, SoftmaxQuant
from qdexport.errors import RecipeError
from qdexport.graph import evaluate
from qdexport.graph.dialect import LOG2_ZERO
from qdexport.models.denoiser import call_denoiser, example_inputs, io_spec
from qdexport.models.load import LoadedModel
from qdexport.models.synthetic import random_unet
from qdexport.quant.affine import fake_quantize_reference, log2_codes, log2_fake_quantize
from qdexport.quant.attach import shared_copy
from qdexport.quant.calibrate import observe
from qdexport.quant.modules import StepContext
from qdexport.quant.observers import HistogramObserver
from qdexport.quant.ops import NO_AXIS, fake_quantize
from qdexport.quant.plan import plan_layers
from qdexport.quant.search import Histogram
from qdexport.quant.softmax import (
    SMALLEST_PROBABILITY,
    ExplicitAttention,
    SoftmaxParameters,
    SoftmaxQuantizer,
    attention_names,
    install_softmax,
    likelihood_ratio,
    softmax_parameters,
    watched_softmax,
)

MakeRecipe = Callable[..., Recipe]


def _pareto(alpha: float, count: int = 4000) -> Tensor:
    """Values with density x^-alpha from 2^-15 on, by inversion."""
    uniform = torch.rand(count, dtype=torch.float64)
    return (SMALLEST_PROBABILITY * (1 - uniform) ** (-1 / (alpha - 1))).clamp(max=1).float()


def _counted(sample: Tensor) -> Histogram:
    observer = HistogramObserver(1)
    if len(sample):
        observer.update(0, sample)
    return observer.histogram(0)


def test_likelihood_ratio_by_hand() -> None:
    sample = torch.tensor([2.0**-15, 2.0**-12, 2.0**-8, 0.25, 1e-9])  # the last is below x_min and does not count
    m = 2.0**-15
    x = np.array([2.0**-15, 2.0**-12, 2.0**-8, 0.25])
    alpha = 1 + len(x) / np.log(x / m).sum()
    rate = 1 / (x.mean() - m)
    expected = (np.log((alpha - 1) / m) - alpha * np.log(x / m) - np.log(rate) + rate * (x - m)).sum()
    assert likelihood_ratio(sample) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 2.5])
def test_power_laws_ask_for_log2(alpha: float) -> None:
    assert likelihood_ratio(_pareto(alpha)) > 0


@pytest.mark.parametrize("kind", ["exponential", "uniform", "narrow"])
def test_other_distributions_stay_uniform(kind: str) -> None:
    uniform = torch.rand(4000)
    sample = {
        "exponential": SMALLEST_PROBABILITY - 0.01 * torch.log(1 - uniform),
        "uniform": uniform,
        "narrow": 0.05 + 0.01 * uniform,  # even attention over some twenty tokens
    }[kind]
    assert likelihood_ratio(sample) < 0


@pytest.mark.parametrize(
    "sample",
    [
        torch.zeros(0),
        torch.tensor([0.5]),
        torch.tensor([0.5, 1e-9]),  # one value from x_min on
        torch.full((10,), SMALLEST_PROBABILITY),  # neither fit exists
        torch.tensor([torch.nan, 0.5]),
        torch.zeros(10),
    ],
    ids=["none", "one", "one that counts", "a tie", "NaN", "zeros"],
)
def test_no_verdict_is_uniform(sample: Tensor) -> None:
    assert likelihood_ratio(sample) == -torch.inf
    if not bool(sample.isnan().any()):  # observers refuse NaN
        chosen = softmax_parameters([_counted(sample)], [0.5], SoftmaxQuant(bits=8))
        assert chosen.mode.tolist() == [0]


def test_counts_stand_for_repeated_values() -> None:
    values, counts = torch.tensor([2.0**-15, 2.0**-12, 0.25]), torch.tensor([5, 2, 1])
    repeated = likelihood_ratio(values.repeat_interleave(counts))
    assert likelihood_ratio(values, counts) == pytest.approx(repeated, rel=1e-12)
    assert repeated != pytest.approx(likelihood_ratio(values), rel=1e-3)


def test_modes_and_scales_per_row() -> None:
    even, power = 0.05 + 0.01 * torch.rand(500), _pareto(2.0, 500)
    adaptive = softmax_parameters([_counted(even), _counted(power)], [0.06, 0.9], SoftmaxQuant(bits=4))
    assert adaptive.mode.tolist() == [0, 1]
    # a uniform row ends at the largest value of its 15 steps, a logarithmic one begins at 1
    assert adaptive.scale.tolist() == [torch.tensor(0.06 / 15).item(), 1.0]
    uniform = softmax_parameters([_counted(even), _counted(power)], [0.06, 0.9], SoftmaxQuant(bits=4, mode="uniform"))
    assert uniform.mode.tolist() == [0, 0]
    assert uniform.scale.tolist() == torch.tensor([0.06 / 15, 0.9 / 15]).tolist()
    log2 = softmax_parameters([_counted(even), _counted(power)], [0.06, 0.9], SoftmaxQuant(bits=4, mode="log2"))
    assert (log2.mode.tolist(), log2.scale.tolist()) == ([1], [1])  # equal rows are one row


def test_a_largest_value_is_a_probability() -> None:
    settings = SoftmaxQuant(bits=8, mode="uniform")
    found = softmax_parameters([_counted(torch.zeros(3))] * 2, [0.0, 1.0000001], settings)
    assert found.scale.tolist() == torch.tensor([SMALLEST_PROBABILITY / 255, 1 / 255]).tolist()


# codes


def _exact_code(ratio: float, qmax: int) -> int:
    """``clip(rint(-log2(ratio)), 0, qmax)`` in integers alone: q with ``2^-(2q+1) <= ratio^2 < 2^-(2q-1)``."""
    if ratio <= 0:
        return qmax
    square, q = Fraction(ratio) ** 2, 0
    while q < qmax and square < Fraction(1, 2 ** (2 * q + 1)):
        q += 1
    return q


BOUND = torch.tensor(0.5).sqrt()


def _probes() -> Tensor:
    """Every power of two and every bound between codes in a wide span, with their neighbours; and odd values."""
    powers = torch.exp2(torch.arange(-40, 4).float())
    centres = torch.cat([powers, powers * BOUND])
    around = [centres, torch.nextafter(centres, torch.tensor(9e9)), torch.nextafter(centres, torch.tensor(0.0))]
    random = torch.rand(500) ** 8
    return torch.cat([*around, random, torch.tensor([0.0, -0.0, -1.0, -1e-30, 1e-45, 1e30])])


@pytest.mark.parametrize("qmax", [3, 15, 255])
def test_log2_codes_are_exact(qmax: int) -> None:
    x = _probes()
    found = log2_codes(x, torch.ones(1), qmax)
    exact = torch.tensor([_exact_code(float(value), qmax) for value in x]).float()
    mantissa, exponent = torch.frexp(x)
    tie = mantissa == BOUND
    assert torch.equal(found[~tie], exact[~tie])
    # FP32's square root of 1/2 lies 1.2e-8 below the true one; it is the bound itself and takes the smaller code
    assert torch.equal(found[tie], (-exponent[tie]).clamp(0, qmax).float())
    assert tie.sum() == 44


@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-20])
@pytest.mark.parametrize("qmax", [15, 255])
def test_torch_and_numpy_have_the_same_codes(scale: float, qmax: int) -> None:
    x = _probes()
    found = log2_codes(x, torch.tensor([scale]), qmax)
    assert np.array_equal(found.numpy(), evaluate.log2_codes(x.numpy(), np.float32([scale]), qmax))


def test_log2_values() -> None:
    x = torch.tensor([1.0, 0.5, 0.3, 2.0**-14, 2.0**-15, 0.0, -1.0, 5.0])
    y = log2_fake_quantize(x, torch.ones(1), 15)
    assert y.tolist() == [1, 0.5, 0.25, 2.0**-14, 0, 0, 0, 1]  # the top code, 15, is nothing
    assert log2_fake_quantize(x.half(), torch.tensor([0.7]), 15).dtype == torch.float16


def test_codes_without_a_normal_power_are_zero() -> None:
    ends = torch.tensor([2.0 ** -(LOG2_ZERO - 1), 2.0**-LOG2_ZERO])
    assert log2_codes(ends, torch.ones(1), 255).tolist() == [LOG2_ZERO - 1, LOG2_ZERO]
    assert log2_fake_quantize(ends, torch.ones(1), 255).tolist() == [2.0 ** -(LOG2_ZERO - 1), 0]


# the operator


def test_rows_of_both_modes_in_one_batch() -> None:
    x = torch.rand(3, 2, 5, 7) ** 4
    scale, mode = torch.tensor([1.0, 0.05]), torch.tensor([1.0, 0.0])
    row = torch.tensor([1, 0, 1])
    y = fake_quantize(x, scale, torch.zeros(2), row, 0, 15, NO_AXIS, mode)
    for sample, chosen in enumerate(row.tolist()):
        expected = (
            log2_fake_quantize(x[sample], scale[0], 15)
            if chosen == 0
            else fake_quantize_reference(x[sample], scale[1], torch.zeros(1), 0, 15)
        )
        assert torch.equal(y[sample], expected)


def test_one_row_of_either_mode() -> None:
    x = torch.rand(2, 3) ** 3
    log2 = fake_quantize(x, torch.ones(1), torch.zeros(1), None, 0, 15, NO_AXIS, torch.ones(1))
    assert torch.equal(log2, log2_fake_quantize(x, torch.ones(1), 15))
    uniform = fake_quantize(x, torch.full((1,), 0.1), torch.zeros(1), None, 0, 15, NO_AXIS, torch.zeros(1))
    assert torch.equal(uniform, fake_quantize_reference(x, torch.tensor(0.1), torch.zeros(1), 0, 15))


def test_gradients_of_logarithmic_rows() -> None:
    values = torch.tensor([[1.0, 0.5, 2.0**-14, 2.0**-15, 0.0, -0.3, 1.3, 1.5]])
    x = values.repeat(2, 1).requires_grad_()
    scale = torch.tensor([1.0, 0.1], requires_grad=True)
    zero_point = torch.zeros(2, requires_grad=True)
    weights = torch.arange(1.0, 9.0)
    y = fake_quantize(x, scale, zero_point, torch.tensor([0, 1]), 0, 15, NO_AXIS, torch.tensor([1.0, 0.0]))
    (y * weights).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert zero_point.grad is not None
    # straight through for codes 0 to 14; nothing for the top code (0 and negative ones too) and beyond 2^0.5
    assert x.grad[0].tolist() == [1, 2, 3, 0, 0, 0, 7, 0]
    assert scale.grad[0] == 0  # s cancels out of s 2^log2(x / s)
    assert scale.grad[1] != 0
    assert zero_point.grad[0] == 0


def test_gradient_stops_where_the_value_does() -> None:
    x = torch.tensor([2.0 ** -(LOG2_ZERO - 1), 2.0**-LOG2_ZERO], requires_grad=True)
    fake_quantize(x, torch.ones(1), torch.zeros(1), None, 0, 255, NO_AXIS, torch.ones(1)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 0]


def test_operator_with_modes_keeps_its_contract_with_torch() -> None:
    x = torch.rand(2, 3, requires_grad=True)
    scale = torch.tensor([1.0, 0.4], requires_grad=True)
    arguments = (x, scale, torch.zeros(2), torch.tensor([1, 0]), 0, 15, NO_AXIS, torch.tensor([1.0, 0.0]))
    torch.library.opcheck(fake_quantize, arguments)


# attention


def _attention(**changes: Any) -> Attention:
    return Attention(query_dim=16, heads=2, dim_head=8, **changes).eval()


def _randomized(block: Attention) -> Attention:
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


@torch.no_grad()
@pytest.mark.parametrize("case", ["self", "cross", "mask", "image", "norms"])
def test_explicit_attention_is_diffusers_own(case: str) -> None:
    text, mask = None, None
    x = torch.randn(2, 9, 16)
    changes: dict[str, Any] = {"bias": True}
    if case in ("cross", "mask"):
        changes["cross_attention_dim"] = 12
        text = torch.randn(2, 5, 12)
    if case == "mask":
        mask = torch.zeros(2, 1, 5)
        mask[:, :, 3:] = -1e4
    if case == "image":  # as in VAEs and unconditional denoisers
        changes |= {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.7}
        x = torch.randn(2, 16, 3, 4)
    if case == "norms":
        changes |= {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm", "qk_norm": "layer_norm"}
        text = torch.randn(2, 5, 12)
    block = _randomized(_attention(**changes))
    block.set_processor(AttnProcessor2_0())
    expected = block(x, encoder_hidden_states=text, attention_mask=mask)
    shown: list[Tensor] = []

    def show(probabilities: Tensor) -> Tensor:
        shown.append(probabilities)
        return probabilities

    block.set_processor(ExplicitAttention(show))
    found = block(x, encoder_hidden_states=text, attention_mask=mask)
    # sums of up to 16 FP32 terms of magnitude 10 in another order (16 * 10 * 2^-24 = 1e-5), and exp amplifies those of
    # the scores by their value; another formula would be off by tenths
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    length = 5 if text is not None else x.shape[1] if x.dim() == 3 else 12
    assert shown[0].shape == (2, 2, x.shape[1] if x.dim() == 3 else 12, length)
    torch.testing.assert_close(shown[0].sum(dim=-1), torch.ones_like(shown[0][..., 0]))
    if case == "mask":
        assert shown[0][..., 3:].max() == 0


@torch.no_grad()
def test_probabilities_pass_the_quantizer() -> None:
    block = _randomized(_attention())
    x = torch.randn(2, 9, 16)
    block.set_processor(ExplicitAttention(lambda p: p))
    plain = block(x)
    block.set_processor(ExplicitAttention(torch.zeros_like))
    nothing = block(x)
    assert torch.equal(nothing, block.to_out[0].bias.expand_as(nothing))
    assert not torch.equal(plain, nothing)


def test_names_and_their_pattern(tiny: LoadedModel) -> None:
    assert attention_names(tiny.denoiser, None) == []
    every = attention_names(tiny.denoiser, SoftmaxQuant())
    assert len(every) == 8
    crossed = attention_names(tiny.denoiser, SoftmaxQuant(match="*.attn2"))
    assert len(crossed) == 4
    with pytest.raises(RecipeError, match=r"'\*\.attn7' matches no attention block; they are named like \S+attn1"):
        attention_names(tiny.denoiser, SoftmaxQuant(match="*.attn7"))


def _inputs(model: LoadedModel, recipe: Recipe) -> dict[str, Tensor]:
    return example_inputs(io_spec(model, recipe.shapes, "fp32"), seed=0)


@torch.no_grad()
def test_watching_changes_nothing_and_ends(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    inputs = _inputs(tiny, make_recipe())
    names = attention_names(tiny.denoiser, SoftmaxQuant(match="mid_block.*"))
    before = call_denoiser(tiny.denoiser, inputs)
    processors = [tiny.denoiser.get_submodule(name).processor for name in names]
    seen: dict[str, Tensor] = {}
    with watched_softmax(tiny.denoiser, names, lambda name, values: seen.update({name: values})):
        watched = call_denoiser(tiny.denoiser, inputs)
    assert set(seen) == set(names)
    # as above, through the layers behind
    torch.testing.assert_close(watched, before, rtol=1e-3, atol=1e-3)
    assert [tiny.denoiser.get_submodule(name).processor for name in names] == processors
    with pytest.raises(ZeroDivisionError), watched_softmax(tiny.denoiser, names, lambda *_: None):
        raise ZeroDivisionError
    assert [tiny.denoiser.get_submodule(name).processor for name in names] == processors


@torch.no_grad()
def test_install_on_a_pipelines_denoiser(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    name = attention_names(tiny.denoiser, SoftmaxQuant(match="mid_block.*attn2"))[0]
    inputs = _inputs(tiny, make_recipe())
    denoiser = shared_copy(tiny.denoiser)
    parameters = SoftmaxParameters(bits=2, scale=torch.tensor([0.2, 1.0]), mode=torch.tensor([0.0, 1.0]))
    context = StepContext()
    install_softmax(denoiser, {name: parameters}, context)
    block = denoiser.get_submodule(name)
    assert isinstance(block.softmax_quantizer, SoftmaxQuantizer)
    assert not hasattr(tiny.denoiser.get_submodule(name), "softmax_quantizer")
    assert list(denoiser.state_dict()) == list(tiny.denoiser.state_dict())
    outputs = []
    for row in (0, 1):
        context.row = torch.tensor([row])
        seen: list[tuple[Tensor, Tensor]] = []
        handle = block.softmax_quantizer.register_forward_hook(lambda _m, args, y, seen=seen: seen.append((args[0], y)))
        outputs.append(call_denoiser(denoiser, inputs))
        handle.remove()
        ((p, y),) = seen
        expected = (
            fake_quantize_reference(p, torch.tensor(0.2), torch.zeros(1), 0, 3)
            if row == 0
            else log2_fake_quantize(p, torch.ones(1), 3)
        )
        assert torch.equal(y, expected)
    assert not torch.equal(*outputs)
    assert not torch.equal(outputs[0], call_denoiser(tiny.denoiser, inputs))


def test_probabilities_are_observed(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    calibration = {"prompts": 1, "batch_size": 1, "steps": 2, "seed": 7}
    settings = SoftmaxQuant(match="mid_block.*attn2", mode="uniform", bits=4)
    recipe = make_recipe(calibration=calibration, softmax=settings.model_dump(), activation_rows="per_step")
    observations = observe(tiny, plan_layers(tiny.denoiser, recipe), recipe)
    ((name, observer),) = observations.softmax.items()
    assert name == "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert observer.low.shape == (2,)
    assert bool((observer.low >= 0).all())
    assert bool((observer.high <= 1).all())
    found = observations.softmax_parameters(settings)[name]
    assert found.bits == 4
    assert torch.equal(found.scale, (observer.high / 15).float())


def test_joint_attention_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"matches transformer_blocks.0.attn, which attends to picture and text"):
        attention_names(random_unet("tiny_sd3"), SoftmaxQuant())
    alone = attention_names(random_unet("tiny_sd3"), SoftmaxQuant(match="*.attn2"))
    assert alone == ["transformer_blocks.0.attn2"]
