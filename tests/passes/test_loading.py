"""Passes that users bring: found, placed, and refused with one message."""

from __future__ import annotations

import pytest

from qdexport.errors import GraphPassError, RecipeError
from qdexport.passes import default_passes
from qdexport.passes.loading import load_pass, with_passes

TEXT = """
class Mine:
    name = "my-pass"
    exact = True
    runs_after = ({after})

    def apply(self, model, context, report):
        for node in model.graph:
            report.touched.append(node.name)


class Half:
    name = "half"
"""


@pytest.fixture
def file(tmp_path):
    def write(after='"fold-adapters",', text=TEXT):
        path = tmp_path / "mine.py"
        path.write_text(text.replace("{after}", after))
        return path

    return write


def test_a_pass_stands_behind_what_it_names(file):
    mine = load_pass(f"{file()}:Mine")
    names = [item.name for item in with_passes(default_passes(), [mine])]
    assert names.index("my-pass") == names.index("fold-adapters") + 1
    assert names[-1] == "legalize-types"


@pytest.mark.parametrize(("after", "place"), [("", 0), ('"legalize-types",', -2)])
def test_first_or_before_the_check_of_types(file, after, place):
    mine = load_pass(f"{file(after)}:Mine")
    assert [item.name for item in with_passes(default_passes(), [mine])][place] == "my-pass"


def test_what_cannot_be_used_is_refused(file, tmp_path):
    path = file()
    for source, message in (
        (str(path), "is not FILE.py:Class"),
        (f"{tmp_path / 'none.py'}:Mine", "does not exist"),
        (f"{path}:Other", "has no class of this name"),
        (f"{path}:Half", "has no exact, runs_after, apply"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_pass(source)
    with pytest.raises(GraphPassError, match="ended with ZeroDivisionError"):
        load_pass(f"{file(text='1 / 0')}:Mine")


def test_names_that_clash_or_do_not_exist(file):
    mine = load_pass(f"{file()}:Mine")
    with pytest.raises(RecipeError, match="there is a pass 'my-pass' already"):
        with_passes(default_passes(), [mine, mine])
    with pytest.raises(RecipeError, match="runs after 'nothing-known', which is no pass"):
        with_passes(default_passes(), [load_pass(f"{file(chr(34) + 'nothing-known' + chr(34) + ',')}:Mine")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "my-pass"', "name = 7"), "`name` is 7"),
        (("exact = True", 'exact = "yes"'), "`exact` is 'yes'"),
        (("runs_after = ({after})", 'runs_after = "fold-adapters"'), "`runs_after` is 'fold-adapters', not a tuple"),
        (("def apply(self, model, context, report):", "apply = None\n    def other(self, model, context, report):"),
         "`apply` is None"),
    ],
)  # fmt: skip
def test_a_pass_with_a_wrong_attribute_is_refused(file, change, message):
    with pytest.raises(RecipeError, match=message):
        load_pass(f"{file(text=TEXT.replace(*change))}:Mine")


@pytest.mark.parametrize("text", ["raise SystemExit(0)", "import sys; sys.exit('bye')", "1 / 0", "def f(:", "\x00"])
def test_whatever_the_file_does_names_the_file(file, text):
    with pytest.raises(GraphPassError, match=r"mine\.py") as caught:
        load_pass(f"{file(text=text)}:Mine")
    assert caught.value.keep_traceback


def test_a_pass_that_cannot_be_made_is_named(file):
    text = TEXT.replace("    def apply", "    def __init__(self):\n        raise KeyError(1)\n\n    def apply")
    with pytest.raises(GraphPassError, match="making the pass ended with KeyError"):
        load_pass(f"{file(text=text)}:Mine")
