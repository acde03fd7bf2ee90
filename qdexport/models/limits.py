"""How much a configuration asks for, before memory is given to it: a wrong number must not fill the machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from qdexport.core.environment import available_bytes, memory_bytes
from qdexport.errors import ModelError, QdExportError
from qdexport.models.library_logs import quiet_libraries

__all__ = ["check_construction", "check_memory", "check_numbers", "construction_limit"]

_LARGEST_NUMBER: Final = 10_000_000  # the largest that a published configuration holds is a vocabulary of 300,000
_ODD: Final = 4  # times as many weights as the files hold: a config may have some that are tied or made anew
_FREE_WEIGHTS: Final = 100_000_000
_FREE_TENSORS: Final = 2_000
_GB: Final = 1e9


def check_numbers(path: Path, value: Any, key: str = "") -> None:
    """Refuses a configuration with a whole number that no network has: sizes are made before anything else is checked.

    Raises:
        ModelError: names file, key and number.
    """
    if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        raise ModelError(f"{path}: {key} is {value:.3g}, more than any network has; mend it, or download it again")
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_numbers(path, item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            check_numbers(path, item, key)


def check_construction(build: Any, path: Path, tensors: int, weights: int) -> None:
    """Builds a network without memory for its weights, and refuses one much larger than its files.

    What else is wrong with its configuration is said when it is built with memory.

    Args:
        build: makes the module.
        path: of the configuration.
        tensors: in the weight files.
        weights: numbers in the weight files.

    Raises:
        ModelError: there are more layers or weights than the files can hold.
    """
    try:
        with construction_limit(path, tensors, weights), quiet_libraries(), torch.device("meta"):
            build()
    except QdExportError:
        raise
    except Exception:  # noqa: BLE001 - said again, with its cause, where the network is built in earnest
        return


@contextlib.contextmanager
def construction_limit(path: Path, tensors: int, weights: int) -> Iterator[None]:
    """Ends a construction inside the block as soon as it has more weights than files of this size can hold.

    Raises:
        ModelError: names the configuration, and both sizes.
    """
    most_tensors, most_weights = _ODD * tensors + _FREE_TENSORS, _ODD * weights + _FREE_WEIGHTS
    count = numbers = modules = 0

    def parameter(_module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        nonlocal count, numbers
        count, numbers = count + 1, numbers + (0 if value is None else value.numel())
        if count > most_tensors or numbers > most_weights:
            raise ModelError(
                f"{path} declares a network of more than {numbers / _GB:,.3g} billion weights in {count:,} tensors "
                f"({name!r} is the last), and its files hold {weights / _GB:,.3g} billion in {tensors:,}; it is not "
                "the configuration of these weights: download the model again"
            )

    def child(_module: nn.Module, _name: str, _child: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > _ODD * most_tensors:
            raise ModelError(f"{path} declares more than {modules:,} modules, and its files hold {tensors:,} tensors")

    hooks = (
        torch_module.register_module_parameter_registration_hook(parameter),
        torch_module.register_module_module_registration_hook(child),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_memory(what: str, needed: float, remedy: str, kind: type[QdExportError] = ModelError) -> None:
    """Refuses work that needs more memory than this machine has free.

    Args:
        what: begins the message.
        needed: bytes, at least.
        remedy: ends the message.
        kind: the error.

    Raises:
        kind: says what is needed, and what there is.
    """
    free = available_bytes()
    if needed > free:
        raise kind(
            f"{what} needs at least {needed / _GB:,.1f} GB of memory, and {free / _GB:,.1f} of "
            f"{memory_bytes() / _GB:,.1f} GB are free; {remedy}"
        )
