"""Every saved or pushed model of ours carries its card and its report.

transformers offers no hook for files beside the weights, so two of its methods are wrapped once: `save_pretrained`
writes them after the weights, and the upload (which puts a generic card in their place) gets them back.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from transformers.utils import extract_commit_hash

from hf_quant.checkpoint import describe, packed_modules
from hf_quant.config import QuantConfig
from hf_quant.errors import CheckpointError, HfQuantError
from hf_quant.loading import OURS, quantized_by
from hf_quant.pages.card import ALLOCATION, PLOT, save_card
from hf_quant.pages.pipeline_card import GRID
from hf_quant.report import Report

# A card without one of these was written by a person and is left alone.
MARKS = ("<!-- written by hf-quant", "This model card has been automatically generated.")
BITS = re.compile(r"\d+-bit")


def settle_headers(folder: Path) -> None:
    """The same model gives the same bytes: safetensors writes its metadata in another order every time."""
    for path in folder.glob("model*.safetensors"):
        with path.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) <= size:  # the tensors stay where they are
                file.seek(8)
                file.write(text.ljust(size))


def _ours(model: Any) -> bool:  # noqa: ANN401  a PreTrainedModel
    """Whether this is a model of ours that is saved whole, not an adapter on it."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return isinstance(config, QuantConfig) and not getattr(model, "_hf_peft_config_loaded", False)


def report_of(model: Any) -> Report | None:  # noqa: ANN401  a PreTrainedModel
    """The report of a model of ours that is about to be saved whole; None for others and for adapters."""
    if not _ours(model):
        return None
    quantizer = model.hf_quantizer
    report: Report | None = quantizer.report or _report_on_hub(model.config.name_or_path, quantizer.files)
    return report


def _report_on_hub(repo: str, files: Sequence[str]) -> Report | None:
    """The report beside the weights that were downloaded; None when there is none, or no way to it."""
    commit = extract_commit_hash(files[0], None) if files else None
    if commit is None:
        return None
    try:
        return Report.load(hf_hub_download(repo, "report.json", revision=commit))
    except (OSError, ValueError, HfQuantError):
        return None  # a report is not needed to save a model


def write_beside(model: Any, folder: Path, repo: str | None = None) -> None:  # noqa: ANN401
    """Card, report.json and report.html into the folder of a saved model, unless a person wrote the card there.

    They go where a model that is not ours took the place of one.
    """
    report, readme, config = report_of(model), folder / "README.md", folder / "config.json"
    if not config.is_file():
        return
    if quantized_by(json.loads(config.read_text(encoding="utf-8"))) != OURS:
        withdraw(folder)
    if report is None:
        return
    if by_a_person(readme):
        report.save(folder / "report.json")
        return
    given = _tags(readme)
    save_card(model, folder, report, repo=repo)
    if given:
        written = ModelCard.load(readme)
        written.data.tags = list(dict.fromkeys([*(written.data.tags or []), *given]))
        written.save(readme)


def withdraw(folder: Path) -> None:
    """Delete what was written beside a quantized model that is no longer there. A card that a person wrote stays."""
    gone = [path for path in folder.glob("report*.json") if _is_report(path)]
    if gone:
        gone.append(folder / "report.html")
    readme = folder / "README.md"
    if readme.is_file() and MARKS[0] in readme.read_text(encoding="utf-8", errors="replace"):
        gone += [readme, *(folder / name for name in (PLOT, ALLOCATION, GRID))]
    for path in gone:
        path.unlink(missing_ok=True)


def _is_report(path: Path) -> bool:
    try:
        Report.load(path)
    except CheckpointError:  # somebody else's
        return False
    return True


def by_a_person(readme: Path) -> bool:
    """Whether there is a card that no library wrote."""
    return readme.is_file() and not any(m in readme.read_text(encoding="utf-8", errors="replace") for m in MARKS)


def _tags(readme: Path) -> list[str]:
    """The tags a user gave to an earlier card: ours come first in it, the method third, then perhaps the bits."""
    tags = list(ModelCard.load(readme).data.tags or []) if readme.is_file() else []
    if tags[:2] == ["hf_quant", "quantized"]:
        tags = tags[3:]
        tags = tags[1:] if tags and BITS.fullmatch(tags[0]) else tags
    return tags


def wrap() -> None:
    """Wrap both methods, once: when the first quantizer of ours is made, as PreTrainedModel is not there at import."""
    from transformers.modeling_utils import PreTrainedModel

    if hasattr(PreTrainedModel.save_pretrained, "__wrapped_by_hf_quant__"):
        return
    PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)
    PreTrainedModel._upload_modified_files = _uploading(PreTrainedModel._upload_modified_files)


@contextmanager
def _described(model: Any) -> Iterator[None]:  # noqa: ANN401  a PreTrainedModel
    """A part of a quantized model that is saved alone (`model.model`, a vision tower) describes itself meanwhile."""
    if getattr(model, "hf_quantizer", None) is not None or next(packed_modules(model), None) is None:
        yield
        return
    from hf_quant.integrations.transformers import Quantizer

    of_whole = getattr(model.config, "quantization_config", None)  # the config may be that of the whole model
    made_by = of_whole.made_by if isinstance(of_whole, QuantConfig) else None
    own = QuantConfig(sites=describe(model)["sites"], made_by=made_by)
    model.hf_quantizer, model.config.quantization_config = Quantizer(own, pre_quantized=True), own
    try:
        yield
    finally:
        del model.hf_quantizer, model.config.quantization_config
        if of_whole is not None:
            model.config.quantization_config = of_whole


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with _described(self):
            result = save(self, save_directory, *args, **kwargs)
            main = args[0] if args else kwargs.get("is_main_process", True)
            if main:
                if _ours(self):
                    settle_headers(Path(save_directory))
                write_beside(self, Path(save_directory))
        if main and getattr(self, "_hf_peft_config_loaded", False):
            from hf_quant.integrations.adapters import leave_word

            leave_word(self, Path(save_directory))
        return result

    save_pretrained.__wrapped_by_hf_quant__ = True  # type: ignore[attr-defined]
    return save_pretrained


def _uploading(upload: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(upload)
    def upload_modified_files(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        write_beside(self, Path(working_dir), repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    return upload_modified_files
