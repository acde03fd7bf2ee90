"""Turns a failed build into one message: what happened, which torch module, why, and what to do."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import DecodeError

from qdexport.build.known_errors import KNOWN_ERRORS
from qdexport.build.plan import module_of
from qdexport.build.suspects import node_quoted_in, runtime_scales

if TYPE_CHECKING:
    from qdexport.build.child import BuildResult
    from qdexport.build.process import ChildRun

__all__ = ["FailedBuild", "explain"]

_MOST_SUSPECTS = 5
# these follow every other error: a builder without a GPU looks for one, the parser frames what it quotes
_NOISE = ("CUDA driver version is insufficient", "ModelImporter.cpp:14", "Invalid Node - ")
_ERROR_LINE = re.compile(r"^(?:(?:INTERNAL_)?ERROR: | ?Internal Error: )(?P<text>.*)", re.MULTILINE)
_LOG_LINE = re.compile(r"^(?:VERBOSE|INFO|WARNING): ")
_PARSING = re.compile(r"^VERBOSE: Parsing node: (?P<node>.*) \[\w+\]$", re.MULTILINE)
_STOPS = frozenset({"SIGTERM", "SIGINT", "SIGHUP"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedBuild:
    """A build that left no engine."""

    builder: str
    run: ChildRun
    onnx_path: Path
    log_path: Path
    timeout_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evidence:
    log: str
    graph: onnx.GraphProto


def explain(failed: FailedBuild) -> str:
    """The message for the user: what happened and where, advice when the cause is known, the log's path."""
    evidence = _Evidence(
        log=failed.log_path.read_text(encoding="utf-8", errors="replace"), graph=_graph(failed.onnx_path)
    )
    result = failed.run.result
    headline = _death(failed, evidence) if result is None else _refusal(failed.builder, result, evidence)
    return "\n".join([headline, *_advice(failed, evidence), f"full log: {failed.log_path}"])


def _refusal(builder: str, result: BuildResult, evidence: _Evidence) -> str:
    """The builder lived to say no."""
    error = result["errors"][0]
    text = _telling_line(error["text"]) or _first_error(evidence.log) or "it gives no reason"
    place = _place(error["node"] or node_quoted_in(text, evidence.graph)) or "the graph"
    verb = "rejects" if result["stage"] == "parse" else "cannot compile"
    return f"{builder} {verb} {place}: {text}"


def _death(failed: FailedBuild, evidence: _Evidence) -> str:
    """The builder did not live to say anything, but its log may."""
    run = failed.run
    if run.timed_out:
        return f"{failed.builder}: the build took longer than {failed.timeout_s:.0f} s; allow it more time"
    text = _first_error(evidence.log) or _last_words(evidence.log)
    node = node_quoted_in(text, evidence.graph)
    if not node and run.phase == "reading the graph":
        node = next(reversed([match["node"] for match in _PARSING.finditer(evidence.log)]), "")
    where = f" at {_place(node)}" if node else f" while {run.phase}" if run.phase else ""
    return f"{failed.builder}: the builder {_end_of(run.returncode)}{where}: {text or 'it left no message'}"


def _end_of(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    name = {item.value: item.name for item in signal.Signals}.get(-returncode, f"signal {-returncode}")
    if name == "SIGKILL":
        return "was killed (SIGKILL), most likely because the machine ran out of memory,"
    return f"was stopped ({name})" if name in _STOPS else f"crashed ({name})"


def _advice(failed: FailedBuild, evidence: _Evidence) -> list[str]:
    run = failed.run
    if run.timed_out:
        return []
    said = [match["text"] for match in _ERROR_LINE.finditer(evidence.log)]
    said += [error["text"] for error in run.result["errors"]] if run.result is not None else []
    known = next((known for known in KNOWN_ERRORS if re.search(known.pattern, "\n".join(said))), None)
    if known is not None:
        return [
            known.advice,
            *_list("nodes to look at", known.suspects(evidence.graph) if known.suspects else []),
        ]
    if run.returncode == -signal.SIGKILL:
        return ["use a machine with more memory, or build for a smaller batch or latent"]
    found = runtime_scales(evidence.graph) if run.returncode < 0 else []
    if found:
        advice = (
            "a scale that is computed at run time crashes the builder when a convolution follows: make it a "
            "constant, or scale the tensor before a quantizer of scale 1 and after the convolution"
        )
        return [advice, *_list("quantizers with such a scale", found)]
    return []


def _list(title: str, nodes: list[str]) -> list[str]:
    if not nodes:
        return []
    of_module = {module_of(node): node for node in reversed(nodes)}
    places = [_place(node) for node in reversed(of_module.values())]
    more = f" and {len(places) - _MOST_SUSPECTS} more" if len(places) > _MOST_SUSPECTS else ""
    return [f"{title}: {', '.join(places[:_MOST_SUSPECTS])}{more}"]


def _place(node: str) -> str:
    module = module_of(node)
    return f"node {node!r}" + (f" of torch module {module!r}" if module else "") if node else ""


def _first_error(log: str) -> str:
    return _telling_line("\n".join(match["text"] for match in _ERROR_LINE.finditer(log)), keep_noise=False)


def _telling_line(text: str, *, keep_noise: bool = True) -> str:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    telling = [line for line in lines if not any(noise in line for noise in _NOISE)]
    return next(iter(telling or (lines if keep_noise else [])), "")


def _last_words(log: str) -> str:
    """What the C++ run time or the interpreter printed at the very end, if anything."""
    last = next((line for line in reversed(log.split("\n")) if line.strip()), "")
    return "" if _LOG_LINE.match(last) else last.strip()


def _graph(path: Path) -> onnx.GraphProto:
    try:
        return onnx.load(path, load_external_data=False).graph
    except DecodeError:
        # the builder says so itself; there are no nodes to name
        return onnx.GraphProto()
