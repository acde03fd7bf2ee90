"""YAML from users: plain values alone, and no more of them than a person or this program writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from qdexport.core.reading import reading
from qdexport.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["YAML_LIMIT", "line_of", "parse_yaml"]

YAML_LIMIT = 4_000_000  # bytes; the widths of 20,000 layers have half
_MOST_VALUES = 200_000
_DEEPEST = 50


class _Loader(yaml.SafeLoader):
    """Refuses what grows while it is read: aliases of aliases become billions of values from a few lines."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        if _count(node, {}, 0) > _MOST_VALUES:
            raise ValueError(f"it stands for more than {_MOST_VALUES:,} values; write it without aliases (*name)")
        return self.construct_document(node)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Args:
        text: the YAML.
        source: begins the message of an error.

    Raises:
        RecipeError: it is no YAML, holds a tag, a date that there is not, a number of thousands of digits, is nested
            too deeply, or its aliases stand for more values than a file can hold.
    """
    with reading(source, RecipeError, what="is not valid YAML"):
        try:
            return yaml.load(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
            raise ValueError(f"{where}{error.problem or error.context}") from error


def line_of(text: str, path: Sequence[str | int]) -> int | None:
    """The line, counted from 1, of a value in a YAML text that :func:`parse_yaml` took.

    Args:
        text: the YAML.
        path: keys and positions from the root; of what is not there the last that is counts.

    Returns:
        The line of the key, or of the entry of a list; None when not even the first is there.
    """
    node, line = yaml.compose(text, Loader=_Loader), None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = [(node.value[part], node.value[part])]
        else:
            break
        if not found:
            break
        key, node = found[-1]  # of a key that stands twice the last counts
        line = key.start_mark.line + 1
    return line


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for, those of an alias counted each time."""
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # for an alias of a node inside itself
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in parts)
    return known[id(node)]
