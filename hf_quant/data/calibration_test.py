import copy
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_quant.data.calibration import (
    Calibration,
    check_inputs,
    describe,
    fingerprint,
    held_out,
    model_inputs,
    spread_windows,
    token_windows,
)
from hf_quant.errors import CalibrationError
from hf_quant.stages.sampler import TextSampler


class Tokenizer:
    """One id a word; ids follow the words, so windows can be read."""

    eos_token_id = 999

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens
        return {"input_ids": [int(w) for w in text.split()]}


@pytest.fixture
def tokenizer():
    return Tokenizer()


def words(start, stop):
    return " ".join(map(str, range(start, stop)))


TEXTS = [words(0, 20), words(100, 119)]  # 20 + eos + 19 tokens: 10 windows of 4


def rows_of(ids):
    return {tuple(r) for r in ids.tolist()}


def test_texts_are_joined_by_eos_and_cut_into_windows(tokenizer):
    ids = token_windows(TEXTS, tokenizer, 10, 4, seed=0)
    stream = [*range(20), 999, *range(100, 119)]
    assert rows_of(ids) == {tuple(stream[i : i + 4]) for i in range(0, 40, 4)}
    assert ids.dtype == torch.int64


def test_the_seed_decides_the_draw(tokenizer):
    a, b, c = (token_windows(TEXTS, tokenizer, 4, 4, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len(rows_of(a)) == 4  # without replacement


def test_every_form_of_the_same_texts_gives_the_same_windows(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2]})
    jsonl = tmp_path / "texts.jsonl"
    jsonl.write_text("".join(json.dumps({"text": t}) + "\n\n" for t in TEXTS))
    parquet = tmp_path / "texts.parquet"
    dataset.to_parquet(str(parquet))
    saved, plain = tmp_path / "saved", tmp_path / "plain"
    dataset.save_to_disk(str(saved))
    plain.mkdir()
    for i, t in enumerate(TEXTS):
        (plain / f"{i}.txt").write_text(t)
    forms = [
        TEXTS,
        tuple(TEXTS),
        iter(TEXTS),
        lambda: iter(TEXTS),
        [{"text": t} for t in TEXTS],
        dataset,
        dataset.to_iterable_dataset(),
        jsonl,
        str(jsonl),
        parquet,
        saved,
        plain,
        Calibration(TEXTS),
        Calibration(Calibration(TEXTS)),
    ]
    wanted = token_windows(TEXTS, tokenizer, 5, 4, seed=3)
    for form in forms:
        assert torch.equal(token_windows(form, tokenizer, 5, 4, seed=3), wanted), form


def test_a_text_file_is_one_document(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(words(0, 12))
    assert rows_of(token_windows(path, tokenizer, 3, 4, seed=0)) == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)}


def test_an_endless_source_ends(tokenizer):
    def endless():
        while True:
            yield words(0, 50)

    assert token_windows(endless, tokenizer, 3, 4, seed=0).shape == (3, 4)


def test_a_processor_lends_its_tokenizer(tokenizer):
    class Processor:
        pass

    processor = Processor()
    processor.tokenizer = tokenizer
    assert torch.equal(token_windows(TEXTS, processor, 4, 4, 0), token_windows(TEXTS, tokenizer, 4, 4, 0))
    assert torch.equal(
        token_windows(Calibration(TEXTS, tokenizer), None, 4, 4, 0), token_windows(TEXTS, tokenizer, 4, 4, 0)
    )


ROWS = np.arange(60).reshape(6, 10)


@pytest.mark.parametrize(
    "form",
    [
        lambda p: torch.tensor(ROWS),
        lambda p: torch.tensor(ROWS, dtype=torch.int32),
        lambda p: ROWS.astype(np.uint16),
        lambda p: ROWS.tolist(),
        lambda p: list(torch.tensor(ROWS)),
        lambda p: [torch.tensor(ROWS[:2]), torch.tensor(ROWS[2:])],
        lambda p: [{"input_ids": r} for r in ROWS.tolist()],
        lambda p: np.save(p, ROWS.astype(np.uint16)) or p,
    ],
)
def test_rows_of_ids_are_taken_as_they_are(form, tmp_path):
    ids = token_windows(form(tmp_path / "ids.npy"), None, 3, 4, seed=5)
    assert ids.tolist()[:3] == ROWS[:3, :4].tolist()
    assert ids.dtype == torch.int64


def test_fewer_and_shorter_rows_than_asked_are_the_users_choice():
    assert (
        token_windows(torch.arange(12).reshape(2, 6), None, 128, 512, 0).tolist()
        == np.arange(12).reshape(2, 6).tolist()
    )


def test_a_flat_stream_is_cut_and_drawn(tmp_path):
    path = tmp_path / "flat.npy"
    np.save(path, np.arange(17, dtype=np.uint16))
    wanted = {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)}
    for form in (path, list(range(17)), torch.arange(17)):
        assert rows_of(token_windows(form, None, 4, 4, 0)) == wanted


def test_a_dataset_of_ids():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input_ids": ROWS.tolist(), "text": ["x"] * 6})
    assert token_windows(data, None, 2, 4, 0).tolist() == ROWS[:2, :4].tolist()


class TestSpread:
    def test_windows_lie_evenly_over_the_texts(self, tokenizer):
        stream = torch.tensor([*range(20), 999, *range(100, 119)]).reshape(10, 4)
        for form in (TEXTS, Calibration(TEXTS, tokenizer), lambda: iter(TEXTS)):
            assert torch.equal(spread_windows(form, tokenizer, 4, 17), stream[[0, 3, 6, 9]])

    def test_one_is_the_first(self):
        assert spread_windows(torch.arange(40), None, 4, 4).tolist() == [[0, 1, 2, 3]]

    def test_all_there_are(self, tokenizer):
        assert spread_windows(TEXTS, tokenizer, 16, 10**6).shape == (2, 16)
        assert spread_windows(torch.arange(17), None, 4, 10**6).shape == (4, 4)

    def test_rows(self):
        assert spread_windows(torch.tensor(ROWS), None, 4, 8).tolist() == ROWS[[0, 5], :4].tolist()

    def test_not_one_window(self, tokenizer):
        with pytest.raises(CalibrationError, match="40 tokens make no window of 64"):
            spread_windows(TEXTS, tokenizer, 64, 640)
        with pytest.raises(CalibrationError, match="at least one window"):
            spread_windows(TEXTS, tokenizer, 64, 63)


class TestErrors:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (None, "needs calibration data and got none"),
            ([], "is empty"),
            (iter([]), "is empty"),
            ([""], "too short: 0 tokens"),
            (["1 2 3"], "3 tokens make 0 windows of 4"),
            (["1 2 3 4 5 6 7 8"], "8 tokens make 2 windows of 4, and 9 are wanted"),
            (torch.zeros(2, 8), "torch.float32; token ids are integers"),
            (torch.zeros(2, 8, dtype=torch.bool), "torch.bool; token ids are integers"),
            (np.array([[1, -100, 3, 4]]), "negative id -100"),
            (torch.zeros(0, 8, dtype=torch.long), "shape [0, 8]"),
            (torch.zeros(2, 2, 8, dtype=torch.long), "shape [2, 2, 8]"),
            ([[1, 2, 3], [1, 2]], "2 to 3 tokens long"),
            ([[], []], "empty"),
            ([["a", "b"]], "not an array of integers"),
            ([1.5, 2.5], "no sequence|token ids are integers"),
            ("no/such/file.txt", "no such calibration file or folder: 'no/such/file.txt'"),
            ("a whole text " * 100, r"goes in a list: \[text\]"),
            ([{"content": "x"}], "no column 'text' or 'input_ids', only ['content']"),
            ({"train": ["x"]}, "pick one split"),
            (["1 2 3 4", 7], "item 1 is a int"),
            ([{"pixel_values": torch.zeros(1, 3, 8, 8)}], "holds batches with ['pixel_values']"),
            ([object()], "batches by name"),
            (3, "data of type int"),
        ],
    )
    def test_says_what_is_wrong(self, data, message, tokenizer):
        with pytest.raises(CalibrationError) as error:
            token_windows(data, tokenizer, 9, 4, 0)
        assert any(m.replace("\\", "") in str(error.value) for m in message.split("|"))

    def test_texts_without_a_tokenizer(self):
        with pytest.raises(CalibrationError, match="processor=tokenizer"):
            token_windows(TEXTS, None, 2, 4, 0)
        with pytest.raises(CalibrationError, match="not its name: this is 'tiny-lm'"):
            token_windows(TEXTS, "tiny-lm", 2, 4, 0)

    def test_a_used_up_iterator(self, tokenizer):
        texts = iter(TEXTS)
        token_windows(texts, tokenizer, 4, 4, 0)
        with pytest.raises(CalibrationError, match="used up"):
            token_windows(texts, tokenizer, 4, 4, 0)

    @pytest.mark.parametrize(
        "name", ["broken.npy", "broken.jsonl", "broken.parquet", "broken.safetensors", "latin1.txt", "pickled.npy"]
    )
    def test_unreadable_files_are_named(self, name, tmp_path, tokenizer):
        path = tmp_path / name
        if name == "pickled.npy":
            np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        else:
            path.write_bytes(b"{\xff\xfe broken")
        with pytest.raises(CalibrationError, match=name):
            token_windows(path, tokenizer, 1, 4, 0)

    def test_a_folder_without_texts(self, tmp_path, tokenizer):
        with pytest.raises(CalibrationError, match=r"holds no \.txt"):
            token_windows(tmp_path, tokenizer, 1, 4, 0)

    def test_few_but_enough_windows_are_used_with_a_warning(self, tokenizer, caplog):
        assert len(token_windows(TEXTS, tokenizer, 30, 4, 0)) == 10
        assert "10 windows" in caplog.text

    def test_nonsense_sizes(self, tokenizer):
        with pytest.raises(CalibrationError, match="at least 1 window"):
            token_windows(TEXTS, tokenizer, 0, 4, 0)


class Model(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.embed = nn.Embedding(rows, 2)

    def get_input_embeddings(self):
        return self.embed


def test_a_file_of_tensors_is_batches_of_the_models_inputs(tmp_path):
    tensors = {"pixel_values": torch.rand(11, 3, 4, 4), "bool_masked_pos": torch.arange(11)[:, None] % 2 == 0}
    save_file(tensors, tmp_path / "images.safetensors")
    for batches in (
        model_inputs(tmp_path / "images.safetensors", None, 128, 512, 0, 8),
        held_out(str(tmp_path / "images.safetensors"), None, 256, 1024),
    ):
        assert [len(b["pixel_values"]) for b in batches] == [8, 3]
        assert all(torch.cat([b[name] for b in batches]).equal(tensor) for name, tensor in tensors.items())
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(3)}, tmp_path / "uneven.safetensors")
    with pytest.raises(CalibrationError, match=r"a \[2, 3\], b \[3\].* a row a sample"):
        held_out(tmp_path / "uneven.safetensors", None, 256, 1024)


def test_what_is_measured_on_is_the_same_windows(tokenizer):
    batches = held_out(Calibration(TEXTS, tokenizer), None, 4, 20)
    assert torch.cat([b["input_ids"] for b in batches]).equal(spread_windows(TEXTS, tokenizer, 4, 20))


def test_ids_of_another_tokenizer_are_found_out():
    batches = [{"input_ids": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[3, 10]])}]
    check_inputs(batches, Model(11))
    check_inputs([{"pixel_values": torch.ones(1)}], Model(1))
    check_inputs(batches, nn.Linear(1, 1))
    with pytest.raises(CalibrationError, match="token id 10 is outside the model's vocabulary of 10"):
        check_inputs(batches, Model(10))
    with pytest.raises(CalibrationError, match="token id 10 is outside"):
        TextSampler().sample(batches, None, 0, Model(10))


class TestHandle:
    def test_is_shared_by_every_copy(self):
        handle = Calibration(iter(TEXTS))
        assert copy.deepcopy({"calibration": handle})["calibration"] is handle
        assert copy.copy(handle) is handle

    def test_is_never_serialized(self):
        with pytest.raises(TypeError, match="never serialized"):
            pickle.dumps(Calibration(TEXTS))
        assert pickle.loads(pickle.dumps(Calibration(None))).data is None

    def test_fingerprint_is_of_what_was_drawn(self, tokenizer):
        handle = Calibration(TEXTS)
        with pytest.raises(CalibrationError, match="nothing was drawn"):
            handle.fingerprint()
        ids = token_windows(handle, tokenizer, 4, 4, 0)
        first = handle.fingerprint()
        assert first == fingerprint([{"input_ids": ids}])
        TextSampler(4, 4, batch_size=2).sample(handle, tokenizer, 0)
        assert handle.fingerprint() == first
        token_windows(handle, tokenizer, 4, 4, 1)
        assert handle.fingerprint() != first


def test_fingerprint_does_not_depend_on_batching():
    ids = torch.arange(24).reshape(6, 4)
    whole = fingerprint([{"input_ids": ids}])
    assert fingerprint([{"input_ids": ids[:1]}, {"input_ids": ids[1:]}]) == whole
    assert fingerprint([{"input_ids": ids.reshape(4, 6)}]) != whole
    assert fingerprint([{"input_ids": ids.flip(0)}]) != whole
    assert fingerprint([{"pixels": torch.ones(2, dtype=torch.bfloat16)}]) != fingerprint([{"pixels": torch.zeros(2)}])


class TestSampler:
    def test_windows_are_no_longer_than_the_model_takes(self):
        model = Model(50)
        model.config = type("Config", (), {"max_position_embeddings": 3})()
        (batch,) = TextSampler(samples=2, length=4).sample(torch.arange(20).reshape(2, 10), None, 0, model)
        assert batch["input_ids"].tolist() == [[0, 1, 2], [10, 11, 12]]

    def test_micro_batches_of_windows(self, tokenizer):
        batches = TextSampler(samples=5, length=4, batch_size=2).sample(TEXTS, tokenizer, 0)
        assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 4), (2, 4), (1, 4)]
        whole = token_windows(TEXTS, tokenizer, 5, 4, 0)
        assert torch.equal(torch.cat([b["input_ids"] for b in batches]), whole)

    def test_batches_pass_through_unchanged(self):
        images = [{"pixel_values": torch.randn(2, 3, 8, 8)} for _ in range(3)]
        for given in (images, iter(images), Calibration(images), lambda: images):
            batches = TextSampler().sample(given, None, 0)
            assert all(b["pixel_values"] is i["pixel_values"] for b, i in zip(batches, images, strict=True))

    def test_sounds_come_in_the_type_of_the_model(self):
        model = Model(50).bfloat16()
        model.main_input_name, model.forward = "input_features", lambda input_features, scale: None
        given = {"input_features": torch.randn(2, 8, 4), "scale": torch.ones(2)}
        (batch,) = TextSampler().sample(given, None, 0, model)
        assert {n: t.dtype for n, t in batch.items()} == {"input_features": torch.bfloat16, "scale": torch.float32}

    def test_one_batch(self):
        batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3)}
        assert TextSampler().sample(batch, None, 0)[0].keys() == batch.keys()

    def test_a_stray_item_among_batches(self):
        with pytest.raises(CalibrationError, match="batch 1 is a str"):
            TextSampler().sample([{"pixel_values": torch.ones(1)}, "text"], None, 0)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "none"),
        ("a/b/docs.txt", "docs.txt"),
        (["x", "y"], "2 texts"),
        (torch.zeros(3, 4), "token ids [3, 4]"),
        ([{"pixel_values": torch.ones(1)}], "1 batches"),
        (Calibration([[1, 2]]), "1 rows"),
    ],
)
def test_describe_never_shows_the_content(data, said):
    assert describe(data) == said
