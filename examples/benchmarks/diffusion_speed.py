"""How long methods take to quantize a diffusion pipeline, at equal settings, one after the other.

The whole call is timed, in a process of its own: recording trajectories, every block, and the pictures of the card.
`cpu_seconds` is the processor time of all threads: it tells work from waiting on a machine that others use. `phases`
are the seconds that were spent solving and fitting, by block ("temporal": what depends on the timestep alone).
With `--kill-after BLOCK` the process is killed once that block is in the run directory, and begun again: `sessions` are
the seconds of both, start-up included.

    python diffusion_speed.py [PIPELINE] [--iterations 1000] [--kill-after up_blocks.0] [--out FILE]
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline

import hf_quant
from hf_quant import QuantConfig
from hf_quant.diffusion.drawing import backbone
from hf_quant.report import Report

HERE = Path(__file__).resolve().parent
METHODS = ("q-diffusion", "tfmq-dm", "tfm-framework")


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(quantized(arguments)), flush=True)
        return
    result: dict[str, Any] = {
        "pipeline": Path(arguments.pipeline).name,
        "settings": settings(arguments),
        "runs": [],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {"hf-quant": hf_quant.__version__, "torch": torch.__version__},
    }
    for method in arguments.methods:
        load = os.getloadavg()[0]
        with TemporaryDirectory() as folder:
            first = [session(arguments, method, Path(folder), arguments.kill_after)] if arguments.kill_after else []
            sessions = [*first, session(arguments, method, Path(folder), None)]
        report = sessions[-1].pop("report")
        run = {"method": method, "load_before": round(load, 2)}
        run |= {k: round(sum(s[k] for s in sessions), 1) for k in ("seconds", "cpu_seconds")}
        result["runs"].append({**run, "sessions": sessions, **report})
        print(json.dumps(run), flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def settings(arguments: argparse.Namespace) -> dict[str, int]:
    return {"bits": 4, "act_bits": 8, "calibration_steps": 20, "iterations": arguments.iterations}


def session(arguments: argparse.Namespace, method: str, folder: Path, kill_after: str | None) -> dict[str, Any]:
    """One process, to its end or until it has written a block."""
    command = [sys.executable, __file__, arguments.pipeline, "--iterations", str(arguments.iterations)]
    command += ["--methods", method, "--child", str(folder)]
    wall, cpu = time.perf_counter(), used()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while kill_after and child.poll() is None:
            if any(folder.rglob(f"{kill_after}.safetensors")):
                child.kill()
                break
            time.sleep(0.5)
        out = child.communicate()[0]
    spent = {"seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(used() - cpu, 1)}
    if kill_after:
        return {**spent, "killed_after": kill_after}
    if child.returncode:
        raise SystemExit(f"{method} ended with {child.returncode}")
    return {**spent, "report": json.loads(out.splitlines()[-1])}


def used() -> float:
    """Processor seconds of processes that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def quantized(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one process does."""
    pipeline = DiffusionPipeline.from_pretrained(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    hf_quant.quantize(pipeline, QuantConfig(arguments.methods[0], run_dir=arguments.child, **settings(arguments)))
    report = backbone(pipeline).hf_quant_report
    return {"bits_per_weight": report.bits_per_weight, "phases": phases(report, backbone(pipeline))}


def phases(report: Report, model: torch.nn.Module) -> dict[str, float]:
    """Seconds by block, as the report has them for each layer."""
    spent: dict[str, float] = defaultdict(float)
    for entry in report.coverage:
        spent[block_of(entry.name)] += entry.seconds or 0.0
    return {name: round(seconds, 1) for name, seconds in spent.items() if seconds}


def block_of(name: str) -> str:
    """`down_blocks.0`, or "temporal" for what lies on the way of the timestep."""
    if any(part in name for part in ("time_emb", "timestep_embedder", "norm1.linear")):
        return "temporal"
    return ".".join(name.split(".")[:2])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", nargs="?", default=str(HERE.parent / "models" / "digits-unet"))
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--kill-after", metavar="BLOCK", help="kill it once this block is written, and begin again")
    parser.add_argument("--child", metavar="RUN_DIR", help=argparse.SUPPRESS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "diffusion_speed.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
