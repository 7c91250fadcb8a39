from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import secateur as sc
from secateur.core.slots import Scope
from secateur.errors import DataNeeded, NotApplicable
from secateur.methods.fisher import Fisher
from secateur.methods.taylor import Taylor
from secateur.parts.gates import Gates
from secateur.parts.granularity.channel import Channel
from secateur.parts.granularity.weight import Weight
from secateur.testing.toys import TwoLayer, toy, toy_batches


def half_square(output, target):
    """L_n = s_n² / 2 with s_n = the output of sample n."""
    return output.square().sum(1).mean() / 2


def problem(seed=0, n=7):
    torch.manual_seed(seed)
    model = TwoLayer(torch.randn(5, 3, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)).eval()
    return model, torch.randn(n, 3, dtype=torch.float64)


def score(model, data, loss=half_square):
    units = Channel().units(model, data[0][0][:1], Scope())
    return Fisher().score(sc.Context(units, data, loss))


def test_for_a_quadratic_loss_of_every_sample_the_score_has_a_closed_form():
    model, x = problem()
    found = score(model, [(x, x)])["hidden"]
    parts = torch.relu(x @ model.hidden.weight.T) * model.head.weight[0]  # what each unit adds to the output s
    g = parts.sum(1, keepdim=True) * parts  # dL_n/dz_c = s_n ds_n/dz_c
    assert torch.allclose(found, g.square().sum(0) / (2 * len(x)), rtol=1e-10)


@pytest.mark.parametrize("network", ["resnet20", "vit"])
def test_scores_agree_with_finite_differences_of_every_samples_loss_by_the_gates(network):
    model, x = toy(network)
    model, ((inputs, target),) = model.double(), toy_batches(network, n=1, batch_size=4)
    scope = Scope(include=("blocks.[01]*",)) if network == "resnet20" else Scope()
    units = Channel().units(model, x.double(), scope)
    scores, gates, step = Fisher().score(sc.Context(units, [(inputs.double(), target)])), Gates(units), 1e-5

    def losses(group, unit, z):
        gate = torch.ones(units.shapes[group], dtype=torch.float64)
        gate[unit] = z
        with torch.no_grad(), gates.applied({group: gate}):
            return F.cross_entropy(model(inputs.double()), target, reduction="none")

    for group, shape in list(units.shapes.items())[:5]:
        unit = shape.numel() - 1
        slopes = (losses(group, unit, 1 + step) - losses(group, unit, 1 - step)) / (2 * step)
        assert scores[group][unit].item() == pytest.approx(slopes.square().mean().item() / 2, rel=1e-6, abs=1e-16)


def test_scores_are_hand_computed():
    model = TwoLayer(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0]])).eval()
    x = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    # s = 2 + 1 = 3 and 0 + 3 = 3; g = 3 * (2, 1) and 3 * (0, 3); squares (36, 9) and (0, 81)
    assert score(model, [(x, x)])["hidden"].tolist() == [36 / 4, 90 / 4]


def test_scores_do_not_depend_on_how_samples_are_put_into_batches():
    """A last batch that is smaller counts as many samples as it has; the mean gradient of a batch is not squared."""
    model, x = problem(1)
    whole = score(model, [(x, x)])["hidden"]
    assert torch.allclose(score(model, [(x[:4], x[:4]), (x[4:6], x[4:6]), (x[6:], x[6:])])["hidden"], whole)
    one_by_one = [(x[i : i + 1], x[i : i + 1]) for i in range(len(x))]
    units = Channel().units(model, x[:1], Scope())
    assert torch.allclose(Taylor().score(sc.Context(units, one_by_one, half_square))["hidden"] / 2, whole)


def test_a_channel_that_is_multiplied_by_zero_downstream_has_score_zero_and_goes_first():
    model, x = toy("mlp")
    with torch.no_grad():
        model[5].weight[:, 7] = 0
    data = toy_batches("mlp")
    scores = score(model, data, loss=None)
    assert scores["3"][7] == 0 and sum(int((s == 0).sum()) for s in scores.values()) == 1
    pruned = sc.prune(model, x, method="fisher", granularity="channel", budget=sc.Budget(params=0.995), data=data)
    assert {name: axis.kept for name, axis in pruned.structure_plan.axes.items()} == {
        "3": tuple(i for i in range(24) if i != 7)
    }


def test_single_weights_and_missing_data_are_refused():
    model, x = toy("mlp")
    with pytest.raises(NotApplicable, match="choose such a granularity"):
        Fisher().score(sc.Context(Weight().units(model, x, Scope()), toy_batches("mlp")))
    with pytest.raises(DataNeeded):
        sc.prune(model, x, method="fisher", granularity="channel", budget=sc.Budget(macs=0.5))
