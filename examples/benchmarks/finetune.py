"""How much of what rounding loses training wins back: KL and perplexity by bits and method, at equal tokens and time.

Every model is trained against its full-precision original on the same windows, saved, loaded back and then measured.
`closed` is the share of gptq's KL at the same bits that is gone; gptq-refined is where lr-qat, l4q and lsq begin. With
`--equal time` each method trains as many steps as fit into the seconds of the slowest row of the same bits (what does
not train: more rounds; gptq has nothing to spend time on and stays as it is; a row that would get less than a tenth
more stays as it is, too). Seconds are those of one thread's processor, whatever else runs on the machine. A row at
equal time may be trained on another machine: its steps are what the seconds at equal tokens allow, its own get a star.

Peers are trained by the same loss: `peft-nf4` is QLoRA as PEFT does it on bitsandbytes' NF4, whose adapter stays beside
the codes, as qlora's does; `torchao-qat` is its `QATConfig` over `IntxWeightOnlyConfig`, symmetric as it must be, from
rounding to nearest (an environment of its own: `pip install --no-deps torchao`).

Rows of an earlier run with the same settings are kept; the table lies beside the JSON. A method that is given a budget
(`lr-qat:budget=3.29 bits`) shares out as many bits among layers, and stands beside gptq's uniform ones.

    python finetune.py MODEL CALIBRATION.npy TEST.npy --bits 3 2 --steps 40
    python finetune.py MODEL CALIBRATION.npy TEST.npy --bits 3 2 --steps 40 --equal time
    python finetune.py MODEL CALIBRATION.npy TEST.npy --bits 3 2 --steps 40 --methods torchao-qat:lr=1e-4
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant.measure.evaluate import evaluate
from hf_quant.measure.reference_logits import store

HERE = Path(__file__).resolve().parent
METHODS = ["gptq", "gptq-refined", "lsq", "lr-qat", "l4q", "qa-lora", "qlora", "qlora:init=loftq"]
ROUNDS = 2  # of gptq-refined, as it comes
PROCESSOR = "AMX" if torch.cpu._is_amx_tile_supported() else torch.backends.cpu.get_cpu_capability()
ALIKE = 10  # fewer additional steps than a tenth are none: seconds vary by as much


@dataclass(frozen=True)
class Asked:
    """A method and its arguments, written `METHOD:NAME=VALUE,NAME=VALUE`."""

    method: str
    arguments: dict[str, float | str]

    @classmethod
    def parse(cls, text: str) -> "Asked":
        """Of what the command line says."""
        method, _, rest = text.partition(":")
        pairs = (part.split("=") for part in rest.split(",") if part)
        return cls(method, {name: _value(value) for name, value in pairs})

    @property
    def trains(self) -> bool:
        """Whether it takes steps."""
        return not self.method.startswith("gptq")

    def __str__(self) -> str:
        return self.method + "".join(
            f" {n}={v:g}" if isinstance(v, float) else f" {n}={v}" for n, v in self.arguments.items()
        )


def _value(text: str) -> float | str:
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("calibration", type=Path, help=".npy of token ids [n, S]")
    parser.add_argument("test", type=Path, help=".npy of token ids [n]")
    parser.add_argument("--methods", nargs="*", type=Asked.parse, default=[Asked.parse(m) for m in METHODS])
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3, 2])
    parser.add_argument("--equal", choices=["tokens", "time"], default="tokens")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=128, help="calibration rows")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192, help="evaluation tokens")
    parser.add_argument("--dtype", default="float32", help="of the model while it is quantized and trained")
    parser.add_argument("--products", default="highest", help="of float32 while training; medium: bfloat16")
    parser.add_argument("--again", action="store_true", help="measure rows again that are there")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "finetune.json")
    given = parser.parse_args()
    ids = torch.from_numpy(np.load(given.calibration)[: given.rows, : given.window].astype(np.int64))
    test = torch.from_numpy(np.load(given.test).astype(np.int64))
    with tempfile.TemporaryDirectory() as logits:
        original = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        store(original, test, logits, window=given.window, tokens=given.tokens, progress=False)
        for bits in given.bits:
            for asked in given.methods:
                key = (bits, str(asked), given.equal)
                if not given.again and any(key_of(r) == key for r in kept(given)):
                    continue
                much = amount(given, bits, asked)
                if much is None:
                    continue
                run = PEERS.get(asked.method, ours)
                row = same(given, bits, asked, much) or {
                    **{"bits": bits, "method": str(asked), "equal": given.equal, "processor": PROCESSOR},
                    **run(given, asked, bits, much, ids, original, lambda model: measured(given, model, logits, test)),
                }
                print(json.dumps(row), flush=True)
                write(given, [r for r in kept(given) if key_of(r) != key] + [row])


def key_of(row: dict) -> tuple[int, str, str]:
    return row["bits"], row["method"], row["equal"]


def amount(given: argparse.Namespace, bits: int, asked: Asked) -> int | None:
    """Steps (rounds of gptq-refined) that a row gets; None: there is no such row."""
    if asked.method == "peft-nf4" and bits != 4:
        return None
    first = given.steps if asked.trains else ROUNDS
    if given.equal == "tokens":
        return first
    rows = [r for r in kept(given) if r["bits"] == bits and r["equal"] == "tokens"]
    mine = [r for r in rows if r["method"] == str(asked)]
    if not mine or "spent" not in mine[0] or asked.method == "gptq":
        return None
    fixed = mine[0]["seconds"] - mine[0]["spent"]
    much = max(1, round(first * (max(r["seconds"] for r in rows) - fixed) / mine[0]["spent"]))
    return first if much - first < first / ALIKE else much


def same(given: argparse.Namespace, bits: int, asked: Asked, much: int) -> dict | None:
    """The row at equal tokens of as many steps: what it found is what this one would find."""
    rows = [r for r in kept(given) if r["bits"] == bits and r["equal"] == "tokens" and r["method"] == str(asked)]
    return rows[0] | {"equal": "time"} if given.equal == "time" and rows and rows[0]["much"] == much else None


Judge = Callable[[nn.Module], dict]


def ours(
    given: argparse.Namespace, asked: Asked, bits: int, much: int, ids: Tensor, original: nn.Module, judge: Judge
) -> dict:
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype))
    extra = {"steps": much, "batch_size": given.batch_size} if asked.trains else {}
    if asked.method == "gptq-refined":
        extra = {"rounds": much}
    width = {} if "budget" in asked.arguments else {"bits": bits}
    config = hf_quant.QuantConfig(asked.method, group_size=given.group_size, **width, **extra, **asked.arguments)
    run = hf_quant.finetune if asked.trains else hf_quant.quantize
    began, wall = time.process_time(), time.perf_counter()
    with products(given.products):
        report = run(model, config, data=ids, progress=False)
    seconds, wall = time.process_time() - began, time.perf_counter() - wall
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = judge(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    told = report.training or {}
    training = {n: told[n] for n in ("tokens", "trained", "optimizer_bytes", "logits", "logit_difference") if n in told}
    share = told["seconds"] / wall if told else 1.0
    return {"much": much, **found, "seconds": round(seconds, 1), "spent": round(seconds * share, 1), **training}


def peft_nf4(
    given: argparse.Namespace, asked: Asked, bits: int, much: int, ids: Tensor, original: nn.Module, judge: Judge
) -> dict:
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    torch.manual_seed(0)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    base = AutoModelForCausalLM.from_pretrained(given.model, quantization_config=config, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    with products(given.products):
        told = distilled(given, model, original, ids, much, float(asked.arguments.get("lr", 1e-3)))
    size = 4 + 8 / 64 + 32 / (64 * 256) + 16 * told["trained"] / matrices(original)
    return {"much": much, **judge(model.eval()), "true_bits": round(size, 4), **told}


def torchao_qat(
    given: argparse.Namespace, asked: Asked, bits: int, much: int, ids: Tensor, original: nn.Module, judge: Judge
) -> dict:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    model.requires_grad_(False)
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(given.group_size))

    def matrix(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != "lm_head"

    quantize_(model, QATConfig(config, step="prepare"), filter_fn=matrix)
    for name, module in model.named_modules():
        if matrix(module, name):
            module.weight.requires_grad_(True)
    with products(given.products):
        told = distilled(given, model, original, ids, much, float(asked.arguments.get("lr", 1e-4)))
    quantize_(model, QATConfig(config, step="convert"), filter_fn=matrix)
    size = bits + 16 / given.group_size
    return {"much": much, **judge(model.eval()), "true_bits": round(size, 4), **told, "torchao": version("torchao")}


PEERS = {"peft-nf4": peft_nf4, "torchao-qat": torchao_qat}


def matrices(model: nn.Module) -> int:
    """Weights that are quantized."""
    return sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")


def distilled(
    given: argparse.Namespace, model: nn.Module, original: nn.Module, ids: Tensor, steps: int, lr: float
) -> dict:
    """Train a peer's model by our loss, batches and schedule."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(i / warm, max(0, steps - i) / max(1, steps - warm))
    )
    began = time.process_time()
    for batch, _ in zip(batches(ids, given.batch_size), range(steps), strict=False):
        with torch.no_grad():
            target = original(batch).logits.log_softmax(-1)
        mine = model(batch).logits.log_softmax(-1)
        loss = F.kl_div(mine, target, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        rate.step()
    seconds = round(time.process_time() - began, 1)
    trained = sum(p.numel() for p in learned)
    return {"seconds": seconds, "spent": seconds, "tokens": steps * given.batch_size * ids.shape[1], "trained": trained}


def batches(ids: Tensor, size: int) -> Iterator[Tensor]:
    """Without end; every row once before any comes again."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(ids), generator=generator).split(size):
            yield ids[rows]


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Multiply float32 so; what is measured is multiplied exactly, before and after."""
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def measured(given: argparse.Namespace, model: nn.Module, at: str, test: Tensor) -> dict:
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
    names = ("group_size", "steps", "batch_size", "rows", "window", "tokens", "dtype", "products")
    files = {"model": Path(given.model).name, "calibration": given.calibration.name, "test": given.test.name}
    return files | {n: getattr(given, n) for n in names}


def kept(given: argparse.Namespace) -> list[dict]:
    """Rows of an earlier run with the same settings."""
    result = json.loads(given.out.read_text()) if given.out.exists() else {}
    return result["rows"] if result.get("settings") == settings(given) else []


def write(given: argparse.Namespace, rows: list[dict]) -> None:
    """The rows as JSON, and as a table beside it."""
    rows.sort(key=lambda r: (r["equal"] == "time", -r["bits"]))
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


COLUMNS = ["bits", "method", "true bits", "KL", "of gptq's gap closed", "perplexity", "top-1 %", "tokens", "seconds"]


def table(result: dict) -> str:
    """Markdown: at equal tokens, then at equal time."""
    said = ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in result["settings"].items())
    lines = [f"Training against gptq: {said}."]
    gptq = {r["bits"]: r["kl"] for r in result["rows"] if r["method"] == "gptq"}
    for equal in ("tokens", "time"):
        rows = [r for r in result["rows"] if r["equal"] == equal]
        if rows:
            lines += ["", f"At equal {equal}:", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for row in rows:
            share = 1 - row["kl"] / gptq[row["bits"]] if row["bits"] in gptq and row["method"] != "gptq" else None
            closed = "-" if share is None else f"{100 * share:.0f} %"
            figures = f"{row['kl']:.5f} | {closed} | {row['perplexity']:.3f} | {row['top1']:.2f}"
            star = "*" if row.get("processor") not in processors(result, row["bits"]) else ""
            tokens = f"{row['tokens']:.0f}" if "tokens" in row else "-"
            cost = f"{tokens} | {row['seconds']:.0f}{star}"
            lines.append(f"| {row['bits']} | {row['method']} | {row['true_bits']:.3f} | {figures} | {cost} |")
    if any(line.endswith("* |") for line in lines):
        lines += [
            "",
            "\\* seconds of another processor than those at equal tokens, which say how many steps a row gets.",
        ]
    return "\n".join(lines) + "\n"


def processors(result: dict, bits: int) -> set[str | None]:
    """What the rows at equal tokens were trained on."""
    return {r.get("processor") for r in result["rows"] if r["bits"] == bits and r["equal"] == "tokens"}


if __name__ == "__main__":
    main()
