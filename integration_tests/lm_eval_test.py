"""The real lm-evaluation-harness on a local task: the extra `[eval]`, nothing downloaded."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_quant.measure.evaluate import lm_eval

pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

QUESTIONS = [
    ("The function returns a", [" list", " zebra"]),
    ("If the argument is", [" given", " purple"]),
    ("Raises an", [" exception", " aunt"]),
]


@pytest.mark.filterwarnings("default")  # the harness and its many libraries warn as they like
def test_the_harness_scores_a_model_of_ours(tiny_lm_path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"q": q, "answers": a, "gold": 0}) + "\n" for q, a in QUESTIONS))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path)
    results = lm_eval(model, AutoTokenizer.from_pretrained(tiny_lm_path), [task], limit=3)
    assert results["local"]["acc,none"] == 1.0  # the docs-trained model prefers what Python documentation says
