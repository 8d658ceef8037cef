"""Runs code with stock PEFT in another process, where fim_lora is never imported and every warning is an error."""

import textwrap

import torch

from helpers.fork_server import run_in_fork

LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
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
    """Run the code, and return what it printed."""
    status, output = run_in_fork(LOAD.format(body=textwrap.dedent(body)), "peft", "helpers.tiny_models")
    assert status == 0, output
    return output


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
