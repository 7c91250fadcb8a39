from __future__ import annotations

import dataclasses
import gzip
import json
import struct

import pytest
import torch

import secateur as sc
from secateur.deploy import safetensors
from secateur.errors import DataUnavailable, InvalidFile, MissingCheckpoint, UnknownName
from secateur.parts.recovery.fine_tune import FineTune
from secateur.tasks import TASKS, fashion_mnist, find_task
from secateur.tasks.digits import TASK as DIGITS
from secateur.tasks.reference import load_reference, reference_path, save_reference, train_reference
from secateur.tasks.task import random_shift


def test_digits_are_split_once_and_for_all():
    splits = DIGITS.splits
    sizes = [len(s.targets) for s in (splits.train, splits.validation, splits.test)]
    assert sizes == [900, 297, 600] and splits.train.inputs.shape == (900, 1, 24, 24)
    assert splits.digest() == DIGITS.digest
    images = torch.cat([s.inputs for s in (splits.train, splits.validation, splits.test)]).flatten(1)
    assert len(images.unique(dim=0)) == 1797  # no image in two splits
    assert abs(images.mean()) < 0.05 and abs(images.std() - 1) < 0.05


def test_other_data_under_the_same_name_are_refused():
    task = dataclasses.replace(DIGITS, digest="0" * 16)
    with pytest.raises(InvalidFile, match="version 1 has 0000"):
        _ = task.splits


@pytest.mark.parametrize(("network", "accuracy"), [("resnet8", 0.98), ("vit", 0.97)])
def test_references_are_trained_small_and_what_their_record_says(network, accuracy):
    path = reference_path(DIGITS, network)
    record = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size < 2_000_000
    model = load_reference(DIGITS, network)
    found = DIGITS.test_accuracy(model)
    assert found >= accuracy and found == pytest.approx(record["test_accuracy"], abs=0.004)
    assert DIGITS.validation_accuracy(model) == pytest.approx(record["validation_accuracy"], abs=0.007)
    assert record["data"] == DIGITS.digest and record["profile"] == sc.profile(model, DIGITS.example()).as_dict()
    assert safetensors.read_about(path)["training"] == record["training"] == DIGITS.training_of(network).model_dump()


def test_every_reference_in_the_package_fits_its_task():
    files = sorted(reference_path(DIGITS, "x").parent.glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        record = json.loads(file.with_suffix(".json").read_text())
        task = find_task(record["task"])
        assert record["data"] == task.digest and file == reference_path(task, record["network"])
        assert (
            file.stat().st_size < 2_000_000 and record["training"] == task.training_of(record["network"]).model_dump()
        )


def test_missing_references_say_how_to_make_one():
    with pytest.raises(MissingCheckpoint, match="secateur train digits --network resnet20"):
        load_reference(DIGITS, "resnet20")
    with pytest.raises(UnknownName, match="network of task 'digits' 'alexnet'"):
        DIGITS.build("alexnet")
    with pytest.raises(UnknownName, match="Unknown task 'imagenet'"):
        find_task("imagenet")
    assert {find_task(name).name for name in TASKS} == set(TASKS)


def test_training_a_reference_is_reproducible_and_resumes(tmp_path):
    settings = FineTune(epochs=1, lr=0.05)
    small = dataclasses.replace(DIGITS, networks={"resnet8": 4})
    a, record = train_reference(small, "resnet8", settings=settings)
    b, _ = train_reference(small, "resnet8", settings=settings, checkpoint=tmp_path / "c")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert record["history"][-1]["step"] == 30 and record["width"] == 4 and record["test_accuracy"] > 0.05
    save_reference(a, record, tmp_path / "r.safetensors")
    assert json.loads((tmp_path / "r.json").read_text())["seed"] == 0
    again = safetensors.read(tmp_path / "r.safetensors", lambda: small.build("resnet8"))
    assert torch.equal(again.fc.weight, a.fc.weight)


def test_the_task_loss_smooths_labels():
    logits, target = torch.randn(4, 10), torch.tensor([0, 1, 2, 3])
    expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    assert torch.equal(DIGITS.loss(logits, target), expected)


def test_random_shift_moves_whole_images_and_fills_with_zero():
    x = torch.arange(1.0, 17).view(1, 1, 4, 4).repeat(64, 1, 1, 1)
    shifted = random_shift(1)(x, torch.Generator().manual_seed(0))
    assert shifted.shape == x.shape and len(shifted.unique(dim=0)) == 9
    kept = [set(image.flatten().tolist()) - {0.0} <= set(range(1, 17)) for image in shifted]
    assert all(kept) and any(torch.equal(image, x[0]) for image in shifted)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.to(torch.uint8).numpy().tobytes()))


def test_fashion_mnist_is_read_from_a_folder(tmp_path, monkeypatch):
    images, labels = torch.arange(12 * 28 * 28).remainder(256).view(12, 28, 28), torch.arange(12) % 10
    for name, array in zip(fashion_mnist.SHA256, (images, labels, images[:3], labels[:3]), strict=True):
        write_idx(tmp_path / name, array)
    monkeypatch.setenv(fashion_mnist.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(fashion_mnist, "VALIDATION", 4)
    splits = fashion_mnist.load()
    assert [len(s.targets) for s in (splits.train, splits.validation, splits.test)] == [8, 4, 3]
    assert torch.allclose(splits.test.inputs[:, 0], (images[:3] / 255 - 0.286) / 0.353)
    assert splits.test.targets.tolist() == [0, 1, 2]
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(InvalidFile, match="damaged"):
        fashion_mnist.load()


def test_without_fashion_mnist_one_line_names_the_choices(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", offline)
    with pytest.raises(DataUnavailable, match=r"apt-get install dataset-fashion-mnist.*SECATEUR_FASHION_MNIST"):
        fashion_mnist.find_folder()
    monkeypatch.setenv(fashion_mnist.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(DataUnavailable, match="lacks the Fashion-MNIST files"):
        fashion_mnist.find_folder()


def test_downloads_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Response:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self):
            return gzip.compress(b"something else")

    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", lambda *a, **k: Response())
    with pytest.raises(InvalidFile, match="download of train-images-idx3-ubyte.gz is damaged"):
        fashion_mnist.find_folder()
