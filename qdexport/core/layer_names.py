"""Names of several layers that one node computes (pass merge-projections): ``a.to_q+a.to_k/MatMul``."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["layers_of", "merged_name", "node_names"]

_SEPARATOR = "+"  # no Python identifier has one, so no torch path does


def merged_name(layers: Iterable[str]) -> str:
    """The module path of a node that computes several layers."""
    return _SEPARATOR.join(layers)


def layers_of(module: str) -> tuple[str, ...]:
    """The layers behind a module path: those that were merged, in order, or the one."""
    return tuple(module.split(_SEPARATOR))


def node_names(name: str) -> tuple[str, ...]:
    """The names that a node stands for: one for each of its layers."""
    module, separator, kind = name.rpartition("/")
    return tuple(f"{layer}{separator}{kind}" for layer in layers_of(module)) if separator else (name,)
