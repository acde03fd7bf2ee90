"""An emitted ONNX file in the place of a pipeline's denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdexport.check.calls import row_chunks, typed_inputs
from qdexport.check.session import ort_errors, reference_session
from qdexport.core.io_spec import IoSpec
from qdexport.emit.facts import read_network_facts
from qdexport.errors import ParityError
from qdexport.models.sampling import NamedDenoiser

__all__ = ["OnnxDenoiser"]


class OnnxDenoiser(NamedDenoiser):
    """Runs an ONNX file in ONNX Runtime with the call signature of a diffusers UNet.

    A timestep or a class that the network has no row for is refused. Calls of any number of rows are split and padded
    to what the file takes; inputs are converted to its dtypes and the prediction back. Config, dtype and device are
    those of the UNet that it stands for.

    Args:
        path: the emitted file.
        io: its inputs and outputs.
        like: the UNet that it stands for.
    """

    def __init__(self, path: Path, io: IoSpec, like: nn.Module) -> None:
        super().__init__(self._predict, like)
        self._path = path
        self._io = io
        self._facts = read_network_facts(path)
        self._session = reference_session(path)
        # an input that the network does not read (a timestep without a table) is not in the file
        self._names = {item.name for item in self._session.get_inputs()}

    @property
    def config(self) -> Any:
        """The UNet's configuration."""
        return self._like[0].config

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's dtype."""
        return next(self._like[0].parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def _predict(self, inputs: dict[str, Tensor]) -> Tensor:
        self._facts.check_call(inputs)
        typed = {name: tensor for name, tensor in typed_inputs(inputs, self._io).items() if name in self._names}
        prediction = torch.cat([self._run(part)[:count] for part, count in row_chunks(typed, self._io)])
        if bool(prediction.isnan().any()) and bool(inputs["sample"].isfinite().all()):
            timestep = inputs["timestep"].item()
            raise ParityError(
                f"{self._path} predicts NaN at timestep {timestep:g}: a table has no row for this call (with "
                "`bos: constant` for another first token of the text), or FP16 overflowed; compile with `--body fp32` "
                "to tell them apart"
            )
        return prediction.to(inputs["sample"].dtype)

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        feed = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        try:
            return torch.from_numpy(self._session.run(None, feed)[0])
        except ort_errors() as error:
            raise ParityError(f"{self._path} does not run: {str(error).splitlines()[0]}") from error
