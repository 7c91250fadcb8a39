from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import BudgetUnreachable, NothingPrunable
from secateur.structure.prove import half_of_each, proved_structure


class Mixture(nn.Module):
    """Each row goes through the one expert that the router prefers; all experts run in one grouped product."""

    def __init__(self, width, hidden, experts):
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(5, width), nn.Linear(width, experts), nn.Linear(width, 3)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / hidden**0.5)

    def forward(self, x):
        x = self.stem(x)
        weight, chosen = self.router(x).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        ends = torch.histc(chosen.float(), self.router.out_features, 0, self.router.out_features - 1).cumsum(0).int()
        rows = F.grouped_mm(F.grouped_mm(x[order], self.up, offs=ends).relu(), self.down, offs=ends)
        return self.head(x + (weight[order, None] * rows)[order.argsort()])


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    return Mixture(16, 32, 4).eval(), torch.randn(20, 5)


def by_role(structure):
    return {axis.role: axis for axis in structure.axes if axis.role}


def test_grouped_products_run_only_on_multiples_so_their_widths_leave_in_steps(mixture):
    structure = proved_structure(*mixture)
    stream, hidden = by_role(structure)["residual stream"], by_role(structure)["hidden unit"]
    assert (stream.size, hidden.size, stream.prunable, hidden.prunable) == (16, 32, True, True)
    assert structure.steps == {stream.name: 8, hidden.name: 8} and structure.ties == ()
    assert not by_role(structure)["expert"].prunable


@pytest.mark.parametrize(("granularity", "width"), [("hidden", "hidden"), ("residual", "stream")])
def test_a_cut_of_the_experts_is_proved(mixture, granularity, width):
    result = sc.prune(*mixture, granularity=granularity, budget=sc.Budget(params=0.8))
    _, stream, hidden = result.model.up.shape
    assert result.proofs[-1].ok and (stream, hidden) in {"hidden": [(16, 24), (16, 16)], "stream": [(8, 32)]}[width]


def test_a_width_that_is_no_multiple_is_left_alone():
    torch.manual_seed(0)
    structure = sc.trace(Mixture(16, 12, 4).eval(), torch.randn(20, 5))
    assert "must stay a multiple of 8" in by_role(structure)["hidden unit"].reason


def test_a_branch_of_which_only_a_part_is_a_module_stays(mixture):
    with pytest.raises(NothingPrunable, match="dropping it could not be proved"):
        sc.prune(*mixture, granularity="depth", budget=sc.Budget(macs=0.9))


def test_experts_whose_choice_is_not_followed_stay_and_the_reason_is_said(mixture):
    with pytest.raises(NothingPrunable, match="rows are assigned to groups by value"):
        sc.prune(*mixture, granularity="expert", budget=sc.Budget(params=0.9))


class Chosen(nn.Module):
    """Each row goes through the `chosen` experts that the router prefers, with weights that sum up to one."""

    def __init__(self, experts, chosen, bias=False):
        super().__init__()
        self.experts, self.chosen = experts, chosen
        self.stem, self.router, self.head = nn.Linear(5, 16), nn.Linear(16, experts), nn.Linear(16, 3)
        self.up = nn.Parameter(torch.randn(experts, 16, 32) / 4)
        self.down = nn.Parameter(torch.randn(experts, 32, 16) / 32**0.5)
        self.bias = nn.Parameter(torch.randn(experts, 32)) if bias else None

    def choice(self, x):
        weight, named = self.router(x).softmax(-1).topk(self.chosen)
        return weight / weight.sum(-1, keepdim=True), named

    def forward(self, x):
        x = self.stem(x)
        weight, named = self.choice(x)
        named, order = named.flatten().sort()
        ends = torch.histc(named.float(), self.experts, 0, self.experts - 1).cumsum(0, dtype=torch.int32)
        hidden = F.grouped_mm(x[order // self.chosen], self.up, offs=ends)
        hidden = hidden if self.bias is None else hidden + self.bias[named]
        rows = F.grouped_mm(hidden.relu(), self.down, offs=ends) * weight.flatten()[order, None]
        return self.head(x + rows[order.argsort()].view(len(x), self.chosen, 16).sum(1))


def chosen(experts, number, **options):
    torch.manual_seed(0)
    return Chosen(experts, number, **options).eval(), torch.randn(20, 5)


def one_by_one(model, kept, x):
    """What the network computes if the router knows the kept experts alone; no line of it is shared with the model."""
    x = model.stem(x)
    rows = []
    for row in x:
        logits = model.router(row)
        best = sorted(kept, key=lambda expert: -logits[expert])[: model.chosen]
        factors = torch.stack([logits[expert] for expert in best]).softmax(0)
        total = row
        for factor, expert in zip(factors, best, strict=True):
            bias = 0 if model.bias is None else model.bias[expert]
            total = total + factor * (row @ model.up[expert] + bias).relu() @ model.down[expert]
        rows.append(total)
    return model.head(torch.stack(rows))


@pytest.mark.parametrize("bias", [False, True])
def test_whole_experts_are_removed_with_their_rows_of_the_router(bias):
    model, x = chosen(6, 2, bias=bias)
    structure = proved_structure(model, x)
    experts = by_role(structure)["expert"]
    assert {("router.weight", 0), ("router.bias", 0), ("up", 0), ("down", 0)} <= {*experts.members}
    assert (("bias", 0) in experts.members) == bias and structure.least == {experts.name: 2}
    pruned = sc.prune(model, x, granularity="expert", budget=sc.Budget(params=0.7))
    kept = pruned.structure_plan.axes[experts.name].kept
    assert pruned.proofs[-1].ok and 2 <= len(kept) < 6
    assert pruned.model.experts == pruned.model.router.out_features == len(pruned.model.up) == len(kept)
    torch.testing.assert_close(one_by_one(model, range(6), x), model(x))
    torch.testing.assert_close(pruned.model(x), one_by_one(model, kept, x))
    assert not torch.allclose(pruned.model(x), model(x), atol=1e-2)


def test_as_many_experts_stay_as_are_chosen_for_each_row():
    model, x = chosen(6, 3)
    with pytest.raises(BudgetUnreachable):
        sc.prune(model, x, granularity="expert", budget=sc.Budget(params=0.3))
    fewest = by_role(sc.trace(model, x))["expert"].name
    kept = half_of_each(sc.trace(*chosen(4, 3)), [fewest], seed=0)
    assert int(kept[fewest].sum()) == 3
    assert "4 of 4 are chosen" in by_role(sc.trace(*chosen(4, 4)))["expert"].reason


def test_experts_are_units_only_where_they_are_asked_for():
    model, x = chosen(6, 2)
    pruned = sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.6))
    assert (
        len(pruned.model.up) == 6
        and by_role(pruned.structure)["expert"].reason == "not asked for: its role is 'expert'"
    )


class Telling(Chosen):
    """Uses which experts are chosen for something else, too."""

    def __init__(self, use):
        super().__init__(6, 2)
        self.use = use

    def choice(self, x):
        weight, named = super().choice(x)
        return self.use(weight, named)


def shifted_in_place(weight, named):
    named += 0
    return weight, named


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda weight, named: (weight * (named + 1), named), "add uses which"),
        (lambda weight, named: (weight * float(named[0, 0]), named), "uses which"),
        (lambda weight, named: (weight * len(set(named.flatten().tolist())), named), "looks at which unit"),
        (shifted_in_place, "add uses which"),
    ],
)
def test_experts_whose_numbers_are_used_otherwise_stay(use, reason):
    torch.manual_seed(0)
    assert reason in by_role(sc.trace(Telling(use).eval(), torch.randn(20, 5)))["expert"].reason


def test_experts_whose_numbers_are_an_output_stay():
    class Output(Chosen):
        def forward(self, x):
            return super().forward(x), self.choice(self.stem(x))[1]

    torch.manual_seed(0)
    reason = by_role(sc.trace(Output(6, 2).eval(), torch.randn(20, 5)))["expert"].reason
    assert "the output says which unit it is" in reason


class Skipping(nn.Module):
    """Passes over the experts that no row has chosen: how many rows have is a shape."""

    def __init__(self, experts=4) -> None:
        super().__init__()
        self.embed, self.route, self.head = nn.Linear(5, 8), nn.Linear(8, experts), nn.Linear(8, 3)
        self.up = nn.ModuleList(nn.Linear(8, 8 + i) for i in range(experts))
        self.down = nn.ModuleList(nn.Linear(8 + i, 8) for i in range(experts))

    def forward(self, x):
        y = self.embed(x)
        chosen, out = self.route(y).argmax(-1), torch.zeros_like(y)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            rows = y[chosen == i]
            if rows.shape[0]:
                out[chosen == i] = down(up(rows).relu())
        return self.head(y + out)


@pytest.mark.parametrize("seed", range(3))
def test_experts_that_are_passed_over_follow_a_cut(seed):
    torch.manual_seed(seed)
    model = Skipping().eval()
    pruned = sc.prune(model, torch.randn(2, 5), granularity="channel", budget=sc.Budget(params=0.7), method="random")
    assert pruned.model.embed.out_features < 8
    for i in range(10):
        assert pruned.model(4 * torch.randn(6, 5, generator=torch.Generator().manual_seed(i))).shape == (6, 3)
