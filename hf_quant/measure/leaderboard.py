"""Leaderboard: many methods at many bits on one model, each measured on what was saved and loaded back.

A row is finished when its file is written; a later call with the same model, data and settings keeps it. The Pareto
front is the rows that no other row beats at once in true bits and in KL.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_quant.config import QuantConfig
from hf_quant.errors import CalibrationError, ConfigError, HfQuantError, RunError
from hf_quant.loading import load_model, load_processor, read_config, require_float
from hf_quant.measure.evaluate import evaluate
from hf_quant.measure.reference_logits import INDEX, store
from hf_quant.method import Method
from hf_quant.running.locks import hold
from hf_quant.running.progress import track
from hf_quant.running.resources import Peak, device_name, versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method at one width.

    Attributes:
        method: its id.
        asked: bits asked for; None for a method that has no such argument.
        refused: why it did not run; all that follows is then None.
        bits: true bits a quantized weight.
        kl: mean KL to full precision, in nats a token.
        kl_error: its standard error.
        top1: tokens (%) whose most likely successor stays the same.
        seconds: of quantizing.
        peak_bytes: most memory in use while quantizing.
        bytes_on_disk: of the saved weights.
    """

    method: str
    asked: int | None
    refused: str | None = None
    bits: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    top1: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    bytes_on_disk: int | None = None

    @property
    def name(self) -> str:
        """`gptq-3`, or `bnb-nf4`."""
        return self.method if self.asked is None else f"{self.method}-{self.asked}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """What all rows have in common.

    Attributes:
        model: folder or Hub id of the full-precision model.
        held_out: data they are measured on.
        calibration: data they are calibrated on, or None.
        group_size: weights sharing a scale, for the methods that ask; None: their own default.
        window: tokens in a window.
        tokens: how many to measure on.
        seed: of everything drawn at random.
    """

    model: str
    held_out: Path
    calibration: Path | None = None
    group_size: int | None = None
    window: int = 256
    tokens: int = 16384
    seed: int = 0

    def key(self) -> str:
        """Changes when a row would: settings, data, weights, and the versions of what computes."""
        digest = hashlib.sha256(repr((self.group_size, self.window, self.tokens, self.seed)).encode())
        made = {k: v for k, v in versions().items() if k in ("hf-quant", "torch", "transformers")}
        digest.update(repr(sorted(made.items())).encode())
        files = [f for f in (self.held_out, self.calibration) if f is not None and f.is_file()]
        files += sorted(Path(self.model).glob("*.safetensors"))
        for file in files:
            digest.update(file.read_bytes())
        return digest.hexdigest()


def entries(methods: Sequence[Method], widths: Sequence[int]) -> list[tuple[Method, int | None]]:
    """Every (method, width) to run; a method without an argument `bits` has one row.

    Raises:
        ConfigError: no width, or none that is positive.
    """
    if not widths or any(b < 1 for b in widths):
        raise ConfigError(f"bits={list(widths)}: at least one positive number")
    return [(m, b) for m in methods for b in (widths if "bits" in m.signature.parameters else (None,))]


def run(contest: Contest, wanted: Sequence[tuple[Method, int | None]], folder: Path) -> list[Row]:
    """Run what is not finished, and return every row in the order asked for.

    Raises:
        RunError: the folder belongs to another contest, or another process works in it.
        CheckpointError, CalibrationError: the model or the data cannot be used.
    """
    require_float(read_config(contest.model), contest.model)
    for data in (contest.held_out, contest.calibration):
        if data is not None and not data.exists():
            raise CalibrationError(f"no file {data}")
    rows = folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        _same_contest(folder / "contest.json", contest)
        todo = [(m, b) for m, b in wanted if not (rows / f"{Row(method=m.id, asked=b).name}.json").is_file()]
        reference = folder / "reference"
        if todo and not (reference / INDEX).is_file():
            _store(contest, reference)
        for method, bits in track(todo, description="leaderboard"):
            row = _row(contest, method, bits, folder / "work", reference)
            part = rows / f"{row.name}.part"
            part.write_text(json.dumps(asdict(row), indent=1) + "\n")
            part.replace(rows / f"{row.name}.json")
        shutil.rmtree(folder / "work", ignore_errors=True)
        shutil.rmtree(reference, ignore_errors=True)
    return [Row(**json.loads((rows / f"{Row(method=m.id, asked=b).name}.json").read_text())) for m, b in wanted]


def _same_contest(path: Path, contest: Contest) -> None:
    key = contest.key()
    if not path.is_file():
        path.write_text(json.dumps({"key": key}) + "\n")
    elif json.loads(path.read_text()).get("key") != key:
        raise RunError(
            f"{path.parent} holds rows of another contest (other model, data, settings or versions); name another "
            "folder, or delete it"
        )


def _store(contest: Contest, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model, processor = load_model(contest.model), load_processor(contest.model)
    store(model, contest.held_out, folder, processor=processor, window=contest.window, tokens=contest.tokens)


def _row(contest: Contest, method: Method, bits: int | None, work: Path, reference: Path) -> Row:
    group = contest.group_size if "group_size" in method.signature.parameters else None
    processor = load_processor(contest.model)
    peak = Peak(torch.device("cpu"))
    try:
        config = QuantConfig(
            method.id,
            bits=bits,
            group_size=group,
            calibration=contest.calibration,
            processor=processor,
            seed=contest.seed,
        )
        made: Any = load_model(contest.model, config)
    except HfQuantError as error:
        return Row(method=method.id, asked=bits, refused=" ".join(str(error).split()))
    used, report = peak.bytes(), made.hf_quantizer.report
    shutil.rmtree(work, ignore_errors=True)
    made.save_pretrained(work)
    del made
    found = evaluate(
        load_model(work),
        reference,
        contest.held_out,
        processor=processor,
        window=contest.window,
        tokens=contest.tokens,
        progress=False,
    )
    return Row(
        method=method.id,
        asked=bits,
        bits=found.bits_per_weight,
        kl=found.kl,
        kl_error=found.kl_error,
        top1=found.top1,
        seconds=report.seconds,
        peak_bytes=used,
        bytes_on_disk=found.bytes_on_disk,
    )


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in bits and KL at once, by rising bits."""
    front: list[Row] = []
    for row in _by_size(rows):
        if not front or _point(row)[1] < _point(front[-1])[1]:
            front.append(row)
    return front


def _by_size(rows: Sequence[Row]) -> list[Row]:
    """The measured ones, by rising true bits and KL."""
    return sorted((r for r in rows if r.refused is None), key=_point)


def _point(row: Row) -> tuple[float, float]:
    """(true bits, KL) of a measured row."""
    return float(row.bits or 0.0), float(row.kl or 0.0)


def result(contest: Contest, rows: Sequence[Row], command: str) -> dict[str, Any]:
    """Everything as JSON: rows by true bits, the front, and what it was measured on."""
    ordered = _by_size(rows)
    return {
        "model": Path(contest.model).name,
        "held_out": contest.held_out.name,
        "calibration": None if contest.calibration is None else contest.calibration.name,
        "settings": {n: getattr(contest, n) for n in ("group_size", "window", "tokens", "seed")},
        "rows": [asdict(r) for r in ordered],
        "refused": [asdict(r) for r in rows if r.refused is not None],
        "pareto": [r.name for r in pareto(rows)],
        "device": device_name(torch.device("cpu")),
        "versions": versions(),
        "command": command,
    }


def save_plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """KL against true bits, a line a method, and the Pareto front."""
    import matplotlib
    from matplotlib.figure import Figure

    from hf_quant.pages.plots import INK, LINE, MARKERS, MUTED, SERIES, SETTINGS, save_png

    groups: dict[str, list[Row]] = {}
    for row in _by_size(rows):
        groups.setdefault(row.method, []).append(row)
    front = pareto(rows)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(10, 6))
        axes = figure.add_axes((0.075, 0.1, 0.685, 0.83))
        axes.plot(*zip(*map(_point, front), strict=True), color=LINE, linewidth=7, zorder=0, label="Pareto front")
        for i, (method, own) in enumerate(groups.items()):
            style = MARKERS[i // len(SERIES) % len(MARKERS)] + "-"
            color = SERIES[i % len(SERIES)]
            axes.plot(
                *zip(*map(_point, own), strict=True),
                style,
                color=color,
                label=method,
                markersize=5,
                linewidth=1.1,
            )
        axes.set_yscale("log")
        axes.set_xlabel("true bits per weight, everything stored counted", color=MUTED)
        axes.set_title(title, loc="left", color=MUTED, fontsize=10)
        axes.tick_params(colors=MUTED, which="both", length=0)
        axes.grid(color=LINE, linewidth=0.6)
        for spine in axes.spines.values():
            spine.set_color(LINE)
        columns = 1 + len(groups) // 34
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, labelcolor=INK, fontsize=8, ncols=columns
        )
        save_png(figure, path)
