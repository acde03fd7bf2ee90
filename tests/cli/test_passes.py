"""``qdexport passes``."""

from __future__ import annotations

import json

from click.testing import CliRunner

from qdexport.cli.main import cli
from qdexport.passes import DEFAULT_ORDER


def test_all_passes_in_their_order():
    rows = json.loads(CliRunner().invoke(cli, ["passes", "--json"]).stdout)
    assert [row["name"] for row in rows] == [*(item.name for item in DEFAULT_ORDER), "bias-in-product"]
    assert {row["name"] for row in rows if row["numbers"] == "re-rounds"} == {"fold-reparam", "precompute-bos"}
    assert all(row["what"].endswith(".") for row in rows)
    shown = CliRunner().invoke(cli, ["passes"]).stdout
    assert all(item.name in shown for item in DEFAULT_ORDER)
    words = " ".join(shown.split())
    assert "transformer blocks out as [length, batch, width]" in words  # no markup


def test_one_pass_says_its_identity():
    assert "Identity:" in CliRunner().invoke(cli, ["passes", "sequence-first"]).stdout


def test_an_unknown_pass_is_refused():
    result = CliRunner().invoke(cli, ["passes", "sequence-last"])
    assert result.exit_code == 2
    assert "did you mean 'sequence-first'?" in result.stderr
