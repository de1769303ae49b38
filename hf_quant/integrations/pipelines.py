"""Every saved or pushed pipeline with components of ours carries its card, its pictures and its reports.

diffusers offers no hook for files beside the components: methods of its pipelines are wrapped once, when they are
imported. Saving writes the card after the components; an upload, before which diffusers writes a generic card, again.
Loading refuses what a config of ours cannot mean before a file is read: diffusers would speak of its own class, or warn
and leave the component in full precision.
"""

import functools
import importlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from hf_quant.config import QuantConfig
from hf_quant.errors import ConfigError
from hf_quant.integrations.finish import is_ours
from hf_quant.method import did_you_mean
from hf_quant.report import Report


def reports_of(pipeline: Any) -> dict[str, Report | None]:  # noqa: ANN401
    """Component of ours -> the report of what was done to it; mostly None for those that were loaded quantized."""
    return {name: part.hf_quantizer.report for name, part in pipeline.components.items() if is_ours(part)}


def write_beside(pipeline: Any, folder: Path, repo: str | None = None) -> None:  # noqa: ANN401
    """Card, pictures and reports into the folder of a saved pipeline, unless a person wrote the card there.

    They go where a pipeline without components of ours took the place of one with them.
    """
    from hf_quant.integrations.saving import by_a_person, withdraw
    from hf_quant.pages.card import is_hub_id
    from hf_quant.pages.pipeline_card import write

    reports, base = reports_of(pipeline), str(pipeline.config.get("_name_or_path") or "")
    if not reports:
        withdraw(folder)
    if not reports or by_a_person(folder / "README.md"):
        return
    source = Path(base)
    saved = {name: _read(source / f"report-{name}.json") for name in reports}
    if all(report in (None, saved[name]) for name, report in reports.items()):
        _carry_over(source, folder, repo or folder.name, reports)
        return
    known = {name: report for name in reports if (report := reports[name] or saved[name]) is not None}
    base_model = base if is_hub_id(base) else None
    pictures = getattr(pipeline, "hf_quant_pictures", None)
    write(folder, type(pipeline).__name__, known, pictures, repo or folder.name, base_model, pipeline.dtype)


def _carry_over(source: Path, folder: Path, repo: str, components: Iterable[str]) -> None:
    """Card, pictures and reports of a pipeline that was loaded quantized, under its new name."""
    from hf_quant.integrations.saving import MARKS
    from hf_quant.pages.pipeline_card import GRID, renamed

    card = source / "README.md"
    if source.resolve() == folder.resolve() or not card.is_file():
        return
    text = card.read_text(encoding="utf-8", errors="replace")
    if MARKS[0] not in text:
        return
    (folder / card.name).write_text(renamed(text, repo), encoding="utf-8")
    for path in (source / GRID, *(source / f"report-{name}.json" for name in components)):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _read(file: Path) -> Report | None:
    return Report.load(file) if file.is_file() else None


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
        refuse(kwargs.get("quantization_config"), lambda: networks_at(cls, pretrained, kwargs), kwargs)
        return load(cls, pretrained, **kwargs)

    loading: Any = from_pretrained
    return classmethod(loading)


def refuse(config: object, networks: Callable[[], list[str]], given: Mapping[str, Any]) -> None:
    """Stop where diffusers' own message would not help, or there is none.

    Raises:
        ConfigError: a QuantConfig without the component it is for, or the name of a component that is not there, has
            no weights, or is given ready-made.
    """
    if isinstance(config, QuantConfig):
        raise ConfigError(
            "a pipeline is loaded with a config for each component: quantization_config=PipelineQuantizationConfig("
            f"quant_mapping={{'transformer': {config!r}}}), or 'unet' where that denoises; or load it and call "
            "hf_quant.quantize(pipeline, config), which finds what denoises and calibrates methods that need data"
        )
    mapping, ours = _named(config)
    if not ours:
        return
    there = networks()
    for name in mapping:
        if there and name not in there:
            raise ConfigError(
                f"the pipeline has no network {name!r}{did_you_mean(name, there)}; it has: {', '.join(there)}"
            )
        if name in given:
            raise ConfigError(
                f"{name} is given ready-made, so it is not quantized while loading: load it with "
                f"quantization_config=... itself, or leave {name!r} out of the mapping"
            )


def _named(config: object) -> tuple[list[str], bool]:
    """The components that a PipelineQuantizationConfig names, and whether any of it is ours."""
    mapping = getattr(config, "quant_mapping", None)
    if isinstance(mapping, dict):
        return [str(name) for name in mapping], any(isinstance(own, QuantConfig) for own in mapping.values())
    return list(getattr(config, "components_to_quantize", None) or ()), getattr(
        config, "quant_backend", ""
    ) == "hf_quant"


def networks_at(kind: Any, pretrained: Any, given: Mapping[str, Any]) -> list[str]:  # noqa: ANN401
    """The networks that a saved pipeline's index names; none when it cannot be read, which diffusers will say."""
    hub = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
    try:
        index = kind.load_config(pretrained, **{name: given[name] for name in hub if name in given})
    except (OSError, ValueError):
        return []
    return [name for name, place in index.items() if isinstance(place, list) and _has_weights(*place)]


def _has_weights(library: object = None, name: object = None, *_: object) -> bool:
    """Not a tokenizer or a scheduler, and not left out; a class that is not to be found here counts as a network."""
    known = importlib.import_module(str(library)) if library in ("diffusers", "transformers") else None
    kind = getattr(known, str(name), None)
    return name is not None and (not isinstance(kind, type) or issubclass(kind, nn.Module))


if not hasattr(DiffusionPipeline.save_pretrained, "__wrapped_by_hf_quant__"):
    DiffusionPipeline.save_pretrained = _saving(DiffusionPipeline.save_pretrained)
    DiffusionPipeline._upload_folder = _uploading(DiffusionPipeline._upload_folder)
    DiffusionPipeline.from_pretrained = _loading(DiffusionPipeline.from_pretrained.__func__)
