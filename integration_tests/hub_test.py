"""Push to the Hub and load back over HTTP, against the stand-in of its API. No byte leaves loopback.

The Hub's address is read when huggingface_hub is imported, so every client is a process of its own, with a cache of
its own: what it loads, it has downloaded.
"""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard
from packaging.version import Version

from integration_tests.hub_standin import TOKEN, Hub, card_problems, serve

ROOT = Path(__file__).parents[1]

TINY_LLAMA = """
    import numpy as np, torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    torch.set_num_threads(1)
    tokens = torch.arange(48).reshape(2, 24) % 64
"""
PUSH = """
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval()
    model.push_to_hub("user/whole", tags=["tiny"])
    model.push_to_hub("user/sharded", max_shard_size="100KB", commit_message="in pieces")
    model.push_to_hub("user/whole", tags=["tiny"])
    np.save("pushed.npy", model(tokens).logits.detach().numpy())
"""
LOAD = """
    for name in ("whole", "sharded"):
        model = AutoModelForCausalLM.from_pretrained(f"user/{name}")
        np.save(f"{name}.npy", model(tokens).logits.detach().numpy())
"""
QUANTIZED_PUSH = """
    from hf_quant import QuantConfig
    config = QuantConfig("rtn", bits=4, group_size=64)
    model = AutoModelForCausalLM.from_pretrained(PATH, quantization_config=config)
    model.push_to_hub("user/whole", tags=["tiny"])
    model.push_to_hub("user/sharded", max_shard_size="1MB")
    np.save("pushed.npy", model(tokens).logits.detach().float().numpy())
    config = QuantConfig("rtn", bits=8, group_size=64)
    AutoModelForCausalLM.from_pretrained(PATH, quantization_config=config).push_to_hub("user/twice", tags=["tiny"])
    model.push_to_hub("user/twice", tags=["second"])
"""
QUANTIZED_LOAD = """
    for name in ("whole", "sharded"):
        model = AutoModelForCausalLM.from_pretrained(f"user/{name}")
        assert model.model.layers[0].self_attn.q_proj.__module__.startswith("hf_quant."), model
        np.save(f"{name}.npy", model(tokens).logits.detach().float().numpy())
    model.push_to_hub("user/again")
"""
ADAPTER_PUSH = """
    from peft import LoraConfig, get_peft_model
    from hf_quant import QuantConfig
    config = QuantConfig("rtn", bits=4, group_size=64)
    model = AutoModelForCausalLM.from_pretrained(PATH, quantization_config=config)
    model.push_to_hub("user/base")
    model = AutoModelForCausalLM.from_pretrained("user/base")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.push_to_hub("user/adapter")
    np.save("pushed.npy", tuned.eval()(tokens).logits.detach().float().numpy())
"""
ADAPTER_LOAD = """
    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained("user/adapter").eval()
    assert type(model.base_model.model.model.layers[0].mlp.up_proj.base_layer).__module__.startswith("hf_quant.")
    np.save("loaded.npy", model(tokens).logits.detach().float().numpy())
"""
CARD = """
    from huggingface_hub import ModelCard, ModelCardData
    data = ModelCardData(license="apache-2.0", library_name="transformers", tags=["hf-quant"], base_model="user/whole")
    ModelCard(f"---\\n{data.to_yaml()}\\n---\\n\\n# Quantized\\n").push_to_hub("user/whole")
    print(ModelCard.load("user/whole").data.base_model)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


def client(hub: Hub, code: str, folder: Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run a Hub client in `folder`, its home and cache new, and give back how it ended."""
    home = folder / "home"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(entry_points(folder / "site")), str(ROOT)])
    command = [sys.executable, "-c", dedent(code)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


def entry_points(site: Path) -> Path:
    """A search path on which our entry points are declared, so that the tests also hold in a checkout not installed."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torch.backends"]
    info = site / "hf_quant-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-quant\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in declared.items()]
    (info / "entry_points.txt").write_text("\n".join(["[torch.backends]", *lines]) + "\n")
    return site


def card_of(hub: Hub, repo: str) -> ModelCard:
    """The card of a repository, whose metadata the Hub must take without a word."""
    readme = hub.repos[repo].resolve("main")[1]["README.md"].content.decode()
    assert card_problems(readme) == ([], [])
    return ModelCard(readme)


def run(hub: Hub, code: str, folder: Path) -> str:
    """`client`, which must succeed; what it printed."""
    done = client(hub, code, folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_float_model(hub: Hub, tmp_path: Path) -> None:
    run(hub, TINY_LLAMA + PUSH, tmp_path / "push")
    whole, sharded = hub.repos["user/whole"], hub.repos["user/sharded"]
    _, files = whole.resolve("main")
    assert set(files) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert files["model.safetensors"].lfs
    assert not files["config.json"].lfs
    assert len(whole.commits) == 2, "pushing the same model again must not make a commit"
    shards = [name for name in sharded.resolve("main")[1] if name.endswith(".safetensors")]
    assert len(shards) > 2

    run(hub, TINY_LLAMA + LOAD, tmp_path / "load")
    pushed = np.load(tmp_path / "push" / "pushed.npy")
    for name in ("whole", "sharded"):
        np.testing.assert_array_equal(np.load(tmp_path / "load" / f"{name}.npy"), pushed)
    for shard in shards:
        assert f"HEAD /user/sharded/resolve/{sharded.branches['main']}/{shard}" in hub.requests
    assert hub.unknown == []


def test_adapter_on_a_quantized_model(hub: Hub, tmp_path: Path, tiny_lm_path: Path) -> None:
    """The adapter alone is pushed; loading it finds the quantized base, all without an import of ours."""
    run(hub, TINY_LLAMA + f"    PATH = {str(tiny_lm_path)!r}" + ADAPTER_PUSH, tmp_path / "push")
    files = hub.repos["user/adapter"].resolve("main")[1]
    assert {"adapter_config.json", "adapter_model.safetensors", "hf_quant.json"} <= set(files)
    assert json.loads(files["adapter_config.json"].content)["base_model_name_or_path"] == "user/base"
    run(hub, TINY_LLAMA + ADAPTER_LOAD, tmp_path / "load")
    loaded, pushed = (np.load(tmp_path / p) for p in ("load/loaded.npy", "push/pushed.npy"))
    np.testing.assert_array_equal(loaded, pushed)


def test_quantized_model(hub: Hub, tmp_path: Path, tiny_lm_path: Path) -> None:
    run(hub, TINY_LLAMA + f"    PATH = {str(tiny_lm_path)!r}" + QUANTIZED_PUSH, tmp_path / "push")
    files = hub.repos["user/whole"].resolve("main")[1]
    config = json.loads(files["config.json"].content)
    assert config["quantization_config"]["quant_method"] == "hf_quant"
    assert card_of(hub, "user/whole").data.tags == ["hf_quant", "quantized", "rtn", "4-bit", "tiny"]
    assert card_of(hub, "user/twice").data.tags == ["hf_quant", "quantized", "rtn", "4-bit", "tiny", "second"]
    assert "4-bit integers" in card_of(hub, "user/twice").text

    run(hub, TINY_LLAMA + QUANTIZED_LOAD, tmp_path / "load")
    pushed = np.load(tmp_path / "push" / "pushed.npy")
    for name in ("whole", "sharded"):
        np.testing.assert_array_equal(np.load(tmp_path / "load" / f"{name}.npy"), pushed)
    assert card_of(hub, "user/again").text == card_of(hub, "user/whole").text.replace("user/whole", "user/again")
    assert hub.unknown == []


@pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2.2"),
    reason="before 2.2 ModelCard.validate asks huggingface.co, whatever HF_ENDPOINT says",
)
def test_model_card(hub: Hub, tmp_path: Path) -> None:
    run(hub, "from huggingface_hub import create_repo; create_repo('user/whole')", tmp_path / "create")
    assert run(hub, CARD, tmp_path / "card").split() == ["user/whole"]
    readme = hub.repos["user/whole"].resolve("main")[1]["README.md"].content.decode()
    assert card_problems(readme) == ([], [])
    assert readme.endswith("# Quantized\n")
    bad = client(hub, CARD.replace("apache-2.0", "/home/me/licence"), tmp_path / "bad")
    assert bad.returncode != 0
    assert "licence the Hub lists" in bad.stderr


# ---- the stand-in refuses what the Hub refuses, so a pass above means something ----------------------------------


def post(hub: Hub, path: str, body: bytes, token: str = TOKEN, method: str = "POST") -> tuple[int, str]:
    request = Request(hub.url + path, body, {"Authorization": f"Bearer {token}"}, method=method)
    try:
        with urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.headers["X-Error-Code"]


def ndjson(*lines: dict[str, object]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def test_stand_in_refuses(hub: Hub) -> None:
    new = json.dumps({"name": "m", "organization": "user"}).encode()
    assert post(hub, "/api/repos/create", new, token="someone") == (401, "Unauthorized")
    assert post(hub, "/api/repos/create", new.replace(b'"user"', b'"other"')) == (403, "Forbidden")
    assert post(hub, "/api/repos/create", new)[0] == 200
    assert post(hub, "/api/repos/create", new)[0] == 409
    assert post(hub, "/lfs/" + "0" * 64, b"other bytes", method="PUT") == (400, "BadRequest")
    header = {"key": "header", "value": {"summary": "s"}}
    missing = {"key": "lfsFile", "value": {"path": "a.safetensors", "oid": "0" * 64, "size": 3}}
    assert post(hub, "/api/models/user/m/commit/main", ndjson(header, missing)) == (400, "BadRequest")
    stale = {"key": "header", "value": {"summary": "s", "parentCommit": "1" * 40}}
    assert post(hub, "/api/models/user/m/commit/main", ndjson(stale)) == (412, "PreconditionFailed")
    assert post(hub, "/api/models/user/m/commit/other", ndjson(header)) == (404, "RevisionNotFound")
    assert post(hub, "/api/nothing", b"") == (404, "NotFound")
    assert hub.unknown == ["POST /api/nothing"]
    assert len(hub.repos["user/m"].commits) == 1


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ("tags: [a", "not YAML"),
        ("- a", "must be a mapping"),
        ("tags: a", '"tags"'),
        ("base_model: /models/x", "not the id"),
        ("license: my-own", "licence"),
        ("model-index: [{name: x, results: [{}]}]", "results need"),
    ],
)
def test_card_problems(metadata: str, part: str) -> None:
    errors, _ = card_problems(f"---\n{metadata}\n---\n# x\n")
    assert len(errors) == 1
    assert part in errors[0]
