from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InvalidFile, NothingPrunable, PlanMismatch
from secateur.structure.carry import Companions, cut_in_place
from secateur.structure.dropped import Dropped
from secateur.structure.inputs import relative_error
from secateur.structure.plan import parse_plan
from secateur.structure.prove import prove_cut, proved_depth, proved_structure
from secateur.structure.surgery import cut_copy, make_plan
from secateur.testing.toys import toy

GONE = torch.zeros(1, dtype=torch.bool)


class Adds(nn.Module):
    """Branches that are added in four ways, one of which is not linear at the end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        x = self.stem(x)
        y = self.a(x)
        y += x  # in place, into the branch
        y += self.scale * self.b(y.relu())  # in place, into the stream
        y = y + self.c(y).sigmoid()
        return y + self.d(x)  # computed from an earlier value of the stream


def branch_names(model, x):
    return [branch.name for branch in sc.trace(model.eval(), x).branches if branch.prunable]


def zeroed(model, *names):
    """Return a copy whose branches end in zero: the layers named have no weights and biases."""
    twin = copy.deepcopy(model)
    for name in names:
        for parameter in twin.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
    return twin


def test_branches_of_the_toys():
    model, x = toy("vit")
    assert branch_names(model, x) == [
        f"blocks.{i}.{{norm{j},{f}}}" for i in (0, 1) for j, f in ((1, "attention"), (2, "mlp"))
    ]
    model, x = toy("resnet20")
    assert branch_names(model, x) == [f"blocks.{i}.{{conv1,bn1,conv2,bn2}}" for i in (0, 1, 2, 4, 5, 7, 8)]
    for name in ("densenet", "mlp", "squeeze_excite"):
        assert branch_names(*toy(name)) == []


@pytest.mark.parametrize(
    ("network", "last"), [("vit", "attention.proj"), ("resnet20", "bn2"), ("mobilenet", "project.1")]
)
def test_dropping_equals_a_branch_that_computes_zero(network, last):
    model, x = toy(network)
    branch = sc.trace(model, x).branches[0]
    block = "3" if network == "mobilenet" else "blocks.0"
    assert branch.gate[0] == f"{block}.{last}.weight"
    structure = sc.trace(model, x)
    assert prove_cut(model, structure, {branch.name: GONE}).ok
    small = cut_copy(model, make_plan(structure, {branch.name: GONE}))
    assert relative_error(small(x), zeroed(model, f"{block}.{last}")(x)) < 1e-6
    gone = {name for name in model.state_dict() if name not in small.state_dict()}
    assert gone == {name for name in branch.tensors if name in model.state_dict()} and gone
    assert sc.profile(model, x).macs - sc.profile(small, x).macs == branch.macs > 0


def test_additions_in_place_and_from_earlier_values():
    model, x = Adds().eval(), torch.randn(3, 4)
    structure = proved_depth(model, x)
    assert {branch.name: branch.prunable for branch in structure.branches} == {
        "a": True,
        "b": True,
        "c": False,
        "d": True,
    }
    assert "could not be proved" in structure.reasons["c"]  # the sigmoid of zero is not zero
    for name in ("a", "b", "d"):
        small = cut_copy(model, make_plan(structure, {name: GONE}))
        assert relative_error(small(x), zeroed(model, name)(x)) < 1e-6


def test_a_branch_beside_a_projection_is_one_that_stays():
    model, x = toy("resnet20")
    structure = sc.trace(model, x)
    assert [branch.name for branch in structure.branches] == [f"blocks.{i}.{{conv1,bn1,conv2,bn2}}" for i in range(9)]
    stay = [branch for branch in structure.branches if not branch.prunable]
    assert [branch.gate[0] for branch in stay] == ["blocks.3.bn2.weight", "blocks.6.bn2.weight"]
    assert all("projection" in structure.reasons[branch.name] and branch.macs > 0 for branch in stay)


def test_a_projected_sum_within_a_branch_or_around_one_is_no_branch_of_its_own():
    class LowRank(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.base, self.a, self.b, self.inner = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 6), inner

        def forward(self, x):
            return self.base(x) + self.b(self.inner(self.a(x)))

    class Residual(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.Sequential(*layers)

        def forward(self, x):
            return x + self.layers(x)

    within = nn.Sequential(Residual(LowRank(nn.ReLU()), nn.ReLU(), LowRank(nn.ReLU())), nn.Linear(6, 3)).eval()
    assert [b.name for b in sc.trace(within, torch.randn(2, 6)).branches] == ["0.layers"]
    around = nn.Sequential(LowRank(Residual(nn.Linear(2, 2))), nn.Linear(6, 3)).eval()
    assert [b.name for b in sc.trace(around, torch.randn(2, 6)).branches] == ["0.inner.layers"]
    alone = nn.Sequential(LowRank(nn.ReLU()), nn.Linear(6, 3)).eval()
    with pytest.raises(NothingPrunable, match="a branch whose shortcut is a projection stays"):
        sc.prune(alone, torch.randn(2, 6), method="random", granularity="depth", budget=sc.Budget(macs=0.5))


def test_a_wrong_drop_is_noticed():
    model, x = Adds().eval(), torch.randn(3, 4)
    structure = sc.trace(model, x)
    assert not prove_cut(model, structure, {"c": GONE}).ok


def test_modules_that_serve_elsewhere_stay():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            y = self.norm(x)
            return x + self.a(y) + self.b(y)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)
            self.h = nn.Linear(6, 6)
            self.h.weight = self.g.weight

        def forward(self, x):
            x = x + self.f(x)
            x = x + self.f(x)
            x = x + self.g(x)
            return x + self.h(x)

    ends = nn.Linear(4, 6), nn.Linear(6, 2)
    assert branch_names(nn.Sequential(ends[0], Parallel(), ends[1]), torch.randn(2, 4)) == ["1.a", "1.b"]
    assert branch_names(nn.Sequential(ends[0], Twice(), ends[1]), torch.randn(2, 4)) == []


def test_branches_within_branches():
    class Residual(nn.Module):
        def __init__(self, *inner):
            super().__init__()
            self.inner = nn.Sequential(*inner)

        def forward(self, x):
            return x + self.inner(x)

    def net(*blocks):
        return nn.Sequential(nn.Linear(4, 6), *blocks, nn.Linear(6, 2))

    def linear():
        return nn.Linear(6, 6)

    x = torch.randn(2, 4)
    assert branch_names(net(Residual(Residual(linear()), linear())), x) == ["1.inner"]
    stack = net(Residual(Residual(linear()), Residual(linear())))
    assert branch_names(stack, x) == ["1.inner.0.inner", "1.inner.1.inner"]


def test_a_module_that_returns_a_tuple():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(6, 6)

        def forward(self, scale, *, x):
            return self.f(x), None

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return x + self.pair(2.0, x=x)[0]

    model, x = nn.Sequential(nn.Linear(4, 6), Block(), nn.Linear(6, 2)).eval(), torch.randn(2, 4)
    structure = proved_depth(model, x)
    small = cut_copy(model, make_plan(structure, {"1.pair": GONE}))
    assert small[1].pair.entries == 2 and relative_error(small(x), model[2](model[0](x))) < 1e-6


def test_dropped_returns_zeros_in_the_form_that_was_there():
    x = torch.randn(2, 3)
    assert torch.equal(Dropped(None)(1, y=x), torch.zeros(2, 3))
    first, *rest = Dropped(3)(x, x)
    assert torch.equal(first, torch.zeros(2, 3)) and rest == [None, None]
    assert not list(Dropped(None).parameters())


def test_a_plan_with_drops_survives_json_and_refuses_other_models():
    model, x = toy("vit")
    structure = sc.trace(model, x)
    plan = make_plan(structure, {structure.branches[1].name: GONE})
    assert parse_plan(plan.model_dump(mode="json")) == plan
    assert [drop.module for drop in plan.dropped] == ["blocks.0.norm2", "blocks.0.mlp"]
    other = nn.Linear(2, 2)
    with pytest.raises(PlanMismatch, match=r"drops the module 'blocks.0.norm2', and there is none"):
        cut_copy(other, plan)
    with pytest.raises(InvalidFile):
        parse_plan({"dropped": [{"module": "a"}]})


def test_optimizers_forget_dropped_parameters_and_keep_the_rest():
    model, x = toy("vit")
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    structure = sc.trace(model, x)
    kept = {p for n, p in model.named_parameters() if not n.startswith(("blocks.0.norm1.", "blocks.0.attention."))}
    before = {p: state["exp_avg"].clone() for p, state in optimizer.state.items()}
    cut_in_place(model, make_plan(structure, {structure.branches[0].name: GONE}), Companions((optimizer,)))
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters()) == kept == set(optimizer.state)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], before[p]) for p in kept)


class Cached(nn.Module):
    """Two branches that fill a cache, whose first entry says how long it is; one returns no tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.keys = nn.Linear(4, 6), nn.ModuleList(Remember() for _ in range(3))

    def forward(self, x):
        x, cache = self.stem(x), {"past": []}
        for i, layer in enumerate(self.keys):
            x = x + (layer(x, cache)[0] if i < 2 else layer(x, cache, form=dict)["y"])
        return x


class Remember(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x, cache, form=tuple):
        cache["past"].append(self.f(x))
        return (cache["past"][-1], cache) if form is tuple else {"y": cache["past"][-1]}


def test_the_first_to_fill_a_cache_and_modules_of_another_form_stay():
    structure = proved_depth(Cached().eval(), torch.randn(2, 4))
    reasons = {branch.name: branch.reason for branch in structure.branches}
    assert reasons == {
        "keys.0": "keys.0 is the first to fill a dict, which is asked for its length there",
        "keys.1": "",
        "keys.2": "keys.2 returns neither a tensor nor a tuple that begins with one",
    }


def test_a_branch_and_an_axis_of_one_module_have_names_of_their_own():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Linear(6, 16), nn.MultiheadAttention(16, 4, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            x = self.embed(x)
            return self.head(x + self.attention(x, x, x)[0])

    structure = proved_structure(Block().eval(), torch.randn(2, 5, 6))
    assert [branch.name for branch in structure.branches] == ["attention (branch)"]
    assert structure.axis("attention").prunable and structure.branches[0].prunable


SHARED = nn.ReLU()


def test_a_module_that_is_no_part_of_the_model_is_part_of_a_branch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.branch = nn.Linear(4, 6), nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)})

        def forward(self, x):
            x = self.first(x)
            return x + self.branch["down"](SHARED(self.branch["up"](x)))

    branches = proved_depth(Net().eval(), torch.randn(2, 4)).branches
    assert [branch.name for branch in branches] == ["branch.{up,down}"] and branches[0].prunable
