"""Put quantized modules in the place of float ones, and float ones back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.errors import NotSupported, UnsupportedModel
from hf_quant.formats import PackedFormat
from hf_quant.qtensor import QTensor
from hf_quant.runtime.apart import put_back_all
from hf_quant.runtime.branches import Branch
from hf_quant.runtime.clock import unwatch
from hf_quant.runtime.embedding import QuantEmbedding, tied_embedding, tied_head
from hf_quant.runtime.features import FeatureTable, Vacant
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import Packed
from hf_quant.runtime.rotating import rotation_of, scale_of, shift_of
from hf_quant.sites import linear_shape
from hf_quant.spec import Spec


def install_linear(
    model: nn.Module,
    name: str,
    q: QTensor,
    fmt: PackedFormat,
    *,
    inputs: Spec | None = None,
    input_range: tuple[Tensor, Tensor | None] | None = None,
    pre_scale: Tensor | None = None,
    branches: Sequence[Branch] = (),
    dtype: torch.dtype | None = None,
) -> QuantLinear:
    """Replace the linear layer (or Conv1D) `name` by a quantized one, with its bias and what is done to its input.

    Arguments as in `QuantLinear.from_qtensor`; `dtype` defaults to the type of the layer's weight.

    Raises:
        UnsupportedModel: the module is not a linear layer.
    """
    module = model.get_submodule(name)
    found = linear_shape(module)
    if found is None:
        raise UnsupportedModel(f"{name} is a {type(module).__name__}, not a linear layer")
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)  # noqa: S101  `linear_shape` has looked at it
    assert bias is None or isinstance(bias, Tensor)  # noqa: S101
    layer = QuantLinear.from_qtensor(
        q,
        fmt,
        kind=found[0],
        bias=bias,
        inputs=inputs,
        input_range=input_range,
        pre_scale=scale_of(module) if pre_scale is None else pre_scale,
        branches=branches,
        rotation=rotation_of(module),
        shift=shift_of(module),
        dtype=dtype or weight.dtype,
    )
    layer.train(module.training)
    model.set_submodule(name, layer)
    return layer


def install_embedding(
    model: nn.Module, name: str, q: QTensor, fmt: PackedFormat, *, shares: Sequence[str] = ()
) -> QuantEmbedding:
    """Replace the embedding `name` by a quantized one, and so what `shares` names: modules tied to it share it all."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Embedding):
        raise UnsupportedModel(f"{name} is a {type(module).__name__}, not an embedding")
    table = QuantEmbedding.from_qtensor(q, fmt, like=module, dtype=module.weight.dtype)
    model.set_submodule(name, table.train(module.training))
    for other in shares:
        old = model.get_submodule(other)
        tied: Packed
        if isinstance(old, nn.Embedding):
            tied = tied_embedding(table, old)
        else:
            bias = old.bias
            assert bias is None or isinstance(bias, Tensor)  # noqa: S101  a linear layer's bias
            tied = tied_head(table, bias)
        model.set_submodule(other, tied.train(old.training))
    return table


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put plain modules with the logical weights back, in place: Linear, Conv1D, Embedding, experts, convolutions.

    Args:
        model: a quantized model.
        dtype: of the weights; default: each layer's compute dtype.

    Raises:
        NotSupported: layers are gone, whose outputs are stored.
    """
    if gone := [name for name, module in model.named_modules() if isinstance(module, FeatureTable | Vacant)]:
        raise NotSupported(
            f"{len(gone)} layers, the first is {gone[0]}, are no longer there: what they put out is stored for every "
            "timestep. Go back to the original model, or quantize it with tfmq-dm, which keeps them"
        )
    tied: dict[int, nn.Parameter] = {}  # id of the shared codes -> the dense weight that is shared instead
    for name, module in list(model.named_modules()):
        if not isinstance(module, Packed):
            continue
        if id(module.qweight) not in tied:
            tied[id(module.qweight)] = nn.Parameter(module.dequantize(dtype), requires_grad=False)
        weight = tied[id(module.qweight)]
        model.set_submodule(name, _plain(module, weight).train(module.training))
    put_back_all(model)
    unwatch(model)
    ties = getattr(model, "all_tied_weights_keys", None)
    if ties and any(key.endswith(".qweight") for key in ties):
        restored = {_of_weight(t): _of_weight(s) for t, s in ties.items()}
        model.all_tied_weights_keys = restored  # type: ignore[assignment]  # a plain attribute of PreTrainedModel
        model.__dict__.pop("_tied_weights_keys", None)
    return model


def _of_weight(key: str) -> str:
    return key.rpartition(".")[0] + ".weight"


def _plain(module: Packed, weight: nn.Parameter) -> nn.Module:
    plain: nn.Module
    if isinstance(module, QuantEmbedding):
        return module.plain(weight)
    assert isinstance(module, QuantLinear)  # noqa: S101  the two kinds of packed modules
    total = module.plain_bias()
    bias: Any = None if total is None else nn.Parameter(total.detach().to(weight.dtype), requires_grad=False)
    n, k = module.matrix_shape
    if module.kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            plain = Conv1D(n, k)
        plain.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    else:
        plain = nn.Linear(k, n, bias=False, device="meta")
        plain.weight = weight
    plain.bias = bias
    return plain
