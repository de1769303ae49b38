"""Where a model is loaded to, in which type, from how many files, and what it may be asked to do afterwards."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel

import hf_quant
from hf_quant import QuantConfig
from hf_quant import solve as solving
from hf_quant.errors import ConfigError, UnsupportedModel
from hf_quant.plan import SitePlan
from hf_quant.rewriting.rewrite import float_weight
from hf_quant.solve import Solved, Split
from hf_quant.stats import Stats
from integration_tests.architectures import build, inputs, logits, same

ROOT = Path(__file__).parents[1]
NAME = "llama"


def rtn() -> QuantConfig:
    return QuantConfig("rtn", bits=4, group_size=32)


def gptq() -> QuantConfig:
    return QuantConfig("gptq", bits=4, group_size=32, calibration=[inputs(NAME, rows=4, seed=5)])


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    build(NAME).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    load(plain, quantization_config=rtn()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def want(quantized: Path) -> Tensor:
    return logits(load(quantized), NAME)


# ---- places ---------------------------------------------------------------------------------------------------------

ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("in_memory", [True, False])
def test_weights_are_quantized_on_the_device_that_the_config_names(
    in_memory: bool, plain: Path, want: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a model loads, and in memory. The other device here is one that holds no numbers, so they are looked up."""
    floats, seen, solve = load(plain), [], solving.solve

    def elsewhere(plan: SitePlan, W_NK: Tensor, stats: Stats | None, split: Split | None = None) -> Solved:
        seen.append(W_NK.device.type)
        return solve(plan, float_weight(floats.get_submodule(plan.site.name), plan.site), stats, split)

    monkeypatch.setattr(solving, "solve", elsewhere)
    config = QuantConfig("rtn", bits=4, group_size=32, device="meta")
    model = load(plain, **({} if in_memory else {"quantization_config": config}))
    if in_memory:
        hf_quant.quantize(model, config, progress=False)
    assert set(seen) == {"meta"}
    assert torch.equal(logits(model, NAME), want)


def test_a_device_that_is_not_there(plain: Path) -> None:
    with pytest.raises(ConfigError, match="device='cuda:77': there is no such device here"):
        load(plain, quantization_config=QuantConfig("rtn", device="cuda:77"))


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(where: Any, plain: Path, quantized: Path, want: Tensor) -> None:
    assert torch.equal(logits(load(quantized, device_map=where), NAME), want)
    assert torch.equal(logits(load(plain, device_map=where, quantization_config=rtn()), NAME), want)
    calibrated = load(plain, device_map=where, quantization_config=gptq())
    assert torch.equal(logits(calibrated, NAME), logits(load(plain, quantization_config=gptq()), NAME))


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device", "ignore:Attempting to save a model with")
@pytest.mark.parametrize("where", [ON_DISK, "auto"], ids=["by name", "by memory"])
@pytest.mark.usefixtures("by_reference")
def test_layers_on_disk_run_and_save_again(where: Any, quantized: Path, tmp_path: Path) -> None:
    want = logits(load(quantized), NAME)
    room = {"cpu": 100_000} if where == "auto" else None  # of 132 kB
    model = load(quantized, device_map=where, max_memory=room, offload_folder=tmp_path / "offload")
    assert "disk" in model.hf_device_map.values()
    for _ in range(2):  # a layer that came back from disk goes there again
        assert torch.equal(logits(model, NAME), want)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert same(again, load(quantized))
    assert torch.equal(logits(again, NAME), want)


def test_quantizing_onto_disk_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="quantize it first"):
        load(plain, device_map=ON_DISK, quantization_config=rtn(), offload_folder=tmp_path)


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize("config", [rtn, gptq])
def test_an_offloaded_model_is_not_quantized_in_memory(
    config: Callable[[], QuantConfig], plain: Path, tmp_path: Path
) -> None:
    model = load(plain, device_map=ON_DISK, offload_folder=tmp_path)
    with pytest.raises(UnsupportedModel, match=r"9 weights are offloaded, the first is model\.layers\.1\.self_attn"):
        hf_quant.quantize(model, config(), progress=False)


# ---- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [rtn, gptq])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_in_a_type(
    dtype: torch.dtype, config: Callable[[], QuantConfig], plain: Path, tmp_path: Path
) -> None:
    model = load(plain, dtype=dtype, quantization_config=config())
    in_memory = load(plain, dtype=dtype)
    hf_quant.quantize(in_memory, config(), progress=False)
    assert same(in_memory, model)
    assert model.dtype == in_memory.dtype == logits(model, NAME).dtype == dtype
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same(again, model)
    assert again.dtype == dtype
    assert torch.equal(logits(again, NAME), logits(model, NAME))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loaded_in_another_type(dtype: torch.dtype, quantized: Path, want: Tensor, tmp_path: Path) -> None:
    """Activations change their type, weights keep their value."""
    model = load(quantized, dtype=dtype)
    assert model.dtype == logits(model, NAME).dtype == dtype
    torch.testing.assert_close(logits(model, NAME).float(), want, atol=0.01, rtol=0.1)
    layer = "model.layers.0.mlp.down_proj"
    whole = load(quantized).get_submodule(layer).dequantize(torch.float32)
    assert torch.equal(model.get_submodule(layer).dequantize(torch.float32), whole)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), NAME), logits(model, NAME))


def test_casts_of_a_loaded_model(quantized: Path, want: Tensor) -> None:
    """transformers guards `half` and `float` of quantized models; other casts never touch a weight's value."""
    model = load(quantized)
    before = {n: m.dequantize(torch.float32) for n, m in model.named_modules() if hasattr(m, "qweight")}
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            cast()
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        assert model.dtype == logits(model, NAME).dtype == dtype
        assert all(torch.equal(model.get_submodule(n).dequantize(torch.float32), w) for n, w in before.items())
    torch.testing.assert_close(logits(model, NAME), want, atol=0.01, rtol=0.1)  # norms went through bfloat16


# ---- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.usefixtures("by_reference")
def test_sharded_checkpoints(plain: Path, quantized: Path, tmp_path: Path) -> None:
    want = logits(load(quantized), NAME)
    load(plain).save_pretrained(tmp_path / "float", max_shard_size="50KB")
    assert len(list((tmp_path / "float").glob("*.safetensors"))) > 4
    model = load(tmp_path / "float", quantization_config=rtn())
    assert same(model, load(quantized))
    model.save_pretrained(tmp_path / "small", max_shard_size="20KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    for options in ({}, {"device_map": ON_DISK, "offload_folder": tmp_path / "offload"}):
        assert torch.equal(logits(load(tmp_path / "small", **options), NAME), want)


# ---- generation and training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_static_cache_compiles_into_one_graph(name: str) -> None:
    """Traced as for a GPU, run eagerly: what compiles is the same on both, and no C++ compiler is needed."""
    model = build(name)
    hf_quant.quantize(model, rtn(), progress=False)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**inputs(name), **options)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    got = model.generate(**inputs(name), **options, cache_implementation="static", compile_config=config)
    assert torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_adapters(reentrant: bool, quantized: Path) -> None:
    """Same loss and same gradients as without it, and a step lowers the loss."""

    def tuned() -> Any:
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
        model = get_peft_model(load(quantized), lora)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    p.normal_(0, 0.02)
        return model.train()

    batch = {**inputs(NAME), "labels": inputs(NAME)["input_ids"]}

    def gradients(model: Any) -> dict[str, Tensor]:
        model(**batch).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    whole, saving = tuned(), tuned()
    saving.enable_input_require_grads()
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    want, got = gradients(whole), gradients(saving)
    assert got.keys() == want.keys()
    assert len(got) == 2 * 14
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
    before = saving(**batch).loss.item()
    torch.optim.SGD([p for p in saving.parameters() if p.requires_grad], lr=0.05).step()
    assert saving(**batch).loss.item() < before


# ---- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, threading, torch
import hf_quant
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
config = hf_quant.QuantConfig("rtn", bits=4, group_size=128)

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=config)  # whatever is imported, is by now
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
done.set()
watcher.join()
print(json.dumps({"peak": peak - before, "model": sum(t.nbytes for t in model.state_dict().values())}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_quantizing_while_loading_stays_small(plain: Path, tmp_path: Path) -> None:
    """At most 1.3 times the larger of the largest shard and the quantized model, in memory that cannot be dropped.

    Bytes of the files that are mapped are not counted: the system takes them back when it likes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 7, "vocab_size": 4000}
    config = LlamaConfig(**size, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for parent in model.modules():
        for name, meta in list(parent.named_parameters(recurse=False)):
            setattr(parent, name, torch.nn.Parameter(noise[: meta.numel()].view(meta.shape), requires_grad=False))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "large", state_dict=state, max_shard_size="70MB")
    shards = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    assert len(shards) > 2
    assert sum(shards) > 190e6

    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(plain)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] < 1.3 * max(*shards, found["model"]), (found, max(shards))


# ---- without us -----------------------------------------------------------------------------------------------------

STOCK = """
import sys
import transformers
for line in sys.argv[1:]:
    auto, folder = line.split(":", 1)
    try:
        getattr(transformers, auto).from_pretrained(folder)
    except RuntimeError as error:
        print("stopped" if "ignore_mismatched_sizes" in str(error) else repr(error))
    else:
        print("ran on random weights")
assert "hf_quant" not in sys.modules
"""

EMBEDDING_ALONE = {"skip": ["*proj"], "overrides": {"*embed_tokens": {"bits": 8}}}


def test_a_library_without_us_stops(tmp_path: Path) -> None:
    """Rather than to run on random weights: where hf_quant neither loads itself nor can be imported."""
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("llama", "AutoModelForCausalLM", {}),
        ("llama-tied", "AutoModelForCausalLM", {}),
        ("llama-tied", "AutoModel", {}),
        ("gpt2", "AutoModelForCausalLM", {}),
        ("mixtral", "AutoModelForCausalLM", {}),
        ("mixtral", "AutoModelForCausalLM", {"skip": ["*proj"]}),  # experts alone
        ("mixtral", "AutoModelForCausalLM", {"skip": ["*.experts.*"]}),
        ("gpt-oss", "AutoModelForCausalLM", {"skip": ["*proj"]}),
        ("llama", "AutoModelForCausalLM", EMBEDDING_ALONE),
    ]
    lines = []
    for i, (name, auto, options) in enumerate(cases):
        model = build(name)
        hf_quant.quantize(model, QuantConfig("rtn", bits=4, group_size=32, **options), progress=False)
        model.save_pretrained(tmp_path / str(i))
        assert torch.equal(logits(load(tmp_path / str(i)), name), logits(model, name))  # nothing of it in our way
        lines.append(f"{auto}:{tmp_path / str(i)}")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_QUANT_AUTOLOAD": "0"}
    command = [sys.executable, "-P", "-c", STOCK, *lines]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["stopped"] * len(cases)
