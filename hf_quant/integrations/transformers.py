"""transformers: register `QuantConfig`, quantize while loading or right after, load and save packed models.

The base classes are imported from the modules that define them: while autoloading, the package that re-exports them
is only half imported.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer as TransformersQuantizer

from hf_quant import checkpoint
from hf_quant.config import QuantConfig, QuantMethod
from hf_quant.errors import HfQuantError, UnsupportedModel
from hf_quant.finite import require_finite
from hf_quant.integrations.finish import finish, with_tokenizer
from hf_quant.integrations.saving import wrap
from hf_quant.integrations.sealing import check_config, check_loaded, ignore_tripwire, open_seal, sealed_state
from hf_quant.on_load import install_loaded, plan_on_load, report_loaded, tied_to, wants
from hf_quant.plan import Plan
from hf_quant.recipe import Recipe
from hf_quant.report import Entry, Report
from hf_quant.runtime.install import dequantize_model
from hf_quant.runtime.shards import adapt_plan

NAME = QuantMethod.HF_QUANT.value


class Quantizer(TransformersQuantizer):  # type: ignore[misc]  # an untyped base
    """What transformers calls while it loads and saves a model of ours.

    A data-free recipe quantizes each weight as it is read from disk; every other method runs once the float model is
    in memory. Either way the model's config then describes its packed layers, and loading needs no method.
    """

    requires_calibration = False
    quantization_config: QuantConfig

    def __init__(self, quantization_config: QuantConfig, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(quantization_config, **kwargs)
        wrap()
        # merging a passed config with a checkpoint's keeps the checkpoint's; a config without sites means "quantize"
        self.pre_quantized: bool = bool(self.pre_quantized) and quantization_config.sites is not None
        self.dtype: torch.dtype = torch.float32
        self.report: Report | None = None
        self.plan: Plan | None = None
        self.entries: dict[str, Entry] = {}
        self.failed: HfQuantError | None = None
        self.files: list[str] = []
        self.started = time.perf_counter()

    # ---- loading ------------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:  # noqa: ANN401
        """Quantizing needs the float weights at hand."""
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if not self.pre_quantized and "disk" in places:
            raise UnsupportedModel(
                "a model offloaded to disk cannot be quantized while it loads; quantize it first (one block at a time "
                "is on the device: QuantConfig(device=...)), save it, then load the saved model with this device_map"
            )

    def update_attn_implementation(self, config: Any) -> Any:  # noqa: ANN401  a PreTrainedConfig
        """Called with the config before the model is built: a damaged one must not size it."""
        check_config(getattr(config, "_name_or_path", ""), self.quantization_config.sealed)
        return config

    def update_tp_plan(self, config: Any) -> Any:  # noqa: ANN401  a PreTrainedConfig
        """The hook at the same place of transformers before 5.21."""
        return self.update_attn_implementation(config)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the compute type."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:  # noqa: ANN401
        self.files = [str(f) for f in kwargs.get("checkpoint_files") or []]
        config = self.quantization_config
        if self.pre_quantized:
            if self.files:
                open_seal(self.files, sealed=config.sealed is not None)
            checkpoint.build_skeleton(model, config.description, dtype=self.dtype)
            ignore_tripwire(model)
            parts = getattr(getattr(model.config, "distributed_config", None), "tp_size", None)
            adapt_plan(model, model.tp_plan, parts or 1)  # type: ignore[arg-type]
            return model
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedModel(
                "a model that is cut over several processes cannot be quantized while it loads: each would quantize "
                "its own part of a matrix; quantize it in one process, save it, then load the saved model like this"
            )
        quantizer = config.quantizer()
        if isinstance(quantizer, Recipe):
            self.plan = plan_on_load(model, quantizer, config.job())
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:  # noqa: ANN401
        """Whether a float parameter is quantized as it is read."""
        return self.plan is not None and wants(model, self.plan, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        """The operation transformers runs on every such parameter."""
        return QuantizeOnLoad(self)

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes per weight, for transformers' own device maps."""
        return None if self.plan is None else self.plan.bits_per_weight / 8

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:  # noqa: ANN401
        if self.pre_quantized:
            self.report = _saved_report(self.files)
            check_loaded(model)
            checkpoint.validate(model)
        else:
            if self.failed is not None:
                raise self.failed
            self._quantize(model)
        checkpoint.prepare_all(model)
        return model

    def _quantize(self, model: nn.Module) -> None:
        require_finite(model)
        if self.plan is not None:
            report = report_loaded(self.plan, self.entries, self.started)
            self.plan, self.entries = None, {}  # done with; models are copied together with their quantizer
        else:
            config = self.quantization_config
            report = config.quantizer().quantize(model, with_tokenizer(config.job(), model))
        finish(model, self, report)

    # ---- saving -------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Packed tensors in their stored types, a tripwire for libraries without us, and checksums."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers saves the adapter alone
        state, metadata, self.quantization_config.sealed = sealed_state(model)
        return state, metadata

    def is_serializable(self) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on it."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Only while a method itself trains: weights are float then, and the Trainer must take them."""
        return not self.pre_quantized and self.report is None

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` goes through."""
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        return dequantize_model(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)


class QuantizeOnLoad(ConversionOps):  # type: ignore[misc]  # an untyped base
    """Replaces a float module by its packed form the moment its weight is read; nothing is left to set.

    An exception raised here would be turned into a general one, so the first is kept and raised after loading.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **kwargs: Any,  # noqa: ANN401  transformers passes more
    ) -> dict[str, Tensor]:
        """See the class."""
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if self.quantizer.failed is None:
                try:
                    assert self.quantizer.plan is not None  # noqa: S101
                    device = self.quantizer.quantization_config.device
                    entries = install_loaded(model, self.quantizer.plan, name, weight, self.quantizer.dtype, device)
                    self.quantizer.entries.update((e.name, e) for e in entries)
                except HfQuantError as error:
                    self.quantizer.failed = error
            if missing_keys is not None:
                missing_keys -= {name, *tied_to(self.quantizer.plan, name)}
        return {}


def _saved_report(files: Sequence[str]) -> Report | None:
    """The report that lies beside a saved model, for the card of the next save."""
    path = Path(files[0]).parent / "report.json" if files else None
    if path is None or not path.is_file():
        return None
    try:
        return Report.from_json(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, HfQuantError):
        return None  # a report is not needed to load a model


if NAME not in AUTO_QUANTIZER_MAPPING:
    AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = QuantConfig
    AUTO_QUANTIZER_MAPPING[NAME] = Quantizer
