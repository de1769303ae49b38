"""What training on a low-bit base costs: a step of LoRA in time and memory, and low-rank beside full training.

Time: both models in one process, steps in turn, medians. Memory: every model in a process of its own, resident set
when loaded and with its adapter trained for one step, less that of the same process before it loaded anything. The
weights are random (of a Llama's shapes): nothing here depends on them.

    python adapter_training.py --hidden 1024 --layers 6
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_quant

HERE = Path(__file__).resolve().parent
PARTS = ("time", "memory", "qat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="the others are kept as they were")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "adapter_training.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given, *given.child)))
        return
    kept = json.loads(given.out.read_text())["parts"] if given.out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        bases = save_bases(given, Path(scratch))
        if "time" in given.parts:
            kept["time"] = stamped(given, seconds(given, bases))
        for part, kinds in (("memory", ("bf16", "w4")), ("qat", ("lr-qat", "lsq"))):
            if part in given.parts:
                kept[part] = stamped(given, {k: spawn(given, k, bases.get(k, bases["bf16"])) for k in kinds})
    summary = summarize(kept)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"summary": summary, "parts": kept}, indent=1) + "\n")
    print(json.dumps(summary))


def save_bases(given: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """The float model, and itself in 4 bits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=11 * given.hidden // 4,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=given.hidden // 128,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "bf16")
    hf_quant.quantize(model, hf_quant.QuantConfig("rtn", bits=4, group_size=given.group_size), progress=False)
    model.save_pretrained(folder / "w4")
    return {"bf16": folder / "bf16", "w4": folder / "w4"}


def tuned(folder: Path | str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(hf_quant.prepare_for_training(model) if "w4" in str(folder) else model, config)


def stepper(given: argparse.Namespace, folder: Path | str) -> tuple[torch.nn.Module, torch.optim.Optimizer, dict]:
    model = tuned(folder)
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()
    ids = torch.randint(0, 4096, (given.batch_size, given.window), generator=torch.Generator().manual_seed(0))
    learned = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(learned, lr=1e-4), {"input_ids": ids, "labels": ids}


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict) -> float:
    began = time.perf_counter()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def seconds(given: argparse.Namespace, bases: dict[str, Path]) -> dict:
    """Seconds of a step of each, taken in turn."""
    ready = {kind: stepper(given, folder) for kind, folder in bases.items()}
    for model, _, _ in ready.values():
        model.gradient_checkpointing_disable()
        model.train()
    took: dict[str, list[float]] = {kind: [] for kind in ready}
    for _ in range(given.rounds + 1):
        for kind, parts in ready.items():
            took[kind].append(step(*parts))
    return {kind: [round(t, 4) for t in times[1:]] for kind, times in took.items()}  # the first makes layouts


def spawn(given: argparse.Namespace, kind: str, folder: Path) -> dict:
    sizes = ("hidden", "layers", "batch_size", "window", "group_size")
    options = [f"--{n.replace('_', '-')}={getattr(given, n)}" for n in sizes]
    command = [sys.executable, __file__, *options, "--child", kind, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(given: argparse.Namespace, kind: str, folder: str) -> dict:
    """Mebibytes of this process: before loading, and more than that when loaded, after a step, and at the peak."""
    before = resident()
    if kind in ("lr-qat", "lsq"):
        return {"before": before, **trained(given, kind, folder, before)}
    model, optimizer, batch = stepper(given, folder)
    loaded = resident() - before
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    step(model, optimizer, {n: t[:1, :64] for n, t in batch.items()})
    return {"before": before, "loaded": loaded, "after a step": resident() - before, "peak": peak() - before}


def trained(given: argparse.Namespace, method: str, folder: str, before: float) -> dict:
    """Quantization-aware training of the whole model for two steps, from rounding to nearest."""
    from dataclasses import replace

    from hf_quant.recipe import Job
    from hf_quant.stages.range import AbsMaxRange
    from hf_quant.stages.solver import Nearest

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    recipe = hf_quant.QuantConfig(method, bits=4, group_size=given.group_size, steps=2, batch_size=1).quantizer()
    ids = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    report = replace(recipe, range=AbsMaxRange(), objective=None, solver=Nearest()).quantize(
        model, Job(data=ids, progress=False)
    )
    training = {n: report.training[n] for n in ("trained", "optimizer_bytes")}
    return {"peak": peak() - before, **training}


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def peak() -> float:
    """Of this program: `ru_maxrss` would begin at that of the process it was started from."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def stamped(given: argparse.Namespace, result: dict) -> dict:
    sizes = {n: getattr(given, n) for n in ("hidden", "layers", "batch_size", "window", "group_size")}
    versions = {"hf-quant": hf_quant.__version__, **{n: version(n) for n in ("torch", "transformers", "peft")}}
    where = {"machine": platform.machine(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    return {"sizes": sizes, "versions": versions, **where, "date": datetime.now(UTC).date().isoformat(), **result}


def summarize(parts: dict) -> dict[str, float]:
    """What the parts say as ratios."""
    found: dict[str, float] = {}
    if "time" in parts:
        w4, bf16 = (statistics.median(parts["time"][k]) for k in ("w4", "bf16"))
        found["step on w4 / step on bf16"] = round(w4 / bf16, 3)
    if "memory" in parts:
        for key in ("after a step", "peak"):  # what is loaded is mapped, and not resident before it is used
            found[f"w4 / bf16, {key}"] = round(parts["memory"]["w4"][key] / parts["memory"]["bf16"][key], 3)
    if "qat" in parts:
        lr, full = parts["qat"]["lr-qat"], parts["qat"]["lsq"]
        found["lr-qat / lsq, peak"] = round(lr["peak"] / full["peak"], 3)
        found["lr-qat / lsq, optimizer"] = round(lr["optimizer_bytes"] / full["optimizer_bytes"], 4)
    return found


if __name__ == "__main__":
    main()
