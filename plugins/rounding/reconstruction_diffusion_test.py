"""What learned rounding wins on diffusion models, of the methods that are no more about diffusion than about others."""

import pytest

LEARNED = {  # what is asked of each: where rounding loses most of what it can win back
    "adaround": {"bits": 3, "group_size": 64},
    "brecq": {"bits": 3, "group_size": 64},
    "qdrop": {"bits": 4, "act_bits": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-unet", "digits-dit"])
@pytest.mark.parametrize("method", LEARNED)
def test_claim(method: str, name: str, diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    """Noise of the network's answer, a mean over the steps of denoising, against that of the same method unlearned."""
    judge, setting = diffusion_judges(name), LEARNED[method]

    def noise(steps: int, seed: int) -> float:
        ratios = judge.sqnr(method, seed=seed, steps=steps, **setting)
        return sum(10 ** (-r / 10) for r in ratios) / len(ratios)

    ours, theirs = ([noise(steps, seed) for seed in range(3)] for steps in (40, 0))
    width = f"W{setting['bits']}A{setting.get('act_bits', 16)}"
    claims.order(method, f"noise of a step below its start's, {name}, {width}, 40 steps", ours=ours, theirs=theirs)
