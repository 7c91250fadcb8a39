"""A cut inside a running training equals training the dense network with the removed units held at zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import secateur as sc
from secateur.testing.toys import toy, toy_batches

STEPS, CUT_AT = 10, 5
HALFWAY = {"name": "cubic", "steps": 2, "start": 0.3, "end": CUT_AT / STEPS}  # cuts with steps 3 and 5

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


def network(name="mlp"):
    model, x = toy(name)
    return model.double().train(), x.double()


def data(name="mlp"):
    return [(a.double(), b) for a, b in toy_batches(name, STEPS)]


def groups(model):
    """Parameter groups with options of their own; the last bias is in none."""
    parameters = dict(model.named_parameters())
    parameters.popitem()
    vectors = [p for p in parameters.values() if p.dim() == 1]
    return [
        {"params": [p for p in parameters.values() if p.dim() > 1]},
        {"params": vectors, "lr": 0.02, "weight_decay": 0.0},
    ]


def train_step(model, optimizer, batch):
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def zero_removed(model, optimizer, plan):
    """Zero every removed entry of every parameter and of everything that the optimizer remembers of it."""
    for name, parameter in model.named_parameters():
        gone = torch.zeros(parameter.shape, dtype=torch.bool)
        for position, index in enumerate(plan.indices(name)):
            if index is not None:
                outside = torch.ones(parameter.shape[position], dtype=torch.bool).index_fill(0, index, False)
                gone.index_fill_(position, outside.nonzero().flatten(), True)
        for value in [parameter.data, *optimizer.state.get(parameter, {}).values()]:
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                value.masked_fill_(gone, 0)


def masked_training(name, make, plans):
    """Train the dense network, with what each plan removes held at zero from its step on."""
    model, _ = network(name)
    optimizer = make(groups(model))
    plan = None
    for step, batch in enumerate(data(name), start=1):
        train_step(model, optimizer, batch)
        plan = plans.get(step, plan)
        if plan is not None:
            zero_removed(model, optimizer, plan)
    return model, optimizer


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "kind"), [*(("mlp", kind) for kind in OPTIMIZERS), ("resnet20", "momentum"), ("mobilenet", "adamw")]
)
def test_cutting_within_a_training_equals_masked_training(name, kind):
    model, x = network(name)
    optimizer = OPTIMIZERS[kind](groups(model))
    first, modules, plans = id(optimizer), dict(model.named_modules()), {}
    pruner = sc.Pruner(model, x, optimizers=optimizer, total_steps=STEPS, budget=sc.Budget(macs=0.4),
                       granularity="channel", schedule=HALFWAY)  # fmt: skip
    for step, batch in enumerate(data(name), start=1):
        train_step(model, optimizer, batch)
        if pruner.step():
            plans[step] = pruner._run.units.plan
    assert list(plans) == [3, 5] and pruner.done and id(optimizer) == first
    assert all(m is modules[n] for n, m in model.named_modules()) and pruner.model is model
    assert model.training  # result() below is a copy
    pruned = pruner.result()
    assert pruned.after.macs <= 0.4 * pruned.before.macs and all(proof.ok for proof in pruned.proofs)

    twin, twin_optimizer = masked_training(name, OPTIMIZERS[kind], plans)
    theirs = dict(twin.named_parameters())
    for parameter_name, ours in model.named_parameters():
        other = theirs[parameter_name]
        assert close(ours, plans[5].slice(parameter_name, other)), parameter_name
        ours_state, other_state = optimizer.state[ours], twin_optimizer.state[other]
        assert ours_state.keys() == other_state.keys()
        for key, value in ours_state.items():
            if isinstance(value, torch.Tensor):
                expected = other_state[key]
                expected = plans[5].slice(parameter_name, expected) if expected.shape == other.shape else expected
                assert close(value, expected), (parameter_name, key)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    *expected_held, absent = [id(p) for p in model.parameters()]
    assert sorted(held) == sorted(expected_held) and absent not in held
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(g["params"]) for g in twin_optimizer.param_groups]
    assert optimizer.param_groups[1]["lr"] == 0.02 and optimizer.param_groups[0]["lr"] != 0.02
