"""PEFT's own tests for quantized bases, `tests/test_quantization.py` of a checkout of PEFT, with our layers below.

    python integration_tests/peft_stock_suite.py CHECKOUT

The tests are copied to a temporary folder and run unchanged but for the table of backends, which becomes ours, and the
base model, a random OPT of as many layers in place of a download. What is left out, and why, is in `LEFT_OUT`.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

TABLE = "def _quant_id(backend):"
FILES = ("__init__.py", "test_quantization.py", "testing_utils.py")
LEFT_OUT = {
    "test_quantization_backend_is_set_and_repr": "asserts an object of PEFT's closed list of backends; to PEFT our "
    "layers are linear layers, and it needs none",
}
OURS = """
class Ours:
    supports_merge = True
    supports_non_quantized_comparison = True
    model_id = {model!r}
    expected_layer_count = 24

    def __init__(self, name, method, **arguments):
        self.name, self.method, self.arguments = name, method, arguments

    def load_model(self):
        from hf_quant import QuantConfig

        config = QuantConfig(self.method, **self.arguments)
        placed = {{"": DEVICE}}
        return AutoModelForCausalLM.from_pretrained(self.model_id, quantization_config=config, device_map=placed)


QUANTIZATION_BACKENDS = [
    Ours("int8", "rtn", bits=8, group_size=64),
    Ours("int4", "rtn", bits=4, group_size=32),
    Ours("nf4", "bnb-nf4"),
    Ours("int8-act8", "dynamic-w8a8"),
]


"""


def main() -> int:
    checkout = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "tests").mkdir()
        for name in FILES:
            shutil.copyfile(checkout / "tests" / name, folder / "tests" / name)
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "ffn_dim": 512, "word_embed_proj_dim": 256, "num_attention_heads": 4}
        OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=12, vocab_size=1024)).save_pretrained(folder / "model")
        test = folder / "tests" / "test_quantization.py"
        text = test.read_text()
        assert text.count(TABLE) == 1
        test.write_text(text.replace(TABLE, OURS.format(model=str(folder / "model")) + TABLE))
        left_out = " and ".join(f"not {name}" for name in LEFT_OUT)
        command = [sys.executable, "-m", "pytest", "-q", "-rsf", "--tb=line", "-p", "no:cacheprovider", "-k", left_out]
        return subprocess.run([*command, "tests/test_quantization.py"], cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
