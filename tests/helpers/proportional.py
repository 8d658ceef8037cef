"""Ranks in proportion to the mean eFIM, as in the proposal to PEFT: easy to compute by hand."""

from fim_lora import FimConfig


def proportional(**options):
    return FimConfig(**({"score": "mean", "budget": "rank"} | options))
