"""Numbers that JSON lacks are written as words that every reader takes, and come back as numbers."""

import json
import math

import pytest
from pydantic import BaseModel

from qdexport.core.json_text import json_text


class _Record(BaseModel):
    value: float
    values: list[float] = []
    names: dict[str, float] = {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -0.0, 5e-324])
def test_every_number_comes_back(value: float) -> None:
    record = _Record(value=value, values=[value, 1.0], names={"a": value})
    text = json_text(record.model_dump(mode="json"))
    json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity as bare words are no JSON
    read = _Record.model_validate_json(text)
    assert [repr(item) for item in (read.value, *read.values, read.names["a"])] == [
        repr(value), repr(value), "1.0", repr(value),
    ]  # fmt: skip


def test_nothing_in_it_can_do_anything_to_a_terminal() -> None:
    text = json_text({"\x1b]0;owned\x07": "\x9b2J\u202e\x7f\udce9"})
    assert text.isascii()
    assert text.isprintable()
