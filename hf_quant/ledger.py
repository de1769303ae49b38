"""The true size of a quantized model: everything stored is counted, to the bit, as it lies on disk."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_quant.runtime.packed import Packed, parts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Bits on disk (tensor data; a safetensors header adds some hundred bytes a tensor).

    Attributes:
        weights: how many weights are quantized, and values of stored features.
        weight_bits: what is stored for them: codes, scales, zero points, codebooks, branches, input tables.
        others: how many values are kept in full precision (norms, biases, embeddings, heads).
        other_bits: what is stored for those.
    """

    weights: int
    weight_bits: int
    others: int
    other_bits: int

    @property
    def bits_per_weight(self) -> float:
        """True bits per quantized weight; 0 when there is none."""
        return self.weight_bits / self.weights if self.weights else 0.0

    @property
    def bits_per_parameter(self) -> float:
        """Bits per parameter of the original model, quantized or not."""
        values = self.weights + self.others
        return (self.weight_bits + self.other_bits) / values if values else 0.0

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return (self.weight_bits + self.other_bits) // 8


def site_bits(module: Packed) -> int:
    """What a quantized module stores for its weight (its bias is not part of it)."""
    own = (t for name, t in module.state_dict().items() if name != "bias" and "." not in name)
    return sum(8 * t.numel() * t.element_size() for t in own)


def true_bits(model: Any) -> float:  # noqa: ANN401  a model, or a pipeline of diffusers
    """Bits per quantized weight as stored on disk, scales, zero points and branches included."""
    return count_bits(model).bits_per_weight


def count_bits(model: Any) -> Ledger:  # noqa: ANN401  a model, or a pipeline of diffusers
    """Count a model as `save_pretrained` would write it; what is tied is counted once."""
    weights = weight_bits = others = other_bits = 0
    seen: set[int] = set()
    modules = [m for part in parts_of(model).values() for m in part.modules()]
    for module in modules:
        if isinstance(module, Packed):
            if id(module.qweight) not in seen:
                weights += module.matrix_shape[0] * module.matrix_shape[1]
                weight_bits += site_bits(module)
            seen |= {id(p) for name, p in module.named_parameters(recurse=False) if name != "bias"}
    for module in modules:
        kept: list[Tensor] = list(module.parameters(recurse=False))
        kept += [b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set]
        for tensor in kept:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                others += tensor.numel()
                other_bits += 8 * tensor.numel() * tensor.element_size()
    return Ledger(weights=weights, weight_bits=weight_bits, others=others, other_bits=other_bits)
