"""What an interrupted calibration had seen: saved after every batch of prompts, taken up again to the same
bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from qdexport.core.files import atomic_path
from qdexport.errors import ModelError
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
        """Writes the observers' states after ``batches`` whole batches, atomically."""
        tensors = {
            f"{key}/{name}": tensor.contiguous()
            for key, observer in observers.items()
            for name, tensor in observer.state().items()
        }
        self.threads = tuple(dict.fromkeys((*self.threads, torch.get_num_threads())))
        facts = {"digest": self.digest, "batches": batches, "threads": self.threads}
        with atomic_path(self.path) as partial:
            save_file(tensors, partial, metadata={_METADATA_KEY: json.dumps(facts)})

    def load(self, observers: Mapping[str, RangeObserver]) -> int:
        """Fills the observers from the file.

        Returns:
            Whole batches that the state covers; 0 when there is none for this digest.

        Raises:
            ModelError: the file is damaged.
        """
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
                if facts.get("digest") != self.digest:
                    logger.info("%s is of another calibration; starting anew", self.path)
                    return 0
                for key, observer in observers.items():
                    observer.load_state({name: file.get_tensor(f"{key}/{name}") for name in observer.state()})
        except (OSError, SafetensorError, ValueError) as error:
            raise ModelError(f"{self.path} is damaged ({error}); delete it to calibrate from the start") from error
        batches, self.threads = int(facts["batches"]), tuple(facts.get("threads", ()))
        logger.info("going on after batch %d of a saved calibration", batches)
        return batches


def weights_sha256(module: nn.Module) -> str:
    """A SHA-256 over names, shapes, dtypes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
