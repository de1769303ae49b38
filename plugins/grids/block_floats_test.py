"""Block floats: the rules of their scales, and their order on a trained model."""

import pytest
import torch

from hf_quant.grids import FloatGrid
from hf_quant.plugins.grids.block_floats import E2M1, SharedExponent, fp8, mxfp4
from hf_quant.qtensor import as_blocks
from hf_quant.spec import Spec


def test_the_largest_of_a_block_lies_in_the_top_binade(claims) -> None:  # type: ignore[no-untyped-def]
    """OCP MX 1.0, 6.3: with the shared exponent the largest magnitude is 4 <= m < 8 in units of the scale."""
    W = torch.randn(64, 320, generator=torch.Generator().manual_seed(0)) ** 5
    spec = mxfp4().weights
    scale, zero = SharedExponent().fit(W, spec)
    assert zero is None
    top = as_blocks(W, spec).abs().amax(-1) / scale
    holds = bool(((top >= 4) & (top < 8) & (scale.log2() % 1 == 0)).all())
    claims.invariant("mxfp4", "the largest of every block lies in the top binade", holds, {"largest": top.max().item()})


def test_blocks_of_zeros_stay_zeros() -> None:
    for scale in ("float8_e8m0fnu", "float8_e4m3fn"):
        spec = Spec(grid=E2M1, block=(1, 32), scale=FloatGrid(scale))
        assert SharedExponent().fit(torch.zeros(2, 64), spec)[0].eq(1).all()


def test_order(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """All data-free: one seed."""
    kl = {m: judge.kl(m) for m in ("mxfp4", "mxfp8", "nvfp4")}
    rows = judge.kl("rtn", bits=4, group_size=-1, symmetric=True)
    claims.order("mxfp4", "KL below symmetric 4-bit integers' a row", ours=[kl["mxfp4"]], theirs=[rows])
    claims.order("mxfp8", "KL below a tenth of mxfp4's", ours=[kl["mxfp8"]], theirs=[kl["mxfp4"]], factor=0.1)
    claims.order("nvfp4", "KL below mxfp4's", ours=[kl["nvfp4"]], theirs=[kl["mxfp4"]])


def test_inputs_too(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """With outlier channels: blocks keep the damage where the outliers are."""
    ours = [judge.kl("nvfp4", act=True, outliers=True)]
    theirs = [judge.kl("dynamic-w8a8", bits=4, act_bits=4, outliers=True)]
    claims.order("nvfp4", "W4A4 with outliers: KL below 4-bit integers' a row and token", ours=ours, theirs=theirs)


@pytest.mark.slow
def test_fp8_stands_outliers(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """Static scales a tensor, three calibration sets."""
    ours = [judge.kl("fp8", act="static", outliers=True, seed=s) for s in range(3)]
    theirs = [judge.kl("int8-default", outliers=True, seed=s) for s in range(3)]
    claims.order("fp8", "static, with outliers: KL below static 8-bit integers'", ours=ours, theirs=theirs)


def test_fp8_costs_little(judge) -> None:  # type: ignore[no-untyped-def]
    assert judge.kl("fp8") < 0.005
    assert judge.kl("fp8", granularity="block", act="none") < 0.001
    assert fp8("tensor", "none").weights.block == (-1, -1)
