"""Pruning what was pruned, and runs that must not pass for a success."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import BudgetUnreachable, NothingPrunable
from secateur.measure.profile import profile
from secateur.parts.recovery.fine_tune import FineTune
from secateur.structure.verify import Verification
from secateur.testing.oracle import oracle_error
from secateur.testing.toys import NETWORKS, toy, toy_batches
from secateur.training.loop import make_optimizer

HALF = sc.Budget(macs=0.5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("from_file", [False, True])
def test_a_pruned_network_is_pruned_again_saved_and_loaded(name, from_file, tmp_path):
    model, x = toy(name)
    first = sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.6))
    sc.save(first, tmp_path / "first.safetensors")

    def build_first():
        return sc.load(tmp_path / "first.safetensors", build=NETWORKS[name][0])

    start = build_first() if from_file else first.model
    second = sc.prune(start, x, granularity="channel", budget=HALF)
    assert second.before == first.after and second.after.macs <= 0.5 * first.after.macs
    if name not in ("vit", "grouped"):  # normalization over cut axes: the engine's own proof knows those
        assert oracle_error(start, second.model, second.structure_plan, x) < 1e-10
    sc.save(second, tmp_path / "second.safetensors")
    loaded = sc.load(tmp_path / "second.safetensors", build=build_first)
    assert torch.equal(loaded(x), second.model(x))
    with pytest.raises(sc.SecateurError, match="Pass the constructor of the network that was pruned"):
        sc.load(tmp_path / "second.safetensors", build=NETWORKS[name][0])


def test_two_granularities_compose():
    model, x = toy("resnet20")
    small = sc.prune(model, x, granularity="channel", budget=HALF)
    sparse = sc.prune(small.model, x, budget=sc.Budget(sparsity=0.5))
    sparser = sc.prune(sparse.model, x, budget=sc.Budget(sparsity=0.8))
    for name, mask in sparser.masks.items():
        assert not (mask & ~sparse.masks[name]).any()  # what was gone stays gone
    kept = sum(int(mask.sum()) for mask in sparser.masks.values())
    assert kept == round(0.2 * sum(mask.numel() for mask in sparser.masks.values()))
    narrow = sc.prune(sparser.model, x, granularity="channel", budget=HALF)  # surgery on a masked network
    assert narrow.after.nonzero_params < sparser.after.nonzero_params and narrow.proofs[0].ok


def test_the_recovery_between_cuts_keeps_its_momentum():
    """The engine's own recovery and a user's loop around a Pruner give the same network, to the bit."""
    settings = FineTune(epochs=2, lr=0.05, lr_schedule="constant")
    options = {"granularity": "channel", "budget": HALF, "schedule": {"name": "iterative", "steps": 2}}
    batches = [(a.double(), b) for a, b in toy_batches("mlp")]
    model, x = toy("mlp")
    model, x = model.double(), x.double()
    found = sc.prune(model, x, data=batches, recovery=settings, **options)

    twin = copy.deepcopy(model).train()
    optimizer = make_optimizer(twin, settings)
    pruner = sc.Pruner(twin, x, optimizers=optimizer, total_steps=10, **options)
    pruner.step()  # before any training, as `prune` does
    for inputs, target in 2 * batches:
        optimizer.zero_grad()
        F.cross_entropy(twin(inputs), target).backward()
        optimizer.step()
        pruner.step()
    assert len(pruner.rounds) == len(found.rounds) == 2 and found.structure_plan == pruner.result().structure_plan
    assert all(torch.equal(p, q) for p, q in zip(found.model.parameters(), twin.parameters(), strict=True))


# ------------------------------------------------------------------------------------------ no success without pruning


@pytest.mark.parametrize("budget", [sc.Budget(sparsity=0.5), sc.Budget(sparsity=0.4)])
def test_zeros_that_were_there_before_are_no_success(budget):
    model, x = toy("mlp")
    sparse = sc.prune(model, x, budget=sc.Budget(sparsity=0.5)).model
    with pytest.raises(BudgetUnreachable, match="already meets the budget"):
        sc.prune(sparse, x, budget=budget)
    for kind in ("macs", "params"):
        with pytest.raises(BudgetUnreachable, match="already meets the budget"):
            sc.prune(sparse, x, budget=sc.Budget(**{kind: 0.6}))
    with pytest.raises(BudgetUnreachable, match="already meets the budget"):
        sc.Pruner(sparse, x, optimizers=torch.optim.SGD(sparse.parameters()), total_steps=1, budget=budget)
    rewound = sc.prune(sparse, x, budget=budget, weights_from="init", checkpoints={"init": model.state_dict()})
    assert rewound.after.nonzero_params < rewound.before.params  # these zeros are not the ones that stay


@pytest.mark.parametrize(
    ("granularity", "budget"),
    [
        ("weight", sc.Budget(sparsity=1e-6)),
        ("channel", sc.Budget(sparsity=1e-6)),
        ("channel", sc.Budget(bytes=10**9)),
        ("channel", sc.Budget(latency_ms=1e6)),
    ],
)
def test_a_budget_that_allows_everything_is_no_success(granularity, budget):
    model, x = toy("mlp")
    with pytest.raises(BudgetUnreachable, match="already meets the budget"):
        sc.prune(model, x, granularity=granularity, budget=budget)


def test_cuts_that_cannot_be_proved_end_in_an_error(monkeypatch):
    """Trial cuts pass, the real ones fail: no network is returned, whatever is left to choose from."""
    model, x = toy("mlp")
    monkeypatch.setattr("secateur.parts.granularity.channel.proved_with_the_analysis", lambda *_: None)
    monkeypatch.setattr(
        "secateur.parts.granularity.cut.proved_keep",
        lambda model, structure, kept: (
            Verification(1.0, ok=False),
            structure.frozen({next(name for name, mask in kept.items() if not mask.all()): "a test"}),
        ),
    )
    with pytest.raises((BudgetUnreachable, NothingPrunable), match="cannot be met|could be proved"):
        sc.prune(model, x, granularity="channel", budget=HALF)


def test_a_network_that_costs_more_than_predicted_is_no_success(monkeypatch):
    def hopeful(kind):
        return lambda units: lambda counts: units.structure.macs(counts) ** 2  # half of this is 71 % of the MACs

    model, x = toy("mlp")
    monkeypatch.setattr("secateur.job.cost_of", hopeful)
    with pytest.raises(BudgetUnreachable, match="macs, and 2,544 are allowed"):
        sc.prune(model, x, granularity="channel", budget=HALF)


class Routed(nn.Module):
    """Runs one of two layers of unlike cost, as the values decide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.small, self.large, self.head = (nn.Linear(n, m) for n, m in ((5, 9), (9, 4), (9, 40), (1, 3)))
        with torch.no_grad():
            self.embed.weight.copy_(torch.eye(9, 5))

    def forward(self, x):
        y = self.embed(x)
        y = self.large(y) if bool(y.sum() < self.embed.bias.sum()) else self.small(y)
        return self.head(y.mean(-1, keepdim=True))


def test_where_the_cost_depends_on_values_the_error_says_how_to_allow_for_that(monkeypatch):
    model, x = Routed().eval(), torch.ones(2, 5)
    dense = profile(model, x).macs
    # The pruned network takes the other way.
    monkeypatch.setattr("secateur.job.profile", lambda m, inputs: profile(m, inputs if m is model else -x))
    with pytest.raises(BudgetUnreachable, match="its path depends on values") as error:
        sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.9))
    found, advised = re.search(r"has ([\d,]+) macs.*Budget\(macs=0.9, tolerance=([\d.]+)\)", str(error.value)).groups()
    more = int(found.replace(",", "")) / (0.9 * dense) - 1
    assert more < float(advised) <= more + 0.011


def test_scopes_that_leave_too_little_are_an_error():
    model, x = toy("mlp")
    with pytest.raises(BudgetUnreachable, match="Ask for"):
        sc.prune(model, x, granularity="channel", budget=HALF, scope={"include": ["3"]})
    with pytest.raises(NothingPrunable):
        sc.prune(model, x, granularity="channel", budget=HALF, scope={"include": ["nothing"]})
    with pytest.raises(NothingPrunable, match="No unit of this model may be removed"):
        sc.prune(nn.ReLU(), x, granularity="channel", budget=HALF)
