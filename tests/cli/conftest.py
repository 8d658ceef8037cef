import datasets
import pytest

from helpers.cli_inputs import allocate, save_adapter, save_bert, save_llama, texts, write_jsonl


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"text": text} for text in texts(12)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    rows = [{"sentence": text, "label": label} for text, label in zip(texts(12), "abc" * 4, strict=True)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "labeled.jsonl", rows)


@pytest.fixture(scope="module")
def allocated(llama, data, tmp_path_factory):
    """Folders of one allocation: an ordinary one, and one for servers."""
    folder = tmp_path_factory.mktemp("allocated")
    assert allocate(llama, data, folder / "plain", "--target-modules", "all-linear") == 0
    assert allocate(llama, data, folder / "serving", "--target-modules", "all-linear", "--serving") == 0
    return folder


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    """A trained adapter for `llama`, on all linear layers."""
    return save_adapter(llama, tmp_path_factory.mktemp("adapter") / "trained")


@pytest.fixture(scope="module")
def classifier(bert, tmp_path_factory):
    """A trained adapter for `bert`, with a head for three classes."""
    return save_adapter(bert, tmp_path_factory.mktemp("classifier") / "trained", num_labels=3)
