"""Distillation in a run: features of what the cut has kept, several teachers, batches without targets."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from secateur.errors import DataNeeded, InvalidInputs, InvalidRecipe, NotApplicable, PlanMismatch, UnknownName
from secateur.parts.recovery.distill import Distill, feature_loss
from secateur.structure.inputs import state_of
from secateur.structure.surgery import cut_copy, make_plan
from secateur.testing.toys import toy, toy_batches
from secateur.training.loop import Trainer, accuracy
from secateur.training.teacher import Teacher, compared_modules, output_cuts, watched

DOUBLE = torch.float64


def integers(model, seed=0):
    """Small integers as parameters: sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    return model.to(DOUBLE)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


def residual_network(width=6, blocks=2):
    stem = nn.Conv2d(1, width, 3)
    return nn.Sequential(stem, *(Residual(width) for _ in range(blocks)), nn.Flatten(), nn.Linear(width * 16, 3))


def states(*models):
    return [{k: v.clone() for k, v in model.state_dict().items()} for model in models]


def unchanged(before, *models):
    return all(
        torch.equal(v, model.state_dict()[k]) for old, model in zip(before, models, strict=True) for k, v in old.items()
    )


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def features_of(model, names, x):
    with watched(model, dict.fromkeys(names)) as seen, torch.no_grad():
        model(x)
    return seen


def pruned_and_teacher(model, x, kept_share=0.5, **settings):
    """Return a student that has lost the first part of every axis, and its teacher."""
    structure = sc.trace(model, x)
    kept = {a.name: torch.arange(a.size) >= a.size * (1 - kept_share) for a in structure.prunable}
    plan = make_plan(structure, kept)
    student = cut_copy(model, plan)
    teacher = Teacher(Distill(features=1, **settings), student, model, structure=structure)
    teacher.follow(plan)
    return student, teacher


# ------------------------------------------------------------------------------------------------------ features


def test_without_dead_channels_the_student_has_the_same_features_exactly():
    x = torch.randint(-3, 4, (5, 1, 6, 6), generator=torch.Generator().manual_seed(1)).to(DOUBLE)
    model = integers(residual_network())
    dead = {"0": [0, 3], "1.first": [1, 2], "2.first": [5]}
    with torch.no_grad():
        for name, units in dead.items():
            for tensor in (model.get_submodule(name).weight, model.get_submodule(name).bias):
                tensor[units] = 0
        for block in model[1:3]:  # nothing is added to a dead channel of the stream
            block.second.weight[dead["0"]] = block.second.bias[dead["0"]] = 0
    structure = sc.trace(model, x)
    kept = {name: ~torch.isin(torch.arange(6), torch.tensor(units)) for name, units in dead.items()}
    plan = make_plan(structure, kept)
    student = cut_copy(model, plan)
    teacher = Teacher(Distill(alpha=1, features=1), student, model, structure=structure)
    teacher.follow(plan)
    output, lesson = teacher.teach(student, (x,), {})
    assert structure.blocks == ("1", "2") and len(lesson.features) == 2
    assert all(s.shape == t.shape == (5, 4, 4, 4) and torch.equal(s, t) and t.any() for s, t in lesson.features)
    assert torch.equal(output, lesson.outputs[0]) and teacher.loss(x) == 0
    with torch.no_grad():
        student[1].first.weight += 1
    assert teacher.loss(x) > 0


NORMALIZED = {"vit": ("patches",), "grouped": ("0", "0#2")}


@pytest.mark.parametrize("name", ["resnet20", "densenet", "vit", "mobilenet", "grouped"])
def test_where_removed_units_are_zero_every_module_of_the_student_returns_what_the_parent_does(name):
    model, x = toy(name)
    model, x = model.double(), x.double()
    structure = sc.trace(model, x)
    normalized = NORMALIZED.get(name, ())  # statistics over these axes would see the zeros
    free = [a for a in structure.prunable if not _tied(structure, a.name) and a.name not in normalized]
    kept = {axis.name: torch.arange(axis.size) % 2 == 0 for axis in free}
    plan = make_plan(structure, kept)
    with torch.no_grad():
        for tensor_name, tensor in state_of(model).items():
            for position, index in enumerate(plan.indices(tensor_name)):
                if index is not None:
                    gone = torch.ones(tensor.shape[position], dtype=torch.bool).index_fill_(0, index, False)
                    tensor.index_fill_(position, gone.nonzero().flatten(), 0)
    student = cut_copy(model, plan)
    teacher = Teacher(
        Distill(features=1, modules=tuple(filter(None, structure.outputs))), student, model, structure=structure
    )
    teacher.follow(plan)
    _, lesson = teacher.teach(student, (x,), {})
    assert len(lesson.features) >= 10 and sum(s.numel() for s, _ in lesson.features) > 0
    assert all(torch.allclose(s, t, rtol=1e-9, atol=1e-9) for s, t in lesson.features)
    cuts = output_cuts(structure, plan, tuple(structure.outputs))
    assert sum(map(bool, cuts.values())) >= 5


def _tied(structure, name):
    return any(name in tie for tie in structure.ties) or name in structure.steps


def test_by_default_blocks_are_compared_and_layers_where_there_are_none():
    resnet, x = toy("resnet20")
    assert compared_modules(sc.trace(resnet, x)) == tuple(f"blocks.{i}" for i in range(9))
    mlp, x = toy("mlp")
    linear = [name for name, module in mlp.named_modules() if isinstance(module, nn.Linear)]
    assert compared_modules(sc.trace(mlp, x)) == tuple(linear[:-1])
    assert compared_modules(sc.trace(mlp, x), linear[:1]) == (linear[0],)


def test_features_come_closer_than_by_logits_alone_and_the_teacher_is_left_alone():
    torch.manual_seed(0)
    model = residual_network().train()
    x = torch.randn(64, 1, 6, 6)
    before = states(model)

    def distance(features):
        pruned = sc.prune(
            model, x[:1], granularity="channel", budget=sc.Budget(macs=0.5), data=[x[:32], x[32:]],
            recovery={"name": "distill", "alpha": 1, "features": features, "epochs": 10},
            schedule={"name": "iterative", "steps": 2},
        )  # fmt: skip
        assert not hooks_of(model) and not hooks_of(pruned.model)
        teacher = Teacher(Distill(features=1), pruned.model, model, structure=pruned.structure)
        teacher.follow(pruned.structure_plan)
        return feature_loss(teacher.teach(pruned.model, (x,), {})[1].features)

    assert distance(features=10) < 0.7 * distance(features=0)
    assert unchanged(before, model) and all(m.training for m in model.modules())


def test_dropped_modules_are_not_compared():
    model, x = residual_network(blocks=3).double(), torch.randn(4, 1, 6, 6, dtype=DOUBLE)
    modules = ("1", "1.first", "2.first", "3.first")
    pruned = sc.prune(
        model, x, granularity="depth", budget=sc.Budget(params=0.7), data=[x],
        recovery={"name": "distill", "alpha": 1, "features": 1, "modules": modules, "epochs": 1},
    )  # fmt: skip
    assert pruned.structure_plan.dropped and pruned.history
    teacher = Teacher(
        Distill(features=1, modules=("2", "1.first", "2.first", "3.first")),
        pruned.model,
        model,
        structure=pruned.structure,
    )
    teacher.follow(pruned.structure_plan)
    _, lesson = teacher.teach(pruned.model, (x,), {})
    gone = sum(pruned.structure_plan.drops(f"{i}.first.weight") for i in (1, 2, 3))
    assert gone and len(lesson.features) == 4 - gone


def test_masked_networks_are_compared_whole():
    model, x = toy("mlp")
    pruned = sc.prune(
        model, x, budget=sc.Budget(sparsity=0.8), data=toy_batches("mlp"),
        recovery={"name": "distill", "features": 0.5, "epochs": 2},
    )  # fmt: skip
    assert pruned.masks and pruned.history[-1]["train_loss"] > 0


# ----------------------------------------------------------------------------------------------- several teachers


def test_two_equal_teachers_teach_what_one_does_and_none_is_changed():
    model, x = toy("mlp")
    other = copy.deepcopy(model).train()
    before = states(model, other)
    options = {
        "granularity": "channel", "budget": sc.Budget(macs=0.5), "data": toy_batches("mlp"),
        "recovery": {"name": "distill", "epochs": 3, "lr": 0.05},
    }  # fmt: skip
    alone, twice, as_state = (
        sc.prune(model, x, teachers=teachers, **options) for teachers in ((), other, [other.state_dict()])
    )
    for a, b, c in zip(*(p.model.state_dict().values() for p in (alone, twice, as_state)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6) and torch.equal(b, c)
    assert unchanged(before, model, other) and all(m.training for m in other.modules())
    stranger = toy("mlp")[0]
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.mul_(-1)
    changed = sc.prune(model, x, teachers=[stranger], **options).model
    assert not all(
        torch.allclose(a, b, atol=1e-4) for a, b in zip(changed.parameters(), alone.model.parameters(), strict=True)
    )


def test_a_teacher_in_a_loop_is_in_eval_mode_and_gets_no_gradient():
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    student = copy.deepcopy(parent)
    modes = []
    parent[2].register_forward_hook(lambda module, *_: modes.append(module.training))
    before = states(parent)
    teacher = Teacher(Distill(alpha=1), student, parent)
    teacher.loss(torch.randn(6, 4)).backward()
    assert modes == [False] and parent.training and parent[2].training and unchanged(before, parent)
    assert all(p.grad is None for p in parent.parameters()) and all(p.grad is not None for p in student.parameters())


# ----------------------------------------------------------------------------------------- batches without targets


def clusters(n, seed=0):
    y = torch.arange(n) % 4
    centers = 2 * torch.randn(4, 6, generator=torch.Generator().manual_seed(7))
    return centers[y] + torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)), y


def checkerboard(n, seed=0):
    x = 2 * torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) - 1
    return x, (3 * x).floor().sum(1).long() % 2


def trained(samples, width, classes, steps):
    torch.manual_seed(0)
    x, y = samples(1024)
    layers = [nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def test_unlabeled_data_recover_a_network():
    model, (x, _) = trained(clusters, 48, 4, 100), clusters(256, seed=1)
    test = [clusters(512, seed=2)]
    budget, lists = sc.Budget(macs=0.1), DataLoader(TensorDataset(x), batch_size=32)  # batches [inputs]
    options = {"method": "random", "granularity": "channel", "budget": budget, "data": lists, "validation": test}
    cut = sc.prune(model, x[:1], **{**options, "validation": None})
    recovered = sc.prune(model, x[:1], recovery={"name": "distill", "alpha": 1, "epochs": 20, "lr": 0.01}, **options)
    dense, before, after = (accuracy(test)(m) for m in (model, cut.model, recovered.model))
    assert before < dense - 0.1 and after > dense - 0.03
    with pytest.raises(DataNeeded, match="alpha=1"):
        sc.prune(model, x[:1], recovery={"name": "distill", "alpha": 0.5}, **options)
    with pytest.raises(DataNeeded, match="needs targets, and these batches have none"):
        sc.prune(model, x[:1], recovery="fine-tune", **options)
    with pytest.raises(DataNeeded, match="calibration="):
        sc.prune(model, x[:1], recovery={"name": "distill", "alpha": 1}, **{**options, "method": "taylor"})


def test_unlabeled_data_beat_a_few_labels_in_equally_many_steps():
    model, test = trained(checkerboard, 64, 2, 300), [checkerboard(2048, seed=1)]
    x, y = checkerboard(512, seed=2)
    options = {"method": "random", "granularity": "channel", "budget": sc.Budget(macs=0.25)}
    training = {"optimizer": "adamw", "lr": 0.005}
    few = sc.prune(
        model, x[:1], data=[(x[:32], y[:32])], recovery={"name": "fine-tune", "epochs": 160, **training}, **options
    )
    taught = sc.prune(
        model, x[:1], data=x.split(64), recovery={"name": "distill", "alpha": 1, "epochs": 20, **training}, **options
    )
    assert few.history[-1]["step"] == taught.history[-1]["step"] == 160
    assert accuracy(test)(taught.model) > accuracy(test)(few.model) + 0.05


# ------------------------------------------------------------------------------------------------ a loop of one's own


def test_a_loop_of_ones_own_is_the_same_training():
    """The pruner's teacher over two cuts gives what our trainer gives."""
    torch.manual_seed(0)
    model = residual_network().double().eval()
    data = [torch.randn(8, 1, 6, 6, dtype=DOUBLE) for _ in range(4)]
    settings = {
        "name": "distill",
        "alpha": 1,
        "features": 0.5,
        "epochs": 2,
        "lr": 1e-3,
        "weight_decay": 0,
        "lr_schedule": "constant",
    }
    options = {"granularity": "channel", "budget": sc.Budget(macs=0.4), "schedule": {"name": "iterative", "steps": 2}}
    expected = sc.prune(model, data[0], data=data, recovery=settings, **options)
    student = copy.deepcopy(model)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    pruner = sc.Pruner(student, data[0], optimizers=optimizer, total_steps=8, **options)
    teacher = pruner.teacher(model, settings)
    student.train()
    for step in range(8):
        if step == 0:
            pruner.steps = -1  # our trainer cuts before the first step
            pruner.step()
        optimizer.zero_grad()
        (teacher.loss(data[step % 4]) + pruner.loss_term()).backward()
        optimizer.step()
        pruner.step()
    assert pruner.result().structure_plan == expected.structure_plan
    for name, value in student.state_dict().items():
        assert torch.allclose(value, expected.model.state_dict()[name], rtol=1e-9), name
    assert len(teacher.teach(student, (data[0],), {})[1].features) == 2
    again = copy.deepcopy(model)
    resumed = sc.Pruner(
        again, data[0], optimizers=torch.optim.SGD(again.parameters(), lr=1e-3), total_steps=8, **options
    )
    late = resumed.teacher(model, settings)
    resumed.load_state_dict(pruner.state_dict())
    again.load_state_dict(student.state_dict())
    assert torch.equal(late.loss(data[0]), teacher.loss(data[0]))
    with pytest.raises(InvalidRecipe, match="learns from no teacher"):
        pruner.teacher(model, "fine-tune")
    with pytest.raises(PlanMismatch, match="pass the unpruned network"):
        pruner.teacher(student, settings)


# ---------------------------------------------------------------------------------------------------------- errors


def test_what_makes_no_sense_is_refused_before_anything_is_trained():
    model, x = toy("mlp")
    data, budget = toy_batches("mlp"), sc.Budget(macs=0.5)

    def prune(recovery, **options):
        return sc.prune(model, x, granularity="channel", budget=budget, data=data, recovery=recovery, **options)

    with pytest.raises(InvalidRecipe, match="'fine-tune' learns from none: take 'distill'"):
        prune("fine-tune", teachers=[model])
    with pytest.raises(UnknownName, match="module to compare .* 'body.7'"):
        prune({"name": "distill", "features": 1, "modules": ["body.7"]})
    with pytest.raises(InvalidInputs, match="a network, or a state dict of the unpruned one; got str"):
        prune("distill", teachers=["parent.pt"])
    with pytest.raises(InvalidInputs, match="state dict does not fit"):
        prune("distill", teachers=[nn.Linear(2, 3).state_dict()])
    with pytest.raises(InvalidInputs, match="logits of one shape"):
        prune("distill", teachers=[nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 99))])
    with pytest.raises(NotApplicable, match="no module whose features could be compared"):
        compared_modules(sc.trace(nn.Linear(3, 4), torch.randn(2, 3)))


def test_modules_that_do_not_run_or_mix_samples_with_units_are_named():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.mixed, self.b = nn.Linear(3, 8), nn.Identity(), nn.Linear(8, 2)

        def forward(self, x):
            h = self.a(x)
            if len(x) < 9:
                h = self.mixed(h.flatten()).unflatten(0, (x.shape[0], -1))
            return self.b(h.relu())

    torch.manual_seed(0)
    x = torch.randn(1, 3)
    student, teacher = pruned_and_teacher(Mixed(), x, modules=("mixed",), alpha=1)
    assert student.a.out_features == 4 and teacher.loss(x) >= 0
    with pytest.raises(InvalidInputs, match=r"'mixed' returns \(20,\) in the student and \(40,\) in what is left"):
        teacher.loss(torch.randn(5, 3))
    with pytest.raises(InvalidInputs, match="'mixed' did not run"):
        teacher.loss(torch.randn(9, 3))


def test_a_failing_training_leaves_no_hooks():
    model, x = toy("mlp")
    student = copy.deepcopy(model)
    settings = Distill(alpha=1, features=1)
    teacher = Teacher(settings, student, model, structure=sc.trace(model, x))
    with pytest.raises(RuntimeError, match="shape"):
        Trainer(student, settings, teacher=teacher).run([torch.zeros(2, 3, 999)], 0, 1)
    assert not hooks_of(model) and not hooks_of(student)
