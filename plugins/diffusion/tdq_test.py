"""TDQ: the table is the learned function of the timestep; it beats a static interval."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import ConfigError
from hf_quant.plugins.diffusion.tdq import TdqRange, encode, intervals, layers
from hf_quant.plugins.diffusion.timed_rows import TimedRows
from hf_quant.runtime.linear import QuantLinear
from hf_quant.spec import Spec, act_spec
from hf_quant.stats import MinMax, Seen
from hf_quant.testing.diffusion import DiffusionJudge

INPUTS = act_spec(4, static=True, symmetric=False)
TABLE = Spec(grid=INPUTS.grid, block=INPUTS.block, index="timestep", entries=6, scale=INPUTS.scale, zero=INPUTS.zero)


def seen(spread: torch.Tensor, K: int = 8) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Statistics of inputs whose spread depends on the timestep."""
    x = torch.randn(60 * len(spread), K, generator=torch.Generator().manual_seed(0))
    entry = torch.arange(len(spread)).repeat_interleave(60)
    x = x * spread[entry][:, None]
    stats: Any = {}
    for stat in TdqRange(rows=256).needs(TABLE):
        state = stat.start(K, x.device)
        stat.update(state, Seen(x, tags={"timestep": entry}))
        stats[stat] = state
    return stats, x, entry


def rounding_error(x: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> float:
    rounded = ((x / s + z).round().clamp(0, 15) - z) * s
    return float(((rounded - x).square().mean(1) / x.square().mean()).mean())


def test_rows_keep_their_timestep() -> None:
    stats, x, entry = seen(torch.arange(1.0, 7))
    rows, at = TimedRows(256).values(stats[TimedRows(256)])
    assert rows.shape == (256, 8)
    for row, e in zip(rows[:20], at[:20], strict=True):
        assert bool((x[entry == e] == row).all(1).any())
    assert MinMax() not in stats


def test_inv_the_table_is_the_module(claims) -> None:  # type: ignore[no-untyped-def]
    """Trained on spreads that grow, the intervals grow with them; untrained, all are the static one."""
    parameters = layers(64, torch.Generator().manual_seed(0))
    static = torch.tensor([[0.3]])
    torch.testing.assert_close(intervals(parameters, static, 6), static.expand(6, 1))
    stats, x, entry = seen(torch.tensor([0.2, 0.5, 1, 2, 4, 8]))
    how = TdqRange(iterations=200, rows=256)
    scale, zero = how.fit_inputs(stats, TABLE)
    assert scale.shape == (6, 1)
    assert zero is not None
    assert scale.flatten().tolist() == sorted(scale.flatten().tolist())
    again, _ = how.fit_inputs(stats, TABLE)
    begun, _ = TdqRange(iterations=0, rows=256).fit_inputs(stats, TABLE)
    assert len(begun.unique()) == 1
    after = sum(rounding_error(x[entry == e], scale[e], zero[e]) for e in range(6))
    before = sum(rounding_error(x[entry == e], begun[e], zero[e]) for e in range(6))
    assert after < before
    weights = [torch.randn_like(p, generator=None) for p in parameters]
    one_by_one = torch.stack([intervals(weights, static, 6)[e] for e in range(6)])
    claims.invariant(
        "tdq",
        "the table of a layer is the learned function at its timesteps, the same in every run",
        torch.equal(scale, again) and torch.equal(intervals(weights, static, 6), one_by_one),
    )
    assert encode(1).shape == (1, 12)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="ranges=0"):
        QuantConfig("tdq", ranges=0)
    for method in ("tdq", "tfmq-dm", "tfm-framework"):
        with pytest.raises(ConfigError, match="ranges=20 are more than the timesteps of calibration_steps=10"):
            QuantConfig(method, calibration_steps=10)
    with pytest.raises(ConfigError, match="too few for 300 steps"):
        QuantConfig("tdq", calibration_steps=300)


def quantized(judge: DiffusionJudge, **arguments: Any) -> Any:
    pipeline = judge.pipeline()
    given = {"class_labels": range(10), "guidance": judge.guidance} if hasattr(pipeline, "transformer") else {}
    hf_quant.quantize(pipeline, QuantConfig("tdq", **arguments), pictures=0, progress=False, **given)
    return pipeline


def draw(pipeline: Any, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    two: dict[str, Any] = {"class_labels": [3, 8]} if hasattr(pipeline, "transformer") else {"batch_size": 2}
    drawn = pipeline(**two, num_inference_steps=steps, generator=generator, output_type="np")
    return torch.as_tensor(drawn.images)


SCHEDULERS = {"DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler, "Euler": EulerDiscreteScheduler}


def differences(judge: DiffusionJudge, pipeline: Any, settings: list[tuple[str, int]]) -> dict[str, float]:
    """Root mean square difference of pictures to full precision's, by scheduler and number of steps."""
    full, found = judge.pipeline(), {}
    config = full.scheduler.config
    for name, steps in settings:
        for one in (full, pipeline):
            one.scheduler = SCHEDULERS[name].from_config(config)
        off = draw(pipeline, steps) - draw(full, steps)
        found[f"{name} at {steps} steps"] = float(off.square().mean().sqrt())
    return found


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers' schedulers
def test_inv_other_schedulers_mixed_timesteps_and_a_compiled_network(
    diffusion_judges,  # type: ignore[no-untyped-def]
    tmp_path: Path,
) -> None:
    """Calibrated with DDIM at 5 steps and guidance; saved and loaded by stock diffusers; then everything else."""
    judge = diffusion_judges("digits-dit")
    pipeline = quantized(judge, calibration_steps=5, ranges=5, samples=10, iterations=10)
    assert all(m.clock for m in pipeline.transformer.modules() if isinstance(m, QuantLinear))
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, 5), draw(pipeline, 5))
    assert max(differences(judge, loaded, [("DPM-Solver++", 10), ("Euler", 7)]).values()) < 0.05
    batch = {
        "hidden_states": torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([999, 500, 20, 0]),
        "class_labels": torch.tensor([1, 2, 3, 1000]),
    }
    network = loaded.transformer
    with torch.no_grad():
        together = network(**batch).sample
        alone = torch.cat([network(**{k: v[i : i + 1] for k, v in batch.items()}).sample for i in range(4)])
        compiled = torch.compile(network, backend="eager")(**batch).sample
    torch.testing.assert_close(compiled, together)
    off = float((together - alone).norm())  # sums of other lengths put single values on the other side of a threshold
    for layer in network.modules():
        if isinstance(layer, QuantLinear):
            layer.input_scale.data = layer.input_scale.flip(0)
    with torch.no_grad():
        assert 20 * off < float((network(**batch).sample - alone).norm())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers' schedulers
@pytest.mark.parametrize("name", ["digits-unet", "digits-dit"])
def test_inv_every_scheduler_and_number_of_steps(name: str, diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    judge = diffusion_judges(name)
    pipeline = quantized(judge, calibration_steps=10, ranges=10, samples=40)
    others = SCHEDULERS if name == "digits-dit" else ["DDIM"]  # diffusers' pipeline gives others what they refuse
    found = differences(judge, pipeline, [(other, steps) for other in others for steps in (10, 20, 50)])
    claims.invariant(
        "tdq",
        f"pictures within 0.05 (rms) of full precision's with {', '.join(others)} at 10, 20 and 50 steps, "
        f"calibrated with DDIM at 10 steps, w8a8, {name}",
        max(found.values()) < 0.05,
        found,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reproduced"), [("digits-unet", True), ("digits-dit", False)])
def test_claim_against_static_intervals(name: str, reproduced: bool, diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    judge = diffusion_judges(name)
    ours, theirs = (
        [judge.compare(quantized(judge, bits=4, act_bits=4, ranges=r, seed=seed))[1] for seed in range(3)]
        for r in (20, 1)
    )
    claims.order(
        "tdq",
        f"error of the pictures below that with static learned intervals, w4a4, {name}",
        ours=ours,
        theirs=theirs,
        reproduced=reproduced,  # a tie on three seeds on the transformer
    )
