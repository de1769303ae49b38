"""Train tiny-moe and tiny-mamba, the small models that methods for experts and for state spaces are judged on.

    python examples/train_bench_models.py moe examples/models/tiny-moe
    python examples/train_bench_models.py mamba examples/models/tiny-mamba

Everything it needs is in the repository: the 128 training sequences of `data/tiny_calib.npy`, and tiny-lm, which writes
a few thousand more (drawn from its own distribution), because 32,768 tokens alone are learned by heart. A
quarter of every batch is real. Minutes on one CPU core. Held-out perplexity is of the first windows of 256 tokens in
`data/tiny_test.npy`.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import AutoModelForCausalLM, MambaConfig, MixtralConfig
from transformers.models.mamba import modeling_mamba as mamba

HERE = Path(__file__).parent
CONFIGS = {
    "moe": MixtralConfig(
        vocab_size=2048,
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        sliding_window=None,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "mamba": MambaConfig(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        state_size=8,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    ),
}
SECONDS = {"moe": 420, "mamba": 900}  # with a core to itself a third of that does
BATCHES = {"moe": (32, 128), "mamba": (16, 96)}  # sequences, tokens of each
LENGTH, SEQUENCES = 128, 3072  # of what tiny-lm writes


class Scan(torch.autograd.Function):
    """`h_t = a_t h_{t-1} + b_t` along the first axis. transformers' own, without CUDA, is quadratic in the backward."""

    @staticmethod
    def forward(context: FunctionCtx, a_SX: Tensor, b_SX: Tensor) -> Tensor:
        """All states."""
        h_SX, h = torch.empty_like(b_SX), torch.zeros_like(b_SX[0])
        for t in range(len(a_SX)):
            h = torch.addcmul(b_SX[t], a_SX[t], h, out=h_SX[t])
        context.save_for_backward(a_SX, h_SX)
        return h_SX

    @staticmethod
    def backward(context: FunctionCtx, grad_SX: Tensor) -> tuple[Tensor, Tensor]:
        """The same recurrence, from the end."""
        a_SX, h_SX = context.saved_tensors
        b_grad = grad_SX.clone()
        for t in range(len(a_SX) - 2, -1, -1):
            b_grad[t].addcmul_(a_SX[t + 1], b_grad[t + 1])
        a_grad = torch.zeros_like(a_SX)
        torch.mul(b_grad[1:], h_SX[:-1], out=a_grad[1:])
        return a_grad, b_grad


def scan(
    x_BDS: Tensor,
    dt_BDS: Tensor,
    A_DN: Tensor,
    B_BNS: Tensor,
    C_BNS: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
    **_: object,
) -> Tensor:
    """Mamba's selective scan, with `Scan` inside."""
    dt_BDS = nn.functional.softplus(dt_BDS + delta_bias[:, None])
    dt_SBD = dt_BDS.permute(2, 0, 1)
    a = torch.exp(dt_SBD[..., None] * A_DN)
    b = (dt_SBD * x_BDS.permute(2, 0, 1))[..., None] * B_BNS.permute(2, 0, 1)[:, :, None]
    y_SBD = (Scan.apply(a, b) * C_BNS.permute(2, 0, 1)[:, :, None]).sum(-1)
    return (y_SBD.permute(1, 2, 0) + x_BDS * D[:, None]) * nn.functional.silu(z)


@torch.no_grad()
def written(cache: Path) -> Tensor:
    """`[SEQUENCES, LENGTH]` tokens drawn from tiny-lm, begun with a token of the training text."""
    if cache.is_file():
        return torch.from_numpy(np.load(cache).astype(np.int64))
    teacher = AutoModelForCausalLM.from_pretrained(HERE / "models" / "tiny-lm", dtype=torch.float32)
    torch.manual_seed(0)
    starts = real()[:, :8].reshape(-1)
    parts = []
    for begun in starts[torch.randint(len(starts), (SEQUENCES,))].split(256):
        parts.append(
            teacher.generate(begun[:, None], max_new_tokens=LENGTH - 1, do_sample=True, top_k=0, eos_token_id=None)
        )
        print(f"{sum(map(len, parts))} of {SEQUENCES} sequences written", flush=True)
    np.save(cache, torch.cat(parts).numpy().astype(np.uint16))
    return torch.cat(parts)


def real() -> Tensor:
    """`[128, 256]` tokens of the training text."""
    return torch.from_numpy(np.load(HERE / "data" / "tiny_calib.npy").astype(np.int64))


@torch.no_grad()
def perplexity(model: nn.Module) -> float:
    """On the first 16 held-out windows."""
    ids = torch.from_numpy(np.load(HERE / "data" / "tiny_test.npy").astype(np.int64))[: 16 * 256].view(16, 256)
    model.eval()
    log_p = model(ids).logits[:, :-1].log_softmax(-1)
    model.train()
    return math.exp(-float(log_p.gather(-1, ids[:, 1:, None]).mean()))


def train(kind: str, out: Path) -> None:
    torch.manual_seed(0)
    mamba.mamba_selective_scan = scan
    batch, length = BATCHES[kind]
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    text, own = real(), written(out.parent / "written.npy")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    generator, began, step = torch.Generator().manual_seed(0), time.monotonic(), 0
    best, kept = math.inf, model.state_dict()
    while (done := (time.monotonic() - began) / SECONDS[kind]) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 40) * (1 - done) + 4e-5
        rows = torch.randint(len(text), (batch // 4,), generator=generator)
        at = torch.randint(256 - length + 1, (batch // 4,), generator=generator)
        cut = torch.stack([text[r, a : a + length] for r, a in zip(rows, at, strict=True)])
        ids = torch.cat([cut, own[torch.randint(len(own), (batch - len(cut),), generator=generator), :length]])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 25 == 0:
            held_out = perplexity(model)
            if held_out < best:
                best, kept = held_out, {n: t.clone() for n, t in model.state_dict().items()}
            print(f"step {step}  {100 * done:.0f} %  loss {loss.item():.3f}  held-out {held_out:.1f}", flush=True)
    model.load_state_dict(kept)
    model.config.output_router_logits = False
    model = model.to(torch.bfloat16)
    model.save_pretrained(out)
    final = {"steps": step, "sequences": batch, "length": length, "perplexity": perplexity(model.float())}
    (out / "training.json").write_text(json.dumps(final) + "\n")


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
