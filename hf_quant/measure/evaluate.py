"""Evaluate: how far a quantized language model is from its full-precision original, measured and resumable.

One pass over windows of tokens spread over the data. Logits are compared in float64, a few positions at a time, and
dropped; what stays is four numbers a window, written to the resume file after every batch.
"""

import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.data import calibration
from hf_quant.data.reading import Data, Processor
from hf_quant.errors import CalibrationError, NotSupported, RunError, UnsupportedModel
from hf_quant.measure.batch_log import append, resumed
from hf_quant.measure.evaluation import Evaluation as Evaluation
from hf_quant.measure.reference_logits import (
    INDEX,
    LiveReference,
    Reference,
    StoredReference,
    device_of,
    forward,
    identity,
)
from hf_quant.running.progress import track
from hf_quant.running.resources import Peak, device_name

COMPARED = 2**22  # logits compared at a time: 32 MB of float64
FORWARD = 2**26  # logits of one forward pass when the batch size is ours to choose: 256 MB of float32


@torch.no_grad()
def evaluate(
    model: nn.Module | str | Path,
    reference: nn.Module | str | Path | None = None,
    data: Data = None,
    *,
    processor: Processor = None,
    window: int = 512,
    tokens: int = 32768,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    resume: str | Path | None = None,
    command: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure a causal language model on `tokens` tokens of `data`, in windows of `window` spread evenly over it.

    Args:
        model: the (quantized) model, or a folder or Hub id to load it from.
        reference: its full-precision original: a model, a folder or Hub id (loaded in the model's dtype), or a folder
            made by `reference_logits.store`. None: no KL and no agreement.
        data: texts, a dataset, a path or token ids, see `calibration.token_windows`.
        processor: tokenizer for texts; None: the one that lies beside the model.
        window: tokens in a window; nothing is carried from one to the next.
        tokens: how many to run; all there are when the data has fewer.
        batch_size: windows a forward pass; None: as many, at most 8, as keep the logits below 256 MB.
        device: where to run; None: where the model is.
        resume: a file that grows by a line a batch; a killed run given the same file goes on to the identical result.
        command: how this was called, for the card; None: this call in words.
        progress: show a bar on a terminal.

    Raises:
        CalibrationError: unusable data, see `calibration.token_windows`, or a window longer than the model's.
        CheckpointError: `model` or `reference` is a path at which there is nothing, or a damaged file.
        UnsupportedModel: it holds no model, gives no logits, or its vocabulary is not the reference's.
        RunError: logits are not finite, or `resume` belongs to another evaluation.
    """
    model = _load(model, "auto") if isinstance(model, str | Path) else model
    if device is not None:
        model.to(device)
    ids = calibration.spread_windows(data, processor or _Beside(model), window, tokens)
    calibration.check_inputs([{"input_ids": ids}], model)
    _check_window(model, ids.shape[1])
    against = _reference(reference, model, ids)
    size = batch_size or max(1, min(8, FORWARD // (ids.shape[1] * _vocabulary(model))))
    key = {
        "ids": calibration.fingerprint([{"input_ids": ids}]),
        "batch_size": size,
        "model": identity(model),
        "reference": against.identity if against else None,
    }
    log = Path(resume) if resume is not None else None
    done = resumed(log, key) if log else []
    peak = Peak(device_of(model))
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        starts = range(len(done) * size, len(ids), size)
        for start in track(starts, description="evaluating", enabled=progress):
            done.append({**_batch(model, against, ids[start : start + size], start), "peak": peak.bytes()})
            if log:
                append(log, done[-1])
    finally:
        for module in training:
            module.training = True
    return Evaluation(
        **_summary([row for batch in done for row in batch["windows"]]),
        windows=len(ids),
        window=ids.shape[1],
        data=calibration.describe(data),
        bits_per_weight=_true_bits(model),
        bytes_on_disk=_bytes_on_disk(model),
        peak_bytes=max(batch["peak"] for batch in done),
        peak_holds="the model and the reference" if isinstance(against, LiveReference) else "the model",
        tokens_per_second=statistics.median(len(b["windows"]) * ids.shape[1] / b["forward"] for b in done),
        batch_size=size,
        device=device_name(device_of(model)),
        dtype=str(getattr(model, "dtype", next(model.parameters()).dtype)).removeprefix("torch."),
        seconds=sum(batch["seconds"] for batch in done),
        command=command or _in_words(reference, data, window, tokens),
    )


def lm_eval(
    model: nn.Module,
    tokenizer: Processor,
    tasks: Sequence[str | dict[str, Any]],
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Run tasks of EleutherAI's lm-evaluation-harness: task -> its metrics, as the harness reports them.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: names of the harness's tasks, whose data it downloads, or tasks as the harness's own config dicts.
        limit: examples a task; None: all.
        batch_size: sequences a forward pass.

    Raises:
        NotSupported: the extra is not installed.
    """
    try:
        import lm_eval as harness
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise NotSupported(
            f"tasks need the lm-evaluation-harness ({error}): pip install 'hf-quant[eval]'; evaluate() needs nothing"
        ) from error
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results: dict[str, dict[str, Any]] = harness.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)[
        "results"
    ]
    return results


def score(logits_SV: Tensor, ids_S: Tensor, reference_SV: Tensor | None) -> list[float]:
    """`[nll]`, with a reference `[nll, KL, agreement, reference nll]`: means over the window's tokens, in float64.

    The KL and the agreement are over all S positions, the nlls over the S - 1 that have a next token.
    """
    S, V = logits_SV.shape
    step = max(1, COMPARED // V)
    sums = torch.zeros(4, dtype=torch.float64, device=logits_SV.device)
    for s in range(0, S, step):
        targets = ids_S[s + 1 : s + 1 + step].to(logits_SV.device)
        log_q = logits_SV[s : s + step].double().log_softmax(-1)
        sums[0] -= log_q[: len(targets)].gather(-1, targets[:, None]).sum()
        if reference_SV is not None:
            log_p = reference_SV[s : s + step].to(log_q.device).double().log_softmax(-1)
            p = log_p.exp()
            sums[1] += torch.where(p > 0, p * (log_p - log_q), 0).sum()  # 0 log 0 = 0
            sums[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
            sums[3] -= log_p[: len(targets)].gather(-1, targets[:, None]).sum()
    means: list[float] = (sums / torch.tensor([S - 1, S, S, S - 1], device=sums.device)).tolist()
    return means[:1] if reference_SV is None else means


def _batch(model: nn.Module, against: Reference | None, ids_BS: Tensor, start: int) -> dict[str, Any]:
    began = _now(device_of(model))
    logits = forward(model, ids_BS)
    ran = _now(device_of(model))
    reference = against.logits(ids_BS, start) if against else None
    if reference is not None and reference.shape != logits.shape:
        raise UnsupportedModel(
            f"the model's logits are {list(logits.shape)} and the reference's {list(reference.shape)}: "
            "not the same vocabulary, so they cannot be compared"
        )
    rows = [score(logits[b], ids_BS[b], None if reference is None else reference[b]) for b in range(len(ids_BS))]
    for b, row in enumerate(rows):
        if not all(map(math.isfinite, row)):
            raise RunError(
                f"the logits of window {start + b} hold NaN or infinite values: a model that diverges has no score"
            )
    return {"windows": rows, "forward": ran - began, "seconds": time.perf_counter() - began}


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, None for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return math.fsum(values) / len(values), error


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _summary(rows: list[list[float]]) -> dict[str, Any]:
    columns = [_mean(column) for column in zip(*rows, strict=True)]
    nll, nll_error = columns[0]
    perplexity = math.exp(nll)
    summary = {"perplexity": perplexity, "perplexity_error": _times(nll_error, perplexity)}
    if len(columns) == 1:
        return {**summary, **dict.fromkeys(("kl", "kl_error", "top1", "top1_error", "reference_perplexity"))}
    increase, increase_error = _mean([row[0] - row[3] for row in rows])
    (kl, kl_error), (agreement, agreement_error), (reference_nll, _) = columns[1:]
    return {
        **summary,
        "kl": kl,
        "kl_error": kl_error,
        "top1": 100 * agreement,
        "top1_error": _times(agreement_error, 100),
        "reference_perplexity": math.exp(reference_nll),
        "loss_increase": increase,
        "loss_increase_error": increase_error,
    }


class _Beside:
    """The tokenizer that lies beside a model, loaded when a text needs it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def tokenizer(self) -> Processor:
        from transformers import AutoTokenizer

        place = getattr(getattr(self.model, "config", None), "_name_or_path", "")
        try:
            return AutoTokenizer.from_pretrained(place) if place else None
        except (OSError, ValueError):
            return None


def _load(path: str | Path, dtype: Any) -> nn.Module:  # noqa: ANN401  torch.dtype or "auto"
    from hf_quant.loading import load_model

    return load_model(path, dtype=dtype)


def _reference(given: nn.Module | str | Path | None, model: nn.Module, ids: Tensor) -> Reference | None:
    if given is None:
        return None
    if isinstance(given, str | Path) and (Path(given) / INDEX).is_file():
        stored = StoredReference(Path(given))
        stored.check(ids)
        return stored
    if isinstance(given, str | Path):
        given = _load(given, getattr(model, "dtype", "auto")).to(device_of(model))
    return LiveReference(given.eval())


def _check_window(model: nn.Module, window: int) -> None:
    longest = calibration.context_length(model)
    if longest is not None and window > longest:
        raise CalibrationError(f"window={window}, and the model has {longest} positions: pass window={longest} or less")


def _vocabulary(model: nn.Module) -> int:
    return int(getattr(getattr(model, "config", None), "vocab_size", None) or 2**15)


def _quantization(config: Any) -> Any:  # noqa: ANN401
    return (
        config.get("quantization_config") if isinstance(config, dict) else getattr(config, "quantization_config", None)
    )


def _true_bits(model: nn.Module) -> float | None:
    from hf_quant.ledger import true_bits

    return true_bits(model) or None


def _bytes_on_disk(model: nn.Module) -> int | None:
    """Of the folder it was loaded from, unless it was quantized since."""
    config = getattr(model, "config", None)
    folder = Path(getattr(config, "_name_or_path", "") or "")
    try:
        saved = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    if (_quantization(saved) is None) != (_quantization(config) is None):
        return None
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) or None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _in_words(reference: Any, data: Data, window: int, tokens: int) -> str:  # noqa: ANN401
    against = (
        Path(reference).name if isinstance(reference, str | Path) else None if reference is None else "full precision"
    )
    return (
        f"hf_quant.measure.evaluate.evaluate(model, reference={against!r}, data={calibration.describe(data)!r}, "
        f"window={window}, tokens={tokens})"
    )
