"""Passes that users bring: a class in a Python file of theirs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdexport.errors import GraphPassError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdexport.graph.runner import GraphPass

__all__ = ["load_pass", "with_passes"]

# nothing may come behind the pass that checks every type
_LAST = "legalize-types"


def load_pass(source: str) -> GraphPass:
    """Makes the pass that ``FILE.py:Class`` names; the file is executed.

    Raises:
        RecipeError: there is no such file or class, or the class does not follow ``GraphPass``.
        GraphPassError: the file cannot be executed.
    """
    file, separator, name = source.rpartition(":")
    path = Path(file)
    if not separator or not name.isidentifier():
        raise RecipeError(f"--pass {source!r} is not FILE.py:Class")
    if not path.is_file():
        raise RecipeError(f"--pass {source!r}: {path} does not exist")
    module_name = f"qdexport_pass_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"--pass {source!r}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        failure = GraphPassError(f"--pass {source!r}: {path} ended with {type(error).__name__}: {error}")
        failure.keep_traceback = True
        raise failure from error
    return _checked(source, getattr(module, name, None))


def _checked(source: str, kind: Any) -> GraphPass:
    if not isinstance(kind, type):
        raise RecipeError(f"--pass {source!r}: the file has no class of this name")
    missing = [item for item in ("name", "exact", "runs_after", "apply") if not hasattr(kind, item)]
    if missing:
        raise RecipeError(
            f"--pass {source!r}: the class has no {', '.join(missing)}; docs/development.md says what a pass needs"
        )
    wrong = _wrong_attribute(kind)
    if wrong:
        raise RecipeError(f"--pass {source!r}: {wrong}; docs/development.md says what a pass needs")
    try:
        made: GraphPass = kind()
    except (Exception, SystemExit) as error:
        failure = GraphPassError(f"--pass {source!r}: making the pass ended with {type(error).__name__}: {error}")
        failure.keep_traceback = True
        raise failure from error
    return made


def _wrong_attribute(kind: Any) -> str:
    if not isinstance(kind.name, str) or not kind.name:
        return f"`name` is {kind.name!r}, not a text"
    if not isinstance(kind.exact, bool):
        return f"`exact` is {kind.exact!r}, not True or False"
    after = kind.runs_after
    if not isinstance(after, tuple | list) or not all(isinstance(item, str) for item in after):
        return f"`runs_after` is {after!r}, not a tuple of names of passes"
    return "" if callable(kind.apply) else f"`apply` is {kind.apply!r}, not a method"


def with_passes(default: Sequence[GraphPass], extra: Sequence[GraphPass]) -> list[GraphPass]:
    """Puts extra passes behind what they name in ``runs_after``, else first; never behind the check of all types.

    Raises:
        RecipeError: a pass names one in ``runs_after`` that there is not, or has the name of another.
    """
    passes = list(default)
    for item in extra:
        names = [known.name for known in passes]
        unknown = [name for name in item.runs_after if name not in names]
        if unknown:
            raise RecipeError(f"pass {item.name!r} runs after {unknown[0]!r}, which is no pass; see `qdexport passes`")
        if item.name in names:
            raise RecipeError(f"there is a pass {item.name!r} already; give yours another name")
        place = max((names.index(name) + 1 for name in item.runs_after), default=0)
        passes.insert(min(place, names.index(_LAST)) if _LAST in names else place, item)
    return passes
