from __future__ import annotations

import pytest
import torch

from secateur.bench import jobs
from secateur.bench.benchmarks import data_of, find_benchmark, plan
from secateur.bench.jobs import Workplace, run_job
from secateur.core.budget import Budget
from secateur.errors import DataUnavailable, InvalidFile
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
    first = imagefolder._content(tmp_path)
    assert first == imagefolder._content(tmp_path) and len(first) == 16
    (tmp_path / "val" / "cat" / "1.png").write_bytes(b"xy")
    assert imagefolder._content(tmp_path) != first


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of small pictures: dark and bright."""
    allow_torchvision()
    pytest.importorskip("timm")
    from PIL import Image

    for part, n in (("train", 20), ("val", 5)):
        for label, level in (("dark", 30), ("light", 220)):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (40, 40), (level + i, level, level)).save(tmp_path / part / label / f"{i}.png")
    monkeypatch.setenv(imagefolder.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(imagefolder.os, "cpu_count", lambda: 0)  # no loader processes
    monkeypatch.delitem(vars(imagefolder.TASK), "splits", raising=False)
    yield tmp_path
    vars(imagefolder.TASK).pop("splits", None)
    vars(imagefolder.TASK).pop("_classes", None)


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
