"""Every saved or pushed pipeline with components of ours carries its card, its pictures and its reports.

diffusers offers no hook for files beside the components: methods of its pipelines are wrapped once, when they are
imported. Saving writes the card after the components; an upload, before which diffusers writes a generic card, again.
Loading refuses what a config of ours cannot mean before a file is read: diffusers would speak of its own class, or warn
and leave the component in full precision.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from hf_quant.config import QuantConfig
from hf_quant.errors import ConfigError
from hf_quant.method import did_you_mean
from hf_quant.report import Report


def reports_of(pipeline: Any) -> dict[str, Report]:  # noqa: ANN401
    """Component -> the report of what we did to it; nothing for those that were loaded quantized."""
    found = {}
    for name, component in pipeline.components.items():
        quantizer = getattr(component, "hf_quantizer", None)
        report = getattr(quantizer, "report", None)
        if isinstance(getattr(quantizer, "quantization_config", None), QuantConfig) and isinstance(report, Report):
            found[name] = report
    return found


def write_beside(pipeline: Any, folder: Path, repo: str | None = None) -> None:  # noqa: ANN401
    """Card, pictures and reports into the folder of a saved pipeline, unless a person wrote the card there."""
    from hf_quant.integrations.saving import by_a_person
    from hf_quant.pages.card import is_hub_id
    from hf_quant.pages.pipeline_card import write

    reports = reports_of(pipeline)
    if not reports or by_a_person(folder / "README.md"):
        return
    base = str(pipeline.config.get("_name_or_path") or "")
    base_model = base if is_hub_id(base) else None
    pictures = getattr(pipeline, "hf_quant_pictures", None)
    write(folder, type(pipeline).__name__, reports, pictures, repo or folder.name, base_model)


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        result = save(self, save_directory, *args, **kwargs)
        write_beside(self, Path(save_directory))
        return result

    save_pretrained.__wrapped_by_hf_quant__ = True  # type: ignore[attr-defined]
    return save_pretrained


def _uploading(upload: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(upload)
    def upload_folder(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        write_beside(self, Path(working_dir), repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    return upload_folder


def _loading(load: Callable[..., Any]) -> Any:  # noqa: ANN401  a classmethod
    @functools.wraps(load)
    def from_pretrained(cls: Any, pretrained: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        refuse(kwargs.get("quantization_config"), lambda: components_at(cls, pretrained, kwargs))
        return load(cls, pretrained, **kwargs)

    loading: Any = from_pretrained
    return classmethod(loading)


def refuse(config: object, components: Callable[[], list[str]]) -> None:
    """Stop where diffusers' own message would not help, or there is none.

    Raises:
        ConfigError: a QuantConfig without the component it is for, or the name of a component that is not there.
    """
    if isinstance(config, QuantConfig):
        raise ConfigError(
            "a pipeline is loaded with a config for each component: quantization_config=PipelineQuantizationConfig("
            f"quant_mapping={{'transformer': {config!r}}}), or 'unet' where that denoises; or load it and call "
            "hf_quant.quantize(pipeline, config), which finds what denoises"
        )
    mapping, ours = _named(config)
    if not ours:
        return
    there = components()
    for name in mapping:
        if there and name not in there:
            raise ConfigError(
                f"the pipeline has no component {name!r}{did_you_mean(name, there)}; it has: {', '.join(there)}"
            )


def _named(config: object) -> tuple[list[str], bool]:
    """The components that a PipelineQuantizationConfig names, and whether any of it is ours."""
    mapping = getattr(config, "quant_mapping", None)
    if isinstance(mapping, dict):
        return [str(name) for name in mapping], any(isinstance(own, QuantConfig) for own in mapping.values())
    return list(getattr(config, "components_to_quantize", None) or ()), getattr(
        config, "quant_backend", ""
    ) == "hf_quant"


def components_at(kind: Any, pretrained: Any, given: Mapping[str, Any]) -> list[str]:  # noqa: ANN401
    """The components that a saved pipeline's index names; none when it cannot be read, which diffusers will say."""
    hub = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
    try:
        index = kind.load_config(pretrained, **{name: given[name] for name in hub if name in given})
    except (OSError, ValueError):
        return []
    return [name for name, place in index.items() if isinstance(place, list | tuple)]


if not hasattr(DiffusionPipeline.save_pretrained, "__wrapped_by_hf_quant__"):
    DiffusionPipeline.save_pretrained = _saving(DiffusionPipeline.save_pretrained)
    DiffusionPipeline._upload_folder = _uploading(DiffusionPipeline._upload_folder)
    DiffusionPipeline.from_pretrained = _loading(DiffusionPipeline.from_pretrained.__func__)
