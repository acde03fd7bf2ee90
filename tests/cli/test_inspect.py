"""What ``qdexport inspect`` prints."""

from __future__ import annotations

import io

from qdexport.cli import inspect as command
from qdexport.cli.console import make_console


def test_names_of_dimensions_are_no_markup() -> None:
    out = io.StringIO()
    facts = {
        "inputs": {"sample": "FLOAT[batch,4,height,width]"},
        "layers": [{"name": "conv_in", "shape": "[out,4,3,3]"}],
    }
    command._print(facts, make_console(file=out, width=120), None)
    assert "sample FLOAT[batch,4,height,width]" in out.getvalue()
    assert "[out,4,3,3]" in out.getvalue()
