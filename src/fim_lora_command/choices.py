"""Values that options accept. Those of the library are repeated here, and a test compares them."""

from typing import Literal, get_args

Task = Literal["causal-lm", "seq-cls"]
TASKS: tuple[str, ...] = get_args(Task)
DTYPES = ("auto", "float32", "bfloat16", "float16")

BUDGETS = ("rank", "parameters")
"""`fim_lora.config.BUDGETS`."""

SCORES = ("norm", "mean")
"""`fim_lora.config.SCORES`."""

FORMATS = ("csv", "axolotl", "peft")
"""`fim_lora.report.exports.FORMATS`."""

ROLES = (
    *("messages", "prompt", "completion", "text", "instruction", "output", "conversations", "label"),
    *("tools", "chat_template_kwargs", "input", "system", "history"),
)
"""`fim_lora.cli.data.ROLES`: what the columns of the data hold."""
