"""diffusers: the same `QuantConfig` quantizes a model while it loads; packed models load, save and dequantize."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from hf_quant import checkpoint
from hf_quant.config import QuantConfig, QuantMethod
from hf_quant.errors import CheckpointError, NotSupported
from hf_quant.finite import require_finite
from hf_quant.integrations.diffusers_models import adapt
from hf_quant.integrations.finish import finish
from hf_quant.integrity import seal, verify
from hf_quant.on_load import install_loaded, plan_on_load, report_loaded, wants
from hf_quant.plan import Plan
from hf_quant.recipe import Recipe
from hf_quant.report import Entry, Report
from hf_quant.runtime.clock import bind
from hf_quant.runtime.install import dequantize_model

NAME = QuantMethod.HF_QUANT.value


class Quantizer(DiffusersQuantizer):  # type: ignore[misc]  # an untyped base
    """What diffusers calls while it loads and saves a model of ours.

    Methods without calibration data quantize each weight as it is read. Those with it need a pipeline that runs.
    """

    use_keep_in_fp32_modules = True
    requires_calibration = False
    quantization_config: QuantConfig

    def __init__(self, quantization_config: QuantConfig, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized: bool = bool(self.pre_quantized) and quantization_config.sites is not None
        self.dtype = torch.float32
        self.plan: Plan | None = None
        self.report: Report | None = None
        self.entries: dict[str, Entry] = {}
        self.packed: set[str] = set()
        self.started = time.perf_counter()

    # ---- loading ------------------------------------------------------------------------------------------------

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Remember the compute type."""
        self.dtype = torch_dtype or torch.float32
        return self.dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """For diffusers' own device maps: about a byte a weight while loading."""
        return torch.int8

    @property
    def supports_parallel_loading(self) -> bool:
        """Weights are quantized one after the other."""
        return False

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str | Path]) -> list[str]:
        """The one hook that sees the files: check them against their seal."""
        files = [str(f) for f in checkpoint_files or [] if str(f).endswith(".safetensors")]
        if self.pre_quantized and files:
            verify(files, sealed=self.quantization_config.sealed is not None)
        return loaded_keys

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Diffusers would warn of what no file holds, and go on.

        Raises:
            CheckpointError: it belongs to a packed layer, which would hold arbitrary codes.
        """
        packed = {name for name, _ in checkpoint.packed_modules(model)}
        if lost := sorted(key for key in missing_keys if key.rpartition(".")[0] in packed):
            raise CheckpointError(f"{lost[0]} is not in the checkpoint; a shard is missing or damaged")
        return missing_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:  # noqa: ANN401
        if self.pre_quantized:
            checkpoint.build_skeleton(model, self.quantization_config.description, dtype=self.dtype)
            self.packed = {f"{n}.{k}" for n, m in checkpoint.packed_modules(model) for k in m.packed_tensors()}
            return model
        quantizer = self.quantization_config.quantizer()
        if isinstance(quantizer, Recipe):
            self.plan = plan_on_load(model, quantizer, self.quantization_config.job())
        if self.plan is None:
            raise NotSupported(
                f"method {self.quantization_config.method!r} needs calibration data, which is not read while a model "
                "of diffusers loads: load in full precision, then hf_quant.quantize(pipeline, config, prompts=[...] or "
                "class_labels=[...]), or hf_quant.quantize(network, config, data=[batches of its inputs]); or use a "
                "method that needs none (rtn, mse-clip, bnb-nf4)"
            )
        return model

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,  # noqa: ANN401  diffusers passes more
    ) -> bool:
        """Whether `create_quantized_param` takes it."""
        return param_name in self.packed or (self.plan is not None and wants(model, self.plan, param_name))

    def check_quantized_param_shape(self, param_name: str, current: Any, loaded: Any) -> bool:  # noqa: ANN401
        """Packed tensors have the shapes of their layout, or the file belongs to another config.

        Raises:
            CheckpointError: they do not.
        """
        if tuple(getattr(current, "shape", current)) != tuple(getattr(loaded, "shape", loaded)):
            raise CheckpointError(f"{param_name}: the file holds another shape than its config says; get it again")
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,  # noqa: ANN401  diffusers passes more
    ) -> None:
        """Quantize a float weight, or put a packed tensor in place in the type it is stored in."""
        if param_name in self.packed:
            owner, _, leaf = param_name.rpartition(".")
            value = nn.Parameter(state_dict[param_name].to(target_device), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, value)
            return
        assert self.plan is not None  # noqa: S101  `check_if_quantized_param` has seen to it
        device = self.quantization_config.device
        entries = install_loaded(model, self.plan, param_name, param_value.to(target_device), self.dtype, device)
        self.entries.update((e.name, e) for e in entries)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:  # noqa: ANN401
        if self.pre_quantized:
            checkpoint.validate(model)
            bind(model)
            adapt(model)
        else:
            assert self.plan is not None  # noqa: S101  the model was planned before it was loaded
            require_finite(model)
            finish(model, self, report_loaded(self.plan, self.entries, self.started))
            self.plan, self.entries = None, {}  # done with; models are copied together with their quantizer
        checkpoint.prepare_all(model)
        return model

    # ---- saving -------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The packed tensors as they are, and a seal over them; config.json is written already.

        Raises:
            NotSupported: they were to be pickled, which carries no seal; or a LoRA is at work, whose layers bear names
                that no model loads.
        """
        if not safe_serialization:
            raise NotSupported("quantized models are saved as safetensors only: leave safe_serialization=False out")
        if adapted := [key for key in state_dict if ".base_layer." in key]:
            name = adapted[0].partition(".base_layer.")[0]
            raise NotSupported(
                f"{name} holds an adapter, and a model that is saved with one does not load: "
                "save it beside the model (pipeline.save_lora_weights) and take it off (unload_lora_weights), after "
                "fuse_lora if it is to stay in the weights"
            )
        return state_dict, seal(state_dict)

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:  # noqa: ANN401  a ModelMixin
        """Back to float layers, in `dtype` or the type the model computes in."""
        self.dtype = dtype or self.dtype
        return super().dequantize(model)

    def _dequantize(self, model: Any) -> Any:  # noqa: ANN401  a ModelMixin
        dequantize_model(model, self.dtype)
        kept = {k: v for k, v in model._internal_dict.items() if k != "quantization_config"}
        model._internal_dict = type(model._internal_dict)(kept)  # else the float model, saved, would not load
        return model

    @property
    def is_serializable(self) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` goes through."""
        return True


if NAME not in AUTO_QUANTIZER_MAPPING:
    AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = QuantConfig
    AUTO_QUANTIZER_MAPPING[NAME] = Quantizer
