"""``qdexport passes``."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from qdexport.cli.main import cli
from qdexport.passes import DEFAULT_ORDER, FLOATING_POINT


def test_all_passes_in_their_order():
    rows = json.loads(CliRunner().invoke(cli, ["passes", "--json"]).stdout)
    assert [row["name"] for row in rows] == [*(item.name for item in DEFAULT_ORDER), "bias-in-product"]
    assert {row["name"] for row in rows if row["numbers"] == "re-rounds"} == {"fold-reparam", "precompute-bos"}
    numbers = {row["name"]: row["numbers"] for row in rows}
    assert numbers["share-quantizers"] == "exact"
    assert numbers["merge-projections"] == "exact up to the order of sums"
    assert numbers["sink-cast"] == "exact up to roundings that fall away"
    assert all(row["what"].endswith(".") for row in rows)
    shown = CliRunner().invoke(cli, ["passes"], env={"COLUMNS": "200"}).stdout
    assert all(item.name in shown for item in DEFAULT_ORDER)
    words = " ".join(shown.split())
    assert "transformer blocks out as [length, batch, width]" in words  # no markup


@pytest.mark.parametrize("kind", [*DEFAULT_ORDER, *FLOATING_POINT], ids=lambda kind: kind.name)
def test_a_pass_says_in_its_text_what_its_exactness_is_up_to(kind):
    text = " ".join(CliRunner().invoke(cli, ["passes", kind.name]).stdout.lower().split())
    up_to = getattr(kind, "up_to", "")
    for phrase in ("the order of sums", "roundings that fall away"):
        assert (phrase in text) == (phrase in up_to), phrase


def test_one_pass_says_its_identity():
    assert "Identity:" in CliRunner().invoke(cli, ["passes", "sequence-first"]).stdout


def test_an_unknown_pass_is_refused():
    result = CliRunner().invoke(cli, ["passes", "sequence-last"])
    assert result.exit_code == 2
    assert "did you mean 'sequence-first'?" in result.stderr
