from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.deploy import safetensors
from secateur.errors import InvalidFile, PlanMismatch
from secateur.tasks.networks import ResNet
from secateur.testing.toys import NETWORKS, toy


def pruned(name="resnet20", granularity="channel"):
    model, x = toy(name)
    return sc.prune(model, x, granularity=granularity, budget=sc.Budget(macs=0.5)), x


@pytest.mark.parametrize("name", NETWORKS)
def test_a_loaded_network_computes_the_same(tmp_path, name):
    result, x = pruned(name)
    artifact = sc.save(result, tmp_path / "small.safetensors")
    again = sc.load(artifact.path, NETWORKS[name][0])
    with torch.no_grad():
        assert torch.allclose(again(x), result.model(x), rtol=0, atol=1e-6)
    assert not again.training and artifact.bytes == artifact.path.stat().st_size
    assert all(not p.is_meta for p in (*again.parameters(), *again.buffers()))


def test_a_loaded_network_does_not_depend_on_the_file(tmp_path):
    model, x = toy("mobilenet")
    path = tmp_path / "m.safetensors"
    sc.save(sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.5)), path)
    loaded = sc.load(path, build=NETWORKS["mobilenet"][0])
    assert all(value.data_ptr() % 64 == 0 for value in loaded.state_dict().values())
    before = loaded(x)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(loaded(x), before)


def test_a_new_process_needs_only_the_file_and_the_constructor(tmp_path):
    result, x = pruned("mobilenet")
    sc.save(result, tmp_path / "small.safetensors")
    torch.save({"x": x, "y": result.model(x).detach()}, tmp_path / "expected.pt")
    code = (
        "import torch, secateur as sc; from secateur.testing.toys import mobilenet; e = torch.load('expected.pt');"
        "m = sc.load('small.safetensors', mobilenet); print(float((m(e['x']) - e['y']).abs().max()))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert float(done.stdout) < 1e-5


def test_the_file_is_smaller_and_tells_what_was_done(tmp_path):
    result, _ = pruned()
    dense = safetensors.write(tmp_path / "dense.safetensors", toy("resnet20")[0])
    small = sc.save(result, tmp_path / "small.safetensors")
    assert small.bytes < 0.7 * dense.bytes
    about = safetensors.read_about(small.path)
    assert about["recipe_hash"] == result.recipe.hash and about["after"]["macs"] == result.after.macs
    assert safetensors.read_plan(small.path) == result.structure_plan


def test_masks_survive_even_where_a_kept_weight_is_zero(tmp_path):
    result, _ = pruned(granularity="weight")
    with torch.no_grad():
        result.model.fc.weight.zero_()
    sc.save(result, tmp_path / "masked.safetensors")
    masks = safetensors.read_masks(tmp_path / "masked.safetensors")
    assert masks.keys() == result.masks.keys()
    assert all(torch.equal(masks[n], result.masks[n]) for n in masks)
    assert sc.load(tmp_path / "masked.safetensors", NETWORKS["resnet20"][0]).fc.weight.eq(0).all()


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, keep):
    result, _ = pruned()
    path = tmp_path / "small.safetensors"
    sc.save(result, path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(InvalidFile, match="damaged"):
        sc.load(path, NETWORKS["resnet20"][0])


@pytest.mark.parametrize("where", [0.3, 0.6, 0.999])
def test_a_flipped_bit_is_noticed(tmp_path, where):
    result, _ = pruned()
    path = tmp_path / "small.safetensors"
    sc.save(result, path)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidFile, match="damaged"):
        sc.load(path, NETWORKS["resnet20"][0])


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(InvalidFile, match="There is no file"):
        sc.load(tmp_path / "nothing", NETWORKS["resnet20"][0])
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(InvalidFile, match="not written by secateur"):
        sc.load(tmp_path / "foreign.safetensors", NETWORKS["resnet20"][0])


@pytest.mark.parametrize(
    "build",
    [
        lambda: ResNet(20, 12, channels=3),
        lambda: ResNet(14, 8, channels=3),
        lambda: ResNet(20, 8, channels=3, classes=7),
    ],
    ids=["wider", "shallower", "other classes"],
)
def test_another_constructor_is_refused(tmp_path, build):
    result, _ = pruned()
    sc.save(result, tmp_path / "small.safetensors")
    with pytest.raises(PlanMismatch, match="Pass the constructor of the network that was pruned"):
        sc.load(tmp_path / "small.safetensors", build)


def test_writing_into_a_missing_folder_is_one_clear_error(tmp_path):
    result, _ = pruned()
    with pytest.raises(InvalidFile, match="does not exist"):
        sc.save(result, tmp_path / "no" / "small.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    result, _ = pruned()
    path = tmp_path / "small.safetensors"
    sc.save(result, path)
    before = path.read_bytes()

    def full(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        sc.save(result, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_buffers_outside_the_state_dict_and_shared_weights_survive(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.c.weight = self.b.weight
            self.register_buffer("scale", torch.arange(6.0), persistent=False)

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x)).relu()) * self.scale)

    model, x = Model().eval(), torch.randn(2, 5)
    result = sc.prune(model, x, granularity="channel", budget=sc.Budget(params=0.6))
    sc.save(result, tmp_path / "m.safetensors")
    again = sc.load(tmp_path / "m.safetensors", Model)
    assert torch.equal(again(x), result.model(x)) and again.b.weight is again.c.weight
    assert again.scale.shape == result.model.scale.shape


def test_constructors_that_compute_are_built_on_a_real_device(tmp_path):
    class Computing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)
            self.rates = torch.linspace(0, 1, 6)  # a plain tensor, neither parameter nor buffer
            self.total = float(self.rates.sum())

        def forward(self, x):
            return self.b(self.a(x)) * self.total

    model, x = Computing().eval(), torch.randn(2, 5)
    result = sc.prune(model, x, granularity="channel", budget=sc.Budget(params=0.6))
    sc.save(result, tmp_path / "m.safetensors")
    again = sc.load(tmp_path / "m.safetensors", Computing)
    assert torch.equal(again(x), result.model(x)) and not again.rates.is_meta


def test_other_types_survive(tmp_path):
    model, x = toy("mlp")
    model = model.to(torch.bfloat16)
    result = sc.prune(model, x.to(torch.bfloat16), granularity="channel", budget=sc.Budget(params=0.5))
    sc.save(result, tmp_path / "m.safetensors")
    again = sc.load(tmp_path / "m.safetensors", NETWORKS["mlp"][0])
    assert next(again.parameters()).dtype == torch.bfloat16 and torch.equal(
        again(x.bfloat16()), result.model(x.bfloat16())
    )


class Table(nn.Module):
    """Makes a table for the length of its inputs at the first call, as some attention layers do."""

    def __init__(self, heads=4):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, heads)
        self.register_buffer("table", torch.zeros(1, 1))

    def forward(self, x):
        if self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype).view(-1, 1)
        return self.head(torch.relu(self.first(x)) + self.table)


def test_a_buffer_that_takes_its_size_from_the_inputs_is_loaded(tmp_path):
    x = torch.randn(2, 5, 6)
    result = sc.prune(Table(), x, granularity="channel", budget=sc.Budget(macs=0.5))
    expected = result.model(x)
    sc.save(result, tmp_path / "small.safetensors")
    again = sc.load(tmp_path / "small.safetensors", Table)
    assert again.table.shape == (5, 1) and torch.equal(again(x), expected)
    with pytest.raises(PlanMismatch, match="head"):
        sc.load(tmp_path / "small.safetensors", lambda: Table(heads=5))
