from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import secateur as sc
from secateur.core.masks import Masks
from secateur.core.select import top_k
from secateur.errors import MissingCheckpoint
from secateur.parts.recovery.fine_tune import FineTune
from secateur.tasks import find_task
from secateur.tasks.reference import early_state
from secateur.testing.toys import toy, toy_batches
from secateur.training.loop import Trainer

RECOVERY = {"name": "fine-tune", "epochs": 1, "lr": 0.05}
ROUNDS = {"name": "iterative", "steps": 4, "whole": True}
LEFT = 0.8**4
"""Four rounds in which a fifth of what is left goes."""


def trained(at=()):
    """Return a trained network, and the states it had at some steps."""
    model, x = toy("mlp")
    data, kept = toy_batches("mlp"), {"init": copy.deepcopy(model.state_dict())}

    def keep(state):
        if state.step in at:
            kept[state.step] = copy.deepcopy(state.model.state_dict())

    Trainer(model, FineTune(epochs=2, lr=0.05)).run(data, 0, 2 * len(data), on_step=keep)
    return model, x, data, kept


def tickets(model, x, data, **options):
    options = {"schedule": ROUNDS, "recovery": RECOVERY, "budget": sc.Budget(sparsity=1 - LEFT), **options}
    return sc.prune(model, x, method="lottery", data=data, **options)


def test_each_round_trains_from_the_first_weights_and_the_density_is_exact():
    model, x, data, kept = trained()
    begins = []

    def watch(state):
        if state.step % len(data) == 1:
            begins.append({n: p.detach().clone() for n, p in state.model.named_parameters()})

    found = tickets(model, x, data, checkpoints=kept, on_step=watch)
    total = sum(mask.numel() for mask in found.masks.values())
    share = round(LEFT * total) / total
    assert [r.cost for r in found.rounds] == [int(share ** (i / 4) * total + 1e-9) for i in (1, 2, 3, 4)]
    assert len(begins) == 4 and found.history[-1]["step"] == 4 * len(data)
    recipe = found.recipe.but(recovery="none")
    ticket = sc.prune(model, x, method=recipe, budget=found.budget, checkpoints=kept, data=data)
    for name, weight in ticket.model.named_parameters():
        assert torch.equal(weight, kept["init"][name] * ticket.masks.get(name, torch.ones_like(weight)))


@pytest.mark.parametrize("step", [0, 3])
def test_weights_are_rewound_to_the_step_that_the_recipe_names(step):
    model, x, data, kept = trained(at=(3,))
    source = step or "init"
    found = tickets(model, x, data, weights_from=source, checkpoints=kept, recovery="none", schedule="one-shot")
    largest = sc.prune(model, x, budget=found.budget).masks
    assert all(torch.equal(mask, largest[name]) for name, mask in found.masks.items())
    assert all(torch.equal(found.model.state_dict()[n], kept[source][n] * mask) for n, mask in found.masks.items())
    with pytest.raises(MissingCheckpoint):
        tickets(model, x, data, weights_from=7, checkpoints=kept)
    with pytest.raises(MissingCheckpoint, match="none"):
        tickets(model, x, data)


def test_rewinding_to_the_end_is_iterative_pruning():
    """Each round goes on from the weights that the last one has trained (specification B 5, check), bit by bit."""
    model, x, data, _ = trained()
    found = tickets(model, x, data, weights_from="same")
    ours, masks = copy.deepcopy(model), {}
    kernels = {name: weight for name, weight in ours.named_parameters() if weight.dim() > 1}
    trainer = Trainer(ours, FineTune(**{k: v for k, v in RECOVERY.items() if k != "name"}))
    for i, done in enumerate(found.rounds):
        scores = {
            n: w.detach().abs().masked_fill(~masks[n], -1) if masks else w.detach().abs() for n, w in kernels.items()
        }
        masks = top_k(scores, int(done.cost))
        trainer.mask(Masks(ours, masks))
        trainer.run(data, i * len(data), (i + 1) * len(data))
    assert all(torch.equal(masks[n], mask) for n, mask in found.masks.items())
    assert all(torch.equal(t, found.model.state_dict()[n]) for n, t in ours.state_dict().items())


def test_rewinding_fine_tuning_and_the_learning_rate_are_answers_to_two_questions():
    """What the learning rate does in each round, by the three values (Renda et al.)."""
    model, x, data, kept = trained()
    rates = {}
    low = {**RECOVERY, "lr": 0.001, "lr_schedule": "constant"}
    for name, slots in {
        "weights": {"weights_from": "init"},
        "learning rate": {"weights_from": "same"},
        "fine-tuning": {"weights_from": "same", "recovery": low},
    }.items():
        seen = []
        tickets(model, x, data, checkpoints=kept, on_step=lambda state, seen=seen: seen.append(state.lr), **slots)
        rates[name] = seen
    assert rates["weights"] == rates["learning rate"] and rates["fine-tuning"] == [0.001] * len(rates["weights"])
    n = len(data)
    assert rates["weights"][:n] == rates["weights"][n : 2 * n] and rates["weights"][0] == 0.05


def test_new_weights_at_the_last_cut_are_trained_under_the_mask_of_the_ticket():
    model, x, data, kept = trained()
    ticket = tickets(model, x, data, checkpoints=kept)
    steps = {}

    def keep(state):
        steps[state.step] = copy.deepcopy(state.model.state_dict())

    source = {"name": "fresh-at-last", "earlier": "init"}
    found = tickets(model, x, data, weights_from=source, checkpoints=kept, on_step=keep)
    assert all(torch.equal(mask, ticket.masks[name]) for name, mask in found.masks.items())
    first = steps[3 * len(data) + 1]  # one step of the last round: far from the ticket's first weights, as new ones are
    for name, mask in found.masks.items():
        old, new = kept["init"][name][mask], first[name][mask]
        assert torch.corrcoef(torch.stack([old, new]))[0, 1].abs() < 0.5 and (first[name] != 0)[mask].all()
    with pytest.raises(MissingCheckpoint, match="init"):
        tickets(model, x, data, weights_from=source)


def test_a_fresh_network_is_trained_first_and_is_its_own_init():
    model, x = toy("mlp")
    data, init = toy_batches("mlp"), copy.deepcopy(model.state_dict())
    schedule = {"name": "one-shot", "at": 0.5}
    found = tickets(model, x, data, schedule=schedule, recovery={**RECOVERY, "epochs": 2})
    pretrained = copy.deepcopy(model)
    Trainer(pretrained, FineTune(epochs=1, lr=0.05)).run(data, 0, len(data))
    largest = sc.prune(pretrained, x, budget=found.budget).masks
    assert all(torch.equal(mask, largest[name]) for name, mask in found.masks.items())
    assert all(torch.equal(init[n], t) for n, t in model.state_dict().items())


def test_in_a_loop_of_the_users_own():
    model, x, data, kept = trained()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = sc.Pruner(
        model, x, optimizers=sgd, total_steps=8, method="lottery", schedule={"name": "iterative", "steps": 4},
        budget=sc.Budget(sparsity=1 - LEFT), checkpoints=kept,
    )  # fmt: skip
    masks = []
    for i in range(8):
        inputs, target = data[i % len(data)]
        sgd.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        sgd.step()
        if pruner.step() is not None:
            now = pruner._run.units.masks
            assert all(torch.equal(model.state_dict()[n], kept["init"][n] * m) for n, m in now.items())
            assert not masks or all((masks[-1][n] | ~m).all() for n, m in now.items())
            masks.append(now)
    assert len(masks) == 4 and pruner.done


def test_a_benchmark_knows_the_weights_that_its_reference_had_at_a_step():
    task, settings = find_task("digits"), FineTune(epochs=1, lr=0.05)
    data, kept = task.train_batches(3), {}

    def keep(state):
        if state.step == 1:
            kept.update(copy.deepcopy(state.model.state_dict()))

    torch.manual_seed(3)
    model = task.build("resnet8")
    init = copy.deepcopy(model.state_dict())
    Trainer(model, settings, loss=task.loss, precision=task.precision).run(
        data, 0, 1, lr_span=(0, len(data)), on_step=keep
    )
    for step, expected in ((0, init), (1, kept)):
        found = early_state(task, "resnet8", seed=3, settings=settings, step=step)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
