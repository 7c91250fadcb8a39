"""Awkward models through all stages: trace, verify, prune, a training step, save, load."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import InvalidInputs, NothingPrunable
from secateur.structure.inputs import Inputs, aliases_of, output_tensors, redrawn
from secateur.structure.surgery import copied


class Two(nn.Module):
    """Two inputs that meet, two heads."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 32), nn.Linear(5, 32)
        self.body = nn.Linear(32, 24)
        self.a, self.b = nn.Linear(24, 3), nn.Linear(24, 4)

    def features(self, x, y):
        return F.relu(self.body(F.relu(self.left(x) + self.right(y))))


class TupleInTupleOut(Two):
    def forward(self, x, y):
        h = self.features(x, y)
        return self.a(h), (self.b(h), None)


class DictInDictOut(Two):
    def forward(self, inputs):
        h = self.features(inputs["x"], inputs["more"][0])
        return {"a": self.a(h), "b": [self.b(h)]}


@dataclass
class Output:
    a: torch.Tensor
    b: torch.Tensor | None = None


class KeywordsInDataclassOut(Two):
    def forward(self, x, *, y=None, scale=1.0, names=("a", "b")):
        y = torch.zeros(len(x), 5, dtype=x.dtype) if y is None else y
        h = self.features(x, y) * scale
        return Output(**{name: getattr(self, name)(h) for name in names})


class FrozenBackbone(Two):
    def __init__(self):
        super().__init__()
        self.left.requires_grad_(False)
        self.body.requires_grad_(False)

    def forward(self, x, y):
        return self.a(self.features(x, y))


class BufferIsParameterMemory(Two):
    """One buffer lies in the memory of a weight, another is a weight itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("view", self.body.weight.data)
        self.register_buffer("same", self.left.weight)

    def forward(self, x, y):
        h = F.linear(F.relu(F.linear(x, self.same, self.left.bias) + self.right(y)), self.view, self.body.bias)
        return self.a(F.relu(h)) + 0 * self.body.weight.mean()


X, Y = torch.randn(4, 6), torch.randn(4, 5)
CASES = {
    "tuples": (TupleInTupleOut, (X, Y), {}),
    "dicts": (DictInDictOut, ({"x": X, "more": [Y]},), {}),
    "keywords and a dataclass": (KeywordsInDataclassOut, (X,), {"y": Y, "scale": 2.0, "names": ("a",)}),
    "keywords left out": (KeywordsInDataclassOut, {"x": X}, {}),
    "frozen parameters": (FrozenBackbone, (X, Y), {}),
    "buffers in the memory of parameters": (BufferIsParameterMemory, (X, Y), {}),
}


def call(model, args, kwargs):
    return output_tensors(model(**args, **kwargs) if isinstance(args, dict) else model(*args, **kwargs))


def to(value, dtype):
    return torch.utils._pytree.tree_map(lambda v: v.to(dtype) if isinstance(v, torch.Tensor) else v, value)


# Module.to gives a parameter and its alias memory of their own; that is PyTorch's doing.
ALIASED = "buffers in the memory of parameters"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES), *((name, torch.bfloat16) for name in CASES if name != ALIASED)],
)
def test_from_trace_to_load(name, dtype, tmp_path):
    make, args, kwargs = CASES[name]

    def build():
        return make() if dtype == torch.float32 else make().to(dtype)

    model, args, kwargs = build().eval(), to(args, dtype), to(kwargs, dtype)
    before = call(model, args, kwargs)
    structure = sc.trace(model, args, kwargs)
    assert structure.verify(model).ok and {"left", "body"} <= {axis.name for axis in structure.prunable}
    pruned = sc.prune(model, args, example_kwargs=kwargs, granularity="channel", budget=sc.Budget(params=0.5))
    assert pruned.after.params <= 0.5 * pruned.before.params and all(proof.ok for proof in pruned.proofs)
    assert all(torch.equal(a, b) for a, b in zip(before, call(model, args, kwargs), strict=True))
    small = pruned.model
    assert [t.shape for t in call(small, args, kwargs)] == [t.shape for t in before]
    assert {p.dtype for p in small.parameters()} == {dtype}

    trainable = {n for n, p in small.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], lr=0.1)
    old = {n: p.detach().clone() for n, p in small.named_parameters()}
    sum(t.float().square().mean() for t in call(small.train(), args, kwargs)).backward()
    optimizer.step()
    moved = {n for n, p in small.named_parameters() if not torch.equal(p, old[n])}
    assert moved and moved <= trainable

    sc.save(pruned, tmp_path / "m.safetensors")
    loaded = sc.load(tmp_path / "m.safetensors", build=build)
    ours, theirs = call(small.eval(), args, kwargs), call(loaded, args, kwargs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_buffers_in_the_memory_of_parameters_stay_there_and_learn(tmp_path):
    model = BufferIsParameterMemory().eval()

    def is_shared(m):
        return m.view.data_ptr() == m.body.weight.data_ptr() and m.same is m.left.weight

    pruned = sc.prune(model, (X, Y), granularity="channel", budget=sc.Budget(params=0.5))
    small = pruned.model
    assert is_shared(model) and is_shared(copied(model)) and is_shared(small)
    with torch.no_grad():
        small.body.weight.add_(1.0)
    assert torch.equal(small.view, small.body.weight) and not small.view.requires_grad
    sc.save(pruned, tmp_path / "m.safetensors")
    loaded = sc.load(tmp_path / "m.safetensors", build=BufferIsParameterMemory)
    assert is_shared(loaded) and torch.equal(loaded(X, Y), small(X, Y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, (X, Y), optimizers=optimizer, total_steps=1, granularity="channel",
                       budget=sc.Budget(params=0.5))  # fmt: skip
    pruner.step()
    assert is_shared(model) and is_shared(pruner.result().model)


def test_kernels_in_shared_memory_are_trained_where_they_are():
    class Convolutions(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4, 10))
            self.register_buffer("view", self[0].weight.data)

    x = torch.randn(4, 3, 4, 4)
    pruned = sc.prune(Convolutions().eval(), x, granularity="channel", budget=sc.Budget(macs=0.5),
                      data=[(x, torch.arange(4))], recovery={"name": "fine-tune", "epochs": 2})  # fmt: skip
    assert pruned.model.view.data_ptr() == pruned.model[0].weight.data_ptr()


def test_tensors_that_overlap_otherwise_are_not_cut():
    class Part(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 16)
            self.c = nn.Linear(16, 3)
            self.register_buffer("part", part(self.a.weight.data))

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    for part in (lambda w: w[:8], lambda w: w.t(), lambda w: w.view(-1)):
        model = Part(part).eval()
        structure = sc.trace(model, X)
        assert [axis.name for axis in structure.prunable] == ["b"]
        assert "lies in the memory of a.weight, in another shape" in structure.axis("a").reason
        assert aliases_of(model) == ({}, {"part": "a.weight"})
    apart = Part(lambda w: w.clone())
    flat = torch.randn(32)  # two parameters side by side in one memory, as flattened ones are
    apart.a.bias, apart.b.bias = nn.Parameter(flat[:16]), nn.Parameter(flat[16:])
    assert aliases_of(apart) == ({}, {})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X,), {}),
        ((X, Y, Y), {}),
        ((Y, X), {}),
        ((X, Y.long()), {}),
        ({"x": X}, {}),
        ((X, Y), {"z": 1}),
        ((X[:2], Y[:3]), {}),
        ((X.double(), Y.double()), {}),
    ],
)
def test_inputs_that_do_not_fit_give_one_clear_error(args, kwargs):
    model = TupleInTupleOut().eval()
    for start in (
        lambda: sc.trace(model, args, kwargs),
        lambda: sc.prune(model, args, example_kwargs=kwargs, granularity="channel", budget=sc.Budget(params=0.5)),
    ):
        with pytest.raises(InvalidInputs, match=r"does not run on the example inputs \(.*\): .*Pass inputs for which"):
            start()


@pytest.mark.parametrize("inputs", [None, 3, "image", {}, (), {"x": "y"}, [[1.0, 2.0]]])
def test_inputs_without_a_tensor_give_one_clear_error(inputs):
    with pytest.raises(InvalidInputs, match="hold no tensor"):
        sc.prune(TupleInTupleOut(), inputs, granularity="channel", budget=sc.Budget(params=0.5))


# ------------------------------------------------------------------------------------ paths that depend on the values


class Branches(nn.Module):
    """The sum of the inputs decides which layer is used."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 32), nn.Linear(32, 3)
        self.hot, self.cold = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        h = F.relu(self.stem(x))
        return self.head(F.relu(self.hot(h) if x.sum() > 0 else self.cold(h)))


class Rare(Branches):
    """No input that anyone would try takes the other branch."""

    def forward(self, x):
        h = F.relu(self.stem(x))
        return self.head(F.relu(self.cold(h) if x[0, 0].item() == 12.0 else self.hot(h)))


class Listed(Rare):
    """The same, with values that leave PyTorch as a list."""

    def forward(self, x):
        h = F.relu(self.stem(x))
        return self.head(F.relu(self.cold(h) if x.tolist()[0][0] == 12.0 else self.hot(h)))


@pytest.mark.parametrize("sign", [1, -1])
def test_both_sides_of_a_branch_follow_the_cut(sign, tmp_path):
    model, x = Branches().eval(), sign * torch.rand(4, 6)
    structure = sc.trace(model, x)
    assert {("hot.weight", 1), ("cold.weight", 1), ("head.weight", 1)} <= {
        member for axis in structure.prunable for member in axis.members
    }
    pruned = sc.prune(model, x, granularity="channel", budget=sc.Budget(params=0.6))
    optimizer = torch.optim.SGD(pruned.model.parameters(), lr=0.1)
    sc.save(pruned, tmp_path / "m.safetensors")
    loaded = sc.load(tmp_path / "m.safetensors", build=Branches)
    for other in (x, -x):
        y = pruned.model(other)
        assert y.shape == (4, 3) and torch.equal(y, loaded(other))
        y.square().mean().backward()
    optimizer.step()
    assert all(p.grad is not None for p in pruned.model.parameters())


@pytest.mark.parametrize("make", [Rare, Listed])
def test_what_no_run_has_used_freezes_all_that_it_may_meet(make):
    model, x = make().eval(), torch.randn(4, 6)
    structure = sc.trace(model, x)
    assert not structure.prunable and "which no run has used, may meet it" in structure.axis("stem").reason
    with pytest.raises(NothingPrunable, match="the path depends on values"):
        sc.prune(model, x, granularity="channel", budget=sc.Budget(params=0.6))


def test_unused_parameters_alone_freeze_nothing_else():
    class Unused(Branches):
        def forward(self, x):
            return self.head(F.relu(self.hot(F.relu(self.stem(x)))))

    assert {axis.name for axis in sc.trace(Unused(), X).prunable} == {"stem", "hot"}


def test_experts_that_the_example_does_not_reach_keep_working():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.gate, self.head = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 3)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def forward(self, x):
            h = F.relu(self.stem(x))
            best = self.gate(h).argmax(-1)
            out = torch.zeros_like(h)
            for expert in best.unique().tolist():
                rows = (best == expert).nonzero()[:, 0]
                out = out.index_add(0, rows, self.experts[expert](h[rows]))
            return self.head(h + out)

    model, x = Experts().eval(), torch.randn(1, 6)
    structure = sc.trace(model, x)
    stream = next(axis for axis in structure.axes if ("stem.weight", 0) in axis.members)
    reached = {name for name, _ in stream.members}
    assert not stream.prunable or {f"experts.{i}.weight" for i in range(4)} <= reached


def test_tracing_leaves_no_hook_behind():
    sc.trace(TupleInTupleOut(), (X, Y))
    left = {name for name, value in vars(torch.nn.modules.module).items() if name.startswith("_global") and value}
    assert left == set()


def test_redrawn_inputs_are_of_the_same_kind():
    inputs = Inputs((torch.randn(3, 2, dtype=torch.float64), {"ids": torch.arange(12).view(3, 4)}), {"flag": True})
    for seed in range(3):
        other = redrawn(inputs, seed)
        assert other.args[0].shape == (3, 2) and other.args[0].dtype == torch.float64
        assert not torch.equal(other.args[0], inputs.args[0]) and other.kwargs == {"flag": True}
        ids = other.args[1]["ids"]
        assert ids.shape == (3, 4) and torch.equal(ids.flatten().sort().values, torch.arange(12))
        assert torch.equal(redrawn(inputs, seed).args[0], other.args[0])
