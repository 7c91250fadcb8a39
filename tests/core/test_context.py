from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.core.slots import Scope
from secateur.errors import DataNeeded, InvalidRecipe, NotApplicable
from secateur.parts.granularity.channel import Channel
from secateur.parts.granularity.weight import Weight
from secateur.testing.toys import toy, toy_batches


def context_of(model, x, data, **kwargs):
    return sc.Context(Weight().units(model, x, Scope()), data, **kwargs)


def two_layers():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(n, 3, dtype=torch.float64), torch.randint(0, 2, (n,))) for n in (5, 2)]
    return model, data


def mean_loss(model, data):
    return sum(F.cross_entropy(model(x), y, reduction="sum") for x, y in data) / sum(len(y) for _, y in data)


def test_gradients_are_those_of_the_mean_over_all_samples_by_finite_differences():
    model, data = two_layers()
    gradients = context_of(model, data[0][0], data).gradients()
    for name, parameter in model.named_parameters():
        if name not in gradients:
            continue
        for index in [(0, 0), (1, 2)]:
            eps, old = 1e-6, parameter.data[index].item()
            parameter.data[index] = old + eps
            up = mean_loss(model, data)
            parameter.data[index] = old - eps
            down = mean_loss(model, data)
            parameter.data[index] = old
            assert gradients[name][index].item() == pytest.approx(((up - down) / (2 * eps)).item(), rel=1e-5, abs=1e-9)


def test_hessian_vector_product_equals_the_full_hessian():
    model, data = two_layers()
    names = ["0.weight", "2.weight"]
    parameters = dict(model.named_parameters())
    shapes = [parameters[n].shape for n in names]

    def loss_of(flat):
        first, second = flat[: shapes[0].numel()].view(shapes[0]), flat[shapes[0].numel() :].view(shapes[1])
        state = {
            "0.weight": first,
            "2.weight": second,
            "0.bias": model[0].bias.detach(),
            "2.bias": model[2].bias.detach(),
        }
        total = sum(F.cross_entropy(torch.func.functional_call(model, state, x), y, reduction="sum") for x, y in data)
        return total / 7

    flat = torch.cat([parameters[n].detach().flatten() for n in names])
    hessian = torch.autograd.functional.hessian(loss_of, flat)
    vectors = {n: torch.randn(s, dtype=torch.float64) for n, s in zip(names, shapes, strict=True)}
    expected = hessian @ torch.cat([vectors[n].flatten() for n in names])
    found = context_of(model, data[0][0], data).hessian_vector_product(vectors)
    assert torch.allclose(torch.cat([found[n].flatten() for n in names]), expected, rtol=1e-8, atol=1e-12)


def test_attention_has_second_derivatives_and_its_hessian_is_symmetric():
    model, x = toy("vit")
    context = context_of(model.double(), x.double(), [(x.double(), torch.tensor([3, 4]))])
    a, b = ({n: torch.randn_like(w) for n, w in context.weights.items()} for _ in range(2))
    dot = lambda u, v: sum(float((u[n] * v[n]).sum()) for n in u)  # noqa: E731
    assert dot(a, context.hessian_vector_product(b)) == pytest.approx(dot(b, context.hessian_vector_product(a)))


def test_second_moments_of_linear_and_convolution_inputs():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 3)
    ).double()
    data = [(torch.randn(3, 2, 5, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.long)) for _ in range(2)]
    moments = context_of(model, data[0][0], data).second_moments()
    x = torch.cat([d[0] for d in data])
    hidden = model[:3](x)
    assert torch.allclose(moments["3.weight"], hidden.T @ hidden / 6)
    assert moments["0.weight"].shape == (2, 9, 9)
    patches = F.unfold(x, 3, padding=1)[:, 9:].transpose(1, 2).reshape(-1, 9)  # second group
    assert torch.allclose(moments["0.weight"][1], patches.T @ patches / len(patches))


def test_second_moments_leave_normalizations_out():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, eps=0.0), nn.Linear(2, 1)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        model[1].running_mean.copy_(torch.tensor([1.0, 3.0]))
        model[1].running_var.fill_(4.0)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)  # behind the first layer (1, 3) and (3, 7)
    context = sc.Context(Channel().units(model, x, Scope()), [(x, torch.zeros(2))])
    assert "1.weight" in context.weights
    moments = {name: moment.tolist() for name, moment in context.second_moments().items()}
    assert moments == {"0.weight": [[5, 7], [7, 10]], "2.weight": [[0.5, 1], [1, 2]]}


def test_second_moments_are_of_all_that_meets_a_shared_weight():
    shared = nn.Linear(2, 2, bias=False)
    model = nn.Sequential(shared, nn.Linear(2, 2, bias=False), nn.Linear(2, 1)).double()
    model[1].weight = shared.weight
    with torch.no_grad():
        shared.weight.copy_(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    x = torch.tensor([[1.0, 3.0]], dtype=torch.float64)  # behind the first layer (6, 1)
    context = context_of(model, x, [(x, torch.zeros(1))])
    assert context.second_moments()["0.weight"].tolist() == [[(1 + 36) / 2, (3 + 6) / 2], [(3 + 6) / 2, (9 + 1) / 2]]


def test_second_moments_refuse_layers_they_do_not_know():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(NotApplicable, match="Conv1d cannot"):
        context_of(model, torch.randn(1, 2, 4), [(torch.randn(1, 2, 4), torch.zeros(1).long())]).second_moments()


def test_activations_stream_over_batches():
    model, x = toy("mlp")
    seen = []
    context_of(model, x, toy_batches("mlp", n=3)).activations(
        lambda name, m, i, o: seen.append((name, i.shape, o.shape))
    )
    assert len(seen) == 9 and seen[0] == ("1.weight", (8, 48), (8, 32))
    assert not any(module._forward_hooks for module in model.modules())


def test_data_are_counted_and_missing_data_are_an_error():
    model, x = toy("mlp")
    context = context_of(model, x, toy_batches("mlp", n=3, batch_size=5))
    context.gradients()
    context.gradients()  # cached
    assert (context.batches_used, context.samples_used) == (3, 15)
    list(context.gradient_batches())
    assert context.samples_used == 30
    with pytest.raises(DataNeeded, match="none was given"):
        context_of(model, x, None).gradients()
    with pytest.raises(DataNeeded, match="empty"):
        context_of(model, x, iter(())).gradients()
    with pytest.raises(DataNeeded, match="A batch must be"):
        context_of(model, x, [(x, x, x)]).gradients()


def test_models_with_their_own_loss_take_mappings():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, inputs, labels):
            logits = self.a(inputs)
            return type("Output", (), {"logits": logits, "loss": F.cross_entropy(logits, labels)})()

    model = WithLoss()
    batch = {"inputs": torch.randn(6, 4), "labels": torch.randint(0, 3, (6,))}
    gradient = context_of(model, batch, [batch]).gradients()["a.weight"]
    model(**batch).loss.backward()
    assert torch.allclose(gradient, model.a.weight.grad)


def test_everything_leaves_the_model_bit_identical():
    model, x = toy("resnet20")
    model.train()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    context = context_of(model, x, toy_batches("resnet20", n=2))
    context.gradients()
    context.second_moments()
    context.hessian_vector_product({n: torch.ones_like(p) for n, p in context.weights.items()})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and model.training and model.blocks[0].bn1.training
    assert not model.conv1.weight.requires_grad and model.conv1.weight.grad is None
    assert model.fc.weight.grad.eq(1).all()


def test_frozen_parameters_get_gradients_too():
    model, data = two_layers()
    expected = context_of(model, data[0][0], data).gradients()["0.weight"]
    model[0].weight.requires_grad_(False)
    found = context_of(model, data[0][0], data).gradients()["0.weight"]
    assert torch.equal(found, expected)


def test_a_context_at_other_values_gives_their_gradients_and_curvature_and_leaves_the_model_alone():
    model, data = two_layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context = context_of(model, data[0][0], data)
    here = context.gradients()
    values = {name: 0.5 * weight for name, weight in context.weights.items()}
    halved = context.but(values=values)
    assert halved.weights["0.weight"] is not model[0].weight and torch.equal(
        halved.weights["0.weight"], values["0.weight"]
    )
    there, curved = halved.gradients(), halved.hessian_vector_product(here)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not values["0.weight"].requires_grad and context.gradients() is here
    with torch.no_grad():
        model[0].weight *= 0.5
        model[2].weight *= 0.5
    moved = context_of(model, data[0][0], data)
    for name, gradient in moved.gradients().items():
        torch.testing.assert_close(there[name], gradient)
        torch.testing.assert_close(curved[name], moved.hessian_vector_product(here)[name])
    assert context.samples_used == halved.samples_used == 3 * 7


def test_a_context_with_another_loss_shares_everything_else():
    model, data = two_layers()
    context = context_of(model, data[0][0], data)
    doubled = context.but(loss=lambda output, target: 2 * F.cross_entropy(output, target))
    for name, gradient in context.gradients().items():
        torch.testing.assert_close(doubled.gradients()[name], 2 * gradient)


def test_only_a_run_can_choose():
    model, data = two_layers()
    context = context_of(model, data[0][0], data)
    assert context.keep == 1.0
    with pytest.raises(InvalidRecipe, match="only a pruning run"):
        context.choose(context.weights, 0.5)
