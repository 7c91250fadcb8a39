"""Networks on the meta device: analysis without memory, proof on a small twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.errors import InvalidInputs
from secateur.measure.profile import count_macs
from secateur.structure.inputs import as_inputs, modules_of, state_of
from secateur.structure.weightless import KnownValues, computation, shaped


class Block(nn.Module):
    """Attention with grouped queries, and a gated MLP."""

    def __init__(self, width: int, heads: int, groups: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.q, self.k, self.v = (nn.Linear(width, n * head_dim, bias=False) for n in (heads, groups, groups))
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.up, self.gate, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.norm1(x)
        q = self.q(y).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = (layer(y).view(b, n, self.groups, -1).transpose(1, 2) for layer in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.125, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A decoder that looks at its positions, as those of Hugging Face do."""

    def __init__(self, layers: int, width: int, heads: int, groups: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(width, heads, groups, head_dim, hidden) for _ in range(layers))
        self.head = nn.Linear(width, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        mask = positions[:, None] >= positions[None, :]
        if mask.all() or int(tokens.max()) >= 50:
            raise ValueError("not a sequence of tokens")
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


SIZES = {"width": 24, "heads": 6, "groups": 3, "head_dim": 4, "hidden": 40}


def meta(build):
    with torch.device("meta"):
        return build()


def test_a_trace_without_memory_says_what_one_with_memory_says():
    x = torch.randint(0, 50, (2, 7))
    model = Decoder(2, **SIZES)
    plain, empty = sc.trace(model, x), sc.trace(meta(lambda: Decoder(2, **SIZES)), x)
    assert [(a.name, a.size, a.prunable, a.role, a.members) for a in empty.axes] == [
        (a.name, a.size, a.prunable, a.role, a.members) for a in plain.axes
    ]
    assert len(empty.prunable) > 3
    assert empty.macs({}) == plain.macs({}) == count_macs(model, x).total
    assert empty.params({}) == sum(p.numel() for p in model.parameters())


def test_no_memory_is_taken_for_a_network_that_would_need_terabytes():
    model = meta(lambda: nn.Sequential(nn.Linear(2**20, 2**20), nn.ReLU(), nn.Linear(2**20, 2**20)))
    structure = sc.trace(model, torch.empty(1, 2**20, device="meta"))
    assert [(axis.name, axis.size) for axis in structure.prunable] == [("0", 2**20)]
    assert structure.params({"0": 1}) == 2**20 + 1 + 2**20 + 2**20
    assert sc.profile(model, torch.empty(1, 2**20, device="meta")).macs == 2**41


def test_values_that_depend_on_weights_give_one_clear_error():
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if self.b(x).sum() > 0 else self.b(x)

    with pytest.raises(InvalidInputs, match="meta device have no values"):
        sc.trace(meta(Choosy), torch.zeros(1, 4))
    assert count_macs(Choosy(), torch.zeros(1, 4)).total == 32  # with memory, since it cannot do without


def test_inputs_without_values_give_the_same_error():
    with pytest.raises(InvalidInputs, match="pass inputs with values"):
        sc.trace(meta(lambda: Decoder(1, **SIZES)), torch.zeros(1, 4, dtype=torch.long, device="meta"))


def test_values_are_forgotten_when_an_unknown_one_is_written_into_them():
    weight = torch.empty(3, device="meta")
    with KnownValues():
        table = torch.arange(6, device="meta").float()
        assert float(table.sum()) == 15 and table.is_meta
        assert table.nonzero().shape == (5, 1)
        assert table.cpu().tolist() == [0, 1, 2, 3, 4, 5]
        table[:3] = 7.0
        assert float(table.sum()) == 33
        table[3:].copy_(weight)
        with pytest.raises(RuntimeError, match="meta"):
            float(table[0])


def test_a_model_without_values_cannot_verify_itself():
    model = meta(lambda: Decoder(2, **SIZES))
    structure = sc.trace(model, torch.randint(0, 50, (2, 7)))
    with pytest.raises(InvalidInputs, match="verify_by_twin"):
        structure.verify(model)


LARGE = {"width": 8192, "heads": 64, "groups": 8, "head_dim": 128, "hidden": 28672}


def test_a_large_network_is_verified_by_its_twin():
    structure = sc.trace(meta(lambda: Decoder(5, **LARGE)), torch.randint(0, 50, (1, 9)))
    found = sc.verify_by_twin(structure, Decoder(2, **SIZES), torch.randint(0, 50, (2, 7)))
    assert found.ok and 0 <= found.max_error < 1e-4


def test_a_twin_with_another_structure_proves_nothing():
    structure = sc.trace(meta(lambda: Decoder(5, **LARGE)), torch.randint(0, 50, (1, 9)))
    other = Decoder(2, **{**SIZES, "groups": 6})  # no grouped queries
    found = sc.verify_by_twin(structure, other, torch.randint(0, 50, (2, 7)))
    assert not found.ok and "the two structures differ: only the large network has" in found.reason
    tied = Decoder(2, **SIZES)
    tied.layers[1].up = tied.layers[0].up
    found = sc.verify_by_twin(structure, tied, torch.randint(0, 50, (2, 7)))
    assert not found.ok and "differ" in found.reason


def test_a_twin_whose_structure_fails_its_proof_says_so(monkeypatch):
    from secateur.structure import rules

    structure = sc.trace(meta(lambda: Decoder(3, **LARGE)), torch.randint(0, 50, (1, 9)))
    known = rules.all_rules()
    broken = dict(known)
    broken["mul"] = lambda call: call.tracer.set(call.out, [*call.tracer.dims(call.tensors[0])])  # forgets to unify
    monkeypatch.setattr(rules, "all_rules", lambda: broken)
    wrong = sc.trace(meta(lambda: Decoder(3, **LARGE)), torch.randint(0, 50, (1, 9)))
    twin, x = Decoder(2, **SIZES), torch.randint(0, 50, (2, 7))
    found = sc.verify_by_twin(wrong, twin, x)
    assert not found.ok and found.max_error > 1e-4
    monkeypatch.undo()
    assert not sc.verify_by_twin(wrong, twin, x).ok and sc.verify_by_twin(structure, twin, x).ok


@pytest.mark.parametrize("number", [1, 1.0, True])
def test_remembered_shapes_are_those_of_the_operation(number):
    x = torch.empty(4, 3, dtype=torch.int32, device="meta")
    for _ in range(2):
        found, expected = shaped(torch.ops.aten.mul.Tensor, (x, number), {}), x * number
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
    view = shaped(torch.ops.aten.t.default, (x,), {})
    assert view._base is x and view.stride() == (1, 3)


class Scaled(nn.Module):
    """Keeps one number that it computes with, and one that it does not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.width, self.note = nn.Linear(width, width), width, width

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.tensor(self.width) ** -0.5


@pytest.mark.parametrize(("name", "same"), [("note", True), ("width", False)])
def test_a_computation_is_the_same_if_operations_and_constants_are(name, same):
    model, x = Scaled(6).eval(), as_inputs(torch.randn(2, 6))
    before = computation(model, x)
    setattr(model, name, 5)
    assert computation(model, x).same(before) is same


def test_modules_and_state_have_the_names_and_the_order_of_pytorch():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict(
        {"a": nn.Sequential(shared, nn.BatchNorm1d(3)), "b": shared, "c": nn.Sequential(nn.Linear(3, 3))}
    )
    model["c"][0].weight = shared.weight
    assert modules_of(model) == list(model.named_modules())
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert list(state_of(model)) == names
