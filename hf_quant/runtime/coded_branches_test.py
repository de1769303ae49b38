"""Low-rank branches in 8 and 4 bits: what they stand for, how large they are, saved and loaded, and what they cost."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import ConfigError
from hf_quant.formats import format_named
from hf_quant.ledger import site_bits
from hf_quant.runtime.branches import CodedLowRank, LowRank, merged, stored_in
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.spec import int_spec


def term(N: int, K: int, R: int, seed: int = 0) -> LowRank:
    """Of sizes that fall along the rank, as an SVD's do; the last one is zero."""
    g = torch.Generator().manual_seed(seed)
    size = torch.logspace(0, -2, R) * (torch.arange(R) < max(1, R - 1))
    return LowRank(torch.randn(R, K, generator=g), torch.randn(N, R, generator=g) * size)


@settings(max_examples=25, deadline=None)
@given(N=st.integers(1, 70), K=st.integers(1, 150), R=st.integers(1, 20), bits=st.sampled_from([8, 4]))
def test_each_factor_is_off_by_half_a_step(N: int, K: int, R: int, bits: int) -> None:
    low = term(N, K, R)
    coded = stored_in(low, bits)
    assert isinstance(coded, CodedLowRank)
    size = low.up_NR.square().mean(0).sqrt()
    size = torch.where(size > 0, size, 1.0)
    for factor, codes in ((low.down_RK * size[:, None], coded.down), (low.up_NR / size, coded.up)):
        off = (factor - codes.dequantize()).abs().amax(1)
        assert bool((off <= 1.02 * factor.abs().amax(1) / (2 ** (bits - 1) - 1)).all())
    torch.testing.assert_close(coded.matrix(slice(0, 1)), coded.matrix()[:1])
    assert stored_in(low, 16) is low


def layer(bits: int, dtype: torch.dtype = torch.float32) -> tuple[QuantLinear, Tensor]:
    q = refit(torch.randn(24, 100, generator=torch.Generator().manual_seed(1)), int_spec(4, 20))
    low = stored_in(term(24, 100, 5), bits)
    made = QuantLinear.from_qtensor(q, format_named("int-group/1"), branches=(low,), dtype=dtype)
    return made, q.dequantize() + low.matrix()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_adds_it_whatever_its_type(bits: int, dtype: torch.dtype) -> None:
    made, W = layer(bits, dtype)
    assert made.rank == 5
    torch.testing.assert_close(made.dequantize(torch.float32), W, rtol=0, atol=0)
    x = torch.randn(2, 3, 100, dtype=dtype)
    close = {} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 0.5}
    torch.testing.assert_close(made(x).float(), x.float() @ W.T, **({"rtol": 1e-4, "atol": 1e-4} | close))
    if (bits, dtype) == (4, torch.bfloat16):
        torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(made(x).float().sum(), x)
    assert bool(gradient.abs().sum() > 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_counted_to_the_bit_and_described(bits: int) -> None:
    made, _ = layer(bits, torch.bfloat16)
    plain = QuantLinear.from_qtensor(made.qtensor(), made.format, dtype=torch.bfloat16)
    words = -(-100 * bits // 32) * 5 + -(-5 * bits // 32) * 24
    scales = 2 * 5 + 1 * 24  # groups of 64
    assert site_bits(made) - site_bits(plain) == 32 * words + 16 * scales
    empty = QuantLinear.from_json(made.describe(), (24, 100), kind="linear", bias=False, dtype=torch.bfloat16)
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in made.named_parameters()
    }
    W = torch.randn(24, 100)
    made.requantize_(W)
    assert (made.dequantize().float() - W).abs().max() < 1


def test_several_become_one_in_full_precision() -> None:
    low, coded = term(6, 70, 2), stored_in(term(6, 70, 3, seed=1), 8)
    one, _ = merged((low, coded))
    assert isinstance(one, LowRank)
    torch.testing.assert_close(one.matrix(), low.matrix() + coded.matrix())
    assert merged((coded,))[0] is coded


def test_other_bits_are_refused() -> None:
    for method in ("lorc", "lqer", "qera", "loftq", "qlora"):
        with pytest.raises(ConfigError, match=f"adapter_bits=3: method '{method}' takes one of 16, 8, 4"):
            QuantConfig(method, adapter_bits=3)


def measured(judge, method: str, **given) -> tuple[float, float]:
    model = judge.model()
    hf_quant.quantize(model, QuantConfig(method, bits=3, group_size=64, **given), data=judge.data(0), progress=False)
    return judge.distance(model)[0], hf_quant.true_bits(model)


def test_what_8_bits_cost(judge) -> None:
    """The adapter shrinks almost four times (from float32), and takes nothing of what it repairs."""
    (full, large), (eight, small), (none, least) = (
        measured(judge, m, **g) for m, g in (("lorc", {}), ("lorc", {"adapter_bits": 8}), ("rtn", {}))
    )
    assert (small - least) < 0.3 * (large - least)
    assert eight < full + 0.1 * (none - full)


@torch.no_grad()
@pytest.mark.parametrize(("method", "bits"), [("loftq", 8), ("qlora", 4)])
def test_saved_and_loaded_back_it_computes_the_same(judge, tmp_path: Path, method: str, bits: int) -> None:
    """What is trained knows how it will be stored: the packed model says what the student said."""
    model = judge.model()
    given = {"bits": 3, "group_size": 64, "rank": 4, "adapter_bits": bits}
    given |= {"steps": 2, "batch_size": 1, "lr": 1e-2} if method == "qlora" else {}
    report = hf_quant.quantize(model, QuantConfig(method, **given), data=judge.data(0)[:2], progress=False)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert all(m.rank == 4 and m.lr_up is None for m in layers.values())
    assert {e.name: e.bits for e in report.quantized} == {f"{n}.weight": site_bits(m) for n, m in layers.items()}
    if report.training:
        assert report.training["logit_difference"] < 1e-4 * report.training["logits"]
    ids = judge.test[:1, :32]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded(ids).logits.equal(model(ids).logits)
    assert hf_quant.true_bits(loaded) == hf_quant.true_bits(model) == pytest.approx(report.bits_per_weight)
