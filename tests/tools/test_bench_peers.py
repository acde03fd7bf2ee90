"""The comparison with ModelOpt, without ModelOpt: its columns, and what a column says that could not be made."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def peers():
    """The module, importable as it is for the script beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
        import benchmarks.peers

        yield benchmarks.peers


def test_every_format_has_columns_of_both(peers):
    for model in peers.MODELS:
        for form in peers.FORMATS:
            columns = peers.routes(model, form)
            assert {route.foreign for route in columns} == {False, True}
            assert len({route.name for route in columns}) == len(columns)
            assert all((route.spec["model"], route.spec["format"]) == (model, form) for route in columns)


def test_sdxl_is_never_held_in_fp32(peers):
    assert not any("FP32" in route.name for form in peers.FORMATS for route in peers.routes("sdxl", form))


def test_a_column_that_failed_has_its_last_words_and_no_numbers(peers):
    route = next(route for route in peers.routes("unet50m", "w4a8") if route.foreign)
    error = RuntimeError("benchmarks.modelopt_child ended with code 1; it last said:\nTraceback\nAssertionError: no\n")
    column = peers.failed(route, error)
    assert column["failed"] == "AssertionError: no"
    assert {cell for _, (cell,) in peers.rows_of([column])} == {"-"}
