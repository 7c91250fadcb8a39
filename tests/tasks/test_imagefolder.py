from __future__ import annotations

import sys

import pytest
import torch

from secateur.bench import jobs
from secateur.bench.benchmarks import find_benchmark
from secateur.bench.jobs import Workplace, run_job
from secateur.bench.plan import data_of, plan
from secateur.core.budget import Budget
from secateur.errors import DataUnavailable, InvalidFile, MissingDependency
from secateur.tasks import find_task, imagefolder
from secateur.tasks.zoo import allow_torchvision


def test_without_pictures_one_line_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv(imagefolder.FOLDER_VARIABLE, raising=False)
    with pytest.raises(DataUnavailable, match="set SECATEUR_IMAGEFOLDER to a folder with train/CLASS and val/CLASS"):
        data_of(find_benchmark("imagefolder/resnet50"))
    monkeypatch.setenv(imagefolder.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(DataUnavailable):
        imagefolder.load()


def test_a_tenth_of_each_class_is_held_out_at_most_fifty():
    targets = torch.tensor([0] * 25 + [1] * 1000)
    held_out = imagefolder._held_out(targets)
    assert held_out[:25].nonzero().flatten().tolist() == [0, 10, 20] and held_out[25:].sum() == 50


def test_the_hash_sees_names_and_sizes(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "1.png").write_bytes(b"x")
    first = imagefolder._folder_content(tmp_path)
    assert first == imagefolder._folder_content(tmp_path) and len(first) == 16
    (tmp_path / "val" / "cat" / "1.png").write_bytes(b"xy")
    assert imagefolder._folder_content(tmp_path) != first


@pytest.fixture
def task(monkeypatch):
    """The task, which has not looked at data yet."""
    allow_torchvision()
    pytest.importorskip("timm", reason="needs timm: pip install 'secateur[timm]'")
    monkeypatch.setattr(imagefolder.os, "cpu_count", lambda: 0)  # no loader processes
    forget()
    yield imagefolder.TASK
    forget()


def forget():
    vars(imagefolder.TASK).pop("splits", None)
    vars(imagefolder.TASK).pop("_classes", None)


@pytest.fixture
def folder(task, tmp_path, monkeypatch):
    """Two classes of small pictures: dark and bright."""
    from PIL import Image

    for part, n in (("train", 20), ("val", 5)):
        for label, level in (("dark", 30), ("light", 220)):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (40, 40), (level + i, level, level)).save(tmp_path / part / label / f"{i}.png")
    monkeypatch.setenv(imagefolder.FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_a_timm_network_on_a_folder_is_a_benchmark_like_others(folder, tmp_path):
    benchmark = find_benchmark("imagefolder/resnet50").model_copy(
        update={"network": "test_resnet.r160_in1k", "reference": "trained", "engines": ()}
    )
    training = benchmark.training.model_copy(update={"epochs": 1.0})
    benchmark = benchmark.model_copy(update={"training": training})
    runs = plan(benchmark, data_of(benchmark), ["magnitude"], [Budget(sparsity=0.8)], [0])
    place = Workplace(results=tmp_path / "results", scratch=tmp_path / "scratch", engines=())
    dense = run_job(runs[0], place)
    assert dense.status == "ok" and dense.measured.metrics["accuracy"].n == 10
    assert dense.measured.metrics["validation_accuracy"].n == 4 and dense.measured.training.samples == 36
    assert find_task("imagefolder").example().shape == (1, 3, 224, 224)
    (folder / "val" / "dark" / "0.png").write_bytes(b"other")
    vars(imagefolder.TASK).pop("splits")
    with pytest.raises(InvalidFile, match="changed since"):
        run_job(runs[1], place)


@pytest.mark.slow
def test_pretrained_networks_are_measured_as_they_are(folder, tmp_path, monkeypatch):
    benchmark = find_benchmark("imagefolder/resnet50").model_copy(update={"network": "test_resnet.r160_in1k"})
    monkeypatch.setattr(type(imagefolder.TASK), "pretrained", lambda task, network: task.build(network))
    run = plan(benchmark, data_of(benchmark), ["magnitude"], [Budget(sparsity=0.8)], [0])[0]
    record = run_job(run, Workplace(results=tmp_path / "results", scratch=tmp_path / "scratch", engines=()))
    assert record.measured.training.steps == 0 and record.measured.history == [] and jobs.reference(run, Workplace(
        results=tmp_path / "results", scratch=tmp_path / "scratch"))[1]["history"] == []  # fmt: skip


def as_dataset(folder, part, **labels):
    """The pictures of a folder in the order in which torchvision reads them, or with other classes."""
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'secateur[datasets]'")
    paths = sorted((folder / part).glob("*/*.png"))
    columns = {
        "name": [path.name for path in paths],
        "picture": [str(path) for path in paths],
        "class": labels.get("labels", [["dark", "light"].index(path.parent.name) for path in paths]),
    }
    features = {"name": datasets.Value("string"), "picture": datasets.Image()}
    features["class"] = datasets.ClassLabel(names=["dark", "light"])
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def save(folder, monkeypatch, **splits):
    """Save splits where the task looks for them."""
    import datasets

    datasets.disable_progress_bars()
    datasets.DatasetDict(splits).save_to_disk(folder)
    monkeypatch.setenv(imagefolder.FOLDER_VARIABLE, str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_saved_dataset_gives_the_batches_of_the_folder_with_the_same_pictures(folder, tmp_path, monkeypatch, name):
    expected = imagefolder.load()
    save(tmp_path / "saved", monkeypatch, **{"train": as_dataset(folder, "train"), name: as_dataset(folder, "val")})
    found = imagefolder.load()
    for part, n in (("train", 36), ("validation", 4), ("test", 10)):
        one, other = getattr(expected, part), getattr(found, part)
        assert one.inputs.tolist() == other.inputs.tolist() and one.targets.tolist() == other.targets.tolist()
        ((x, y),), ((also_x, also_y),) = list(one.batches(100)), list(other.batches(100))
        assert x.shape == (n, 3, 224, 224) and x.equal(also_x) and y.equal(also_y)
    with torch.random.fork_rng():
        crops = []
        for splits in (expected, found):
            torch.manual_seed(0)  # of crops and flips
            crops += [next(iter(splits.train.batches(8, shuffle=True, seed=1)))]
    assert crops[0][0].equal(crops[1][0]) and crops[0][1].equal(crops[1][1])


@pytest.mark.slow
def test_a_saved_dataset_in_three_is_taken_as_it_is_split(folder, tmp_path, monkeypatch):
    train, val = as_dataset(folder, "train"), as_dataset(folder, "val")
    save(tmp_path / "saved", monkeypatch, train=train, validation=val, test=train.select([0, 39]), other=val)
    splits = imagefolder.load()
    assert [len(split.targets) for split in (splits.train, splits.validation, splits.test)] == [40, 10, 2]
    assert splits.test.targets.tolist() == [0, 1]


@pytest.mark.slow
def test_a_test_split_without_classes_does_not_count(folder, tmp_path, monkeypatch):
    parts = {"train": as_dataset(folder, "train"), "validation": as_dataset(folder, "val")}
    save(tmp_path / "two", monkeypatch, **parts)
    two = imagefolder.load()
    save(tmp_path / "three", monkeypatch, **parts, test=as_dataset(folder, "val", labels=[-1] * 10))
    assert imagefolder.load().digest() == two.digest() and len(imagefolder.load().validation.targets) == 4
    save(tmp_path / "unknown", monkeypatch, **parts | {"train": as_dataset(folder, "train", labels=[0, None] * 20)})
    with pytest.raises(DataUnavailable, match="splits train, validation; with a class for every picture: validation;"):
        imagefolder.load()


@pytest.mark.slow
def test_the_hash_of_a_saved_dataset_sees_names_sizes_and_classes(folder, tmp_path, monkeypatch):
    train, val = as_dataset(folder, "train"), as_dataset(folder, "val")
    digests = []
    for number, changed in enumerate((val, val, val.select(range(9)), val.select([1, 0, *range(2, 10)]))):
        save(tmp_path / str(number), monkeypatch, train=train, validation=changed)
        digests.append(imagefolder.load().digest())
    save(tmp_path / "classes", monkeypatch, train=train, validation=as_dataset(folder, "val", labels=[0] * 9 + [1]))
    digests.append(imagefolder.load().digest())
    (folder / "val" / "dark" / "0.png").write_bytes((folder / "val" / "dark" / "0.png").read_bytes() + b"x")
    save(tmp_path / "sizes", monkeypatch, train=train, validation=as_dataset(folder, "val"))
    digests.append(imagefolder.load().digest())
    assert digests[0] == digests[1] and len(set(digests)) == 5 and len(digests[0]) == 16


@pytest.mark.slow
def test_what_is_wrong_with_a_saved_dataset_is_said_in_one_line(folder, tmp_path, monkeypatch):
    train, val = as_dataset(folder, "train"), as_dataset(folder, "val")

    def refused(error, words):
        with pytest.raises(error, match=words) as caught:
            imagefolder.load()
        assert "\n" not in str(caught.value)

    save(tmp_path / "train", monkeypatch, train=train)
    refused(DataUnavailable, "expected train, and validation or test")
    save(tmp_path / "pictures", monkeypatch, train=train.remove_columns("picture"), test=val)
    refused(
        DataUnavailable, r"pictures/train has 0 columns of type Image; expected one. Columns: name \(Value\), class"
    )
    twice = train.add_column("again", train["class"], feature=train.features["class"])
    save(tmp_path / "classes", monkeypatch, train=train, test=twice)
    refused(DataUnavailable, "classes/test has 2 columns of type ClassLabel")
    train.save_to_disk(tmp_path / "one")
    monkeypatch.setenv(imagefolder.FOLDER_VARIABLE, str(tmp_path / "one"))
    refused(DataUnavailable, "Dataset without splits; expected a DatasetDict")
    save(tmp_path / "damaged", monkeypatch, train=train, test=val)
    next((tmp_path / "damaged" / "test").glob("*.arrow")).unlink()
    refused(InvalidFile, "no dataset that `datasets` can load")


def test_without_the_library_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    monkeypatch.setenv(imagefolder.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(MissingDependency, match=r"pip install 'secateur\[datasets\]'"):
        imagefolder.load()


@pytest.mark.slow
def test_a_timm_network_is_built_for_the_classes_of_a_saved_dataset(task, folder, tmp_path, monkeypatch):
    save(tmp_path / "saved", monkeypatch, train=as_dataset(folder, "train"), test=as_dataset(folder, "val"))
    network = task.build("test_resnet.r160_in1k")
    x, y = next(iter(task.validation_batches()))
    assert network.eval()(x).shape == (4, 2) and y.tolist() == [0, 0, 1, 1]
