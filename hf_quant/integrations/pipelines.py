"""Every saved or pushed pipeline with components of ours carries its card, its pictures and its reports.

diffusers offers no hook for files beside the components: two methods of its pipelines are wrapped once, when they are
imported. Saving writes the card after the components; an upload, before which diffusers writes a generic card, again.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from hf_quant.config import QuantConfig
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


if not hasattr(DiffusionPipeline.save_pretrained, "__wrapped_by_hf_quant__"):
    DiffusionPipeline.save_pretrained = _saving(DiffusionPipeline.save_pretrained)
    DiffusionPipeline._upload_folder = _uploading(DiffusionPipeline._upload_folder)
