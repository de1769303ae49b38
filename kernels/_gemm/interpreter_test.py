"""Every kernel's `*_interpreted_test.py`, run by Triton's interpreter in one process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = Path(__file__).resolve().parents[1]


def test_under_the_interpreter(pytestconfig: pytest.Config) -> None:
    """Triton decides when a kernel is defined whether it is interpreted. Old versions of it warn: `-W` goes with it."""
    files = sorted(KERNELS.rglob("*_interpreted_test.py"))
    warnings = [word for w in pytestconfig.getoption("pythonwarnings") or [] for word in ("-W", w)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *warnings, *files],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=KERNELS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= len(files)
    assert "skipped" not in done.stdout
