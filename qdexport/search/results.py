"""A folder of answers that survive an interruption: one small file per question, each whole or absent."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from qdexport.core.digests import digest_of
from qdexport.core.sealed import read_sealed, write_sealed
from qdexport.core.writing import output_errors

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["AnswerCache", "discard_answers"]

_NAME = re.compile("[0-9a-f]{64}")


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
        stored = read_sealed(self._path(question))
        # the question stands beside its answer, so that a file under another's name is not taken for it
        if stored is None or stored.get("question") != digest_of(*question) or not _is_answer(stored.get("answer")):
            return None
        self.found += 1
        return dict(stored["answer"])

    def put(self, answer: dict[str, Any], *question: Any) -> None:
        """Stores an answer. Raises ``OutputError`` when the folder cannot be written."""
        write_sealed(self._path(question), {"question": digest_of(*question), "answer": answer})
        self.stored += 1

    def _path(self, question: tuple[Any, ...]) -> Path:
        return self._folder / f"{digest_of(*question)}.json"


def discard_answers(folder: Path) -> None:
    """Removes all stored answers. Other files in the folder stay."""
    with output_errors(folder):
        for file in folder.glob("*.json"):
            if _NAME.fullmatch(file.stem):
                file.unlink(missing_ok=True)


def _is_answer(value: Any) -> bool:
    """What a search asks for: costs of a plan, or why there are none."""
    return isinstance(value, dict) and ("why_not" in value or value.keys() == {"kernels", "moved_bytes", "seconds"})
