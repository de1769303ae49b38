import pytest
import torch
from torch import nn

from hf_quant.capture import collect, record
from hf_quant.errors import CalibrationError, UnsupportedModel
from hf_quant.sites import find_blocks
from hf_quant.stats import AbsMax
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
