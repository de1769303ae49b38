"""Everything that needs a GPU, within 8 minutes: the tests marked `gpu`, then the benchmarks, then one JSON.

`make bench-gpu`, or `python kernels/bench/run.py [--minutes 8] [--output FOLDER]`. On red tests nothing is reported.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(ROOT))


def red(seconds: float, mark: str) -> str | None:
    """None when the marked tests are green, else what went wrong."""
    # the machine's own libraries, whatever they warn of; what has no kernel may need libraries that are not there
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-m", mark]
    command += ["kernels", "hf_quant/every_format_test.py"]
    if find_spec("xdist") is not None:  # most of their time is Triton's compiler's, on the host
        command += ["-n", str(min(16, len(os.sched_getaffinity(0))))]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"the tests took more than {seconds:.0f} s"
    if done.returncode == 0:
        return None
    return f"the tests are not green (pytest ends with {done.returncode}):\n{done.stdout[-4000:]}{done.stderr[-1000:]}"


def benchmarks(device_type: str, until: float) -> dict[str, Any]:
    """All figures of this machine."""
    import torch

    from hf_quant.kernels.bench import decoding, linear, operations, warm
    from hf_quant.kernels.bench.contenders import CONTENDERS
    from hf_quant.kernels.bench.timing import machine

    device = torch.device(device_type)
    end_to_end = [c for c in CONTENDERS if c.name in ("torch", "int-group W4 g128", "int-group W4 g128 symmetric")]
    now = time.monotonic()
    result: dict[str, Any] = {"machine": machine(device)}
    if device.type == "cuda":
        warm.compile_all(linear.SHAPES, linear.TOKENS, now + 0.3 * (until - now))
    now = time.monotonic()
    # a quarter of the time for whole decoders, which are few
    result["decoding"] = decoding.measure(device, now + 0.25 * (until - now), end_to_end)
    now = time.monotonic()
    result["operations"] = operations.measure(device, now + 0.15 * (until - now))
    result["linear"] = linear.measure(device, until)
    return result


def slug(name: str) -> str:
    """A device's name as a file's."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def main() -> int:
    """Tests, benchmarks, JSON; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="for tests and benchmarks together")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.stderr.write("no GPU is available here\n")
        return 2
    until = time.monotonic() + 60 * arguments.minutes - 20  # to write and to end
    wrong = red(0.6 * 60 * arguments.minutes, "gpu")
    if wrong is not None:
        sys.stderr.write(f"{wrong}\nNothing is reported.\n")
        return 1
    result = benchmarks("cuda", until)
    path: Path = arguments.output / f"{slug(result['machine']['device'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
