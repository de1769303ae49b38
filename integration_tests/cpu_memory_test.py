"""What a packed model takes in memory on CPU: the benchmark, one process a model, by resident size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "cpu_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident sizes are read from /proc")
def test_a_4_bit_model_takes_less_than_035_of_bfloat16s_memory() -> None:
    done = subprocess.run([sys.executable, SCRIPT], check=True, capture_output=True, text=True)
    print(done.stdout)
    sizes = {name: row["after_a_forward"] for name, row in json.loads(done.stdout)["bytes"].items()}
    assert sizes["W4 g128"] < 0.35 * sizes["bf16"]
    assert sizes["W8 rows"] < 0.6 * sizes["bf16"]
