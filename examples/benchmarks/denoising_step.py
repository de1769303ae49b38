"""Seconds of one denoising step, each method's beside full precision's, in turn and in one process.

What is timed is the network alone, on a batch; the median of many. Methods are what they are at run time: how long they
learn does not matter here, so they learn for one iteration. Peers take part where they are installed.

    python denoising_step.py [--threads 1] [--images 20] [--repeats 15]
"""

import argparse
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from _diffusion_peers import PEERS, offers, quantized

import hf_quant
from hf_quant import QuantConfig
from hf_quant.diffusion.drawing import backbone
from hf_quant.diffusion.loading_pipeline import load_pipeline
from hf_quant.running.resources import versions

HERE = Path(__file__).resolve().parent
MODELS, OUT = HERE.parent / "models", HERE / "results" / "denoising_step.json"
DRAWN = {"digits-unet": {}, "digits-dit": {"class_labels": range(10)}}
SETTINGS = {"W8A16": (8, None), "W4A16": (4, None), "W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
OURS: dict[str, tuple[str, dict]] = {  # setting -> method, arguments
    "W8A16": ("rtn", {"group_size": 64}),
    "W4A16": ("rtn", {"group_size": 64}),
    "W8A8, each token's range": ("dynamic-w8a8", {}),
    "W8A8, one range": ("int8-default", {}),
    "W4A8, each token's range": ("dynamic-w8a8", {}),
    "W4A8, one range": ("q-diffusion", {"iterations": 1, "calibration_steps": 4}),
    "W4A8, low-rank branch": ("svdquant", {"rank": 4}),
    "W4A4, a range a timestep": ("tdq", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [row for name in DRAWN for row in measured(name, given)]
    about = {
        "device": f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": given.threads,
        "images": given.images,
        "repeats": given.repeats,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
    }
    OUT.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(table(rows))


def measured(name: str, given: argparse.Namespace) -> list[dict]:
    """Rows of one pipeline."""
    networks = {("full precision", ""): backbone(load_pipeline(MODELS / name))}
    for label, (method, arguments) in OURS.items():
        pipeline = load_pipeline(MODELS / name)
        bits, act_bits = SETTINGS[label.split(",")[0]]
        rounded = {} if act_bits is None else {"act_bits": act_bits}
        config = QuantConfig(method, bits=bits, allow=["*"], **rounded, **arguments)
        hf_quant.quantize(pipeline, config, pictures=0, progress=False, **DRAWN[name])
        networks[label, method] = backbone(pipeline)
    for peer in PEERS:
        for setting in SETTINGS:
            if offers(peer, setting):
                try:
                    networks[setting, peer] = backbone(quantized(peer, setting, MODELS / name))
                except Exception as error:  # whatever a peer does not offer here: the others are timed all the same
                    print(f"{name}, {peer}, {setting}: {type(error).__name__}: {str(error).splitlines()[0]}")
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in networks}
    for turn in range(given.repeats + 2):
        for key, network in list(networks.items()):
            try:
                seconds = step(network, given.images)
            except Exception as error:  # whatever a peer's own kernels find wrong when they first run
                print(f"{name}, {key}: {type(error).__name__}: {str(error).splitlines()[0]}")
                del networks[key]
                continue
            if turn > 1:
                taken[key].append(seconds)
    full = statistics.median(taken["full precision", ""])
    return [
        {
            "pipeline": name,
            "setting": label,
            "method": method,
            "seconds": round(statistics.median(found), 5),
            "of_full_precision": round(statistics.median(found) / full, 3),
        }
        for (label, method), found in taken.items()
        if (label, method) in networks
    ]


@torch.inference_mode()
def step(network: torch.nn.Module, images: int) -> float:
    """Seconds of one call on a batch."""
    config, generator = network.config, torch.Generator().manual_seed(0)
    x = torch.randn(images, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    classes = {"class_labels": torch.arange(images) % 10} if "num_embeds_ada_norm" in config else {}
    began = time.perf_counter()
    network(x, timestep=torch.full((images,), 500), **classes)
    return time.perf_counter() - began


def table(rows: list[dict]) -> str:
    lines = ["| pipeline | setting | method | ms | of full precision's |", "|---|---|---|---:|---:|"]
    for r in rows:
        ms, share = 1000 * r["seconds"], r["of_full_precision"]
        lines.append(f"| {r['pipeline']} | {r['setting']} | {r['method']} | {ms:.1f} | {share:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
