"""Alpaca and ShareGPT, two known formats of data, in the form of the others."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fim_lora_command.errors import CommandError

from .cells import excerpt, text_of
from .data import Row

# The prompts that the authors of Alpaca trained with: https://github.com/tatsu-lab/stanford_alpaca
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

# Who speaks in ShareGPT and its relatives, to the role of a chat template.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def in_usual_form(row: Row) -> Row:
    """A row of Alpaca as prompt and completion, a row of ShareGPT as messages, and other rows as they are."""
    if "instruction" in row.values:
        return replace(row, values={"prompt": _alpaca_prompt(row), "completion": text_of(row, "output")})
    if "conversations" in row.values:
        others = {role: row.values[role] for role in ("tools", "chat_template_kwargs") if role in row.values}
        return replace(row, values={"messages": _messages(row), **others})
    return row


def _alpaca_prompt(row: Row) -> str:
    for role in ("system", "history"):  # LLaMA-Factory adds them
        if row.values.get(role):
            raise CommandError(
                f"{row.place} has a {role}, for which the prompt of Alpaca has no place: give the conversations as "
                "messages with role and content."
            )
    instruction = text_of(row, "instruction")
    if row.values.get("input") in (None, ""):
        return _ALPACA.format(instruction=instruction)
    return _ALPACA_WITH_INPUT.format(instruction=instruction, input=text_of(row, "input"))


def _messages(row: Row) -> list[dict[str, Any]]:
    turns = row.values["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise CommandError(
            f"The conversations of {row.place} are not a list of {{'from': …, 'value': …}}: {excerpt(turns)}. Correct "
            "or remove the row."
        )
    messages = [_message(row, turn) for turn in turns]
    system = row.values.get("system")
    if system in (None, ""):
        return messages
    if any(message["role"] == "system" for message in messages):
        raise CommandError(f"{row.place} has a system message in two places: remove one of them.")
    return [{"role": "system", "content": text_of(row, "system")}, *messages]


def _message(row: Row, turn: Mapping[str, Any]) -> dict[str, Any]:
    if turn.get("role") is not None:  # the messages of chat templates under the name of ShareGPT
        return dict(turn)
    speaker, text = turn.get("from"), turn.get("value")
    if speaker not in _SPEAKERS:
        raise CommandError(
            f"{row.place} has a turn from {excerpt(speaker)}; known are {', '.join(_SPEAKERS)}. Give the "
            "conversations as messages with role and content."
        )
    if not isinstance(text, str):
        raise CommandError(f"{row.place} has a turn without text: {excerpt(turn)}. Correct or remove the row.")
    return {"role": _SPEAKERS[speaker], "content": text}
