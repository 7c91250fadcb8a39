from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Lasso as SklearnLasso
from torch import nn

import secateur as sc
from secateur.core.context import Context
from secateur.core.slots import Scope
from secateur.errors import DataNeeded
from secateur.methods.lasso import Lasso, entries
from secateur.parts.granularity.channel import Channel
from secateur.testing.toys import toy


def problem(hidden=6):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, 4)).double()
    x = torch.randn(40, 5, dtype=torch.float64)
    return model, x, [(part, None) for part in x.split(9)]


def test_at_any_penalty_the_nonzero_coefficients_are_those_of_the_lasso_on_all_activations():
    model, x, data = problem()
    units = Channel().units(model, x[:1], Scope())
    scores = Lasso().score(Context(units, data))["0"]
    hidden, weight = model[:2](x).detach(), model[2].weight.detach()
    norms = weight.norm(dim=0)
    columns = torch.einsum("nj,oj->noj", hidden, weight / norms).reshape(-1, 6)  # X_j W_j with |W_j| = 1
    target = (hidden @ weight.T).reshape(-1)
    largest = float((columns.T @ target).abs().max()) / len(columns)
    assert scores.max() == 1
    for share in (0.9, 0.5, 0.2, 0.05, 0.01):
        fit = SklearnLasso(alpha=share * largest, fit_intercept=False, tol=1e-12, max_iter=100_000)
        found = torch.from_numpy(fit.fit(columns.numpy(), target.numpy()).coef_) != 0
        assert torch.equal(scores > share, found)


def test_orthogonal_contributions_enter_in_the_order_of_their_own_correlation():
    """Closed form: with G = diag(g), coefficient j is nonzero up to the penalty g_j / |W_j|."""
    gram, norms = torch.tensor([4.0, 9.0, 1.0, 0.0]).double().diag(), torch.tensor([1.0, 3.0, 0.5, 1.0]).double()
    expected = torch.tensor([4.0, 3.0, 2.0, 0.0]).double() / 4
    torch.testing.assert_close(entries(gram, norms), expected)
    assert torch.equal(entries(0 * gram, norms), torch.zeros(4).double())


def test_of_units_that_express_each_other_not_all_enter():
    model, x, data = problem()
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 2 * model[0].weight[1], 2 * model[0].bias[1]
        model[2].weight[:, 4] = model[2].weight[:, 1]
    units = Channel().units(model, x[:1], Scope())
    scores = Lasso().score(Context(units, data))["0"]
    assert sorted([float(scores[1]), float(scores[4])])[0] == 0 and (scores > 0).sum() == 5
    pruned = sc.prune(
        model,
        x[:1],
        method="lasso",
        budget=sc.Budget(sparsity=1 / 6),
        data=data,
        repair={"name": "least-squares", "ridge": 0},
    )
    torch.testing.assert_close(pruned.model(x), model(x), rtol=1e-8, atol=1e-8)


def test_more_than_the_coefficients_are_fitted_afterwards():
    """Least squares over all weights is at least as good as the LASSO's own scalings, refitted without penalty."""
    model, x, data = problem(12)
    pruned = sc.prune(model, x[:1], method="lasso", budget=sc.Budget(sparsity=0.5), data=data)
    kept = list(pruned.structure_plan.axes["0"].kept)
    hidden, last = model[:2](x).detach(), model[2]
    columns = torch.einsum("nj,oj->noj", hidden, last.weight.detach())[:, :, kept].reshape(-1, len(kept))
    target = (hidden @ last.weight.detach().T).reshape(-1, 1)
    scaled = (columns @ torch.linalg.lstsq(columns, target).solution - target).square().mean()
    assert (pruned.model(x) - model(x)).square().mean() < scaled


def test_data_are_needed():
    model, x = toy("mlp")
    with pytest.raises(DataNeeded):
        sc.prune(model, x, method="lasso", budget=sc.Budget(macs=0.5))
