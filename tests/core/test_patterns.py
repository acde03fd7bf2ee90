"""Patterns mean what they meant, and none of them hangs."""

import fnmatch
import re
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdexport.core import patterns
from qdexport.core.patterns import check_pattern, limited, matches
from qdexport.core.recipe import BitAllocation, Rule
from qdexport.errors import RecipeError


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    monkeypatch.setattr(patterns, "_spent", {})


NAME = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"


@given(st.text("ab.*?[]!-\\", max_size=8), st.text("ab.", max_size=8))
@settings(max_examples=300, deadline=None)
def test_globs_are_those_of_fnmatch(pattern: str, name: str) -> None:
    assert matches(pattern, name) == fnmatch.fnmatchcase(name, pattern)


@pytest.mark.parametrize("pattern", [r".*\.to_out\.\d", "down.*", r"(?!up).*", r"(a|d).*0", r"x|.*"])
def test_expressions_are_those_of_re(pattern: str) -> None:
    assert matches(f"re:{pattern}", NAME) == (re.fullmatch(pattern, NAME) is not None)


@pytest.mark.parametrize("pattern", [r"re:([a-z_.0-9]+)+!", r"re:(\w|\w\.|.)*!", "re:" + "(.*)" * 8 + r"\8!"])
def test_a_pattern_that_never_ends_is_refused(pattern: str) -> None:
    check_pattern(pattern)
    started = time.process_time()
    for _ in range(3):  # the second time at once
        with pytest.raises(RecipeError, match="takes more than"):
            matches(pattern, NAME)
    assert time.process_time() - started < 1


def test_many_slow_matches_together_have_one_limit() -> None:
    started = time.process_time()

    def match_all() -> None:
        for length in range(15, 30):
            matches("re:(x+x+)+y", "x" * length)

    with pytest.raises(RecipeError, match="takes more than"):
        match_all()
    assert time.process_time() - started < 1


def test_a_sane_pattern_is_never_refused_however_often_it_is_used() -> None:
    for index in range(20_000):
        matches("re:.*attn[12].*", f"blocks.{index}.attn1.to_q")


def test_other_threads_match_too() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(matches("re:a+", "aaa")))
    thread.start()
    thread.join()
    assert found == [True]


def test_what_the_block_raises_passes_through() -> None:
    with pytest.raises(KeyError), limited("*"):
        raise KeyError


@pytest.mark.parametrize(
    "pattern", ["re:(", "re:a{99999999999999}", "re:" + "(" * 900, "re:(?<=a+)b", "*" * 1001, "re:[b-a]"]
)
def test_what_is_no_pattern_is_refused_with_the_recipe(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"pattern|regular expression"):
        Rule(match=pattern)
    with pytest.raises(ValueError, match=r"pattern|regular expression"):
        BitAllocation(protect=(pattern,))
