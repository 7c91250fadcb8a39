from __future__ import annotations

import pytest
import torch

import secateur as sc
from secateur.budgets import cost_of
from secateur.core.engine import Run
from secateur.core.hooks import TrainingState
from secateur.errors import NotApplicable
from secateur.methods.sss import Factors, SparseStructureSelection, proximal_step
from secateur.testing.toys import toy, toy_batches


def recipe(**settings):
    criterion = SparseStructureSelection(**settings)
    return sc.Recipe(criterion=criterion, granularity="channel", schedule={"name": "one-shot", "at": 0.5})


def run_of(model, x, **settings):
    units = recipe().granularity.units(model, x, recipe().scope)
    return Run(recipe(**settings), units, sc.Budget(macs=0.5), cost_of("macs"))


def test_a_step_is_hand_computed():
    factor, velocity = torch.tensor([1.0, 1.0, 0.01]), torch.tensor([0.5, 0.0, 0.0])
    proximal_step(factor, velocity, torch.tensor([2.0, -1.0, 0.0]), lr=0.1, penalty=0.3, momentum=0.5)
    # z = 0.8, 1.1, 0.01; soft by 0.03: 0.77, 1.07, 0; velocity 0.25 - 0.23, 0.07, -0.01; factor = soft + velocity / 2
    assert torch.allclose(velocity, torch.tensor([0.02, 0.07, -0.01]))
    assert torch.allclose(factor, torch.tensor([0.78, 1.105, -0.005]))


def test_steps_end_at_the_closed_form_of_a_quadratic_loss():
    """a (l - b)² / 2 + penalty |l| is smallest at soft(b, penalty / a); zeros are exact."""
    a, b, penalty = torch.tensor([1.0, 2.0, 4.0, 1.0]).double(), torch.tensor([0.9, -0.5, 0.02, 0.1]).double(), 0.3
    factor, velocity = torch.ones(4).double(), torch.zeros(4).double()
    for _ in range(500):
        proximal_step(factor, velocity, a * (factor - b), lr=0.05, penalty=penalty, momentum=0.9)
    expected = b.sign() * (b.abs() - penalty / a).clamp_min(0)
    assert torch.allclose(factor, expected, atol=1e-10) and expected.count_nonzero() == 2
    assert (factor[expected == 0].abs() < 1e-12).all()


def test_a_factor_moves_along_the_gradient_of_the_loss_by_it():
    model, x = toy("mlp")
    model = model.double()
    ((inputs, target),) = toy_batches("mlp", n=1)
    inputs = inputs.double()
    hidden = torch.relu(model[1](inputs.flatten(1)))
    gate = torch.ones(32, dtype=torch.double, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model[3:](hidden * gate), target), gate)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    pruner = sc.Pruner(model, x.double(), method=recipe(penalty=0.1, momentum=0.9), budget=sc.Budget(macs=0.5),
                       optimizers=sgd, total_steps=4, data=[(inputs, target)])  # fmt: skip
    torch.nn.functional.cross_entropy(model(inputs), target).backward()
    sgd.step()
    pruner.step()
    soft = 1 - 0.5 * slope - 0.5 * 0.1
    torch.testing.assert_close(pruner._run.hooks.factors["1"].double(), soft + 0.9 * (soft - 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", ["resnet20", "grouped", "vit"])
def test_at_the_end_of_a_stretch_the_factors_become_part_of_the_weights(network):
    model, x = toy(network)
    run = run_of(model.double(), x.double())
    factors = Factors(run, 0.01, 0.9)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1), 0, 4)
    factors.on_start(state)
    with torch.no_grad():
        for factor in factors.factors.values():
            factor.copy_(torch.rand_like(factor))
    trained = model(x.double())
    factors.on_end(state)
    torch.testing.assert_close(model(x.double()), trained)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    factors.on_end(state)  # nothing is folded twice
    torch.testing.assert_close(model(x.double()), trained)


def test_the_branch_of_the_smallest_factor_is_dropped_and_on_one_that_adds_nothing_the_penalty_acts_alone():
    """By depth: what the paper is mostly about."""
    model, x = toy("resnet20")
    with torch.no_grad():
        model.blocks[7].bn2.weight.zero_()
        model.blocks[7].bn2.bias.zero_()
    data, sgd = toy_batches("resnet20"), torch.optim.SGD(model.fc.parameters(), lr=0.1)
    by_depth = recipe(penalty=2, momentum=0).but(granularity="depth")
    pruner = sc.Pruner(model, x, method=by_depth, budget=sc.Budget(macs=0.95), optimizers=sgd, total_steps=6, data=data)
    branches = [branch.name.split(".")[1] for branch in pruner._run.units.structure.branches if branch.prunable]
    for inputs, target in data[:3]:
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), target).backward()
        sgd.step()
        pruner.step()
    factors = dict(zip(branches, torch.cat(list(pruner._run.hooks.factors.values())).tolist(), strict=True))
    assert factors["7"] == pytest.approx(1 - 3 * 0.1 * 2) and len(set(factors.values())) == len(factors) == 7
    dropped = {drop.module.split(".")[1] for drop in pruner.result().structure_plan.dropped}
    assert dropped == {min(factors, key=factors.get)}


def test_a_unit_that_nothing_needs_shrinks_at_the_full_rate_to_exactly_zero():
    model, x = toy("mlp")
    with torch.no_grad():
        model[5].weight[:, 7] = 0
    sgd = torch.optim.SGD([*model[1].parameters(), *model[3].parameters(), model[5].bias], lr=0.1)
    pruner = sc.Pruner(model, x, method=recipe(penalty=4, momentum=0), budget=sc.Budget(macs=0.5), optimizers=sgd,
                       total_steps=6, data=toy_batches("mlp"))  # fmt: skip
    for expected, (inputs, target) in zip((0.6, 0.2, 0), toy_batches("mlp"), strict=False):
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), target).backward()
        sgd.step()
        pruner.step()
        assert pruner._run.hooks.factors["3"][7].item() == pytest.approx(expected, abs=1e-6)
    assert pruner.done and pruner._run.hooks.factors["3"][7] == 0


def test_what_was_learned_goes_on_from_a_checkpoint():
    def parts():
        model, x = toy("mlp")
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        budget = sc.Budget(macs=0.5)
        return model, sgd, sc.Pruner(model, x, method=recipe(), budget=budget, optimizers=sgd, total_steps=8, data=data)

    def go(model, sgd, pruner, batches):
        for inputs, target in batches:
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), target).backward()
            sgd.step()
            pruner.step()

    data = toy_batches("mlp", n=8)
    straight, stopped, resumed = parts(), parts(), parts()
    go(*straight, data)
    go(*stopped, data[:2])
    states = [part.state_dict() for part in stopped]
    resumed[2].load_state_dict(states[2])
    resumed[0].load_state_dict(states[0])
    resumed[1].load_state_dict(states[1])
    go(*resumed, data[2:])
    a, b = straight[2].result(), resumed[2].result()
    assert a.structure_plan == b.structure_plan
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_single_weights_are_refused_before_any_training():
    model, x = toy("mlp")
    with pytest.raises(NotApplicable, match="choose such a granularity"):
        sc.prune(model, x, method="sss", budget=sc.Budget(sparsity=0.5), data=toy_batches("mlp"), recovery="fine-tune")
