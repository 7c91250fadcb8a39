"""Fashion-MNIST: 70,000 images of clothing, 28x28 (Xiao, Rasul, Vollgraf, arXiv 1708.07747)."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import urllib.request
import zlib
from pathlib import Path

import torch
from torch import Tensor

from secateur.atomic import written_atomically
from secateur.errors import DataUnavailable, InvalidFile
from secateur.parts.recovery.fine_tune import FineTune
from secateur.tasks.task import Split, Splits, Task, random_shift

FOLDER_VARIABLE = "SECATEUR_FASHION_MNIST"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SOURCE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
# Of the content, uncompressed: mirrors compress it differently.
SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
VALIDATION = 5_000  # of the 60,000 training images


def load() -> Splits:
    """Return 55,000 training, 5,000 validation and the 10,000 official test images of shape (1, 28, 28), normalized."""
    folder = find_folder()
    images, labels, test_images, test_labels = (_read(folder / name) for name in SHA256)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    validation, train = order[:VALIDATION], order[VALIDATION:]
    return Splits(
        Split(_normalized(images[train]), labels[train].long()),
        Split(_normalized(images[validation]), labels[validation].long()),
        Split(_normalized(test_images), test_labels.long()),
    )


def find_folder() -> Path:
    """Return the folder with the four files: the user's, Debian's, or the cache, which is filled by download.

    Raises:
        DataUnavailable: None of these; the message names the choices.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "secateur" / "fashion-mnist"
    for folder in [Path(named)] if named else [DEBIAN_FOLDER, cache]:
        if all((folder / name).is_file() for name in SHA256):
            return folder
    if named:
        raise DataUnavailable(f"{FOLDER_VARIABLE}={named} lacks the Fashion-MNIST files {', '.join(SHA256)}.")
    try:
        return _download(cache)
    except OSError as error:
        raise DataUnavailable(
            f"Fashion-MNIST is not on this machine and could not be downloaded ({error}). Either run `apt-get install "
            f"dataset-fashion-mnist`, or put its four .gz files into a folder and set {FOLDER_VARIABLE} to it."
        ) from error


def _download(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, expected in SHA256.items():
        with urllib.request.urlopen(f"{SOURCE}/{name}", timeout=30) as response:
            content = response.read()
        found = hashlib.sha256(gzip.decompress(content)).hexdigest()
        if found != expected:
            raise InvalidFile(f"The download of {name} is damaged: SHA-256 {found}, expected {expected}. Try again.")
        with written_atomically(folder / name) as temporary:
            temporary.write_bytes(content)
    return folder


def _read(path: Path) -> Tensor:
    """Return the tensor of an IDX file (uint8)."""
    try:
        content = bytearray(gzip.decompress(path.read_bytes()))
        rank = content[3]
        shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
        return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * rank).view(shape)
    except (OSError, EOFError, zlib.error, struct.error, RuntimeError, IndexError) as error:
        raise InvalidFile(f"{path} is damaged: {error}. Delete it, or install it again.") from error


def _normalized(images: Tensor) -> Tensor:
    return (images[:, None].float() / 255 - 0.286) / 0.353


TASK = Task(
    name="fashion-mnist",
    version=1,
    title="Fashion-MNIST",
    load=load,
    digest="d6df9a84fcb93f22",
    size=28,
    networks={"resnet8": 16, "resnet20": 16, "vit": 64},
    default_network="resnet20",
    training={
        "default": FineTune(epochs=20, lr=0.2, weight_decay=5e-4, warmup=0.15),
        "vit": FineTune(epochs=20, lr=1e-3, weight_decay=0.05, warmup=0.1, optimizer="adamw"),
    },
    augment=random_shift(2),
    batch_size=128,
    precision="auto",
)
