"""Finish: make a freshly quantized model one that its library knows as such: config, flags, report."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from hf_quant import checkpoint
from hf_quant.config import QuantConfig
from hf_quant.errors import UnsupportedModel
from hf_quant.finite import require_finite
from hf_quant.method import method_named
from hf_quant.recipe import Job
from hf_quant.report import Report
from hf_quant.runtime.packed import Packed


def quantizer_of(model: nn.Module, config: QuantConfig) -> Any:  # noqa: ANN401  two unrelated base classes
    """The object that the model's library asks when it saves or dequantizes the model."""
    if any(c.__module__.startswith("diffusers.") for c in type(model).__mro__):
        from hf_quant.integrations import diffusers

        return diffusers.Quantizer(config, pre_quantized=False)
    from hf_quant.integrations import transformers

    return transformers.Quantizer(config, pre_quantized=False)


def is_ours(model: object) -> bool:
    """Whether hf-quant quantized it."""
    return isinstance(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), QuantConfig)


def refuse_quantized(model: Any) -> None:  # noqa: ANN401
    """Raises `UnsupportedModel` for what is quantized already."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModel(
            "the model is quantized already; call hf_quant.dequantize(model) first, or load the original"
        )


def refuse_wrapped(model: nn.Module) -> None:
    """Raises `UnsupportedModel` for what lies around or inside a model and would be quantized, or saved, with it."""
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModel(
            "this is what torch.compile made of a model, whose layers have other names: quantize the model that was "
            "given to it, then compile that"
        )
    hooks = {h for m in model.modules() for h in getattr(getattr(m, "_diffusers_hook", None), "hooks", ())}
    if hooks & {"group_offloading", "layerwise_casting"}:
        raise UnsupportedModel(
            "the model is offloaded or cast layer by layer (enable_group_offload, enable_layerwise_casting), so its "
            "weights are not there to be read: quantize it first, then turn that on"
        )
    packed = next((name for name, m in model.named_modules() if isinstance(m, Packed)), None)
    if packed is not None:
        raise UnsupportedModel(
            f"{packed} is quantized already, and the model is not: a run on it was interrupted, or it was put in by "
            "hand. Load the original again; with a run_dir the run goes on where it was"
        )
    adapted = next((name for name, m in model.named_modules() if hasattr(m, "base_layer")), None)
    if adapted is not None:
        raise UnsupportedModel(
            f"{adapted} holds an adapter, whose matrices would be quantized too: merge it first "
            "(model = model.merge_and_unload()), or quantize the base model and load the adapter onto it"
        )


def with_tokenizer(job: Job, model: Any) -> Job:  # noqa: ANN401
    """The job with the tokenizer that lies beside a model of transformers: none was given, and texts may need one."""
    name = getattr(model, "name_or_path", None)
    if not name or job.processor is not None or job.data is None or isinstance(job.data, Tensor | np.ndarray):
        return job
    from transformers import AutoTokenizer

    try:
        return replace(job, processor=AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError):
        return job  # whoever reads texts then says that it needs one


def run_quantizer(model: nn.Module, config: QuantConfig, run: Callable[[nn.Module, Job], Report], job: Job) -> Report:
    """Run a quantizer on a model in memory, and make it one that its library knows as quantized."""
    refuse_wrapped(model)
    require_finite(model)
    report = run(model, job)
    report = finish(model, quantizer_of(model, config), report)
    checkpoint.prepare_all(model)
    return report


def finish(model: nn.Module, quantizer: Any, report: Report) -> Report:  # noqa: ANN401
    """Attach the quantizer, and in place of the config that asked for it the one that describes what was made."""
    config: QuantConfig = quantizer.quantization_config
    report = replace(report, method=config.to_dict())
    paper = method_named(str(config.method)).paper
    made_by = {
        "method": config.method,
        "arguments": config.given,
        "budget": config.budget.to_json() if config.budget else None,
        "skip": list(config.skip),
        "overrides": config.overrides,
        "seed": config.seed,
        "paper": {"title": paper.title, "arxiv": paper.arxiv},
        "versions": report.versions,
        "calibration": report.calibration,
    }
    done = config.finished(checkpoint.describe(model)["sites"], made_by)
    quantizer.quantization_config, quantizer.report = done, report
    anything: Any = model
    anything.hf_quantizer, anything.hf_quant_report = quantizer, report
    anything.is_quantized, anything.quantization_method = True, done.quant_method
    if hasattr(model, "register_to_config"):  # diffusers keeps its config frozen
        from hf_quant.integrations.diffusers_models import adapt

        anything.register_to_config(quantization_config=done)
        adapt(model)
    elif getattr(model, "config", None) is not None:
        anything.config.quantization_config = done
        for module in model.modules():
            part: Any = getattr(module, "config", None)
            if hasattr(part, "to_dict"):
                part._is_quantized = True
    return report
