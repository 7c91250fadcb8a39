"""A cut inside a running training equals training the dense network with the removed units held at zero."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur as sc
from secateur.errors import (
    BudgetUnreachable,
    DataNeeded,
    InvalidInputs,
    InvalidRecipe,
    MissingCheckpoint,
    NotApplicable,
    PlanMismatch,
)
from secateur.testing.toys import toy, toy_batches

STEPS, CUT_AT = 10, 5
HALFWAY = {"name": "cubic", "steps": 2, "start": 0.3, "end": CUT_AT / STEPS}  # cuts with steps 3 and 5

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    # A bias in front of batch normalization has no gradient but rounding, and Adam's steps are up to lr / eps times its
    # size: 1e6 times with the usual eps.
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=1e-4),
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


def pruner_for(model, x, optimizer, **options):
    options = {"granularity": "channel", "schedule": HALFWAY, "budget": sc.Budget(macs=0.4), **options}
    return sc.Pruner(model, x, optimizers=optimizer, total_steps=STEPS, **options)


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.05, 0.01], STEPS),
    "warmup": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1, 4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [4],
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR warns of itself
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_go_on_as_if_nothing_had_been_cut(kind):
    rates = []
    for cut in (False, True):
        model, x = network()
        optimizer = OPTIMIZERS["momentum"](groups(model))
        scheduler = SCHEDULERS[kind](optimizer)
        pruner = pruner_for(model, x, optimizer) if cut else None
        before = model[1].weight
        rates.append([])
        for batch in data():
            train_step(model, optimizer, batch)
            if pruner is not None:
                pruner.step()
            scheduler.step()
            rates[-1].append([group["lr"] for group in optimizer.param_groups])
        if cut:  # the rate of the schedule is what moves the new parameters
            assert model[1].weight is not before and model[1].out_features < 32
            at, gradient = model[1].weight.detach().clone(), torch.ones_like(model[1].weight)
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group.update(weight_decay=0, momentum=0, nesterov=False)
            model[1].weight.grad = gradient
            optimizer.step()
            assert torch.allclose(at - model[1].weight, torch.full_like(at, rates[-1][-1][0]))
    assert rates[0] == rates[1] and len({tuple(r) for r in rates[0]}) > 3


def test_a_gradient_scaler_goes_on_and_skips_the_step_that_overflows():
    results = []
    for scaled in (False, True):
        model, x = network()
        optimizer = OPTIMIZERS["adamw"](groups(model))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4, enabled=scaled)
        pruner, scales = pruner_for(model, x, optimizer), []
        for step, batch in enumerate(data(), start=1):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(batch[0]), batch[1])).backward()
            if step == 7:
                if not scaled:
                    pruner.step()
                    continue
                model[1].weight.grad[0, 0] = float("inf")
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            pruner.step()
            scales.append(scaler.get_scale())
        results.append({name: p.detach().clone() for name, p in model.named_parameters()})
        assert model[1].out_features < 32
    assert scales[3] == 2048 and scales[6] == 1024  # grew after four steps, fell back when one overflowed
    assert all(close(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("wrapped", [True, False])
def test_averaged_copies_are_cut_along(wrapped):
    ema_function = get_ema_multi_avg_fn(0.8)
    model, x = network()
    ema = AveragedModel(model, multi_avg_fn=ema_function) if wrapped else copy.deepcopy(model)
    inside = ema.module if wrapped else ema
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    pruner, plans = pruner_for(model, x, optimizer, copies=ema), {}
    twin, _ = network()
    shadow = copy.deepcopy(twin)
    for step, batch in enumerate(data(), start=1):
        train_step(model, optimizer, batch)
        if pruner.step():
            plans[step] = pruner._run.units.plan
        if wrapped:
            ema.update_parameters(model)
        else:
            with torch.no_grad():
                for mean, now in zip(ema.parameters(), model.parameters(), strict=True):
                    mean.lerp_(now, 0.2)
    twin_optimizer, plan = OPTIMIZERS["momentum"](twin.parameters()), None
    for step, batch in enumerate(data(), start=1):
        train_step(twin, twin_optimizer, batch)
        plan = plans.get(step, plan)
        if plan is not None:
            zero_removed(twin, twin_optimizer, plan)
        with torch.no_grad():
            for mean, now in zip(shadow.parameters(), twin.parameters(), strict=True):
                if wrapped and step == 1:
                    mean.copy_(now)  # AveragedModel starts from the first weights that it sees
                else:
                    mean.lerp_(now, 0.2)
    for (name, mean), expected in zip(inside.named_parameters(), shadow.parameters(), strict=True):
        assert close(mean, plans[5].slice(name, expected)), name
    assert inside[1].out_features == model[1].out_features < 32
    assert inside(x).shape == (2, 10) and inside[1].weight is not model[1].weight


def test_several_optimizers_and_pending_gradients():
    model, x = network()
    first = torch.optim.AdamW(model[1].parameters(), lr=1e-2)
    stranger = nn.Parameter(torch.ones(3))
    second = torch.optim.SGD([*model[3].parameters(), *model[5].parameters(), stranger], lr=1e-2, momentum=0.9)
    pruner = sc.Pruner(model, x, optimizers=[first, second], total_steps=2, granularity="channel",
                       budget=sc.Budget(macs=0.4))  # fmt: skip
    batch = data()[0]
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    first.step()
    second.step()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    moments = first.state[model[1].weight]["exp_avg"].clone()
    pruner.step()
    plan = pruner.result().structure_plan
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plan.slice(name, gradients[name]))
    assert torch.equal(first.state[model[1].weight]["exp_avg"], plan.slice("1.weight", moments))
    assert {id(p) for p in first.param_groups[0]["params"]} == {id(p) for p in model[1].parameters()}
    assert second.param_groups[0]["params"][-1] is stranger
    assert first.state.keys() | second.state.keys() == set(model.parameters())  # nothing of the old ones stays


def test_attributes_of_parameters_stay_and_lost_hooks_are_named():
    model, x = network()
    model[1].weight.no_decay = True
    model[3].weight.requires_grad_(False)
    model[1].weight.register_hook(lambda g: g)
    optimizer = OPTIMIZERS["sgd"](p for p in model.parameters() if p.requires_grad)
    pruner = pruner_for(model, x, optimizer, schedule="one-shot")
    with pytest.warns(UserWarning, match=r"gradient hook of '1.weight' is lost"):
        pruner.step()
    assert model[1].weight.no_decay and not model[3].weight.requires_grad and model[1].weight.requires_grad


def test_the_random_state_of_the_training_is_left_alone():
    model, x = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    state = torch.get_rng_state()
    pruner = pruner_for(model, x, optimizer, method="random", weights_from="fresh", schedule="one-shot")
    pruner.step()
    assert torch.equal(torch.get_rng_state(), state)


def test_factored_moments_follow_and_what_cannot_follow_begins_anew():
    model, x = network()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    train_step(model, optimizer, data()[0])
    row, column = (optimizer.state[model[1].weight][key].clone() for key in ("row_var", "col_var"))
    assert row.shape == (32, 1) and column.shape == (1, 48)
    optimizer.state[model[3].weight]["vector"] = torch.arange(32.0)  # runs along dim 1 of (24, 32), as it is 32 long
    optimizer.state[model[5].weight]["factor"] = torch.eye(10)  # says nothing about (10, 24)
    optimizer.state[model[3].bias]["list"] = [torch.ones(24)]
    pruner = pruner_for(model, x, optimizer, schedule="one-shot")
    with pytest.warns(UserWarning, match="whose shape does not say how to cut it") as caught:
        pruner.step()
    assert {name for w in caught for name in ("5.weight", "3.bias") if name in str(w.message)} == {"5.weight", "3.bias"}
    plan = pruner.result().structure_plan
    kept = plan.indices("1.weight")[0]
    assert torch.equal(optimizer.state[model[1].weight]["row_var"], row[kept])
    assert torch.equal(optimizer.state[model[1].weight]["col_var"], column)
    assert torch.equal(optimizer.state[model[3].weight]["vector"], torch.arange(32.0)[kept])
    assert model[5].weight not in optimizer.state and model[3].bias not in optimizer.state
    del optimizer.state[model[3].weight]["vector"]
    train_step(model, optimizer, data()[1])  # and it goes on
    assert model[5].weight in optimizer.state


def test_a_vector_that_may_run_along_either_dim_of_a_square_is_not_guessed():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model[2].weight]["row"] = torch.arange(8.0)
    pruner = pruner_for(model, torch.zeros(1, 4).double(), optimizer, schedule="one-shot")
    with pytest.warns(UserWarning, match=r"'2.weight'"):
        pruner.step()


# --------------------------------------------------------------------------------------------- masks, moments, results


def test_single_weights_are_held_at_zero_after_every_step_and_in_copies():
    model, x = network()
    ema = copy.deepcopy(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    pruner = pruner_for(model, x, optimizer, granularity="weight", budget=sc.Budget(sparsity=0.8), copies=ema)
    zeros, moved = [], model[1].weight
    for batch in data():
        train_step(model, optimizer, batch)
        pruner.step()
        with torch.no_grad():
            for mean, now in zip(ema.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 0.2)
        zeros.append(sum(int((m.weight == 0).sum()) for m in (model[1], model[3], model[5])))
    total = 48 * 32 + 32 * 24 + 24 * 10
    first = zeros[2]
    assert zeros[:2] == [0, 0] and 0 < first < zeros[4] and zeros == [0, 0, first, first, *[round(0.8 * total)] * 6]
    masks = pruner.result().masks
    assert model[1].weight is moved and all(
        torch.equal(dict(ema.named_parameters())[n] != 0, m) for n, m in masks.items()
    )


def test_moments_come_when_the_schedule_says():
    def moments(total, **schedule):
        model, x = network()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        pruner = sc.Pruner(model, x, optimizers=optimizer, total_steps=total, budget=sc.Budget(macs=0.5),
                           granularity="channel", schedule=schedule)  # fmt: skip
        when = [step for step in range(1, total + 1) if pruner.step() is not None]
        assert pruner.done and pruner.steps == total and pruner.step() is None
        assert len(pruner.rounds) == schedule.get("steps", 1)
        return when

    assert moments(8, name="one-shot") == [1]
    assert moments(8, name="iterative", steps=4) == [1, 2, 4, 6]
    assert moments(10, name="cubic", steps=3, start=0.2, end=0.8) == [2, 5, 8]
    assert moments(2, name="iterative", steps=4) == [1, 2]  # two moments each


def test_one_shot_gives_what_prune_gives():
    for granularity in ("weight", "channel"):
        model, x = network()
        expected = sc.prune(model, x, method="taylor", data=data(), granularity=granularity, budget=sc.Budget(macs=0.5))
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        pruner = sc.Pruner(model, x, optimizers=optimizer, total_steps=1, method="taylor", data=data(),
                           granularity=granularity, budget=sc.Budget(macs=0.5))  # fmt: skip
        assert pruner.step().cost == expected.rounds[0].cost
        found = pruner.result()
        assert found.structure_plan == expected.structure_plan and found.before == expected.before
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.model.parameters(), strict=True))


def test_the_result_is_a_copy_that_saves_and_reports(tmp_path):
    model, x = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = pruner_for(model, x, optimizer, schedule="one-shot")
    with pytest.raises(BudgetUnreachable, match="0 of 1 pruning moments"):
        pruner.result()
    pruner.step()
    result = pruner.result()
    sc.save(result, tmp_path / "small.safetensors")
    loaded = sc.load(tmp_path / "small.safetensors", build=lambda: network()[0])
    assert torch.equal(loaded(x), model.eval()(x)) and "Budget" in result.report()
    train_step(model, optimizer, data()[0])
    assert not torch.equal(loaded(x), model(x)) and torch.equal(loaded(x), result.model(x))


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_rewound_weights_forget_what_the_optimizer_knew(granularity):
    model, x = network()
    early = copy.deepcopy(model.state_dict())
    ema, optimizer = copy.deepcopy(model), OPTIMIZERS["adamw"](model.parameters())
    pruner = pruner_for(model, x, optimizer, granularity=granularity, schedule="one-shot", weights_from="init",
                        checkpoints={"init": early}, copies=ema)  # fmt: skip
    train_step(model, optimizer, data()[0])
    pruner.step()
    result = pruner.result()
    for name, parameter in model.named_parameters():
        expected = result.structure_plan.slice(name, early[name]) * result.masks.get(name, 1)
        assert torch.equal(parameter, expected) and torch.equal(parameter, dict(ema.named_parameters())[name])
    assert not optimizer.state


@pytest.mark.parametrize("granularity", ["weight", "channel"])
@pytest.mark.parametrize("stop", [2, 4, 8])
def test_a_resumed_training_equals_an_undisturbed_one_to_the_bit(granularity, stop, tmp_path):
    def parts():
        model, x = network()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        schedule = {**HALFWAY, "momentum": 0.9}
        return model, optimizer, pruner_for(model, x, optimizer, granularity=granularity, schedule=schedule)

    def go(model, optimizer, pruner, batches):
        for batch in batches:
            train_step(model, optimizer, batch)
            pruner.step()

    straight = parts()
    go(*straight, data())
    stopped = parts()
    go(*stopped, data()[:stop])
    torch.save([part.state_dict() for part in stopped], tmp_path / "checkpoint.pt")
    resumed = parts()
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed[2].load_state_dict(states[2])
    resumed[0].load_state_dict(states[0])
    resumed[1].load_state_dict(states[1])
    go(*resumed, data()[stop:])
    a, b = straight[2].result(), resumed[2].result()
    assert a.structure_plan == b.structure_plan and a.rounds == b.rounds and resumed[2].steps == STEPS
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    with pytest.raises(PlanMismatch, match="has pruned already"):
        resumed[2].load_state_dict(states[2])


def test_compiled_models_see_the_cut():
    model, x = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    pruner = pruner_for(model, x, optimizer)
    for batch in data():
        train_step(compiled, optimizer, batch)
        pruner.step()
    assert torch.equal(compiled(x), model(x)) and model[1].out_features < 32


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_requests_get_one_clear_error():
    model, x = network()
    sgd = OPTIMIZERS["sgd"](model.parameters())
    for error, match, changes in [
        (InvalidInputs, "holds no parameter of the model", {"optimizer": OPTIMIZERS["sgd"](network()[0].parameters())}),
        (InvalidInputs, "got generator", {"optimizer": model.parameters()}),
        (InvalidInputs, "got none", {"optimizer": ()}),
        (NotApplicable, "LBFGS", {"optimizer": torch.optim.LBFGS(model.parameters())}),
        (InvalidInputs, "model.module", {"model": nn.DataParallel(model)}),
        (InvalidInputs, "got NoneType", {"model": None}),
        (PlanMismatch, r"A copy \(Linear\)", {"copies": nn.Linear(2, 2)}),
        (InvalidRecipe, "your own loop is the recovery", {"recovery": {"name": "fine-tune", "epochs": 1}}),
        (InvalidRecipe, "unknown option", {"granularty": "channel"}),
        (InvalidRecipe, "at least 1; got 0", {"total_steps": 0}),
        (MissingCheckpoint, "init", {"mask_from": "init"}),
        (BudgetUnreachable, "Ask for", {"budget": sc.Budget(macs=0.001)}),
    ]:
        options = {"model": model, "optimizer": sgd, "total_steps": STEPS, "budget": sc.Budget(macs=0.4), **changes}
        with pytest.raises(error, match=match):
            sc.Pruner(
                options.pop("model"), x, optimizers=options.pop("optimizer"), granularity="channel", **options
            )  # fmt: skip
    pruner = pruner_for(model, x, sgd, method="taylor")
    with pytest.raises(DataNeeded):
        [pruner.step() for _ in range(STEPS)]


def test_the_default_case_is_silent():
    model, x = network("resnet20")
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    pruner = pruner_for(model, x, optimizer, schedule="one-shot")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(model, optimizer, data("resnet20")[0])
        pruner.step()
        train_step(model, optimizer, data("resnet20")[1])
