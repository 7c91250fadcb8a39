from __future__ import annotations

from math import ceil

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.masks import Masks
from secateur.core.recipe import Recipe
from secateur.core.slots import Scope
from secateur.errors import BudgetUnreachable
from secateur.job import make_job
from secateur.parts.granularity import channel
from secateur.parts.granularity.channel import Channel
from secateur.parts.granularity.weight import Weight
from secateur.structure import prove, rules
from secateur.structure.dims import leaf
from secateur.structure.masked import run_masked
from secateur.structure.plan import Plan
from secateur.testing.toys import toy


def test_sums_over_channels_equal_a_direct_computation():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)
    ).eval()
    units = Channel().units(model, torch.randn(1, 2, 6, 6), Scope())
    values = {name: p.detach().abs() for name, p in units.parameters().items()}
    total = units.sum(values)["0"]
    consumed = units.sum(values, consumed=True)["0"]
    for j in range(3):
        columns = values["5.weight"][:, 4 * j : 4 * j + 4].sum()
        produced = values["0.weight"][j].sum() + values["0.bias"][j] + values["1.weight"][j] + values["1.bias"][j]
        assert torch.isclose(consumed[j], columns) and torch.isclose(total[j], columns + produced)


def test_heads_and_head_dims_sum_over_their_factor():
    model, x = toy("vit")
    units = Channel().units(model, x, Scope())
    ones = {name: torch.ones_like(p) for name, p in units.parameters().items()}
    total = units.sum(ones)
    width, heads, head_dim = 24, 3, 8
    per_head = 3 * head_dim * (width + 1) + width * head_dim  # rows of qkv with bias, columns of proj
    assert total["blocks.0.attention.qkv[heads]"].tolist() == [per_head] * heads
    per_dim = 3 * heads * (width + 1) + width * heads
    assert total["blocks.0.attention.qkv[head_dim]"].tolist() == [per_dim] * head_dim


LATE = {"name": "one-shot", "at": 0.5}


def every_second(units):
    return {name: torch.arange(mask.numel()) % 2 == 0 for name, mask in units.whole().items()}


def test_the_first_cut_proves_the_analysis_too_with_one_run_of_the_masked_network(monkeypatch):
    runs = []
    monkeypatch.setattr(prove, "run_masked", lambda *args: runs.append(args) or run_masked(*args))
    model, x = toy("mlp")
    units = Channel().units(model, x, Scope())
    sizes = [axis.size for axis in units.structure.prunable]
    assert sizes and not runs  # nothing is proved before there is something to cut
    for count in (1, 2):
        assert units.keep(every_second(units)) and len(runs) == count and units.proofs[-1].ok
    assert [axis.size for axis in units.structure.prunable] == [size // 4 for size in sizes]


def test_axes_that_the_first_cut_shows_to_be_wrong_are_frozen_and_the_rest_is_cut(monkeypatch):
    def forget_to_unify(call):
        call.tracer.set(call.out, [leaf(size) for size in call.out.shape])

    monkeypatch.setitem(rules.all_rules(), "gelu", forget_to_unify)
    model, x = toy("vit")
    units = Channel().units(model, x, Scope())
    before = set(units.shapes)
    assert not units.keep(every_second(units)) and units.proofs == []
    wrong = before - set(units.shapes)
    assert wrong and all("mlp" in name for name in wrong) and set(units.shapes) == {n for n in before if "mlp" not in n}
    assert {units.structure.reasons[name] for name in wrong} == {"permuting it changed the output"}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in toy("vit")[0].parameters())
    assert units.keep(every_second(units)) and units.proofs[0].ok
    with pytest.raises(BudgetUnreachable, match=r"cannot be met: .* Ask for Budget\(macs=0\.\d+\)"):
        sc.prune(
            model, x, granularity={"name": "channel", "roles": ["hidden unit", "head dim"]}, budget=sc.Budget(macs=0.5)
        )


class Concatenated(nn.Module):
    """Two layers side by side; a running sum over the units of a third, which no half of them computes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.d(self.c(torch.cat([self.a(x), self.b(x)], 1).relu()).cumsum(1))


def sums_units_whatever_their_order(call):
    call.tracer.consume("self", call["self"], [1])
    call.tracer.follow(call.out, call["self"], call.tracer.dims(call["self"]))


def test_axes_that_stay_whole_are_reordered_beside_those_that_are_cut(monkeypatch):
    proofs = []
    monkeypatch.setattr(channel, "proved", lambda *args: proofs.append(args) or prove.proved(*args))
    units = Channel().units(Concatenated().eval(), torch.randn(3, 5), Scope())
    assert set(units.shapes) == {"a", "b"}
    assert units.keep({**units.whole(), "a": torch.arange(8) % 2 == 0}) and not proofs


def test_a_wrong_axis_is_found_by_a_first_cut_that_leaves_it_whole(monkeypatch):
    monkeypatch.setitem(rules.all_rules(), "cumsum", sums_units_whatever_their_order)
    units = Channel().units(Concatenated().eval(), torch.randn(3, 5), Scope())
    assert set(units.shapes) == {"a", "b", "c"}
    assert units.keep({**units.whole(), "a": torch.arange(8) % 2 == 0})  # it loses nothing by this cut
    assert set(units.shapes) == {"a", "b"} and [len(axis.kept) for axis in units.plan.axes.values()] == [4]


def test_a_budget_that_only_a_wrong_axis_could_meet_names_the_nearest_one(monkeypatch):
    monkeypatch.setitem(rules.all_rules(), "cumsum", sums_units_whatever_their_order)
    nearest = (5 + 5 + 2 * 8 + 8 * 3) / (5 * 8 + 5 * 8 + 16 * 8 + 8 * 3)  # one unit of a and b, all of c
    with pytest.raises(BudgetUnreachable, match=rf"Ask for Budget\(macs={ceil(1e4 * nearest) / 1e4:.4f}\)"):
        sc.prune(Concatenated().eval(), torch.randn(3, 5), granularity="channel", budget=sc.Budget(macs=0.1))


@pytest.mark.parametrize(
    ("slots", "before"), [({}, False), ({"criterion": "taylor"}, True), ({"schedule": LATE}, True)]
)
def test_the_analysis_is_proved_before_any_pass_over_data_and_any_training(monkeypatch, slots, before):
    monkeypatch.setitem(rules.all_rules(), "cumsum", sums_units_whatever_their_order)
    data = [(torch.randn(4, 5), torch.randint(3, (4,)))] * 2
    model, budget = Concatenated().eval(), sc.Budget(macs=0.7)
    job = make_job(model, data[0][0], None, budget, "magnitude", {"granularity": "channel", **slots}, 0)
    assert ("c" not in job.start(model, data, None, None).units.shapes) is before


def test_a_pruner_goes_on_where_one_was_whose_first_cut_froze_an_axis(monkeypatch):
    monkeypatch.setitem(rules.all_rules(), "cumsum", sums_units_whatever_their_order)

    def made():
        model = Concatenated().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        budget = sc.Budget(macs=0.7)
        return sc.Pruner(
            model, torch.randn(3, 5), optimizers=optimizer, total_steps=2, budget=budget, granularity="channel"
        )

    first, second = made(), made()
    first.step()
    assert set(first._run.units.shapes) == {"a", "b"}
    second.load_state_dict(first.state_dict())
    assert second._run.units.plan == first._run.units.plan != Plan()
    assert second._run.units.shapes == first._run.units.shapes


class Halved(nn.Module):
    """Takes half of what it computes where that is much."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.first(x).relu()
        return self.second(y / 2 if bool(y.sum() > 1) else y)


@pytest.mark.parametrize(
    ("model", "times"), [(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)), 0), (Halved(), 1)]
)
def test_only_where_the_path_depends_on_values_is_the_analysis_proved_before_the_first_cut(monkeypatch, model, times):
    found = []
    monkeypatch.setattr(channel, "proved", lambda *args: found.append(args) or prove.proved(*args))
    units = Channel().units(model.eval(), torch.randn(3, 5), Scope())
    assert units.keep(every_second(units)) and len(found) == times and units.proofs[0].ok


def test_an_axis_that_no_parameter_consumes_is_taken_at_its_producers():
    class QueryKey(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            return self.q(x) @ self.k(x).transpose(1, 2)

    units = Channel().units(QueryKey().eval(), torch.randn(1, 5, 3), Scope())
    ones = {name: torch.ones_like(p) for name, p in units.parameters().items()}
    assert units.sum(ones, consumed=True)["q"].tolist() == [8.0] * 4


def test_weight_units_are_kernels_by_default():
    model, x = toy("vit")
    assert set(Weight().units(model, x, Scope()).shapes) == {n for n, p in model.named_parameters() if p.dim() > 1}


def test_keep_zeroes_weights_and_reset_keeps_the_mask():
    model, x = toy("mlp")
    units = Weight().units(model, x, Scope(include=("1.weight",)))
    mask = torch.rand(32, 48) < 0.3
    units.keep({"1.weight": mask})
    assert not model[1].weight[~mask].any() and units.counts() == {"1.weight": int(mask.sum())}
    units.reset({n: torch.ones_like(t) for n, t in model.state_dict().items()})
    assert torch.equal(model[1].weight.detach(), mask.float()) and torch.equal(units.removed()["1.weight"], ~mask)


def test_a_cut_that_leaves_no_weight_at_all_is_refused_and_one_that_empties_a_tensor_is_not():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 10)), torch.randn(1, 4)
    for allocation in ("uniform", "global"):
        with pytest.raises(BudgetUnreachable, match=r"costs 1 of the 420 before\. Ask for Budget\(sparsity=0\.997"):
            sc.prune(model, x, method="magnitude", allocation=allocation, budget=sc.Budget(sparsity=0.9999))
    masks = sc.prune(model, x, method="magnitude", allocation="global", budget=sc.Budget(sparsity=0.997619)).masks
    assert sorted(int(mask.sum()) for mask in masks.values()) == [0, 1]


def test_round_to_and_minimum_reach_the_selection():
    model, x = toy("resnet20")
    result = sc.prune(
        model, x, granularity={"name": "channel", "round_to": 4, "minimum": 4}, budget=sc.Budget(macs=0.6)
    )
    sizes = [len(axis.kept) for axis in result.structure_plan.axes.values()]
    assert sizes and all(n % 4 == 0 for n in sizes)


def test_spreading_is_the_adjoint_of_summing():
    for network, granularity in (("vit", "channel"), ("resnet20", "channel"), ("resnet20", "depth"), ("mlp", "weight")):
        model, x = toy(network)
        units = Recipe(criterion="random", granularity=granularity).granularity.units(
            model.double(), x.double(), Scope()
        )
        entries = {name: torch.randn_like(p) for name, p in units.parameters().items()}
        values = {group: torch.randn(shape, dtype=torch.float64) for group, shape in units.shapes.items()}
        there = sum((units.sum(entries)[g] * v).sum() for g, v in values.items())
        back = sum((units.spread(values)[n] * e).sum() for n, e in entries.items())
        torch.testing.assert_close(there, back)


def test_exchanged_masks_reach_the_optimizer_that_holds_them():
    model, x = toy("mlp")
    units = Weight().units(model, x, Scope(include=("1.weight",)))
    first = torch.rand(32, 48) < 0.3
    units.keep({"1.weight": first})
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    Masks(model, units.masks).attach(sgd)
    second = torch.rand(32, 48) < 0.3
    units.exchange({"1.weight": second})
    assert not model[1].weight[~(first & second)].any()
    model(x).square().sum().backward()
    sgd.step()
    assert not model[1].weight[~second].any() and model[1].weight[second & ~first].any()
