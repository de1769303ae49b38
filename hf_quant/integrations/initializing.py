"""Begin an adapter at what rounding lost: the repair of a method (lorc, lqer, qera) as LoRA weights."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.config import QuantConfig, require_config
from hf_quant.errors import ConfigError, UnsupportedModel
from hf_quant.integrations.merging import input_statistics, tuned_layers
from hf_quant.recipe import Recipe
from hf_quant.runtime.branches import LowRank
from hf_quant.runtime.linear import QuantLinear
from hf_quant.sites import linear_shape


@torch.no_grad()
def initialize_adapter(
    model: nn.Module,
    original: nn.Module,
    config: QuantConfig,
    *,
    data: Any = None,  # noqa: ANN401  many kinds, see QuantConfig
    processor: Any = None,  # noqa: ANN401
    adapter: str = "default",
) -> dict[str, float]:
    """Set the LoRA weights of an adapter so that codes and adapter together are near the full-precision weights.

    `scaling B A = repair(W, Q)` at the adapter's own rank, whatever method made Q: with `QuantConfig("qera")` the
    output error is the least there is. A base whose codes know of the adapter to come (LoftQ): quantize with `loftq`,
    whose branch is then in the base.

    Args:
        model: a `PeftModel` with LoRA on a quantized base, in place.
        original: the full-precision model of the same architecture.
        config: a method with a low-rank repair.
        data: for repairs that weigh by inputs.
        processor: tokenizer for texts.
        adapter: its name.

    Returns:
        Layer -> the share of `||W - Q||^2` that is left.

    Raises:
        ConfigError: no config, or the method has no low-rank repair.
        UnsupportedModel: no such LoRA adapter on a quantized layer, or the original has other layers.
    """
    recipe = require_config(config, "initialize_adapter").quantizer()
    repair: Any = recipe.repairs[0] if isinstance(recipe, Recipe) and len(recipe.repairs) == 1 else None
    if not hasattr(repair, "rank"):
        raise ConfigError(f"method {config.method!r} has no low-rank repair; use lorc, lqer or qera")
    if not isinstance(original, nn.Module):
        raise UnsupportedModel(f"the original is a model in memory, not {type(original).__name__}; load it first")
    repair = replace(repair, bits=16)  # an adapter of PEFT has its own type
    layers = {n: m for n, m in tuned_layers(model) if adapter in getattr(m, "lora_A", {})}
    if not layers:
        raise UnsupportedModel(f"there is no LoRA adapter named {adapter!r} on a quantized layer of this model")
    needs = repair.needs
    stats = input_statistics(model, layers, data, processor, needs) if needs else {}
    left: dict[str, float] = {}
    for name, layer in layers.items():
        base: QuantLinear = layer.base_layer
        if adapter in layer.lora_variant or base.pre_scale is not None:
            raise UnsupportedModel(f"{name}: only a plain LoRA on a layer without a scale of its inputs begins so")
        W = base._without_extras(_weight(original, name, base.matrix_shape))
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        q = base.qtensor()
        (branch,) = replace(repair, rank=A.shape[0]).repair(W, q, stats.get(name, {}))
        assert isinstance(branch, LowRank)  # noqa: S101  it has a rank
        A.copy_(branch.down_RK)
        B.copy_(branch.up_NR / layer.scaling[adapter])
        E = W - q.dequantize()
        left[name] = float((E - branch.matrix()).square().sum()) / max(float(E.square().sum()), 1e-30)
    return left


def _weight(original: nn.Module, name: str, shape: tuple[int, int]) -> Tensor:
    """The float weight of a layer, `[N, K]`."""
    try:
        module = original.get_submodule(name)
    except AttributeError:
        module = None
    found = None if module is None else linear_shape(module)
    if module is None or found is None or found[1] != shape:
        raise UnsupportedModel(f"the original has no linear layer {name} of shape {list(shape)}: it is another model")
    weight: Tensor = module.weight  # type: ignore[assignment]
    return (weight.T if found[0] == "conv1d" else weight).detach().float()
