"""What stands around a product, and many experts: microseconds within the kernel's passes and by themselves."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hf_quant.formats import Layer, choose_kernel, format_for
from hf_quant.hadamard import Hadamard
from hf_quant.kernels.bench.contenders import Shape, random_weight
from hf_quant.kernels.bench.timing import interleaved
from hf_quant.runtime.activation import quantize_input
from hf_quant.runtime.branches import LowRank
from hf_quant.runtime.clock import Clock
from hf_quant.runtime.experts import Experts
from hf_quant.runtime.linear import QuantLinear
from hf_quant.spec import Spec, act_spec, int_spec

Run = Callable[[Tensor], object]
TOKENS = (1, 16, 1024)
W4, W8, A8, RANK = int_spec(4, 128), int_spec(8, symmetric=True), act_spec(8), 32


@dataclass(frozen=True, slots=True)
class Operation:
    """Several ways to do the same; the first one is ours, the last one what it is compared with."""

    name: str
    make: Callable[[Shape, torch.device, torch.dtype], dict[str, Run]]


def layers(
    count: int,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    weights: Spec,
    inputs: Spec | None = None,
    extras: Mapping[str, Any] = MappingProxyType({}),
) -> list[QuantLinear]:
    """Layers with the same random codes."""
    q, fmt = random_weight(shape, weights, torch.device("cpu")), format_for(Layer(shape, weights, inputs))
    return [QuantLinear.from_qtensor(q, fmt, inputs=inputs, dtype=dtype, **extras).to(device) for _ in range(count)]


def unfused(module: QuantLinear) -> QuantLinear:
    """The layer with everything around its product done apart, its kernel chosen for that."""
    choose = choose_kernel(module.format, module._product(), module.qweight.device, module.compute_dtype)
    module.kernel, module._fuses = choose[0], frozenset()
    module._blob = [] if module.kernel == "reference" else None
    return module


def branch(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    """A low-rank term of rank 32."""
    term = LowRank(torch.randn(RANK, shape[1]), torch.randn(shape[0], RANK))
    fused, apart = layers(2, shape, device, dtype, W4, extras={"branches": [term]})
    return {"fused": fused, "apart": unfused(apart)}


def rotation(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    """A Hadamard transform of the whole input, and 8-bit tokens."""
    turn = Hadamard.of_width(shape[1], 0)
    fused, apart = layers(2, shape, device, dtype, W8, A8, {"rotation": turn})
    return {"fused": fused, "apart": unfused(apart)}


def timesteps(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    """Ranges of the input by denoising step, a table of 50."""
    inputs = replace(act_spec(8, static=True), index="timestep", entries=50)
    clock = Clock(range(50))
    clock.entry_B = torch.tensor([7], device=device)
    ways = layers(2, shape, device, dtype, W8, inputs, {"input_range": (torch.full((50, 1), 0.02), None)})
    for module in ways:
        module.clock = clock
    return {"fused": ways[0], "apart": unfused(ways[1])}


def tokens_to_int8(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    """Dynamic ranges of tokens, and their integers."""

    def one_pass(x: Tensor) -> object:
        from hf_quant.kernels._gemm.quantized import quantize

        return quantize(x, A8)

    return {"one pass": one_pass, "torch": lambda x: quantize_input(x, A8, {})}


def hadamard(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    """The transform alone."""
    from hf_quant.kernels.hadamard.dense import Dense
    from hf_quant.kernels.hadamard.gpu import Triton

    size = Hadamard.of_width(shape[1]).size
    return {
        "butterflies": lambda x: Triton().run(x, size, 0, False),
        "products of factors": lambda x: Dense().run(x, size, 0, False),
    }


def experts(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    """8 experts of Mixtral's kind, 2 a token, with a quarter of the shape."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    inner, hidden = (max(128, n // 4) for n in shape)
    config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=8)
    with torch.device("meta"):
        module = Experts(MixtralExperts(config))
    for e in range(8):
        module.expert(e).gate_up = layers(1, (2 * inner, hidden), device, dtype, W4)[0]
        module.expert(e).down = layers(1, (hidden, inner), device, dtype, W4)[0]

    def routed(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        def call(x: Tensor) -> Tensor:
            rows = torch.arange(2 * len(x), device=x.device).view(-1, 2)
            chosen = (rows * 5 + rows // 8) % 8
            return run(x[:, :hidden].contiguous(), chosen, torch.full_like(chosen, 0.5, dtype=torch.float32))

        return call

    return {"one launch a matrix": routed(module), "every expert on every token": routed(module._dense)}


OPERATIONS = (
    Operation("low-rank branch, rank 32, W4 g128", branch),
    Operation("Hadamard transform and W8A8", rotation),
    Operation("ranges by timestep and W8A8", timesteps),
    Operation("tokens to int8", tokens_to_int8),
    Operation("Hadamard transform", hadamard),
    Operation("8 experts of W4 g128, 2 a token", experts),
)


def measure(
    device: torch.device,
    until: float,
    *,
    shape: Shape = (4096, 4096),
    tokens: Sequence[int] = TOKENS,
    operations: Sequence[Operation] = OPERATIONS,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 0.15,
) -> dict[str, Any]:
    """Rows `{operation, tokens, microseconds}`; a way that does not run here is told in `absent`."""
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    late: list[dict[str, Any]] = []
    for operation in operations:
        if time.monotonic() > until:
            late.append({"operation": operation.name})
            continue
        ways = operation.make(shape, device, dtype)
        for count in tokens:
            x, calls = torch.randn(count, shape[1], device=device, dtype=dtype), {}
            for way, run in ways.items():
                try:
                    with torch.no_grad():
                        run(x)
                except Exception as error:  # what does not run on this device, in whatever way it fails
                    absent[f"{operation.name}: {way}"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    continue
                calls[way] = [_without_gradient(run, x)]
            if calls:
                times = interleaved(calls, device, seconds)
                rows.append({"operation": operation.name, "tokens": count, "microseconds": times})
    return {"shape": list(shape), "rows": rows, "absent": absent, "left_out": late}


def _without_gradient(run: Run, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return run(x)

    return call
