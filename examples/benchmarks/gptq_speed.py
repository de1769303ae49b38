"""How long gptq takes here and in GPTQModel, side by side: the same model, the same tokens, the same machine, in turn.

Every run is a process of its own (A B A B ...), so neither profits from the other's caches; only the call that
quantizes is timed, not the imports, the loading or the saving. Each library runs with its own defaults. `cpu_seconds`
is the processor time of all threads in that call: it tells work from waiting on a machine that others use.

    python gptq_speed.py MODEL CALIBRATION.npy --peer-python PEERS/bin/python
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "calibration.npy"
        np.save(ids, np.load(arguments.calibration)[: arguments.rows])
        shape = list(np.load(ids).shape)
        runs: dict[str, list[dict]] = {"hf-quant": [], "GPTQModel": []}
        for turn in range(arguments.rounds):
            for name, python, script in (
                ("hf-quant", sys.executable, "_gptq_ours.py"),
                ("GPTQModel", arguments.peer_python, "_gptq_gptqmodel.py"),
            ):
                load = os.getloadavg()[0]
                out = Path(folder) / f"{name}-{turn}"
                sizes = [str(arguments.bits), str(arguments.group_size)]
                run = once([python, HERE / script, arguments.model, ids, out, *sizes], folder)
                runs[name].append({**run, "load_before": round(load, 2)})
                print(f"round {turn + 1}  {name:10s} {run['seconds']:7.1f} s")
    seconds, cpu = (
        {name: [round(run[clock], 2) for run in of] for name, of in runs.items()}
        for clock in ("seconds", "cpu_seconds")
    )
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    result = {
        "model": Path(arguments.model).name,
        "calibration": {"file": Path(arguments.calibration).name, "shape": shape},
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "seconds": seconds,
        "median_seconds": medians,
        "ratio": round(medians["hf-quant"] / medians["GPTQModel"], 3),
        "ratio_by_round": [round(a / b, 3) for a, b in zip(*seconds.values(), strict=True)],
        "cpu_seconds": cpu,
        "load_before": {name: [run["load_before"] for run in of] for name, of in runs.items()},
        "threads": {name: of[0]["threads"] for name, of in runs.items()},
        "config": {name: of[0]["config"] for name, of in runs.items()},
        "versions": {name: of[0]["versions"] for name, of in runs.items()},
        "device": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"medians {medians['hf-quant']:.1f} s and {medians['GPTQModel']:.1f} s: ratio {result['ratio']:.2f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("calibration", type=Path, help=".npy of token ids [n, S]")
    parser.add_argument("--peer-python", required=True, help="python of an environment with gptqmodel")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gptq_speed.json")
    return parser.parse_args()


def once(command: list[str | Path], folder: str) -> dict:
    """Run a worker; the JSON of its last line."""
    # GPTQModel's CPU worker pool stalls when it is wider than the machine
    env = {**os.environ, "GPTQMODEL_CPU_WORKERS": str(len(os.sched_getaffinity(0)))}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{command[1]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def processor() -> str:
    """The processor's name as the kernel knows it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
