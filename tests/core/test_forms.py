"""Tables of forms: look-up, replacement, and files."""

from __future__ import annotations

import pytest

from qdexport.core.forms import FormEntry, FormTable, FormTrial, shipped_forms
from qdexport.core.target import TARGETS
from qdexport.errors import ModelError


def entry(form: str, **signature: str | int) -> FormEntry:
    trial = FormTrial(form=form, kernels=7, moved_bytes=9_250_000, microseconds=9.2)
    return FormEntry(operator="norm", signature=signature, form=form, tried=(trial,))


def test_the_nearest_size_answers_and_says_so() -> None:
    table = FormTable(target="t", entries=(entry("one", size=1000, images=2), entry("two", size=8000, images=2)))
    found = table.choose("norm", {"size": 2000, "images": 2}, "none")
    assert found.form == "one"
    assert found.why == "one, as for size 1000, images 2 (one: 7 kernels, 9.25 MB, 9.2 us)"
    assert table.choose("norm", {"size": 4000, "images": 2}, "none").form == "two"
    assert table.choose("norm", {"size": 8000, "images": 2}, "none").why.startswith("two, measured for this shape")


def test_the_first_size_counts_more_than_the_others() -> None:
    table = FormTable(target="t", entries=(entry("one", size=100, images=2), entry("two", size=200, images=64)))
    assert table.choose("norm", {"size": 190, "images": 1}, "none").form == "two"


def test_a_category_counts_more_than_any_size() -> None:
    table = FormTable(target="t", entries=(entry("one", then="silu", size=10), entry("two", then="other", size=1000)))
    assert table.choose("norm", {"then": "silu", "size": 1000}, "none").form == "one"


def test_new_entries_replace_and_forced_ones_answer_for_every_shape() -> None:
    table = FormTable(target="t", entries=(entry("one", size=1), entry("two", size=2)))
    new = table.with_entries((entry("three", size=2),))
    assert [item.form for item in new.entries] == ["three", "one"]
    assert new.forced({"norm": "zero"}).choose("norm", {"size": 2}, "none").form == "zero"


def test_a_file_keeps_everything(tmp_path) -> None:
    table = FormTable(target="t", entries=(entry("one", then="silu", size=1), entry("two", size=2)))
    table.save(tmp_path / "forms.json")
    assert FormTable.load(tmp_path / "forms.json") == table
    assert len((tmp_path / "forms.json").read_text().splitlines()) == 4


def test_what_is_no_table_is_refused(tmp_path) -> None:
    (tmp_path / "forms.json").write_text('{"entries": 1}')
    with pytest.raises(ModelError, match="is no FormTable of qdexport"):
        FormTable.load(tmp_path / "forms.json")
    with pytest.raises(ModelError, match="does not exist; `qdexport search` writes"):
        FormTable.load(tmp_path / "absent.json")


def test_shipped_tables_name_forms_that_passes_have() -> None:
    from qdexport.passes import FORM_PASSES

    forms = {item.operator: item.forms for item in FORM_PASSES}
    for target in TARGETS:
        for item in shipped_forms(target).entries:
            assert item.form in forms[item.operator]
            assert not item.tried or item.form in {trial.form for trial in item.tried if not trial.why_not}
    assert shipped_forms("tensorrt-rtx").entries
