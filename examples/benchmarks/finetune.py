"""How much of what rounding loses training wins back: KL and perplexity by bits and method, at equal steps and tokens.

Every model is trained against its full-precision original on the same windows, saved, loaded back and then measured.
`closed` is the share of gptq's KL at the same bits that is gone; gptq-refined is where lr-qat, l4q and lsq begin.
`peft-nf4` is QLoRA as PEFT does it on bitsandbytes' NF4, trained by the same loss; its adapter stays beside the codes,
as qlora's does. Rows of an earlier run with the same settings are kept; the table lies beside the JSON.

    python finetune.py MODEL CALIBRATION.npy TEST.npy --bits 3 2 --steps 40
"""

import argparse
import json
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_quant
from hf_quant.measure.evaluate import evaluate
from hf_quant.measure.reference_logits import store

HERE = Path(__file__).resolve().parent
PEER = "peft-nf4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("calibration", type=Path, help=".npy of token ids [n, S]")
    parser.add_argument("test", type=Path, help=".npy of token ids [n]")
    parser.add_argument(
        "--methods", nargs="*", default=["gptq", "gptq-refined", "lr-qat", "l4q", "lsq", "qlora", "qa-lora"]
    )
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=128, help="calibration rows")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192, help="evaluation tokens")
    parser.add_argument("--set", nargs="*", default=[], help="arguments of what trains, NAME=NUMBER")
    parser.add_argument("--dtype", default="float32", help="of the model while it is quantized and trained")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "finetune.json")
    given = parser.parse_args()
    ids = torch.from_numpy(np.load(given.calibration)[: given.rows, : given.window].astype(np.int64))
    test = torch.from_numpy(np.load(given.test).astype(np.int64))
    with tempfile.TemporaryDirectory() as logits:
        original = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        store(original, test, logits, window=given.window, tokens=given.tokens, progress=False)
        for bits in given.bits:
            for method in given.methods:
                if method == PEER and bits != 4:
                    continue
                row = (
                    peer(given, original, ids, test, logits)
                    if method == PEER
                    else ours(given, method, bits, ids, test, logits)
                )
                of_gptq = [r["kl"] for r in kept(given) if r["method"] == "gptq" and r["bits"] == bits]
                if of_gptq and method != "gptq":
                    row["closed"] = round(1 - row["kl"] / of_gptq[0], 3)
                rows = [r for r in kept(given) if (r["method"], r["bits"]) != (method, bits)] + [row]
                print(json.dumps(row), flush=True)
                write(given, rows)


def ours(given: argparse.Namespace, method: str, bits: int, ids: torch.Tensor, test: torch.Tensor, at: str) -> dict:
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype))
    trains = not method.startswith("gptq")
    chosen = {name: float(value) for name, value in (s.split("=") for s in given.set)} if trains else {}
    extra = {"steps": given.steps, "batch_size": given.batch_size} if trains else {}
    config = hf_quant.QuantConfig(method, bits=bits, group_size=given.group_size, **extra, **chosen)
    run = hf_quant.finetune if trains else hf_quant.quantize
    began = time.perf_counter()
    report = run(model, config, data=ids, progress=False)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found = measured(given, loaded, at, test)
    training = {n: report.training[n] for n in ("trained", "optimizer_bytes", "logit_difference") if report.training}
    return {"method": method, "bits": bits, "arguments": chosen, **found, "seconds": round(seconds, 1), **training}


def peer(given: argparse.Namespace, original: torch.nn.Module, ids: torch.Tensor, test: torch.Tensor, at: str) -> dict:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    base = AutoModelForCausalLM.from_pretrained(given.model, quantization_config=config, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, given.steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(i / warm, max(0, given.steps - i) / (given.steps - warm))
    )
    generator = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    for _ in range(given.steps):
        batch = ids[torch.randperm(len(ids), generator=generator)[: given.batch_size]]
        with torch.no_grad():
            target = original(batch).logits.log_softmax(-1)
        mine = model(batch).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(mine, target, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        rate.step()
    seconds = time.perf_counter() - began
    found = measured(given, model.eval(), at, test) | {"true_bits": None}
    trained = sum(p.numel() for p in learned)
    return {"method": PEER, "bits": 4, **found, "seconds": round(seconds, 1), "trained": trained}


def measured(given: argparse.Namespace, model: torch.nn.Module, at: str, test: torch.Tensor) -> dict:
    found = evaluate(model, at, test, window=given.window, tokens=given.tokens, progress=False)
    return {
        "true_bits": round(found.bits_per_weight or 0.0, 4),
        "kl": round(found.kl or 0.0, 6),
        "kl_error": round(found.kl_error or 0.0, 6),
        "perplexity": round(found.perplexity, 3),
        "top1": round(found.top1 or 0.0, 2),
    }


def settings(given: argparse.Namespace) -> dict:
    """What all rows of a file have in common."""
    names = ("group_size", "steps", "batch_size", "rows", "window", "tokens", "dtype")
    files = {"model": Path(given.model).name, "calibration": given.calibration.name, "test": given.test.name}
    return files | {n: getattr(given, n) for n in names}


def kept(given: argparse.Namespace) -> list[dict]:
    """Rows of an earlier run with the same settings."""
    result = json.loads(given.out.read_text()) if given.out.exists() else {}
    return result["rows"] if result.get("settings") == settings(given) else []


def write(given: argparse.Namespace, rows: list[dict]) -> None:
    """The rows as JSON, and as a table beside it."""
    rows.sort(key=lambda r: -r["bits"])
    result = {
        "settings": settings(given),
        "versions": {
            "hf-quant": hf_quant.__version__,
            **{n: version(n) for n in ("torch", "transformers", "peft", "bitsandbytes")},
        },
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(result))


def table(result: dict) -> str:
    """Markdown."""
    said = ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in result["settings"].items())
    lines = [f"Training against gptq: {said}.", ""]
    lines += [
        "| bits | method | true bits | KL | of gptq's gap closed | perplexity | top-1 % | seconds |",
        "|---" * 8 + "|",
    ]
    for row in result["rows"]:
        closed = f"{100 * row['closed']:.0f} %" if "closed" in row else "-"
        size = "-" if row["true_bits"] is None else f"{row['true_bits']:.3f}"
        figures = f"{row['kl']:.5f} | {closed} | {row['perplexity']:.3f} | {row['top1']:.2f} | {row['seconds']:.0f}"
        chosen = "".join(f" {n}={v:g}" for n, v in row.get("arguments", {}).items())
        lines.append(f"| {row['bits']} | {row['method']}{chosen} | {size} | {figures} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
