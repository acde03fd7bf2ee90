"""Every error a user can cause or meet, with the exit code that the command line returns for it.

    QdExportError              1   anything below that has no code of its own
    |- RecipeError             2   a recipe or an option is wrong (2 is also click's code for bad usage)
    |- ModelError              3   a model folder, a checkpoint or its weights are wrong
    |- CaptureError            4   PyTorch could not be turned into an ONNX graph
    |- GraphPassError          5   a compiler pass met a graph it must refuse
    |- EmitError               6   the ONNX file could not be written or is not legal for the target
    |- BuildError              7   the engine builder rejected the graph, crashed or was killed
    |- ParityError             8   a compiled artefact differs from what was planned
    |- MissingDependencyError  9   an optional package or a device is not there
    |- OutputError            10   the output folder cannot be written (read-only, full, in use)
       |- DamagedError        10   a file in it is not what its manifest says

A programming mistake stays an ordinary exception: the command line ends with code 1 and one sentence, and writes the
traceback to a file that the sentence names. An interrupt (Ctrl-C) ends with code 130. ``kind`` names an error in what
``--json`` prints.
"""

from __future__ import annotations

INTERRUPTED_EXIT_CODE = 130


class QdExportError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_code = 1
    kind = "error"
    keep_traceback = False  # True: the command line writes the traceback of the cause to a file, and names it


class RecipeError(QdExportError):
    """A recipe, a rule in it, or a command-line option cannot be used."""

    exit_code = 2
    kind = "recipe"


class ModelError(QdExportError):
    """A model folder, a checkpoint, or the weights in it cannot be used."""

    exit_code = 3
    kind = "model"


class CaptureError(QdExportError):
    """The quantized module could not be captured as an ONNX graph."""

    exit_code = 4
    kind = "capture"


class GraphPassError(QdExportError):
    """A compiler pass refuses the graph."""

    exit_code = 5
    kind = "pass"


class EmitError(QdExportError):
    """The ONNX file could not be written, or is not legal for the target."""

    exit_code = 6
    kind = "onnx"


class BuildError(QdExportError):
    """The engine builder rejected the graph, crashed, or was killed."""

    exit_code = 7
    kind = "build"


class ParityError(QdExportError):
    """A compiled artefact does not do what was planned."""

    exit_code = 8
    kind = "parity"


class MissingDependencyError(QdExportError):
    """An optional package or a device is missing."""

    exit_code = 9
    kind = "missing"


class OutputError(QdExportError):
    """The output folder cannot be written."""

    exit_code = 10
    kind = "output"


class DamagedError(OutputError):
    """A file of an output folder is not what the folder's manifest says."""

    kind = "damaged"
