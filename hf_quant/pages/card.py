"""The model card: README.md with the Hub's metadata. Its numbers come from a report and an evaluation alone."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.errors import ConfigError
from hf_quant.measure.evaluation import Evaluation, measured_of
from hf_quant.pages.describe import arguments, call, count, groups, megabytes, seconds
from hf_quant.report import Report

if TYPE_CHECKING:
    from torch import nn

    from hf_quant.method import Paper

PLOT, ALLOCATION = "layers.png", "bits.png"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*|[\w][\w-]*")  # owner/name, or one of the old names without owner
PIPELINES = {  # how a transformers class ends -> the Hub's name of its task
    "ForCausalLM": "text-generation",
    "ForConditionalGeneration": "image-text-to-text",
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
}
LOADERS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForImageTextToText",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a card says about a model besides its report. None: not known, and then not stated.

    Attributes:
        repo: where it can be loaded from: a Hub id or a folder's name.
        base_model: Hub id of the full-precision model.
        library: "transformers" or "diffusers".
        loader: class whose `from_pretrained` loads it.
        pipeline_tag: the Hub's name of the task.
        license: the Hub's name of the licence.
        license_name: of a licence that the Hub has no name for (`license="other"`).
        license_link: URL of its text.
        kernels: kernel -> how many layers run it, on `device`.
        device: where `kernels` was looked up.
        weights_bytes: of the files that hold the weights.
        plot: file name of a picture beside the card: the error of every layer.
        allocation: likewise the bits of every layer, where they differ.
    """

    repo: str | None = None
    base_model: str | None = None
    library: str = "transformers"
    loader: str = "AutoModelForCausalLM"
    pipeline_tag: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    kernels: Mapping[str, int] | None = None
    device: str | None = None
    weights_bytes: int | None = None
    plot: str | None = None
    allocation: str | None = None


def card(report: Report, evaluation: Evaluation | None = None, about: About | None = None) -> str:
    """The text of README.md: YAML metadata that the Hub accepts, then the card.

    Args:
        report: what the run did.
        evaluation: what was measured; None: the evaluation inside the report, if any, else every quality figure
            reads "not measured".
        about: what else is known.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    about = about or About()
    method = str(report.method.get("method", "unknown"))
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters |= {"count": count, "megabytes": megabytes, "seconds": seconds, "cell": _cell}
    template = environment.from_string((files("hf_quant.pages") / "model_card.md.jinja").read_text(encoding="utf-8"))
    text = template.render(
        report=report,
        measured=evaluation or measured_of(report),
        about=about,
        method=method,
        paper=_paper(method),
        arguments=arguments(report.method),
        call=call(report.method),
        groups=groups(report),
        kept=Counter(e.reason or "no reason given" for e in report.coverage if e.status == "kept"),
        unsupported=[e for e in report.coverage if e.status == "unsupported"],
        noted=[e for e in report.quantized if e.reason],
        stored=sum(e.bits for e in report.coverage) / 8,
    )
    bits = report.method.get("bits")
    data = ModelCardData(
        base_model=about.base_model,
        base_model_relation="quantized" if about.base_model else None,
        library_name=about.library,
        pipeline_tag=about.pipeline_tag,
        license=about.license,
        license_name=about.license_name,
        license_link=about.license_link,
        tags=["hf_quant", "quantized", method, *([f"{bits}-bit"] if isinstance(bits, int) else [])],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def save_card(
    model: "nn.Module",
    folder: str | Path,
    report: Report,
    evaluation: Evaluation | None = None,
    repo: str | None = None,
) -> None:
    """Write README.md, report.json and report.html beside a saved model.

    Args:
        model: the quantized model.
        folder: where it was saved.
        report: what the run did.
        evaluation: what was measured; None: the evaluation inside the report, if any.
        repo: where it will be loaded from; None: the folder's name.
    """
    from hf_quant.pages import plots, report_html

    folder = Path(folder)
    if evaluation is not None:
        report = replace(report, measured=evaluation.to_json())
    about = about_model(model, repo, folder)
    figure = plots.error_figure(report)
    if figure is not None:
        plots.save_png(figure, folder / PLOT)
        about = replace(about, plot=PLOT)
    bits = plots.bits_figure(report) if len(groups(report)) > 1 else None
    if bits is not None:
        plots.save_png(bits, folder / ALLOCATION)
        about = replace(about, allocation=ALLOCATION)
    report.save(folder / "report.json")
    report_html.write(report, folder / "report.html")
    (folder / "README.md").write_text(card(report, about=about), encoding="utf-8")


def about_model(model: "nn.Module", repo: str | None = None, folder: str | Path | None = None) -> About:
    """What a model's own config, its base's card and its layers tell.

    Args:
        model: the quantized model.
        repo: where it will be loaded from; None: a folder's name.
        folder: where it was saved, to weigh its files.
    """
    config = getattr(model, "config", None)
    config = config if isinstance(config, Mapping) else vars(config) if config is not None else {}
    base = str(config.get("_name_or_path") or "")
    before = _card_in(base)  # of the original; of the quantized model itself, when that is what was loaded
    again = getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False)
    original = before.get("base_model") if again else base
    architecture = (config.get("architectures") or [type(model).__name__])[0]
    diffusers = any(c.__module__.startswith("diffusers.") for c in type(model).__mro__)
    auto, tag = (
        next((v for k, v in table.items() if architecture.endswith(k)), None) for table in (LOADERS, PIPELINES)
    )
    files_there = sorted(Path(folder).glob("*.safetensors")) if folder is not None else []
    kernels = _kernels(model)
    return About(
        repo=repo or (Path(folder).name if folder is not None else None),
        base_model=original if isinstance(original, str) and is_hub_id(original) else None,
        library="diffusers" if diffusers else "transformers",
        loader=type(model).__name__ if diffusers else auto or "AutoModel",
        pipeline_tag=None if diffusers else tag,
        **_license(before),
        kernels=kernels,
        device=str(next(model.parameters()).device.type) if kernels else None,
        weights_bytes=sum(p.stat().st_size for p in files_there) or None,
    )


def is_hub_id(name: str) -> bool:
    """Whether this names a repository rather than a folder here."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _card_in(folder: str) -> dict[str, Any]:
    """Metadata of the card that lies in the folder; empty when there is none that can be read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError  # type: ignore[import-untyped]

    place = Path(folder) / "README.md"
    if not folder or not place.is_file():
        return {}
    try:
        return dict(ModelCard.load(place).data.to_dict())
    except (OSError, ValueError, YAMLError):
        return {}


def _license(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The licence of a card; a link to a file beside that card is left out."""
    named = {k: v for k in ("license", "license_name", "license_link") if isinstance(v := metadata.get(k), str)}
    if not named.get("license_link", "https://").startswith("https://"):
        del named["license_link"]
    return named


def _kernels(model: "nn.Module") -> dict[str, int] | None:
    used = Counter(k for m in model.modules() if isinstance(k := getattr(m, "kernel", None), str))
    return dict(used) or None


def _paper(method: str) -> "Paper | None":
    from hf_quant.method import method_named

    try:
        return method_named(method).paper
    except ConfigError:  # a method of a plug-in that is not installed here
        return None


def _cell(value: Any) -> str:  # noqa: ANN401
    """Text that cannot break out of a table's cell or of inline code."""
    return str(value).replace("|", "\\|").replace("`", "'").replace("\n", " ")
