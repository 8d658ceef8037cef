"""Runs code with stock PEFT in another process, where fim_lora is never imported and every warning is an error."""

import functools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

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


@functools.cache
def server():
    """The process that runs the code. It ends with the tests, when its input is closed."""
    command = [sys.executable, str(Path(__file__).with_name("stock_server.py"))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def stock(body):
    """What the code prints."""
    process = server()
    process.stdin.write(json.dumps(LOAD.format(body=textwrap.dedent(body))) + "\n")
    process.stdin.flush()
    status, output = json.loads(process.stdout.readline())
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
