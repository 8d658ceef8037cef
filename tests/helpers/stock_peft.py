"""Runs code with stock PEFT in another process, where fim_lora is never imported and every warning is an error."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import torch
from helpers.tiny_models import llama, token_batch
from peft import LoraConfig, PeftModel, get_peft_model
base = llama()
warnings.simplefilter("error")
# transformers raises it about itself, for any adapter.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
{body}
assert not any(name.startswith("fim_lora") for name in sys.modules)
"""


def stock(body):
    code = LOAD.format(tests=str(Path(__file__).parents[1]), body=textwrap.dedent(body))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert result.returncode == 0, result.stderr
    return result


def require_equal_outputs(model, logits, folder, tolerance):
    """Saves an adapter of `llama()`, and compares the logits of `token_batch()` in stock PEFT with `logits`."""
    torch.save(logits, folder / "logits.pt")
    model.save_pretrained(folder)
    stock(f"""
        model = PeftModel.from_pretrained(base, {str(folder)!r}).eval()
        with torch.no_grad():
            logits = model(**token_batch()).logits
        expected = torch.load({str(folder / "logits.pt")!r})
        torch.testing.assert_close(logits, expected, rtol={tolerance}, atol={tolerance})
    """)
