import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from hf_quant.checkpoint import (
    build_skeleton,
    check_present,
    describe,
    fold,
    packed_modules,
    prepare_all,
    unfold,
    validate,
)
from hf_quant.errors import CheckpointError
from hf_quant.formats import Layer, format_for
from hf_quant.integrity import read_header
from hf_quant.runtime.apart import take_apart
from hf_quant.runtime.branches import LowRank
from hf_quant.runtime.install import install_embedding, install_linear
from hf_quant.runtime.packed import refit
from hf_quant.sites import kept_reason, linear_shape
from hf_quant.spec import act_spec, int_spec

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=32),
    "mixtral": MixtralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    ),
}  # fmt: skip
IDS = torch.arange(12).reshape(2, 6)


def float_model(kind: str, auto=AutoModelForCausalLM, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[kind])
    for key, value in changes.items():
        setattr(config, key, value)
    return auto.from_config(config).eval()


@torch.no_grad()
def quantize(model: nn.Module, embeddings: bool = False, bits: tuple[int, int] = (8, 4)) -> nn.Module:
    take_apart(model)
    for i, (name, module) in enumerate(list(model.named_modules())):
        found = linear_shape(module)
        if found and not kept_reason(name):
            kind, shape = found
            spec = int_spec(bits[i % 2], 16)
            W = module.weight.T if kind == "conv1d" else module.weight
            install_linear(model, name, refit(W, spec), format_for(Layer(shape, spec)))
    if embeddings:
        table, spec = model.get_input_embeddings(), int_spec(8, 16)
        name = next(n for n, m in model.named_modules() if m is table)
        shape = (table.num_embeddings, table.embedding_dim)
        shares = ["lm_head"] if model.config.tie_word_embeddings else []
        install_embedding(model, name, refit(table.weight, spec), format_for(Layer(shape, spec)), shares=shares)
    return model


def skeleton(kind: str, description, auto=AutoModelForCausalLM, **changes) -> nn.Module:
    with torch.device("meta"):
        model = float_model(kind, auto, **changes)
    build_skeleton(model, json.loads(json.dumps(description)), torch.float32)
    return model


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_description_rebuilds_the_tree(kind):
    model = quantize(float_model(kind))
    empty = skeleton(kind, describe(model))
    want = {n: (t.shape, t.dtype) for n, t in model.state_dict().items()}
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == want
    empty.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():  # rotary tables are not saved
        owner, _, leaf = name.rpartition(".")
        setattr(empty.get_submodule(owner), leaf, buffer)
    prepare_all(empty)
    validate(empty)
    assert torch.equal(empty.eval()(IDS).logits, model(IDS).logits)
    assert describe(empty) == describe(model)


def test_embeddings_and_their_tied_head_rebuild_too():
    model = quantize(float_model("gpt2"), embeddings=True)
    empty = skeleton("gpt2", describe(model))
    assert empty.lm_head.qweight is empty.transformer.wte.qweight
    assert empty.all_tied_weights_keys["lm_head.scale"] == "transformer.wte.scale"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_with_and_without_the_base_models_prefix(kind):
    whole, base = quantize(float_model(kind)), quantize(float_model(kind, AutoModel))
    names = {n for n, _ in packed_modules(base)}
    assert {n for n, _ in packed_modules(skeleton(kind, describe(whole), AutoModel))} == names
    assert len(list(packed_modules(skeleton(kind, describe(base))))) == len(names)


def test_loaded_branches_and_static_ranges_are_there(tmp_path):
    model, spec, inputs = float_model("llama"), int_spec(8, -1, symmetric=True), act_spec(8, static=True)
    name = "model.layers.0.mlp.down_proj"
    branch = LowRank(torch.ones(2, 48), torch.ones(32, 2))
    install_linear(
        model,
        name,
        refit(model.get_submodule(name).weight, spec),
        format_for(Layer((32, 48), spec, inputs)),
        inputs=inputs,
        input_range=(torch.tensor(0.1), None),
        pre_scale=torch.ones(48),
        branches=(branch,),
    )
    layer = skeleton("llama", describe(model)).get_submodule(name)
    want = {n: (t.shape, t.dtype) for n, t in model.get_submodule(name).state_dict().items()}
    assert {"lr_up", "pre_scale", "input_scale"} < set(want)
    assert {n: (t.shape, t.dtype) for n, t in layer.state_dict().items()} == want


def test_describing_takes_few_entries():
    description = describe(quantize(float_model("mixtral"), bits=(4, 4)))
    (site,) = description["sites"]
    assert len(json.dumps(description)) < 1000
    assert "model.layers.[0-1].mlp.experts.[0-2].down" in site["modules"]


@given(st.lists(st.lists(st.sampled_from(["a", "b", "0", "1", "2", "07", "11", "x{y}"]), min_size=1, max_size=4)))
def test_unfold_is_the_inverse_of_fold(parts):
    names = sorted({".".join(p) for p in parts})
    assert sorted(unfold(fold(names))) == names


def damaged(change) -> dict:
    description = json.loads(json.dumps(describe(quantize(float_model("llama")))))
    change(description)
    return description


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "newer than this hf-quant"),
        (lambda d: d.update(version="1"), "not one of ours"),
        (lambda d: d.pop("version"), "not one of ours"),
        (lambda d: d.update(sites={}), "not a list"),
        (lambda d: d["sites"].append(3), "not a list of objects"),
        (lambda d: d["sites"][0].update(modules=[1]), "without a list of module names"),
        (lambda d: d["sites"][0].update(modules=[]), "without a list of module names"),
        (lambda d: d["sites"][0].update(modules=["a.[0-99999999]"]), "names 100000000 modules"),
        (lambda d: d["sites"][0].update(modules=["a.[5-2]"]), "names 0 modules"),
        (lambda d: d["sites"][0].update(format="int-gruop/1"), "format 'int-gruop/1' is not known"),
        (lambda d: d["sites"][0].update(format=["x"]), "is not a name"),
        (lambda d: d["sites"][0].pop("weights"), "no field 'weights'"),
        (lambda d: d["sites"][0].update(weights=None), "a spec has exactly the fields"),
        (lambda d: d["sites"][0]["weights"].update(zero="nit"), "zero='nit'"),
        (lambda d: d["sites"][0]["weights"].update(block=7), "not iterable"),
        (lambda d: d["sites"][0]["weights"]["grid"].update(bits=9), "bits=9"),
        (lambda d: d["sites"][0]["weights"]["grid"].update(type="Int"), "unknown grid"),
        (lambda d: d["sites"][0]["weights"].update(zero="float"), "cannot hold it"),
        (lambda d: d["sites"][0].update(kind="embedding"), "is a Linear, not an embedding"),
        (lambda d: d["sites"][0].update(kind="lienar"), "cannot be a quantized 'lienar'"),
        (lambda d: d["sites"][0].update(kind=[]), "quantized"),
        (lambda d: d["sites"][0].update(rank=-3), "rank=-3"),
        (lambda d: d["sites"][0].update(rank="4"), "rank='4'"),
        (lambda d: d["sites"][0].update(modules=["model.norm"]), "is a LlamaRMSNorm"),
        (lambda d: [s.update(modules=["other.model"]) for s in d["sites"]], "does not have, such as 'other.model'"),
    ],
)
def test_a_damaged_description_is_one_clear_error(change, message):
    with pytest.raises(CheckpointError, match=message):
        skeleton("llama", damaged(change))


@pytest.mark.parametrize("description", [None, [], "x", 3, {}])
def test_no_description_at_all(description):
    with pytest.raises(CheckpointError, match="not one of ours"):
        skeleton("llama", description)


class TestWhatAFileHolds:
    @pytest.fixture
    def model(self):
        return quantize(float_model("gpt2"), embeddings=True)

    @pytest.fixture
    def header(self, model, tmp_path):
        state = {n: t for n, t in model.state_dict().items() if not n.startswith("lm_head")}
        save_file(state, tmp_path / "model.safetensors")
        return read_header([tmp_path / "model.safetensors"])

    def test_sound(self, model, header):
        check_present(skeleton("gpt2", describe(model)), header)

    def test_a_missing_tensor_is_named(self, model, header):
        del header["transformer.h.1.attn.c_attn.scale"]
        with pytest.raises(CheckpointError, match=r"h\.1\.attn\.c_attn\.scale is not in the checkpoint"):
            check_present(skeleton("gpt2", describe(model)), header)

    @pytest.mark.parametrize("change", [{"shape": (3, 4)}, {"dtype": "I8"}])
    def test_a_wrong_shape_or_type_is_named(self, model, header, change):
        header["transformer.wte.qweight"] = replace(header["transformer.wte.qweight"], **change)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: transformer\.wte\.qweight is .* is expected"):
            check_present(skeleton("gpt2", describe(model)), header)

    def test_values_that_no_solver_writes(self, model):
        model = copy.deepcopy(model)
        validate(model)
        model.transformer.h[0].mlp.c_fc.scale.data[3] = float("nan")
        with pytest.raises(CheckpointError, match=r"transformer\.h\.0\.mlp\.c_fc: scale holds NaN"):
            validate(model)

    def test_biases_too(self, model):
        model = copy.deepcopy(model)
        model.transformer.h[0].mlp.c_fc.bias.data[3] = float("inf")
        with pytest.raises(CheckpointError, match=r"c_fc: bias holds NaN or infinite"):
            validate(model)


def test_preparing_freezes_scales_and_leaves_biases():
    model = quantize(float_model("gpt2"))
    layer = model.transformer.h[0].mlp.c_fc
    layer.scale.requires_grad_(True)
    prepare_all(model)
    assert not layer.scale.requires_grad
    assert layer.bias.requires_grad
