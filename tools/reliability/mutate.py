"""Changes of valid inputs, drawn from a seed: bytes, numbers, words, and values inside JSON."""

from __future__ import annotations

import json
import re
import struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import random

__all__ = ["mutated"]

_NUMBERS: Final = (
    b"0", b"-1", b"1e999", b"-1e999", b"NaN", b"Infinity", b"1e-320", b"0.1", b"9223372036854775808", b"1" + b"0" * 40,
    b"9" * 5000, b"0x_", b"1:1:1", b".nan", b".inf", b"2024-13-45", b"true", b"null", b'"x"', b"[]", b"{}",
)  # fmt: skip
_WORDS: Final = (
    b"\x00", b"\x1b[2J", b"\xff", b"\xed\xa0\x80", "\u202e".encode(), b"\n", b"\n\n", b"\t", b"'", b'"', b"[", b"]",
    b"{", b"}", b":", b"- ", b"&a ", b"*a", b"<<: *a\n", b"!!python/name:os.system ", b"!!binary x", b"re:(",
    b"re:(a+)+b",
    b"[red]", b"../", b"/", b"%s", b"\\ud800", b"\\u0000", b"#", b"---\n", b"PK\x05\x06", b"\x80\x04\x95", b"null",
    b"[" * 300, b'{"a":' * 300,
)  # fmt: skip
_VALUES: Final[tuple[Any, ...]] = (
    None, True, 0, -1, 1, 2**31, 2**63, 10**40, 1.5, float("nan"), float("inf"), -1e308, "", "x", "\x1b]0;a\x07",
    "../..",    "a\0b", "\ud800", [], {}, [[]], {"a": 1}, [1] * 50, "x" * 3000, [None],
)  # fmt: skip
_DIGITS: Final = re.compile(rb"-?\d+(?:\.\d+)?")


def mutated(source: random.Random, data: bytes, others: tuple[bytes, ...]) -> bytes:
    """One to four changes of an input."""
    for _ in range(source.choice((1, 1, 1, 2, 3, 4))):
        data = source.choice(_CHANGES)(source, data, others)
    return data[:2_000_000]


def _flip(source: random.Random, data: bytes, _: Any) -> bytes:
    changed = bytearray(data)
    for _ in range(source.randint(1, 4)):
        if changed:
            changed[source.randrange(len(changed))] = source.randrange(256)
    return bytes(changed)


def _cut(source: random.Random, data: bytes, _: Any) -> bytes:
    return data[: source.randint(0, len(data))]


def _remove(source: random.Random, data: bytes, _: Any) -> bytes:
    start = source.randint(0, len(data))
    return data[:start] + data[start + source.randint(1, 30) :]


def _repeat(source: random.Random, data: bytes, _: Any) -> bytes:
    start = source.randint(0, len(data))
    return data[:start] + data[start : start + source.randint(1, 80)] * source.randint(2, 6) + data[start:]


def _insert(source: random.Random, data: bytes, _: Any) -> bytes:
    place = source.randint(0, len(data))
    return data[:place] + source.choice(_WORDS) + data[place:]


def _number(source: random.Random, data: bytes, _: Any) -> bytes:
    found = list(_DIGITS.finditer(data[:100_000]))
    if not found:
        return data
    match = source.choice(found)
    return data[: match.start()] + source.choice(_NUMBERS) + data[match.end() :]


def _splice(source: random.Random, data: bytes, others: tuple[bytes, ...]) -> bytes:
    other = source.choice(others)
    start = source.randint(0, len(other))
    return data[: source.randint(0, len(data))] + other[start : start + source.randint(1, 2000)]


def _inside(source: random.Random, data: bytes, _: Any) -> bytes:
    """Another value somewhere in a JSON text, or in the header of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    has_header = 0 < length <= len(data) - 8
    text = data[8 : 8 + length] if has_header else data
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return data
    changed = json.dumps(_replaced(source, value)).encode("utf-8", "surrogatepass")
    if not has_header:
        return changed
    return struct.pack("<Q", len(changed)) + changed + data[8 + length :]


def _replaced(source: random.Random, value: Any, depth: int = 0) -> Any:
    inner = isinstance(value, dict | list) and value and depth < 30
    if isinstance(value, str) and value[:1] in {"{", "["} and source.random() < 0.8:  # JSON inside JSON: metadata
        try:
            return json.dumps(_replaced(source, json.loads(value), depth + 1))
        except (ValueError, RecursionError):
            return value
    if not inner or source.random() < 0.1:
        return source.choice(_VALUES)
    if isinstance(value, dict):
        key = source.choice(list(value))
        if source.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if source.random() < 0.1:
            return {**value, "extra\x1b": source.choice(_VALUES)}
        return {**value, key: _replaced(source, value[key], depth + 1)}
    index = source.randrange(len(value))
    return [*value[:index], _replaced(source, value[index], depth + 1), *value[index + 1 :]]


_CHANGES: Final = (
    _flip, _cut, _remove, _repeat, _insert, _insert, _number, _number, _splice, _inside, _inside, _inside,
)  # fmt: skip
