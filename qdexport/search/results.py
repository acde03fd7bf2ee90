"""A folder of answers that survive an interruption: one small file per question, each whole or absent."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qdexport.core.files import digest_of, write_json

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["AnswerCache"]


class AnswerCache:
    """Answers by question.

    Args:
        folder: for the files; made when the first answer is stored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.found = 0
        self.stored = 0

    def get(self, *question: Any) -> dict[str, Any] | None:
        """The stored answer to a question of JSON-able parts; None where there is none, or none that can be read."""
        path = self._path(question)
        try:
            answer: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        self.found += 1
        return answer

    def put(self, answer: dict[str, Any], *question: Any) -> None:
        """Stores an answer. Raises ``OutputError`` when the folder cannot be written."""
        write_json(self._path(question), answer)
        self.stored += 1

    def _path(self, question: tuple[Any, ...]) -> Path:
        return self._folder / f"{digest_of(*question)}.json"
