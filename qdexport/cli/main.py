"""The command line: ``qdexport``. Only this package prints and exits."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from qdexport import __version__
from qdexport.cli.allocate import allocate, sensitivity
from qdexport.cli.compile import build, compile_, export, quantize, validate
from qdexport.cli.doctor import doctor
from qdexport.cli.ending import Failure, ended
from qdexport.cli.inspect import inspect
from qdexport.cli.passes import passes
from qdexport.cli.recipes import recipes
from qdexport.cli.sample import sample
from qdexport.cli.search import search
from qdexport.core.children import use_safe_path
from qdexport.core.processes import end_politely
from qdexport.errors import QdExportError

__all__ = ["cli", "main"]

_EPILOG = """\b
Examples:
  qdexport compile shapes --recipe w8a8 --target tensorrt-rtx --out out
  qdexport compile path/to/stable-diffusion --recipe w8a8-timestep --body fp16
  qdexport inspect out
  qdexport doctor

\b
Exit codes: 0 done, 1 other error, 2 recipe or usage, 3 model, 4 capture, 5 compiler pass, 6 ONNX file,
7 engine build, 8 a verdict failed (compiled right, pictures kept), 9 missing package or device,
10 output folder (not writable, or damaged), 130 interrupted.
Of an error that was not foreseen (1) the message names a file with the traceback.
"""


class _Group(click.Group):
    """Turns the errors that are meant for users into one message and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QdExportError as error:
            raise Failure(error) from error


@click.group(
    cls=_Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="qdexport")
def cli() -> None:
    """Compiles quantized diffusion models for NVIDIA hardware, and proves at every step that nothing was lost."""


for command in (
    compile_, quantize, export, build, validate, search, inspect, sample, sensitivity, allocate, recipes, passes,
    doctor,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Entry point of the ``qdexport`` script."""
    # Threads that spin while they wait make small networks many times slower as soon as anything else runs on the
    # machine (10 s against 1.3 s for the same denoiser calls on two busy cores). Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    end_politely()
    use_safe_path()
    sys.exit(ended(lambda: cli.main(standalone_mode=False), as_json="--json" in sys.argv[1:]))
