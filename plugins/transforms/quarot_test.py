"""QuaRot on a trained model with outlier channels: what plain rounding loses at W4A4 comes back."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant import QuantConfig
from hf_quant.ledger import count_bits

W4A4 = {"bits": 4, "act_bits": 4}


def test_one_seed(judge) -> None:  # type: ignore[no-untyped-def]
    assert judge.kl("quarot", outliers=True) < 0.1 * judge.kl("dynamic-w8a8", outliers=True, **W4A4)


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """At least nine tenths of rtn's loss is recovered: KL at most a tenth, over three calibration sets."""
    kl = [judge.kl("quarot", outliers=True, seed=seed) for seed in range(3)]
    rounded = [judge.kl("dynamic-w8a8", outliers=True, **W4A4)] * 3
    statement = "W4A4, outlier channels: KL at most a tenth of rtn's (90 % of what rtn loses is recovered)"
    claims.order("quarot", statement, ours=kl, theirs=rounded, factor=0.1)
    calm = [judge.kl("dynamic-w8a8", **W4A4)] * 3
    claims.order("quarot", "W4A4: KL with outlier channels below rtn's without any", ours=kl, theirs=calm)


def test_outliers_are_gone(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """Largest over mean magnitude of what the attention layers read, before and after."""
    peaks = []
    for config in (QuantConfig("dynamic-w8a8"), QuantConfig("quarot", bits=8, act_bits=8, clip_steps=1)):
        model = judge.model(outliers=True)
        hf_quant.quantize(model, config, data=judge.data(0)[:4], progress=False)
        seen: list[float] = []
        for layer in model.model.layers:
            see = lambda _m, a, seen=seen: seen.append(float((a[0].abs().amax(-1) / a[0].abs().mean(-1)).mean()))  # noqa: E731
            layer.self_attn.q_proj.register_forward_pre_hook(see)
        with torch.no_grad():
            model(judge.test[:2])
        peaks.append(sum(seen) / len(seen))
    figures = {"before": peaks[0], "after": peaks[1]}
    claims.invariant("quarot", "inputs have no outliers left: a token's peak is below 6 means", peaks[1] < 6, figures)
    assert peaks[0] > 3 * peaks[1]


def test_saved_it_needs_no_plugin(judge, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A process in which methods cannot be imported computes the same logits and the same text, with a cache."""
    model = judge.model(outliers=True)
    hf_quant.quantize(model, QuantConfig("quarot", clip_steps=1), data=judge.data(0)[:2], progress=False)
    ids = judge.test[:1, :24]
    with torch.no_grad():
        logits, text = model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
        again = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(text, again)
    bits = count_bits(model)
    model.save_pretrained(tmp_path / "model")
    torch.save((ids, logits, text), tmp_path / "want.pt")
    script = f"""
        import sys
        sys.modules["hf_quant.plugins"] = None
        import torch
        from transformers import AutoModelForCausalLM
        ids, logits, text = torch.load({str(tmp_path / "want.pt")!r})
        torch.set_num_threads({torch.get_num_threads()})
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, dtype=torch.float32).eval()
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
            assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), text)
        assert "hf_quant.plugins.transforms" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=Path(__file__).parents[2])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert count_bits(loaded) == bits
