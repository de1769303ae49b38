"""The levels are QLoRA's quantiles, and on a trained model they beat integers."""

import torch

from hf_quant import QuantConfig
from hf_quant.kernels.bnb_4bit.format import NF4


def test_levels_are_quantiles_of_the_normal_distribution(claims) -> None:  # type: ignore[no-untyped-def]
    """8 positive and 7 negative quantiles at equal probabilities, zero, all over the largest (QLoRA, appendix E)."""
    offset = 0.9677083
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((positive, torch.zeros(1), negative)).sort().values
    away = (levels / levels.max() - torch.tensor(NF4, dtype=torch.float64)).abs().max().item()
    claims.invariant("nf4", "its levels are the quantiles of the normal distribution", away < 1e-6, {"away": away})


def test_levels_are_the_same_while_a_model_is_loaded() -> None:
    """The default device is meta then."""
    expected = QuantConfig("nf4", bits=3).quantizer()
    with torch.device("meta"):
        assert QuantConfig("nf4", bits=3).quantizer() == expected


def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    for group in (64, 128):
        setting = {"bits": 4, "group_size": group, "symmetric": True}
        claims.order(
            "nf4",
            f"KL below symmetric 4-bit integers', groups of {group} (data-free: one seed)",
            ours=[judge.kl("nf4", group_size=group)],
            theirs=[judge.kl("rtn", **setting)],
        )
