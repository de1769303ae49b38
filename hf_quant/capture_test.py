import pytest
import torch
from torch import nn

from hf_quant.capture import collect, record
from hf_quant.errors import CalibrationError, UnsupportedModel
from hf_quant.runtime.apart import take_apart
from hf_quant.sites import find_blocks
from hf_quant.stats import AbsMax, CrossGram
from hf_quant.testing.subjects import SUBJECTS


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, queries, keys=None):
        return self.proj(queries) + (0 if keys is None else keys), keys


class Model(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.blocks, self.call = nn.ModuleList([Block(), Block()]), call

    def forward(self, x):
        for block in self.blocks:
            x = self.call(block, x)
        return (x,)


def recorded(model, batch):
    return record(model, find_blocks(model), [batch], torch.device("cpu"))


def test_a_text_model_inside_another_one_keeps_no_keys_between_runs():
    subject = SUBJECTS["vlm"]
    model, batch = subject.model(), subject.data()[0]
    found = recorded(model, batch)
    name = found.chains[-1][0]
    call, hidden, block = found.calls[0][name], found.starts[0][name], model.get_submodule(name)
    with torch.no_grad():
        alone = block(2 * hidden, **{**call.kwargs, "past_key_values": None})
        for _ in range(2):
            assert torch.equal(call.run(block, 2 * hidden, torch.device("cpu")), alone)
    assert model.config.text_config.use_cache


def test_hidden_states_may_have_any_name():
    model = Model(lambda block, x: block(queries=x, keys=x)[0])
    x = torch.ones(2, 4)
    found = recorded(model, {"x": x})
    assert found.chains == [["blocks.0", "blocks.1"]]
    with torch.no_grad():
        said = found.calls[0]["blocks.0"].run(model.blocks[0], 3 * x, torch.device("cpu"))
    assert torch.equal(said, model.blocks[0].proj(3 * x) + x)


def test_blocks_that_take_something_else_are_named():
    model = Model(lambda block, x: block([x])[0])
    with pytest.raises(UnsupportedModel, match=r"block blocks\.0 is called with list in the place of hidden states"):
        recorded(model, {"x": torch.ones(2, 4)})


def test_whatever_a_model_says_of_a_batch_is_told_with_the_batch():
    def refuse(block, x):
        raise AttributeError("'NoneType' object has no attribute 'dtype'")

    with pytest.raises(CalibrationError, match=r"Model cannot run on calibration batch 0 \(x \[2, 4\]\): 'NoneType'"):
        recorded(Model(refuse), {"x": torch.ones(2, 4)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_found_whatever_reads_them(value):
    x = torch.ones(2, 4)
    x[1, 2] = value
    with pytest.raises(CalibrationError, match="input of proj holds NaN or infinite values"):
        collect(Block(), lambda block, i: block(x), [{"x": x}], {"proj": (AbsMax(),)}, None)


@torch.no_grad()
def test_an_expert_is_compared_on_the_tokens_that_it_gets_on_the_quantized_path():
    """In full precision the router would send others to it."""
    model = SUBJECTS["moe"].model(1)
    take_apart(model)
    block = model.model.layers[0].mlp
    x, fp_x = torch.randn(2, 2, 12, 64, generator=torch.Generator().manual_seed(0))
    fp_x = x + fp_x
    routes = []
    for given in (x, fp_x):
        handle = block.experts.register_forward_pre_hook(lambda _, args: routes.append(args[1]))
        block(given)
        handle.remove()
    assert not torch.equal(*(r.sort().values for r in routes))
    run = (lambda b, i: b(x)), (block, lambda b, i: b(fp_x))
    found = collect(block, run[0], [{"x": x}], {f"experts.{e}.gate_up": (CrossGram(),) for e in range(4)}, run[1])
    for e in range(4):
        mine = x.reshape(-1, 64)[(routes[0] == e).any(-1)]
        theirs = fp_x.reshape(-1, 64)[(routes[0] == e).any(-1)]
        torch.testing.assert_close(
            found[f"experts.{e}.gate_up"][CrossGram()]["dx"].float(), (theirs - mine).T @ mine, rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_a_module_that_runs_twice_is_compared_call_by_call():
    x, block = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), Block()
    twice = lambda b, shift: (b(x + shift), b(2 * x))  # noqa: E731
    state = collect(
        block, lambda b, i: twice(b, 0), [{"x": x}], {"proj": (CrossGram(),)}, (block, lambda b, i: twice(b, 1))
    )
    torch.testing.assert_close(state["proj"][CrossGram()]["dx"].float(), torch.ones(2, 4).T @ x)


@torch.no_grad()
def test_what_is_compared_is_what_was_seen_whatever_is_written_into_it_later():
    x, block = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), Block()
    gone = lambda b, x: (b(x), x.zero_())  # noqa: E731
    fp = block, lambda b, i: gone(b, x + 1)
    state = collect(block, lambda b, i: gone(b, x.clone()), [{"x": x}], {"proj": (CrossGram(),)}, fp)
    torch.testing.assert_close(state["proj"][CrossGram()]["dx"].float(), torch.ones(2, 4).T @ x)


@torch.no_grad()
def test_other_tokens_are_no_twins():
    x, block = torch.randn(3, 4), Block()
    with pytest.raises(UnsupportedModel, match="proj sees other tokens on the quantized path"):
        collect(block, lambda b, i: b(x), [{"x": x}], {"proj": (CrossGram(),)}, (block, lambda b, i: b(x[:2])))
