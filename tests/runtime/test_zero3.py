"""Two processes with a model sharded by ZeRO-3 against one process with the whole model and all data."""

import json
import os
import shutil

import pytest

from fim_lora import get_fim_scores
from helpers.several_processes import ALL, base, config
from helpers.torchrun import NUM_PROCESSES, assert_same_scores, torchrun

pytest.importorskip("deepspeed")


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its communication for the CPU")
def test_scores_of_a_model_sharded_by_zero3(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    finished = torchrun("helpers.zero3", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    alone = get_fim_scores(base().float(), ALL, config(), show_progress_bar=False)
    for rank in range(NUM_PROCESSES):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert_same_scores(found["module"], alone, relative=1e-5)
        assert_same_scores(found["engine"], alone, relative=1e-5)
        assert not found["without_gradient"]
