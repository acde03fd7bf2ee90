"""What is made from what: the stages of an output folder, what each reads, and which keys of the report it fills.

A stage enters the digests of what it was made from beside its artifacts. It is stale when one of them is another now;
then all that it made, and all that the report says about it, belongs to something that is gone. Nothing else decides
that.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qdexport.core.companion_facts import COMPANION_NAMES
from qdexport.core.digests import digest_of
from qdexport.core.integrity import check_whole
from qdexport.core.recipe import load_recipe
from qdexport.errors import ModelError, QdExportError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qdexport.core.results import Artifact, Manifest, Report

__all__ = [
    "STAGES",
    "Lineage",
    "Stage",
    "check_checkpoint",
    "check_made",
    "clear_results",
    "has_results",
    "next_command",
    "order_of",
    "remedy_of",
    "stage_named",
]

# nothing is made from the words of a log, or from the bytes of an engine, which differ between two builds of one file
_NOT_READ: Final = frozenset({"log", "engine", "companion_engine"})
_NETWORK: Final = ":*"  # of a stage that every network beside the denoiser has
_COMPONENTS: Final = {"vae_decoder": "vae"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of an output folder.

    Attributes:
        name: ``build:*`` stands for ``build:vae_decoder`` and so on.
        made_from: the stages whose artifacts it is made from, ``target`` for where the network will run, ``component``
            for a network's own weights and settings in the checkpoint, ``networks`` for the ONNX files of all networks
            beside the denoiser, ``everything`` for all stages.
        unless_absent: those of them that need not be there.
        also_reads: stages whose artifacts it reads although nothing of its own depends on them.
        sections: keys of the report that it fills.
        remedy: the command that makes it again.
    """

    name: str
    made_from: tuple[str, ...] = ()
    unless_absent: tuple[str, ...] = ()
    also_reads: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    remedy: str = "qdexport compile {model} --out {out}"


# in an order in which they can be made; what a stage is made from stands before it
STAGES: Final = (
    Stage(name="quantize", remedy="qdexport quantize {model} --out {out}"),
    Stage(name="search", made_from=("quantize", "target"), remedy="qdexport search {model} --out {out}"),
    Stage(
        name="export",
        made_from=("quantize", "search", "target"),
        unless_absent=("search",),
        remedy="qdexport export {out}",
    ),
    Stage(name="export:*", made_from=("component", "target"), also_reads=("quantize",), remedy="qdexport export {out}"),
    Stage(
        name="build",
        made_from=("export", "target"),
        also_reads=("quantize",),
        sections=("engine",),
        remedy="qdexport build {out}",
    ),
    Stage(name="build:*", made_from=("export:*", "target"), also_reads=("quantize",), remedy="qdexport build {out}"),
    Stage(
        name="validate",
        made_from=("quantize", "export", "build"),
        unless_absent=("build",),
        sections=("body", "coverage", "parity", "layer_errors", "cost", "quality", "verdict"),
        remedy="qdexport validate {out}",
    ),
    Stage(
        name="validate:companions",
        made_from=("quantize", "export", "networks"),
        sections=("whole_pipeline",),
        remedy="qdexport validate {out}",
    ),
    Stage(name="bits", made_from=("quantize",)),
    Stage(name="report", made_from=("everything",), remedy="qdexport validate {out}"),
    Stage(name="results"),
)
_BY_NAME: Final = {stage.name: stage for stage in STAGES}


def stage_named(name: str) -> Stage:
    """The stage that has a name, or stands for it; one of which nothing is known for any other name."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    return _BY_NAME.get(f"{name.partition(':')[0]}{_NETWORK}", Stage(name=name))


def order_of(name: str) -> int:
    """The place of a stage in the order in which they can be made."""
    stage = stage_named(name)
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


class Lineage:
    """Tells what is stale in an output folder.

    Args:
        root: the output folder.
        manifest: of the folder, as it is now.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self._root = root
        self._manifest = manifest

    def inputs(self, name: str) -> dict[str, str] | None:
        """Digests of what a stage would be made from now; None when something is missing that it needs."""
        stage, network = stage_named(name), name.partition(":")[2]
        found: dict[str, str] = {}
        for key in stage.made_from:
            digest = self._digest(key, network)
            if digest is None and key not in stage.unless_absent:
                return None
            found[key] = digest or ""
        return found

    def is_stale(self, name: str) -> bool:
        """Whether a stage that was made was made from something else than what is there now."""
        now = self.inputs(name)
        return now is None or any(
            item.inputs.get(key) != digest for item in self.artifacts(name) for key, digest in now.items()
        )

    def made(self) -> list[str]:
        """The stages that were made, in the order of making."""
        return sorted({item.stage for item in self._manifest.artifacts}, key=order_of)

    def missing(self, name: str) -> str | None:
        """The first stage that has to be made before this one can be; None when nothing is missing."""
        stage, network = stage_named(name), name.partition(":")[2]
        for key in stage.made_from:
            if key not in stage.unless_absent and self._digest(key, network) is None:
                return "quantize" if key == "component" else key.replace("*", network)
        return None

    def read_by(self, name: str) -> list[Artifact]:
        """The artifacts that a stage reads or vouches for: of the stages it is made from, and of others."""
        stage, network = stage_named(name), name.partition(":")[2]
        names = {key.replace("*", network) for key in (*stage.made_from, *stage.also_reads)}
        if "networks" in names:
            names |= {item.stage for item in self._manifest.artifacts if item.stage.startswith(("export:", "build:"))}
        return [item for item in self._manifest.artifacts if item.stage in names and item.kind != "log"]

    def artifacts(self, name: str) -> list[Artifact]:
        """What a stage made."""
        return [item for item in self._manifest.artifacts if item.stage == name]

    def _digest(self, key: str, network: str) -> str | None:
        if key == "target":
            return self._manifest.target
        if key == "component":
            return self._component(network)
        if key == "everything":
            others = [item for item in self._manifest.artifacts if item.kind != "report"]
            return _digest({item.path: item for item in others}, all_of=True)
        if key == "networks":
            return _digest({item.path: item for item in self._manifest.artifacts if item.kind == "companion_onnx"})
        return _digest({item.path: item for item in self.artifacts(key.replace("*", network))})

    def _component(self, network: str) -> str | None:
        """Of a network's weights, all configurations in the checkpoint, and what the recipe says about networks."""
        checkpoint = self._manifest.artifact("checkpoint")
        if checkpoint is None:
            return None
        if checkpoint.files is None:
            return checkpoint.sha256
        folder = f"{_COMPONENTS.get(network, network)}/"
        weights = {name: sha for name, sha in checkpoint.files.items() if name.startswith(folder)}
        others = {name: sha for name, sha in checkpoint.files.items() if name.endswith(".json")}
        try:
            recipe = load_recipe(str(self._root / checkpoint.path / "recipe.yaml"))
        except QdExportError:
            return None
        says = recipe.model_dump(mode="json", include={"companions", "shapes", "body", "opset"})
        # a checkpoint may refer to weights elsewhere: then what its metadata says is all that is known
        return digest_of(weights or checkpoint.sha256, others, says)


def check_made(root: Path, manifest: Manifest, name: str) -> None:
    """Makes sure that everything a stage reads is there, belongs together, and is what the manifest says.

    Args:
        root: the output folder.
        manifest: of the folder.
        name: of the stage that is about to read it; nothing need be there of its own.

    Raises:
        ModelError: something is missing, or was made from something that is gone; the message says what makes it.
        DamagedError: a file is not what the manifest says.
    """
    lineage = Lineage(root, manifest)
    missing = lineage.missing(name)
    if missing is not None:
        raise ModelError(f"{root} holds no {_what(missing)}; run `{remedy_of(root, manifest, missing)}`")
    for item in sorted(lineage.read_by(name), key=lambda item: order_of(item.stage)):
        # first whole, then current: what is damaged says nothing about what it was made from
        check_whole(root, [item], f"run `{remedy_of(root, manifest, item.stage)}` to make it again")
        if lineage.is_stale(item.stage):
            raise ModelError(_stale(root, manifest, item))


def _stale(root: Path, manifest: Manifest, item: Artifact) -> str:
    now = Lineage(root, manifest).inputs(item.stage) or {}
    changed = next((key for key, digest in now.items() if item.inputs.get(key) != digest and key != "target"), "")
    same_target = item.inputs.get("target", manifest.target) == manifest.target
    source = "ONNX file" if changed.startswith("export") else "checkpoint"
    other = f"from another {source}" if same_target else "for another target"
    return (
        f"the {_what(item.stage)} in {root} was made {other} than the one that is there now (or by another version of "
        f"qdexport); run `{remedy_of(root, manifest, item.stage)}`"
    )


def check_checkpoint(root: Path, manifest: Manifest) -> None:
    """Makes sure that the checkpoint is there, and what the manifest says; raises as :func:`check_made`."""
    check_made(root, manifest, "export")


def next_command(root: Path, manifest: Manifest, *, builds: bool) -> str | None:
    """The command that goes on from what is there; None when every stage was made.

    Args:
        root: the output folder.
        manifest: of the folder.
        builds: whether the target has a builder.
    """
    made = Lineage(root, manifest).made()
    wanted = ("quantize", "export", *(("build",) if builds else ()), "validate")
    return next((remedy_of(root, manifest, stage) for stage in wanted if stage not in made), None)


def remedy_of(root: Path, manifest: Manifest, name: str) -> str:
    """The command that makes what a stage makes."""
    return stage_named(name).remedy.format(out=shlex.quote(str(root)), model=shlex.quote(manifest.model))


def _what(name: str) -> str:
    kind, _, network = name.partition(":")
    names = {"quantize": "checkpoint", "search": "table of forms", "export": "ONNX file", "build": "engine"}
    what = names.get(kind, kind)
    return f"{what} of {network}" if network and kind != "validate" else what


def _digest(items: Mapping[str, Artifact], *, all_of: bool = False) -> str | None:
    read = {path: item.sha256 for path, item in items.items() if all_of or item.kind not in _NOT_READ}
    return digest_of(read) if read else None


def has_results(report: Report, name: str) -> bool:
    """Whether the report has what a stage found."""
    kind, _, network = name.partition(":")
    known = report.companions or {}
    if name == "validate:companions":
        return report.whole_pipeline is not None and all(item.parity is not None for item in known.values())
    if network:
        return network in known and (kind != "build" or known[network].engine is not None)
    needed = {"build": ("engine",), "validate": ("parity", "coverage")}.get(name, ())
    return all(getattr(report, section) is not None for section in needed)


def clear_results(report: Report, name: str) -> None:
    """Strikes from the report what a stage found, noted and took."""
    stage = stage_named(name)
    for section in stage.sections:
        if section in type(report).model_fields:
            setattr(report, section, type(report).model_fields[section].get_default(call_default_factory=True))
    _clear_networks(report, name)
    gone = report.stages.pop(name, None)
    if gone is not None:
        report.notes = [note for note in report.notes if note not in gone.notes]


def _clear_networks(report: Report, name: str) -> None:
    kind, _, network = name.partition(":")
    known = dict(report.companions or {})
    if name == "validate:companions":
        known = {key: result.model_copy(update={"parity": None}) for key, result in known.items()}
    elif network in COMPANION_NAMES and network in known and kind == "export":
        known.pop(network)
    elif network in COMPANION_NAMES and network in known and kind == "build":
        result = known[network]
        left = [text for text in result.mismatches if not text.endswith(" in the engine")]
        update = {"engine": None, "layers": {**result.layers, "engine": {}}, "mismatches": left}
        known[network] = result.model_copy(update=update)
    report.companions = known or None
