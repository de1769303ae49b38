import numpy as np
import pytest
import torch
from torch import Tensor

import hf_quant
from hf_quant.data.calibration import model_inputs, spread_windows, token_windows
from hf_quant.data.samples import as_batches, is_sample, without_padding
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
    (batch,) = as_batches(iter([{**ROWS[1], "labels": [-100, 4, 5, 6, -100]}]), (*TAKES, "decoder_input_ids"), 9, 8)
    assert batch["labels"].tolist() == [[-100, 4, 5, 6]]  # an end of their own


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


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """Rows of ids as one batch, the way a tokenizer pads them, with ids that would show."""
    width = max(len(row) for row in rows)
    batch = {"input_ids": torch.full((len(rows), width), 7), "attention_mask": torch.zeros(len(rows), width).long()}
    for i, row in enumerate(rows):
        there = slice(width - len(row), width) if side == "left" else slice(len(row))
        batch["input_ids"][i, there], batch["attention_mask"][i, there] = row, 1
    return batch


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("subject", ["llm", "moe", "mamba"])
def test_a_padded_batch_calibrates_as_its_rows_do(subject: str, side: str) -> None:
    ids = torch.randint(0, 90, (4, 32), generator=torch.Generator().manual_seed(3))
    rows = [ids[0], ids[1, :11], ids[2, :20], ids[3, :20]]
    apart = [{"input_ids": ids[:1]}, {"input_ids": ids[1:2, :11]}, {"input_ids": ids[2:, :20]}]
    found = []
    for data in ([padded(rows, side)], apart):
        model = SUBJECTS[subject].model(1)
        config = hf_quant.QuantConfig("gptq", bits=3, group_size=32, allow=["*"])
        hf_quant.quantize(model, config, data=data, progress=False)
        found.append(model.state_dict())
    assert [name for name, tensor in found[1].items() if not torch.equal(tensor, found[0][name])] == []


def test_what_lies_beside_the_ids_is_cut_with_them_and_what_does_not_stays() -> None:
    batch = padded([torch.arange(3), torch.arange(2)], "left") | {
        "position_ids": torch.tensor([[0, 1, 2], [0, 0, 1]]),
        "@weight": torch.tensor([[1.0, 2, 3], [9, 5, 6]]),
        "pixel_values": torch.randn(2, 3, 3, 3),
    }
    first, second = without_padding([batch], ())
    assert {n: v.tolist() for n, v in second.items() if n != "pixel_values"} == {
        "input_ids": [[0, 1]],
        "attention_mask": [[1, 1]],
        "position_ids": [[0, 1]],
        "@weight": [[5, 6]],
    }
    assert first["input_ids"].tolist() == [[0, 1, 2]]
    assert torch.equal(torch.cat([first["pixel_values"], second["pixel_values"]]), batch["pixel_values"])


def test_a_decoder_has_padding_of_its_own() -> None:
    batch = padded([torch.arange(3), torch.arange(2)], "right")
    takes = ("decoder_input_ids",)
    found = without_padding([batch | {"labels": torch.tensor([[4, -100, -100], [-100, 5, -100]])}], takes)
    assert [b["labels"].tolist() for b in found] == [[[4]], [[-100, 5]]]
    assert [b["input_ids"].tolist() for b in found] == [[[0, 1, 2]], [[0, 1]]]
    (found,) = without_padding(
        [{"decoder_input_ids": torch.ones(1, 4), "decoder_attention_mask": torch.tensor([[0, 1, 1, 0]])}], takes
    )
    assert found["decoder_input_ids"].shape == (1, 2)


def test_sounds_have_padding_and_spectra_of_one_size_have_none() -> None:
    mask = torch.tensor([[1, 1, 1, 0]])
    (sound,) = without_padding([{"input_values": torch.randn(1, 4), "attention_mask": mask}], ())
    assert sound["input_values"].shape == (1, 3)
    (spectrum,) = without_padding([{"input_features": torch.randn(1, 8, 4), "attention_mask": mask}], ())
    assert spectrum["input_features"].shape == (1, 8, 4)
    assert spectrum["attention_mask"].equal(mask)


def test_rows_that_cannot_be_taken_apart_are_told(caplog: pytest.LogCaptureFixture) -> None:
    patches = {"pixel_values": torch.randn(7, 5)}
    batch = padded([torch.arange(3), torch.arange(2)], "right") | patches
    (same,) = without_padding([batch], ())
    assert same is batch
    assert "padding stays in a batch that cannot be taken apart (input_ids [2, 3]" in caplog.text
    caplog.clear()
    (alone,) = without_padding([padded([torch.arange(2)], "right") | patches], ())
    (cut,) = without_padding([{n: v[:, :2] if n in TAKES else v for n, v in batch.items()}], ())
    assert alone["input_ids"].shape == (1, 2)
    assert cut["input_ids"].shape == (2, 2)
    assert not caplog.text
    with pytest.raises(CalibrationError, match="row 3 of the data has no tokens"):
        without_padding([batch, padded([torch.arange(2), torch.arange(0)], "right")], ())
