"""Text from files, made safe to show: what a terminal would obey becomes visible letters."""

from __future__ import annotations

import re

__all__ = ["UNSAFE", "one_line", "shown"]

# C0 and C1 controls but for tab and newline, line separators, the controls of writing direction (they make a name look
# like another), and lone surrogates (a file name that is not UTF-8; no stream can encode them)
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)


def shown(text: str) -> str:
    """The text with every character that a terminal may obey written as an escape; lines stay lines."""
    return UNSAFE.sub(_escape, text)


def one_line(text: str) -> str:
    """As :func:`shown`, and with newlines as escapes too: a name cannot begin a line of its own."""
    return shown(text).replace("\n", "\\n")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, as the file system's decoder keeps it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
