"""A layer that has run keeps its codes once, and everybody who reads or writes them sees the canonical tensors."""

import copy
import gc
import pickle
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_quant.formats import Layer, format_for
from hf_quant.running.resources import release_mapped
from hf_quant.runtime.embedding import QuantEmbedding, tied_head
from hf_quant.runtime.laid_out import LaidOut
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec, int_spec

N, K = 80, 96  # a whole block of torch's 4-bit layout and a short one
SPECS = (int_spec(4, 32), int_spec(3, 32, symmetric=True), int_spec(2, 96), int_spec(8, -1, symmetric=True))
X = torch.randn(5, K, generator=torch.Generator().manual_seed(1)).bfloat16()


def made(spec: Spec = SPECS[0]) -> QuantLinear:
    q = refit(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), spec)
    return QuantLinear.from_qtensor(q, format_for(Layer((N, K), spec)), bias=torch.ones(N), dtype=torch.bfloat16)


@pytest.fixture(params=SPECS, ids=lambda s: f"w{s.grid.bits:g}")
def pair(request: pytest.FixtureRequest) -> tuple[QuantLinear, dict[str, Tensor], Tensor]:
    """A layer that has run; the canonical tensors and the weight it had before."""
    layer = made(request.param)
    before, W_NK = {n: t.clone() for n, t in layer.state_dict().items()}, layer.dequantize()
    codes = weakref.ref(layer.qweight.untyped_storage())
    assert codes() is not None
    layer(X)
    gc.collect()
    assert codes() is None, "the codes are held twice"
    assert isinstance(layer.qweight, LaidOut)
    return layer, before, W_NK


def same(layer: QuantLinear, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[n]) and not isinstance(t, LaidOut) for n, t in layer.state_dict().items())


def test_reading_restores_to_the_bit(pair: tuple[QuantLinear, dict[str, Tensor], Tensor]) -> None:
    layer, before, W_NK = pair
    assert same(layer, before)
    assert all(torch.equal(t, before[n]) for n, t in layer.packed_tensors().items())
    assert torch.equal(layer.dequantize(), W_NK)
    assert torch.equal(layer.weight + 0, W_NK)
    assert torch.equal(layer.qtensor().dequantize(torch.bfloat16), W_NK)
    code = layer.qweight
    assert isinstance(code, nn.Parameter)
    assert not code.requires_grad
    assert (code.shape, code.dtype, code.device) == (before["qweight"].shape, torch.int32, torch.device("cpu"))
    assert torch.equal(code, before["qweight"])
    assert torch.equal(code.detach().flatten()[:7].cpu(), before["qweight"].flatten()[:7])
    assert code.tolist() == before["qweight"].tolist()
    assert (code.numpy() == before["qweight"].numpy()).all()
    assert "qweight" in repr(code)
    assert isinstance(layer.qweight, LaidOut), "reading must not keep the codes"


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "load", "assign", "type", "device"])
def test_copies_and_moves_keep_the_bits(pair: tuple[QuantLinear, dict[str, Tensor], Tensor], how: str) -> None:
    layer, before, W_NK = pair
    y = layer(X)
    if how == "deepcopy":
        layer = copy.deepcopy(layer)
    elif how == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
    elif how in ("load", "assign"):
        other = made(layer.layer.weights)
        with torch.no_grad():
            other.qweight.zero_()
        other.prepare()
        other(X)
        other.load_state_dict(layer.state_dict(), assign=how == "assign")
        layer = other
    elif how == "type":
        layer = layer.float().bfloat16()
    else:
        assert layer.to("meta").qweight.is_meta  # codes go with the module; there is nothing to come back from
        return
    assert same(layer, before)
    assert torch.equal(layer(X), y)
    assert torch.equal(layer.dequantize(), W_NK)


def test_writing_has_the_codes_taken_back(pair: tuple[QuantLinear, dict[str, Tensor], Tensor]) -> None:
    layer, before, _ = pair
    y = layer(X)
    with torch.no_grad():
        layer.qweight.copy_(torch.zeros_like(before["qweight"]))
    assert not isinstance(layer.qweight, LaidOut)
    assert not layer.qweight.any()
    assert not torch.equal(layer(X), y)
    with torch.no_grad():
        layer.qweight.copy_(before["qweight"])
    assert torch.equal(layer(X), y)
    W_NK = layer.dequantize(torch.float32) + 0.5
    layer.requantize_(W_NK)
    torch.testing.assert_close(layer.dequantize(torch.float32), W_NK, atol=1.0, rtol=0)
    alone = layer.qweight
    del layer
    with pytest.raises(RuntimeError, match="gone"), torch.no_grad():
        (alone if isinstance(alone, LaidOut) else laid_out_orphan()).zero_()


def test_files_of_laid_out_codes_are_canonical(
    pair: tuple[QuantLinear, dict[str, Tensor], Tensor], tmp_path: Path
) -> None:
    """What writes a file asks where the codes lie (`enable_group_offload(offload_to_disk_path=...)` of diffusers)."""
    layer, before, _ = pair
    y, codes = layer(X), layer.qweight.data
    save_file({"qweight": codes}, tmp_path / "codes.safetensors")
    assert torch.equal(load_file(tmp_path / "codes.safetensors")["qweight"], before["qweight"])
    assert torch.equal(layer(X), y)
    assert isinstance(layer.qweight, LaidOut)


def laid_out_orphan() -> Tensor:
    layer = made()
    layer(X)
    return layer.qweight


def test_gradients_are_those_of_the_weight(pair: tuple[QuantLinear, dict[str, Tensor], Tensor]) -> None:
    layer, _, W_NK = pair
    x = X.clone().requires_grad_()
    grad = torch.randn(5, N, generator=torch.Generator().manual_seed(2)).bfloat16()
    layer(x).backward(grad)
    assert torch.equal(x.grad, grad @ W_NK)


def test_a_layer_laid_out_in_inference_trains_afterwards() -> None:
    layer = made()
    with torch.inference_mode():
        layer(X)
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert not layer.float().qweight.is_inference()


def test_inputs_of_another_type_run_the_reference(pair: tuple[QuantLinear, dict[str, Tensor], Tensor]) -> None:
    layer, _, _ = pair
    want = nn.functional.linear(X.float(), layer.dequantize(torch.float32), layer.bias.float())
    assert torch.equal(layer(X.float()), want)


def test_compiles_whole_after_and_before_a_forward(pair: tuple[QuantLinear, dict[str, Tensor], Tensor]) -> None:
    layer, before, W_NK = pair
    y = layer(X)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(X), y)
    fresh = made(layer.layer.weights)
    x = X.clone().requires_grad_()
    torch.compile(fresh, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert isinstance(fresh.qweight, LaidOut)
    assert torch.equal(x.grad, torch.ones(5, N).bfloat16() @ W_NK)
    assert same(fresh, before)


def test_a_table_and_its_head_share_one_tensor() -> None:
    q = refit(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), SPECS[0])
    table = QuantEmbedding.from_qtensor(q, format_for(Layer((N, K), SPECS[0])), dtype=torch.bfloat16)
    head = tied_head(table)
    assert head.kernel != "reference"
    head(X)
    assert head.qweight is table.qweight
    assert torch.equal(table(torch.tensor([0, N - 1])), head.dequantize()[[0, N - 1]])
    lone = copy.deepcopy(head)
    del table, head
    lone(X)
    assert isinstance(lone.qweight, LaidOut)


def test_offloading_after_a_forward() -> None:
    """accelerate makes Parameters of the type of those it replaces."""
    from accelerate import cpu_offload
    from accelerate.utils import set_module_tensor_to_device

    model = nn.Sequential(made(), nn.ReLU())
    y = model(X)
    before = model.state_dict()["0.qweight"]
    set_module_tensor_to_device(model, "0.qweight", "cpu", value=before.clone())
    assert type(model[0].qweight) is nn.Parameter
    assert torch.equal(model(X), y)
    model = nn.Sequential(made(), nn.ReLU())
    model(X)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(offloaded(X), y)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are asked for on Linux only")
def test_pages_of_a_mapped_file_are_dropped_and_can_be_read_again(tmp_path: Path) -> None:
    """Tensors of a checkpoint are slices of one mapped file, so dropping a tensor alone frees nothing."""
    count = 8 << 20
    save_file({"a": torch.arange(count), "b": torch.arange(count)}, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")

    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile:"))

    part = loaded["b"]
    sums = int(loaded["a"].sum()), int(part.sum())
    before = mapped()
    release_mapped(part)
    assert before - mapped() > 0.9 * part.nbytes
    assert (int(loaded["a"].sum()), int(part.sum())) == sums
