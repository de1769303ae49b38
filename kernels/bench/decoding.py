"""Tokens a second of a Llama-shaped decoder with random weights: one token at a time, as one CUDA graph."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.kernels.bench.contenders import Contender
from hf_quant.kernels.bench.timing import Call, interleaved


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a decoder; `context` tokens are in the cache."""

    layers: int
    hidden: int
    middle: int
    heads: int
    kv_heads: int
    vocabulary: int = 128256
    context: int = 1024


LLAMA = {"1B": Shape(16, 2048, 8192, 32, 8), "8B": Shape(32, 4096, 14336, 32, 8)}
TINY = Shape(2, 64, 128, 4, 2, vocabulary=100, context=8)


class Decoder:
    """Norms, attention over a full cache, gated MLP; the linear layers are a contender's. Only time has a meaning."""

    def __init__(self, shape: Shape, contender: Contender, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, head = shape, shape.hidden // shape.heads
        wide = shape.hidden + 2 * shape.kv_heads * head

        def linear(n: int, k: int) -> Any:  # noqa: ANN401  whatever the contender calls
            return contender.make((n, k), device, dtype)[0]

        self.blocks = [
            {
                "qkv": linear(wide, shape.hidden),
                "out": linear(shape.hidden, shape.hidden),
                "gate_up": linear(2 * shape.middle, shape.hidden),
                "down": linear(shape.hidden, shape.middle),
            }
            for _ in range(shape.layers)
        ]
        size = (1, shape.kv_heads, shape.context, head)
        self.cache = [torch.randn(2, *size, device=device, dtype=dtype) for _ in range(shape.layers)]
        self.norm = torch.ones(shape.hidden, device=device, dtype=dtype)
        self.embedding = 0.02 * torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype)
        self.token = torch.zeros(1, dtype=torch.long, device=device)

    def step(self) -> Tensor:
        """The next token; it replaces the last one, and its keys the oldest of the cache."""
        s, head = self.shape, self.shape.hidden // self.shape.heads
        x = self.embedding[self.token]
        for block, cache in zip(self.blocks, self.cache, strict=True):
            qkv = block["qkv"](F.rms_norm(x, (s.hidden,), self.norm))
            q, k, v = qkv.split((s.hidden, s.kv_heads * head, s.kv_heads * head), -1)
            cache[0, 0, :, 0], cache[1, 0, :, 0] = k.view(s.kv_heads, head), v.view(s.kv_heads, head)
            y = F.scaled_dot_product_attention(
                q.view(1, s.heads, 1, head), cache[0], cache[1], enable_gqa=s.heads != s.kv_heads
            )
            x = x + block["out"](y.reshape(1, s.hidden))
            gate, up = block["gate_up"](F.rms_norm(x, (s.hidden,), self.norm)).chunk(2, -1)
            x = x + block["down"](F.silu(gate) * up)
        logits = F.linear(F.rms_norm(x, (s.hidden,), self.norm), self.embedding)
        self.token.copy_(logits.argmax(-1))
        return self.token


def measure(
    device: torch.device,
    until: float,
    contenders: Sequence[Contender],
    *,
    shapes: dict[str, Shape] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 1.0,
) -> dict[str, Any]:
    """Model -> contender -> tokens a second; the first contender is the one to compare with."""
    rows, absent, late = {}, {}, []
    for name, shape in (shapes or LLAMA).items():
        decoders: dict[str, list[Call]] = {}
        for contender in contenders:
            if time.monotonic() > until:
                late.append({"model": name, "contender": contender.name})
                continue
            try:
                decoders[contender.name] = [Decoder(shape, contender, device, dtype).step]
            except Exception as error:  # another library's, in whatever way it fails
                absent[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        times = interleaved(decoders, device, seconds) if decoders else {}
        rows[name] = {k: round(1e6 / t, 1) for k, t in times.items()}
        del decoders
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"tokens_per_second": rows, "absent": absent, "left_out": late}
