"""Networks that were never trained are recognised, trained ones never taken for such."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdexport.models.configs import CONFIGS
from qdexport.models.denoiser_classes import denoiser_class
from qdexport.models.load import load_model
from qdexport.models.synthetic import random_unet
from qdexport.models.untrained import is_untrained

TINY = sorted(name for name in CONFIGS if name.startswith("tiny"))


def as_made(name: str, seed: int) -> nn.Module:
    config = dict(CONFIGS[name])
    cls = denoiser_class(config.pop("_class_name"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(**config)


@pytest.mark.parametrize("name", TINY)
def test_random_weights_are_recognised(name: str) -> None:
    assert is_untrained(random_unet(name))
    assert is_untrained(random_unet(name, torch.float16, seed=1))
    assert is_untrained(as_made(name, 0))


@pytest.mark.parametrize("name", ["shapes", "shapes-turbo"])
def test_trained_networks_are_not(name: str) -> None:
    assert not is_untrained(load_model(name).denoiser)


def test_trained_weights_are_recognised_without_their_norms() -> None:
    """Where norms have no parameters, or training rounded their changes away, the weights alone must tell."""
    network = load_model("shapes").denoiser
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
    assert not is_untrained(network)


def test_one_step_of_training_is_enough() -> None:
    network = as_made("tiny_sd", 0)
    norm = next(module for module in network.modules() if isinstance(module, nn.GroupNorm))
    with torch.no_grad():
        norm.weight[0] += 1e-4
    assert not is_untrained(network)


def test_one_trained_layer_is_enough() -> None:
    network = as_made("tiny_sd", 0)
    weight = next(module.weight for module in network.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        weight[0] *= 20
    assert not is_untrained(network)


def test_a_network_without_large_weights_is_not_called_random() -> None:
    assert not is_untrained(nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(1, 4)))
    broken = as_made("tiny_sd", 0)
    with torch.no_grad():
        next(module for module in broken.modules() if isinstance(module, nn.Linear)).weight[0, 0] = torch.nan
    assert not is_untrained(broken)
