"""PEFT: quantized layers are linear layers to it, so every tuner works unregistered; here is what LoRA gains on them.

Registered when PEFT is imported: `use_qalora=True`, which PEFT itself knows for GPTQ layers only, a check of ranks, and
one of adapters against the base they were made for (adapters.py). They are the ordinary folders of PEFT either way.
"""

import functools
from typing import Any

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import QALoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_quant.errors import ConfigError, UnsupportedModel
from hf_quant.integrations.recomputing import recompute_activations
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import Packed


class QaLora(QALoraLinearVariant):  # type: ignore[misc]  # an untyped base
    """QA-LoRA (arXiv:2309.14717): `delta W = scaling B A P`, with P the sum over groups of `qalora_group_size` inputs.

    PEFT pools with `mean * number of groups`; this is its matrix. It is constant within a group, so it merges into a
    float zero point without any rounding of codes (`hf_quant.merge_adapter`).
    """

    @staticmethod
    def get_delta_weight(module: Any, active_adapter: str) -> Tensor:  # noqa: ANN401  PEFT's layer
        """`[N, K]`."""
        group = module.qalora_group_size[active_adapter]
        A_RG, B_NR = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        delta_NG: Tensor = module.scaling[active_adapter] * (B_NR.float() @ A_RG.float()) * (A_RG.shape[1] / group)
        return delta_NG.repeat_interleave(group, 1)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # noqa: ANN401
        """The weight with the adapter in it."""
        return orig_weight + QaLora.get_delta_weight(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # noqa: ANN401
        """In place."""
        orig_weight.data += QaLora.get_delta_weight(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # noqa: ANN401
        """The weight without it."""
        return orig_weight - QaLora.get_delta_weight(module, active_adapter).to(orig_weight.dtype)


class LoraQuantLinear(LoraLinear):  # type: ignore[misc]  # an untyped base
    """LoRA on a quantized layer: PEFT's own, with `use_qalora` and a check of the rank."""

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: int,
        config: Any,  # noqa: ANN401  a LoraConfig
        **kwargs: Any,  # noqa: ANN401  PEFT passes more
    ) -> None:
        """As PEFT's.

        Raises:
            ConfigError: the rank is above that of the matrix, or groups do not divide it.
        """
        n, k = self.get_base_layer().matrix_shape
        where = kwargs.get("target_name") or "a layer"
        most = min(n, k // config.qalora_group_size if config.use_qalora else k)
        if config.use_qalora and k % config.qalora_group_size:
            raise ConfigError(
                f"{where} has {k} inputs, which qalora_group_size={config.qalora_group_size} does not divide"
            )
        if r > most:
            what = f" pooled to {most} groups" if config.use_qalora and most < min(n, k) else ""
            raise ConfigError(
                f"r={r} is above the rank of the [{n}, {k}] matrix{what} of {where}; use r <= {most}, "
                "or leave the layer out of target_modules"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """PEFT's variants, and QA-LoRA, which its plain layer takes and silently leaves out."""
        if not config.use_qalora:
            return super().resolve_lora_variant(config=config, **kwargs)
        if config.use_dora:
            raise ConfigError("use_qalora and use_dora cannot be combined: the magnitude of DoRA does not pool")
        return QaLora()


def register() -> None:
    """Have every `LoraConfig` use `LoraQuantLinear` for our layers, also one read from an adapter's folder."""
    before = LoraConfig.__post_init__
    if hasattr(before, "__wrapped_by_hf_quant__"):
        return

    @functools.wraps(before)
    def after(self: Any) -> None:  # noqa: ANN401
        before(self)
        self._register_custom_module({QuantLinear: LoraQuantLinear})

    after.__wrapped_by_hf_quant__ = True  # type: ignore[attr-defined]
    LoraConfig.__post_init__ = after


def prepare_for_training(model: nn.Module, *, gradient_checkpointing: bool = True) -> nn.Module:
    """Make a quantized model ready for adapters that it has or gets: nothing else of it trains, gradients reach them.

    Unlike `peft.prepare_model_for_kbit_training` it casts nothing to float32: what is frozen gains nothing by it, the
    copies of embeddings and scales cost memory, and activations of another type leave the fast kernels.

    Args:
        model: a quantized model, in place. Adapters that it has already go on training.
        gradient_checkpointing: recompute activations in the backward pass (non-reentrant), where the model can.

    Returns:
        The model.

    Raises:
        UnsupportedModel: it is not quantized by this library, or its weights are offloaded.
    """
    packed = [m for m in model.modules() if isinstance(m, Packed)]
    if not packed:
        raise UnsupportedModel(
            "prepare_for_training takes a model quantized by hf_quant, and this one has no packed layer"
        )
    if any(m.qweight.is_meta for m in packed):
        raise UnsupportedModel("the model is offloaded; training needs its weights on the device: load it without")
    adapted = hasattr(model, "peft_config") or any(isinstance(m, BaseTunerLayer) for m in model.modules())
    if not adapted:  # else PEFT has frozen all but its own
        model.requires_grad_(False)
    anything: Any = model
    if hasattr(model, "enable_input_require_grads"):
        anything.enable_input_require_grads()
    if gradient_checkpointing and getattr(model, "supports_gradient_checkpointing", False):
        recompute_activations(model)
    return model


register()
