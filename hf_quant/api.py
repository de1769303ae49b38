"""What a user calls on models: quantize, dequantize, explain, true_bits, estimate."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from hf_quant.config import QuantConfig, require_config
from hf_quant.diffusion.drawing import Drawing
from hf_quant.diffusion.foreseen import with_features
from hf_quant.diffusion.pipelines import configs_of, is_pipeline, quantize_pipeline
from hf_quant.errors import ConfigError, UnsupportedModel
from hf_quant.integrations.finish import is_ours, refuse_quantized, run_quantizer, with_tokenizer
from hf_quant.plan import Plan, make_plan
from hf_quant.recipe import Recipe, refuse_untrained
from hf_quant.report import Report
from hf_quant.runtime.apart import take_apart
from hf_quant.runtime.packed import parts_of


@overload
def quantize(
    model: nn.Module,
    config: QuantConfig,
    *,
    data: Any = None,  # noqa: ANN401
    processor: Any = None,  # noqa: ANN401
    progress: bool = True,
) -> Report: ...


@overload
def quantize(
    model: Any,  # noqa: ANN401  a DiffusionPipeline, which diffusers does not type
    config: QuantConfig | Mapping[str, QuantConfig],
    *,
    prompts: Sequence[str] = (),
    class_labels: Sequence[int] = (),
    guidance: float | None = None,
    steps: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    pictures: int = 4,
    progress: bool = True,
) -> dict[str, Report]: ...


def quantize(
    model: Any,
    config: QuantConfig | Mapping[str, QuantConfig],
    *,
    data: Any = None,
    processor: Any = None,
    prompts: Sequence[str] = (),
    class_labels: Sequence[int] = (),
    guidance: float | None = None,
    steps: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    pictures: int = 4,
    progress: bool = True,
) -> Report | dict[str, Report]:
    """Quantize a model or a pipeline that is already in memory, in place. It then saves, pushes and explains itself
    like any other.

    Args:
        model: a model of transformers or diffusers, or a pipeline of diffusers.
        config: how. Of a pipeline one for the networks that denoise, or a dict: name of a component -> config.
        data: calibration data of a model; wins over `config.calibration`. Pipelines draw their own.
        processor: tokenizer or processor for it.
        prompts: what a pipeline that takes texts draws while it is calibrated; used round and round.
        class_labels: likewise of one that draws classes.
        guidance: scale of classifier-free guidance; None: the pipeline's own.
        steps: of denoising on a trajectory; None: the method's own `calibration_steps`, or 20.
        arguments: further ones of the pipeline's call, such as `{"height": 512}`; a text is that of every picture.
        pictures: drawn before and after from equal noise, for the card; 0: none.
        progress: show a bar with the time left.

    Returns:
        What was done to every parameter; of a pipeline, name of a component -> report.
    """
    if is_pipeline(model):
        if data is not None or processor is not None:
            raise ConfigError("a pipeline draws its own calibration data: pass prompts or class_labels, not data")
        drawing = Drawing(
            guidance=guidance, class_labels=class_labels, prompts=prompts, arguments=dict(arguments or {})
        )
        return quantize_pipeline(model, config, drawing, steps=steps, pictures=pictures, progress=progress)
    config = require_config(config, "quantize")
    refuse_quantized(model)
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"quantize takes a model in memory, not {type(model).__name__}; load it first")
    if len(prompts) or len(class_labels) or guidance is not None or steps is not None or arguments:
        raise ConfigError(
            "prompts, class_labels, guidance, steps and arguments are a pipeline's; a network alone takes "
            "data=[batches]"
        )
    job = with_tokenizer(config.job(data=data, processor=processor, progress=progress), model)
    return run_quantizer(model, config, config.quantizer().quantize, job)


@overload
def finetune(
    model: nn.Module,
    config: QuantConfig,
    data: Any = None,  # noqa: ANN401  many kinds, see QuantConfig
    *,
    processor: Any = None,  # noqa: ANN401
    progress: bool = True,
) -> Report: ...


@overload
def finetune(
    model: Any,  # noqa: ANN401  a DiffusionPipeline, which diffusers does not type
    config: QuantConfig | Mapping[str, QuantConfig],
    *,
    prompts: Sequence[str] = (),
    class_labels: Sequence[int] = (),
    guidance: float | None = None,
    steps: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    pictures: int = 4,
    progress: bool = True,
) -> dict[str, Report]: ...


def finetune(
    model: Any,
    config: QuantConfig | Mapping[str, QuantConfig],
    data: Any = None,
    *,
    processor: Any = None,
    prompts: Sequence[str] = (),
    class_labels: Sequence[int] = (),
    guidance: float | None = None,
    steps: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    pictures: int = 4,
    progress: bool = True,
) -> Report | dict[str, Report]:
    """Quantize a float model or pipeline by training it, in place. As `quantize`, for methods that train and no other.

    Labels in the data (of batches, or of a tokenized dataset's rows) are what a `distill` below 1 trains on; a causal
    language model's are its tokens where there are none.

    With `config.run_dir` a training that was cut off goes on from its last checkpoint. Processes that torchrun or
    `accelerate launch` started share each step's batch. What is learned and the frozen weights are shared out among
    them by `--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP
    --fsdp_cpu_ram_efficient_loading false` or by DeepSpeed (`--use_deepspeed --zero_stage 3`; stages 1 and 2 share out
    the optimizer alone; tested with 0.19); all of them have the whole model before and after. Under DeepSpeed load the
    model in the type that it shall compute in: mixed precision would round what is learned.

    Raises:
        NotSupported: the method does not train.
    """
    if is_pipeline(model):
        if data is not None or processor is not None:
            raise ConfigError("a pipeline draws its own training data: pass prompts or class_labels, not data")
        for own in configs_of(model, config).values():
            refuse_untrained(own.quantizer())
        drawing = Drawing(
            guidance=guidance, class_labels=class_labels, prompts=prompts, arguments=dict(arguments or {})
        )
        return quantize_pipeline(
            model,
            config,
            drawing,
            steps=steps,
            pictures=pictures,
            progress=progress,
            run=lambda how, m, job: how.finetune(m, job),
        )
    config = require_config(config, "finetune")
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"finetune takes a model in memory, not {type(model).__name__}; load it first")
    if getattr(model, "is_quantized", False):
        raise UnsupportedModel(
            "the model is quantized already: train an adapter on it with PEFT (hf_quant.prepare_for_training), or "
            "fine-tune the original"
        )
    job = with_tokenizer(config.job(data=data, processor=processor, progress=progress), model)
    return run_quantizer(model, config, config.quantizer().finetune, job)


@overload
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module: ...


@overload
def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any: ...  # noqa: ANN401  a DiffusionPipeline


def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Back to plain float layers holding the dequantized weights; the model is no longer a quantized one.

    Args:
        model: a quantized model, a `PeftModel` on one, whose adapters stay, or a pipeline with quantized components.
        dtype: of the weights, those that were never quantized too; None: what the model computes in.

    Returns:
        The model, changed in place.
    """
    if is_pipeline(model):
        ours = [part for part in parts_of(model).values() if is_ours(part)]
        if not ours:
            raise UnsupportedModel("no component of the pipeline is quantized by hf-quant")
        for part in ours:
            dequantize(part, dtype)
        return model
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is None:
        raise UnsupportedModel("the model is not quantized")
    before = getattr(base, "dtype", None)
    quantizer.dequantize(base, dtype)
    for parameter in model.parameters():
        if dtype is not None and parameter.dtype == before:  # what a model keeps in another type stays in it
            parameter.data = parameter.data.to(dtype)
    return model


def estimate(model: str | Path | nn.Module, config: QuantConfig) -> dict[str, Any]:
    """What quantizing would give, without reading a weight: sites, bits per weight, bytes, memory needed.

    With a budget, bits and bytes are the most that it allows, and `lowest` and `highest` what could be reached at all.
    Stored features are those of every timestep and of as many classes as there can be; layers that need not be kept
    then are not counted.

    Args:
        model: a path or Hub id (only its config is read), or a model.
        config: how.

    Raises:
        UnsupportedSpec: a layer cannot be held, or the budget cannot be met (says what can).
        UnsupportedModel: it is quantized already.
    """
    config = require_config(config, "estimate")
    if isinstance(model, nn.Module):
        refuse_quantized(model)
        whole = _twin(model)
    elif is_pipeline(model):
        raise UnsupportedModel(f"estimate takes one network of a pipeline: one of {', '.join(parts_of(model))}")
    else:
        from hf_quant.loading import read_config, require_float, skeleton

        require_float(read_config(model), model)
        whole = skeleton(model)
    quantizer = config.quantizer()
    if not isinstance(quantizer, Recipe):
        raise ConfigError(f"{config.method!r} is no recipe of stages; it cannot be estimated")
    before = sum(p.numel() * p.element_size() for p in whole.parameters())
    take_apart(whole)
    plan = make_plan(whole, quantizer, config.job())
    sizes = _sizes_of(plan)
    if quantizer.serving is not None:
        stored = with_features(whole, plan, quantizer.serving)
        sizes |= stored or {"not_counted": "stored features: the network cannot be run for their shapes"}
    largest = max((sum(4 * n for n in _sizes(whole, b)) for b in plan.blocks), default=0)
    return {
        "sites": len(plan.sites),
        **sizes,
        "original_bytes": before,
        "device_bytes": largest,
        "kept": len(plan.kept),
        "formats": sorted({p.format.id for p in plan.sites.values()}),
        "needs_calibration": (plan.is_open and quantizer.needs_data)
        or any(p.recipe.needs_data for p in plan.sites.values()),
    }


def _sizes_of(plan: Plan) -> dict[str, Any]:
    if not plan.is_open:
        return _size_of(plan)
    lowest, highest = plan.lowest, plan.highest
    most = min(plan.room + plan.model_bits - plan.open_bits, highest.model_bits)
    bits = (most - lowest.model_bits) / plan.values + lowest.bits_per_weight
    found = {"bits_per_weight": bits, "model_bytes": most // 8}
    budget = None if plan.budget is None else plan.budget.to_json()
    return found | {"budget": budget, "lowest": _size_of(lowest), "highest": _size_of(highest)}


def _size_of(plan: Plan) -> dict[str, Any]:
    return {"bits_per_weight": plan.bits_per_weight, "model_bytes": plan.model_bytes}


def _twin(model: nn.Module) -> nn.Module:
    """The model on the meta device: a copy of everything but the numbers."""
    tensors = [*model.parameters(), *model.buffers()]
    empty = {id(t): torch.empty_like(t, device="meta", requires_grad=False) for t in tensors}
    known = {id(p): nn.Parameter(empty[id(p)], requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, {**empty, **known})


def _sizes(model: nn.Module, block: str) -> list[int]:
    return [p.numel() for p in model.get_submodule(block).parameters()]
