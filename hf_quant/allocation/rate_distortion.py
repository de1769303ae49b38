"""How far a quantized layer is from what any code of its rate could reach: the Gaussian rate-distortion bound."""

import torch
from torch import Tensor


def gaussian_bound(W_NK: Tensor, H_KK: Tensor, bits: float) -> float:
    """The least `tr(E H E^T)` that any code of `bits` a weight can have for Gaussian weights, by reverse water-filling.

    A row of independent weights of variance s^2 is, along the eigenvectors of H, K independent Gaussians whose squared
    error counts l_k times:

        D(R) = s^2 sum_k min(t, l_k),   R = mean_k max(0, log2(l_k / t) / 2)

    With H = I that is `2^-2R` times the energy of the weights. Real weights are not Gaussian and scales adapt to them:
    a code may even pass the bound where the weights of a row are unlike a Gaussian of its variance.

    Args:
        W_NK: the weights; only the mean square of each row is used.
        H_KK: the metric, symmetric and positive semidefinite.
        bits: rate, in true bits a weight.
    """
    levels = torch.linalg.eigvalsh(H_KK.double()).clamp_min(0).flip(0)
    active = levels[levels > levels[0] * 1e-12]
    # with the n largest above the water, log2 t = mean of their log2 - 2 R K / n; the largest n whose l_n is above t
    n = torch.arange(1, len(active) + 1, dtype=torch.float64, device=active.device)
    log_t = active.log2().cumsum(0) / n - 2 * bits * len(levels) / n
    valid = active.log2() >= log_t
    water = float(log_t[int(valid.nonzero().max())].exp2())
    return float(W_NK.double().square().mean(1).sum() * levels.clamp_max(water).sum())


def rate_gap(W_NK: Tensor, Q_NK: Tensor, H_KK: Tensor, bits: float) -> tuple[float, float]:
    """`(tr(E H E^T), the bound)` of a layer; half the `log2` of their ratio is the gap in bits a weight."""
    E = (W_NK - Q_NK).double()
    return float(((E @ H_KK.double()) * E).sum()), gaussian_bound(W_NK, H_KK, bits)
