from __future__ import annotations

import pytest
import torch

import secateur as sc
from secateur.budgets import cost_of
from secateur.core.slots import Scope
from secateur.errors import NotApplicable
from secateur.parts.granularity.channel import Channel
from secateur.parts.granularity.weight import Weight
from secateur.structure.inputs import state_of
from secateur.structure.surgery import cut_copy, make_plan
from secateur.testing.toys import NETWORKS, toy


def size_of(model, x, kind):
    profile = sc.profile(model, x)
    return {"macs": profile.macs, "params": profile.params, "bytes": profile.bytes}[kind]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
def test_predicted_costs_are_the_costs_of_the_cut_network(name, kind):
    model, x = toy(name)
    units = Channel().units(model, x, Scope())
    cost = cost_of(kind)(units)
    assert cost(units.counts()) == size_of(model, x, kind)
    kept = {n: torch.arange(shape[0]) < max(1, shape[0] // 3) for n, shape in units.shapes.items()}
    small = cut_copy(model, make_plan(units.structure, kept))
    assert cost({n: int(m.sum()) for n, m in kept.items()}) == size_of(small, x, kind)


def test_costs_of_single_weights():
    model, x = toy("resnet20")
    units = Weight().units(model, x, Scope())
    counts = {name: int(0.3 * n) for name, n in units.counts().items()}
    masks = {name: (torch.arange(shape.numel()) < counts[name]).view(shape) for name, shape in units.shapes.items()}
    predicted = {kind: cost_of(kind)(units)(counts) for kind in ("macs", "params", "sparsity")}
    units.keep(masks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter == 0] = 0
    profile = sc.profile(model, x)
    assert predicted["macs"] == pytest.approx(profile.effective_macs, rel=1e-6)
    zeros_elsewhere = sum(int((p == 0).sum()) for n, p in model.named_parameters() if n not in masks)
    assert predicted["params"] == profile.nonzero_params + zeros_elsewhere
    assert predicted["sparsity"] == sum(counts.values())


@pytest.mark.parametrize("kind", ["bytes", "latency_ms"])
def test_budgets_that_zeros_cannot_meet_are_refused(kind):
    model, x = toy("mlp")
    with pytest.raises(NotApplicable, match="keeps all weights"):
        sc.prune(model, x, budget=sc.Budget(**{kind: 100}))


def test_a_budget_in_bytes_is_met():
    model, x = toy("resnet20")
    dense = sum(t.numel() * t.element_size() for t in state_of(model).values())
    result = sc.prune(model, x, granularity="channel", budget=sc.Budget(bytes=dense // 3))
    assert 0.3 * dense < result.after.bytes <= dense // 3


def test_a_latency_budget_is_met_by_measuring(monkeypatch):
    """With a clock that counts MACs, so that the test does not depend on the machine."""
    import secateur.budgets.latency as module

    def clock(model, inputs):
        return sc.Latency(sc.profile(model, inputs).macs / 1e6, 0, 1, "eager", 1, 1, "float32")

    monkeypatch.setattr(module, "measure_latency", clock)
    monkeypatch.setattr(module, "compare_latency", lambda models, x: {n: clock(m, x) for n, m in models.items()})
    model, x = toy("resnet20")
    dense = sc.profile(model, x).macs / 1e6
    result = sc.prune(model, x, granularity="channel", budget=sc.Budget(latency_ms=0.5 * dense))
    assert 0.45 < result.after.macs / result.before.macs <= 0.5
