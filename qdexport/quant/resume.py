"""What an interrupted calibration had seen: saved after every batch of prompts, taken up again to the same
bits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qdexport.core.files import atomic_path
from qdexport.quant.observers import RangeObserver

__all__ = ["CalibrationState", "weights_sha256"]

logger = logging.getLogger(__name__)

_METADATA_KEY = "qdexport.calibration"


class CalibrationState:
    """The saved state of one calibration in a folder.

    Args:
        folder: made when missing.
        digest: of everything the result depends on; a state with another digest is not used.
        name: of the file, without its ending.

    Attributes:
        threads: the numbers of threads that whole batches were computed with, each once, in their order.
    """

    def __init__(self, folder: Path, digest: str, name: str = "calibration") -> None:
        self.path = folder / f"{name}.safetensors"
        self.digest = digest
        self.threads: tuple[int, ...] = ()

    def save(self, observers: Mapping[str, RangeObserver], batches: int) -> None:
        """Writes the observers' states after ``batches`` whole batches, atomically, with a checksum."""
        tensors = {
            f"{key}/{name}": tensor.contiguous()
            for key, observer in observers.items()
            for name, tensor in observer.state().items()
        }
        self.threads = tuple(dict.fromkeys((*self.threads, torch.get_num_threads())))
        facts: dict[str, Any] = {"digest": self.digest, "batches": batches, "threads": self.threads}
        facts["sha256"] = _checksum(tensors, facts)
        with atomic_path(self.path) as partial:
            save_file(tensors, partial, metadata={_METADATA_KEY: json.dumps(facts)})

    def load(self, observers: Mapping[str, RangeObserver]) -> int:
        """Fills the observers from the file; one that is damaged, or of another calibration, is not used.

        Returns:
            Whole batches that the state covers; 0 when there is none for this digest.
        """
        if not self.path.exists():
            return 0
        try:
            facts, tensors = _read(self.path)
            if facts["digest"] != self.digest:
                logger.info("%s is of another calibration; starting anew", self.path)
                return 0
            states = {key: {name: tensors[f"{key}/{name}"] for name in item.state()} for key, item in observers.items()}
            for key, observer in observers.items():
                copy.deepcopy(observer).load_state(states[key])  # first all of them on copies: none is filled by half
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            logger.warning("%s is damaged (%s); calibrating from the start", self.path, error)
            return 0
        for key, observer in observers.items():
            observer.load_state(states[key])
        batches, self.threads = int(facts["batches"]), tuple(facts["threads"])
        logger.info("going on after batch %d of a saved calibration", batches)
        return batches


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {})[_METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    if facts.pop("sha256") != _checksum(tensors, facts):
        raise ValueError("its checksum is another")
    return facts, tensors


def _checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Over names, types, shapes and values, and what is said about them."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
    array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(memoryview(array))  # type: ignore[arg-type]  # numpy's stub


def weights_sha256(module: nn.Module) -> str:
    """A SHA-256 over names, shapes, dtypes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        _add(digest, name, tensor)
    return digest.hexdigest()
