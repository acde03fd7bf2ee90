"""The page docs/reliability.md: each tool rewrites the section between its own markers."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PAGE", "write_section"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
_HEAD = "# What goes wrong, and how it ends\n"


def write_section(name: str, text: str) -> None:
    """Puts ``text`` between the markers of ``name``; a section that is not there is added at the end."""
    begin, end = f"<!-- {name}: begin, written by a tool -->", f"<!-- {name}: end -->"
    page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else _HEAD
    section = f"{begin}\n{text.strip()}\n{end}"
    before, found, rest = page.partition(begin)
    after = rest.partition(end)[2]
    page = f"{before}{section}{after}" if found else f"{page.rstrip()}\n\n{section}\n"
    PAGE.write_text(page, encoding="utf-8")
