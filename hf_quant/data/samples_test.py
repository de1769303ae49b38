import numpy as np
import pytest
import torch

from hf_quant.data.calibration import model_inputs, spread_windows, token_windows
from hf_quant.data.samples import as_batches, is_sample
from hf_quant.errors import CalibrationError
from hf_quant.stages.sampler import TextSampler
from hf_quant.testing.subjects import SUBJECTS

TAKES = ("input_ids", "attention_mask", "labels")
ROWS = [
    {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, -100, 6, 7], "id": "a"},
    {"input_ids": [1, 2, 3, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "labels": [1, 2, 3, -100, -100], "id": "b"},
    {"input_ids": [8, 9, 0, 0, 0], "attention_mask": [1, 1, 0, 0, 0], "labels": [8, 9, -100, -100, -100], "id": "c"},
]
FORMS = [
    lambda: ROWS,
    lambda: [{n: np.array(v) if n != "id" else v for n, v in row.items()} for row in ROWS],
    lambda: [{n: torch.tensor(v) for n, v in row.items() if n != "id"} for row in ROWS],
    lambda: pytest.importorskip("datasets").Dataset.from_list(ROWS),
    lambda: pytest.importorskip("datasets").Dataset.from_list(ROWS).with_format("torch"),
]


@pytest.mark.parametrize("form", FORMS)
def test_rows_keep_their_labels_and_lose_their_padding(form) -> None:
    batches = TextSampler().sample(form(), None, 0, SUBJECTS["llm"].model())
    assert [{n: v.tolist() for n, v in b.items()} for b in batches] == [
        {"input_ids": [[5, 6, 7], [1, 2, 3]], "labels": [[-100, 6, 7], [1, 2, 3]]},
        {"input_ids": [[8, 9]], "labels": [[8, 9]]},
    ]


def test_where_ids_alone_are_wanted_padding_is_cut_off_too() -> None:
    assert token_windows(ROWS[:2], None, 2, 8, 0).tolist() == [[5, 6, 7], [1, 2, 3]]
    with pytest.raises(CalibrationError, match="2 to 3 tokens long"):
        spread_windows(ROWS, None, 4, 64)


def test_rows_of_ids_are_the_batches_that_a_tensor_of_them_is() -> None:
    ids, model = torch.arange(50).reshape(5, 10), SUBJECTS["llm"].model()
    given = [{"input_ids": row, "attention_mask": [1] * 10} for row in ids.tolist()]
    ours, theirs = (model_inputs(data, None, 4, 8, 0, 3, model) for data in (given, ids))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert torch.equal(a["input_ids"], b["input_ids"])


def test_a_mask_with_holes_stays() -> None:
    rows = [{"input_ids": [1, 2, 3, 4], "attention_mask": [1, 0, 1, 0]}, {**ROWS[1]}]
    (batch,) = as_batches(iter([{n: r[n] for n in TAKES[:2]} for r in rows]), TAKES, 9, 8)
    assert batch["attention_mask"].tolist() == [[1, 0, 1], [1, 1, 1]]


def test_a_decoders_labels_are_not_beside_the_ids() -> None:
    (batch,) = as_batches(iter(ROWS[1:2]), (*TAKES, "decoder_input_ids"), 2, 8)
    assert batch["input_ids"].tolist() == [[1, 2]]
    assert batch["labels"].tolist() == [[1, 2]]  # no more than `length`
    (batch,) = as_batches(iter(ROWS[1:2]), (*TAKES, "decoder_input_ids"), 9, 8)
    assert batch["labels"].tolist() == [ROWS[1]["labels"]]


def test_pictures_with_labels() -> None:
    rows = [{"pixel_values": torch.randn(3, 4, 4), "label": i} for i in range(3)]
    sizes = [
        (b["pixel_values"].shape, b["labels"].tolist())
        for b in as_batches(iter(rows), ("pixel_values", "labels"), 9, 2)
    ]
    assert sizes == [((2, 3, 4, 4), [0, 1]), ((1, 3, 4, 4), [2])]


def test_what_is_no_sample() -> None:
    assert not is_sample({"text": "a", "tags": [1, 2], "score": 3})
    assert not is_sample({"input_ids": torch.ones(2, 3)})
    assert not is_sample({"pixel_values": torch.ones(2, 3, 4, 4)})
    for rows, message in (
        ([ROWS[0], "a"], "item 1 is a str"),
        ([{"input_ids": [1, 2], "labels": ["a", "b"]}], "labels of row 0 is no array of numbers"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "row 0 of the data has no tokens"),
        ([{"input_ids": [-100, 2]}], "negative id"),
    ):
        with pytest.raises(CalibrationError, match=message):
            as_batches(iter(rows), TAKES, 9, 8)
    with pytest.raises(CalibrationError, match="input_ids, id, none of which the model takes"):
        as_batches(iter([{"input_ids": [1, 2], "id": 1}]), ("pixel_values",), 9, 8)
