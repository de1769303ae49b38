"""Rows: the samples that a training draws its batches from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_quant.errors import CalibrationError, UnsupportedModel
from hf_quant.runtime.clock import NAME
from hf_quant.stages.sampler import Batch

ENTRY = "@" + NAME  # of a row: its entry in tables by timestep
PADDING = {"labels": -100}  # of rows that are shorter than others of their batch; else 0


def rows_of(batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Micro-batches as single samples.

    Raises:
        UnsupportedModel: they cannot be taken apart, or not be put together again.
    """
    rows = []
    for batch in batches:
        own = {n: v for n, v in batch.items() if n == ENTRY or not n.startswith("@")}
        count = len(next(iter(own.values())))
        if shared := [n for n, v in own.items() if not v.dim() or len(v) != count]:
            raise UnsupportedModel(
                f"training takes rows one by one, and {shared[0]!r} of the data is shared by several"
            )
        rows += [{n: v[i] for n, v in own.items()} for i in range(count)]
    kinds = {tuple((n, v.shape[v.dim() and "input_ids" in row :]) for n, v in row.items()) for row in rows}
    if len(kinds) > 1:
        raise UnsupportedModel("training takes rows of one kind, and these differ in their shapes or in what they hold")
    return rows


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of rows, shorter ones padded on the right (and masked)."""
    columns = {n: [r[n] for r in rows] for n in rows[0]}
    batch = {n: pad_sequence(c, True, PADDING.get(n, 0)) if c[0].dim() else torch.stack(c) for n, c in columns.items()}
    if "input_ids" in batch and "attention_mask" not in batch:
        lengths = torch.tensor([len(ids) for ids in columns["input_ids"]])
        if len(lengths.unique()) > 1:
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def check_labels(model: Any, batches: Sequence[Batch]) -> None:  # noqa: ANN401  a model of any library
    """A model's own loss needs labels; of a causal language model they are its tokens.

    Raises:
        CalibrationError: there are none.
    """
    causal = _is_causal(model)
    if any("labels" not in batch and not (causal and "input_ids" in batch) for batch in batches):
        raise CalibrationError(
            f"distill < 1 trains on the model's own loss, for which {type(model).__name__} needs labels: give them "
            "beside its other inputs (batches or rows with 'labels'), or distill=1"
        )


def targets_of(model: Any, labels: Tensor) -> int:  # noqa: ANN401
    """How many labels a model's own loss is the mean over: a causal language model has nothing to say of the first."""
    return int((labels[..., 1:] if _is_causal(model) else labels).ne(-100).sum())


def _is_causal(model: Any) -> bool:  # noqa: ANN401
    return getattr(model, "can_generate", bool)() and not model.config.is_encoder_decoder


def counted(model: Any, inputs: Mapping[str, Tensor], answer: Tensor) -> Any:  # noqa: ANN401  an index
    """Which positions of a model's answer `[..., V]` are no padding: a mask, or `...` for all of them."""
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and (
        labels is not None or "decoder_input_ids" in inputs
    ):
        mask = inputs.get("decoder_attention_mask", None if labels is None else labels != -100)
    return ... if mask is None or mask.shape != answer.shape[:-1] else mask != 0


def size_of(inputs: Mapping[str, Tensor]) -> int:
    """Tokens of a batch, without padding; rows of a model that takes none."""
    if "input_ids" not in inputs:
        return len(next(iter(inputs.values())))
    return int((inputs["attention_mask"] != 0).sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
