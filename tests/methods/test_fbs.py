from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import secateur as sc
from secateur.core.hooks import TrainingState
from secateur.core.slots import Scope
from secateur.errors import InvalidRecipe, NotApplicable, PlanMismatch
from secateur.methods.fbs import FBS, Boosting, saliencies
from secateur.parts.granularity.channel_per_input import ChannelPerInput
from secateur.structure.gated import gates_of, largest
from secateur.tasks.networks import build_network

RECOVERY = {"name": "fine-tune", "epochs": 1, "lr": 0.02}


def network():
    torch.manual_seed(0)
    return build_network("resnet8", 8, 8)


def batches(n=2, size=16, seed=0):
    """Images whose class is where they are bright."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 4, (n, size), generator=generator)
    images = torch.randn(n, size, 1, 8, 8, generator=generator)
    for image, target in zip(images.flatten(0, 1), targets.flatten(), strict=True):
        image[0, 4 * (int(target) // 2) :, 4 * (int(target) % 2) :] += 3
    return list(zip(images, targets, strict=True))


X = batches()[0][0][:1]


def prune(model=None, budget=None, **options):
    options = {"recovery": RECOVERY, "data": batches(), **options}
    return sc.prune(model or network(), X, method="fbs", budget=budget or sc.Budget(sparsity=0.5), **options)


def units_of(model):
    return ChannelPerInput().units(model, X, Scope())


@pytest.fixture(scope="module")
def pruned():
    return prune(recovery={**RECOVERY, "epochs": 5})


class Fake:
    """What hooks and scores need of a run."""

    def __init__(self, units, seed=0):
        self.units, self.seed = units, seed


def test_the_penalty_is_the_mean_over_samples_of_the_l1_norm_of_all_saliencies():
    model = network().train()
    units = units_of(model)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1), 0, 10)
    hooks = Boosting(Fake(units), FBS(penalty=0.5))
    hooks.on_start(state)
    for gate in units.gates.values():
        gate.winners = 2  # those that lose count, too
    x = batches()[0][0]
    with saliencies(units.gates) as found:
        model(x)
    expected = sum(sum(sample.tolist()) for predicted in found.values() for sample in predicted) / len(x)
    term = hooks.loss_term(state)
    assert term.item() == pytest.approx(0.5 * expected, rel=1e-5)
    last = units.gates["blocks.2.conv2"]
    assert torch.autograd.grad(term, last.saliency.bias)[0].allclose(torch.full((32,), 0.5))  # all gates are open
    assert hooks.loss_term(state) is None  # no forward pass since
    hooks.on_end(state)
    model(x)
    assert hooks.loss_term(state) is None
    assert not any(module._forward_hooks for module in model.modules())


def test_scores_are_the_mean_saliencies_of_the_most_salient_channel_the_second_and_so_on():
    model, data = network(), batches(3, 5)
    units = units_of(model)
    for gate in units.gates.values():
        nn.init.normal_(gate.saliency.weight)
    found = FBS().score(sc.Context(units, data))
    with saliencies(units.gates) as predicted, torch.no_grad():
        model.eval()(torch.cat([x for x, _ in data]))
    for path, saliency in predicted.items():
        assert torch.allclose(found[path].float(), saliency.sort(1, descending=True).values.mean(0), rtol=1e-4)
        assert (found[path].diff() <= 0).all()


def test_predictors_are_drawn_once_by_the_seed_and_trained_by_an_optimizer_that_did_not_know_them():
    drawn = []
    for seed in (0, 0, 1):
        model = network()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        units = units_of(model)
        hooks = Boosting(Fake(units, seed), FBS())
        hooks.on_start(TrainingState(model, sgd, 0, 10))
        drawn.append(torch.cat([gate.saliency.weight.flatten() for gate in units.gates.values()]).detach())
        hooks.on_start(TrainingState(model, sgd, 5, 10))  # the next stretch, or a checkpoint
        assert torch.equal(drawn[-1], torch.cat([g.saliency.weight.flatten() for g in units.gates.values()]))
        held = [id(p) for group in sgd.param_groups for p in group["params"]]
        assert len(held) == len(set(held)) and {id(p) for p in model.parameters()} <= set(held)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].abs().max().item() <= 0.1 and 0.03 < drawn[0].std().item() < 0.05


def test_pruning_ends_at_the_density_and_each_input_has_channels_of_its_own(pruned):
    gates = gates_of(pruned.model)
    assert {path: gate.winners for path, gate in gates.items()} == pruned.rounds[-1].counts
    assert all(gate.winners == gate.convolution.out_channels // 2 for gate in gates.values())
    assert [round(r.keep, 6) for r in pruned.rounds] == [0.9, 0.8, 0.7, 0.6, 0.5]
    with torch.no_grad(), saliencies(gates) as predicted:
        pruned.model(batches()[0][0])
    winners = largest(predicted["blocks.2.conv2"], 16)
    assert len({tuple(row.tolist()) for row in winners}) > 1
    assert pruned.history[-1]["train_loss"] < pruned.history[0]["train_loss"]
    assert pruned.model(X).shape == (1, 10)


def test_a_budget_in_macs_is_what_any_input_takes_at_most():
    found = prune(budget=sc.Budget(macs=0.4))
    assert 0.38 * found.before.macs < found.after.effective_macs <= 0.4 * found.before.macs
    assert found.after.macs > found.before.macs  # a dense engine computes everything, and the predictions


def test_the_result_survives_a_file_and_reports(pruned, tmp_path):
    sc.save(pruned, tmp_path / "gated.safetensors")
    again = sc.load(tmp_path / "gated.safetensors", network)
    assert {path: gate.winners for path, gate in gates_of(again).items()} == pruned.rounds[-1].counts
    for x in (X, batches()[0][0]):
        assert torch.allclose(again(x), pruned.model(x), atol=1e-5)
    with pytest.raises(PlanMismatch, match="gates"):
        sc.load(tmp_path / "gated.safetensors", lambda: nn.Sequential(nn.Linear(2, 2)))
    page = pruned.report()
    assert "Channels per input" in page and "blocks.2.conv2" in page


def test_it_works_from_a_recipe_file(tmp_path, monkeypatch, capsys):
    from secateur.cli.prune import command

    (tmp_path / "gated_user.py").write_text("from tests.methods.test_fbs import network as make, batches as data\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    content = {
        "model": "gated_user:make", "data": "gated_user:data", "example": [1, 1, 8, 8], "method": "fbs",
        "budget": {"macs": 0.5}, "recipe": {"recovery": RECOVERY, "criterion": {"name": "fbs", "penalty": 1e-4}},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    command(tmp_path / "recipe.yaml", out=tmp_path / "out", model=None, data=None, seed=None)
    assert "at most" in capsys.readouterr().out
    assert gates_of(sc.load(tmp_path / "out" / "model.safetensors", network))


def test_it_works_in_a_loop_of_the_users_own_and_goes_on_from_a_checkpoint():
    def start():
        model = network()
        sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        pruner = sc.Pruner(
            model, X, optimizers=sgd, total_steps=10, method="fbs", criterion=FBS(penalty=1e-3), data=batches(),
            budget=sc.Budget(sparsity=0.5),
        )  # fmt: skip
        return model, sgd, pruner

    def train(model, sgd, pruner, steps):
        for step in steps:
            x, y = batches()[step % 2]
            sgd.zero_grad()
            (F.cross_entropy(model(x), y) + pruner.loss_term()).backward()
            sgd.step()
            pruner.step()

    model, sgd, pruner = start()
    first = gates_of(model)["conv1"].saliency.weight.clone()
    train(model, sgd, pruner, range(5))
    kept = copy.deepcopy((model.state_dict(), sgd.state_dict(), pruner.state_dict()))
    assert not torch.equal(gates_of(model)["conv1"].saliency.weight, first)
    again, other, resumed = start()
    resumed.load_state_dict(kept[2])
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    train(model, sgd, pruner, range(5, 10))
    train(again, other, resumed, range(5, 10))
    assert all(gate.winners == gate.convolution.out_channels // 2 for gate in gates_of(again).values())
    assert torch.equal(resumed.result().model(X), pruner.result().model(X))


def test_what_it_cannot_do_is_one_clear_error():
    with pytest.raises(NotApplicable, match="granularity='channel-per-input'"):
        prune(granularity="channel")
    with pytest.raises(InvalidRecipe, match="trains nothing"):
        prune(recovery="none")
    with pytest.raises(InvalidRecipe, match="first cut must come later"):
        prune(schedule="one-shot")
    with pytest.raises(NotApplicable, match="keeps all weights"):
        prune(budget=sc.Budget(bytes=1000))
    with pytest.raises(NotApplicable, match="BatchNorm2d"):
        prune(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    model = network()
    with pytest.raises(NotApplicable, match="Copies"):
        sc.Pruner(
            model, X, optimizers=torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9, method="fbs",
            copies=network(), budget=sc.Budget(sparsity=0.5), data=batches(),
        )  # fmt: skip
