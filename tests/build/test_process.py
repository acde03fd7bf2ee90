"""What the child process may be, and how its memory is measured."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

IMPORT = """
import sys, qdexport.build.child
print([name for name in ('torch', 'numpy', 'onnx', 'pydantic') if name in sys.modules])
"""
MEASURE = "from qdexport.build.child import peak_rss_mb; import numpy; {action}; print(peak_rss_mb())"


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_child_imports_nothing_large():
    assert run(IMPORT) == "[]"


def test_peak_memory_is_the_childs_own():
    ballast = np.ones(400 << 17)  # 400 MiB in this process
    idle = float(run(MEASURE.format(action="pass")))
    busy = float(run(MEASURE.format(action="numpy.ones(200 << 17)")))
    assert ballast.nbytes == 400 << 20
    # an interpreter with numpy has some 30 to 100 MiB
    assert 10 < idle < 200
    # 200 MiB more; a tenth of it for what else differs between two runs
    assert 180 < busy - idle < 220
