"""The order of the training examples, and the exact match of generated answers."""

import random

import pytest
import torch

import quality_tasks
from helpers import tiny_models


def test_batches_of_a_run_have_similar_lengths_and_repeat_nothing_within_a_round():
    draw = random.Random(0)
    lengths = [draw.randint(3, 48) for _ in range(640)]
    order = quality_tasks.training_order(lengths, 8, 100, seed=3)
    assert order == quality_tasks.training_order(lengths, 8, 100, seed=3)
    assert order != quality_tasks.training_order(lengths, 8, 100, seed=4)
    assert len(order) == 800
    assert len(set(order[:512])) == 512  # two whole pools of one epoch

    def padding(indices):
        rows = [[lengths[index] for index in indices[first : first + 8]] for first in range(0, len(indices), 8)]
        return sum(8 * max(row) - sum(row) for row in rows)

    assert padding(order) < padding(draw.sample(range(640), 640)) / 3


@pytest.mark.parametrize(
    ("text", "reference", "correct"),
    [
        ("so 3 + 4 = 7\n#### 7", "7 it is\n#### 7", True),
        ("#### $1,234.00.", "#### 1234", True),
        ("#### 12.50", "#### 12.5", True),
        ("#### 100", "#### 10", False),
        ("#### -5", "#### 5", False),
        ("#### -$5", "#### -5", True),
        ("the answer is 7", "#### 7", False),
        ("#### none", "#### 7", False),
        ("#### 7\n#### 8", "#### 7", True),
    ],
)
def test_an_answer_is_correct_if_its_number_is(text, reference, correct):
    assert quality_tasks.is_correct(text, reference) == correct


class TokensAsNumber:
    """A tokenizer that decodes token ids into one number."""

    pad_token_id, eos_token_id = 0, 1

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return ["#### 1" + "".join(f"{token:02d}" for token in row.tolist() if token > 1) for row in rows]


def greedy_answer(model, prompt):
    """Generate token by token, without padding and cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + quality_tasks.MAX_NEW_TOKENS and (len(ids) == len(prompt) or ids[-1] != 1):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return torch.tensor(ids[len(prompt) :])


def test_answers_are_the_greedy_ones_of_each_question_on_its_own(monkeypatch):
    monkeypatch.setattr(quality_tasks, "MAX_NEW_TOKENS", 8)
    model = tiny_models.llama().eval()
    model.config.use_cache = False
    tokenizer = TokensAsNumber()
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16], [17]]
    references = tokenizer.batch_decode([greedy_answer(model, prompt) for prompt in prompts], skip_special_tokens=True)
    references[1] += "9"
    examples = [
        quality_tasks.Example(prompt, [-100] * len(prompt), prompt, reference)
        for prompt, reference in zip(prompts, references, strict=True)
    ]
    found = quality_tasks.exact_match(model, examples, tokenizer, 3, torch.device("cpu"))
    assert found == 0.75
