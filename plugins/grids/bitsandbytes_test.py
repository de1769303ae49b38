"""Bytes and outputs against bitsandbytes itself, and the claims."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.formats import Layer, format_named
from hf_quant.method import method_named
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.solver import Nearest
from hf_quant.testing import Claims

bnb = pytest.importorskip("bitsandbytes")


def weight(N: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    W_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05
    W_NK[0] = 0  # whole blocks of zeros
    return W_NK.to(dtype)


def solved(name: str, W_NK: Tensor, **arguments: object) -> tuple[Recipe, QTensor]:
    recipe = method_named(name).build(**arguments)
    assert isinstance(recipe, Recipe)
    assert recipe.data_free
    assert recipe.solver.refuses(recipe.weights) is None
    return recipe, recipe.solver.solve(W_NK, recipe.weights, recipe.range, None)


def positive_zero(packed: Tensor) -> Tensor:
    """FP4 codes with the second zero (8) replaced by the first."""
    high, low = packed >> 4, packed & 15
    return torch.where(high == 8, 0, high) << 4 | torch.where(low == 8, 0, low)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("kind", "blocksize"), [("nf4", 64), ("nf4", 1024), ("fp4", 64), ("fp4", 32)])
def test_4_bit_bytes_and_outputs(kind: str, blocksize: int, double_quant: bool, dtype: torch.dtype) -> None:
    W_NK = weight(33, 1024, dtype)
    recipe, q = solved(f"bnb-{kind}", W_NK, blocksize=blocksize, double_quant=double_quant)
    fmt, layer = format_named(str(recipe.format)), Layer((33, 1024), recipe.weights)
    assert fmt.holds(layer) is None
    tensors = fmt.pack(q)
    assert fmt.check(tensors, layer) is None
    packed, state = bnb.functional.quantize_4bit(
        W_NK, blocksize=blocksize, quant_type=kind, compress_statistics=double_quant
    )
    assert torch.equal(tensors["qweight"].view(-1, 1), packed if kind == "nf4" else positive_zero(packed))
    theirs = {"qweight": packed.view(33, 512), "scale": state.absmax.view(q.scale.shape)}
    if double_quant:
        theirs |= {"nested_scale": state.state2.absmax, "nested_offset": state.offset.reshape(1)}
        assert torch.equal(tensors["nested_scale"], theirs["nested_scale"])
        assert torch.equal(tensors["nested_offset"], theirs["nested_offset"])
        # On CPU bitsandbytes looks codes up in a coarse table: near a midpoint it may take the second nearest.
        steps = tensors["scale"].int() - theirs["scale"].int()
        assert (steps != 0).float().mean().item() < 0.01
        assert steps.abs().max().item() <= 1
    else:
        assert torch.equal(tensors["scale"], theirs["scale"])
    assert torch.equal(fmt.unpack(tensors, layer).scale, q.scale)

    # and what bitsandbytes wrote, read by us
    assert fmt.check(theirs, layer) is None
    dense = bnb.functional.dequantize_4bit(packed, state).to(dtype)
    torch.testing.assert_close(fmt.weight(theirs, layer, dtype), dense, rtol=torch.finfo(dtype).eps, atol=0)
    x_TK = torch.randn(5, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    kernel = next(k for k in fmt.kernels if k.name == "bitsandbytes")
    y_TN = fmt.linear(x_TK, theirs, kernel.prepare(theirs, layer, dtype), layer, kernel.name)
    assert torch.equal(y_TN, bnb.matmul_4bit(x_TK, packed.t(), state))


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("largest", [1.0, 20.0])
def test_int8_bytes_and_outputs(tokens: int, largest: float) -> None:
    W_NK, dtype = weight(24, 80, torch.bfloat16), torch.bfloat16
    W_NK[0, 0] = 0.01  # bitsandbytes gives NaN for a row of zeros on some backends
    recipe, q = solved("bnb-int8", W_NK)
    fmt, layer = format_named("bnb-int8/1"), Layer((24, 80), recipe.weights, recipe.inputs)
    assert fmt.holds(layer) is None
    tensors = fmt.pack(q)
    theirs, row_max, _ = bnb.functional.int8_vectorwise_quant(W_NK.half())
    assert torch.equal(tensors["qweight"], theirs)
    torch.testing.assert_close(tensors["scale"].flatten() * 127, row_max, rtol=2e-7, atol=0)

    x_TK = torch.randn(tokens, 80, generator=torch.Generator().manual_seed(1)).to(dtype)
    x_TK[0, 3] = largest
    state = bnb.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights, state.threshold = theirs, row_max, False, 6.0
    state.is_training = False  # in training, on CPU, it does not round the tokens
    expected = bnb.matmul(x_TK, W_NK, state=state).float()
    kernel = fmt.kernels[0]
    blob = kernel.prepare(tensors, layer, dtype)
    for name in (kernel.name, "reference"):
        y_TN = fmt.linear(x_TK, tensors, blob, layer, name).float()
        assert ((y_TN - expected).norm() / expected.norm()).item() < 4e-3  # bfloat16 outputs


def test_wrong_block_sizes_and_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="blocksize=48"):
        method_named("bnb-nf4").build(blocksize=48)
    spec = method_named("bnb-nf4").build().weights  # type: ignore[attr-defined]
    assert "cross row ends" in str(format_named("bnb-nf4/1").holds(Layer((4, 96), spec)))


def test_true_bits_of_double_quantization() -> None:
    """QLoRA, section 3: 0.5 bits a weight for scales in blocks of 64 become 8/64 + 32/(64 256) = 0.127."""
    for double_quant, bits in ((False, 4.5), (True, 4 + 8 / 64 + 32 / (64 * 256))):
        _, q = solved("bnb-nf4", weight(64, 1024), double_quant=double_quant)
        stored = format_named("bnb-nf4/1").pack(q)
        stored.pop("nested_offset", None)  # 32 bits a matrix
        assert 8 * sum(t.nbytes for t in stored.values()) == bits * 64 * 1024


def relative_error(q: QTensor, W_NK: Tensor) -> float:
    return ((q.dequantize() - W_NK).norm() / W_NK.norm()).item()


def test_claims_of_nf4_and_fp4(claims: Claims) -> None:
    W_NK = weight(64, 1024)
    errors = {name: relative_error(solved(name, W_NK)[1], W_NK) for name in ("bnb-nf4", "bnb-fp4")}
    rtn_3 = relative_error(Nearest().solve(W_NK, int_spec(3, 64), AbsMaxRange(), None), W_NK)
    where = "relative weight error of normal weights, blocks of 64"
    nf4, fp4 = [errors["bnb-nf4"]], [errors["bnb-fp4"]]
    claims.order("bnb-nf4", f"below bnb-fp4: {where}", ours=nf4, theirs=fp4)
    claims.order("bnb-fp4", f"below 3-bit integers: {where}", ours=fp4, theirs=[rtn_3])
    double = relative_error(solved("bnb-nf4", W_NK, double_quant=True)[1], W_NK)
    assert double < 1.02 * errors["bnb-nf4"]  # QLoRA: double quantization costs next to nothing


def test_claim_of_int8(claims: Claims) -> None:
    W_NK = weight(32, 256)
    recipe, q = solved("bnb-int8", W_NK)
    x_TK = torch.randn(20, 256, generator=torch.Generator().manual_seed(2))
    x_TK[:, :3] *= 40  # the outlier channels of large language models
    layer, expected = Layer((32, 256), recipe.weights, recipe.inputs), F.linear(x_TK, W_NK)
    errors = []
    for format_id in ("bnb-int8/1", "int8-act/1"):
        fmt = format_named(format_id)
        y_TN = fmt.linear(x_TK, fmt.pack(q), [], layer, "reference")
        errors.append(((y_TN - expected).norm() / expected.norm()).item())
    claims.order(
        "bnb-int8",
        "relative output error below that of plain 8-bit tokens, with three channels of inputs 40 times as large",
        ours=errors[:1],
        theirs=errors[1:],
        factor=0.3,
    )
