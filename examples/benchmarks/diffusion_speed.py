"""How long methods take to quantize a diffusion pipeline, at equal settings, one after the other in one process.

The whole call is timed: recording trajectories, every block, and the pictures of the card. `cpu_seconds` is the
processor time of all threads: it tells work from waiting on a machine that others use. `phases` are the seconds that
were spent solving and fitting, by block ("temporal": what depends on the timestep alone, fitted before the blocks).

    python diffusion_speed.py [PIPELINE] [--iterations 1000] [--out results/diffusion_speed.json]
"""

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from pathlib import Path

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
    settings = {"bits": 4, "act_bits": 8, "calibration_steps": 20, "iterations": arguments.iterations}
    result = {
        "pipeline": Path(arguments.pipeline).name,
        "settings": settings,
        "runs": [],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {"hf-quant": hf_quant.__version__, "torch": torch.__version__},
    }
    for method in arguments.methods:
        load = os.getloadavg()[0]
        pipeline = DiffusionPipeline.from_pretrained(arguments.pipeline)
        pipeline.set_progress_bar_config(disable=True)
        wall, cpu = time.perf_counter(), time.process_time()
        hf_quant.quantize(pipeline, QuantConfig(method, **settings))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        report = backbone(pipeline).hf_quant_report
        run = {"method": method, "seconds": round(wall, 1), "cpu_seconds": round(cpu, 1), "load_before": round(load, 2)}
        result["runs"].append({**run, "phases": phases(report, backbone(pipeline))})
        print(json.dumps(run), flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


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
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "diffusion_speed.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
