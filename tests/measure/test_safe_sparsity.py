"""The safe sparsity where it is known in closed form."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch import nn

from secateur.cli import main
from secateur.core.randomness import generator_for
from secateur.core.slots import Scope
from secateur.errors import DataNeeded, NotApplicable, NothingPrunable
from secateur.measure.safe_sparsity import _ClassMeans, safe_density, safe_sparsity

SIGNALS, NEURONS, INPUTS = 4, 40, 2000


def planted(n=200, size=20):
    """Class k is a signal on input k; the other inputs are noise, and one is constant."""
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(n, INPUTS, generator=generator)
    labels = torch.arange(n) % SIGNALS
    x[:, :SIGNALS] = torch.eye(SIGNALS)[labels]
    x[:, -1] = 3
    return list(zip(x.split(size), labels.split(size), strict=True))


def neurons():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, NEURONS), nn.ReLU(), nn.Linear(NEURONS, SIGNALS))


FIRST = Scope(include=("0.*",))


def test_the_threshold_of_planted_signals_is_that_of_the_closed_form():
    """Outputs have 2,000 weights each and are never cut off first; a signal has one for each of 40 neurons."""
    found = safe_sparsity(neurons(), planted(), scope=FIRST, draws=400)
    (layer,) = found.layers
    assert (layer.inputs, layer.signals, layer.weights) == (INPUTS, SIGNALS, INPUTS * NEURONS)
    assert layer.density == pytest.approx(1 - (0.05 / SIGNALS) ** (1 / NEURONS), abs=1e-9)
    assert found.by_layer == found.uniform and found.by_layer.safe == 1 - layer.density
    survive = lambda p: (1 - (1 - p) ** NEURONS) ** SIGNALS  # noqa: E731
    mean = quad(survive, 0, 1)[0]  # of 1 - p where the first signal is lost
    assert abs(found.by_layer.mean - mean) < 2 * found.by_layer.half_width
    kept = sum(draw > found.by_layer.safe for draw in found.by_layer.draws) / 400
    assert kept == pytest.approx(survive(layer.density), abs=3 * (0.95 * 0.05 / 400) ** 0.5)
    assert kept >= found.confidence - 0.03 and (found.samples, found.classes) == (200, SIGNALS)


def test_a_bound_per_unit_is_its_root():
    assert safe_density([(1, 3)], 0.125) == pytest.approx(0.5)
    assert safe_density([(2, 1), (2, 1)], 0.4) == pytest.approx(0.9)


def test_layers_share_the_risk_and_all_need_what_the_worst_one_does():
    found = safe_sparsity(neurons(), planted(), draws=2)
    first, last = found.layers
    assert first.density == pytest.approx(1 - (0.025 / SIGNALS) ** (1 / NEURONS), abs=1e-9)
    expected = last.signals * (1 - last.density) ** SIGNALS + SIGNALS * (1 - last.density) ** NEURONS
    assert expected == pytest.approx(0.025)
    total = first.weights + last.weights
    spared = (1 - first.density) * first.weights + (1 - last.density) * last.weights
    assert found.by_layer.safe == pytest.approx(spared / total)
    assert first.density < 1 - found.uniform.safe < last.density  # the risk need not be shared equally
    assert all(a >= b for a, b in zip(found.by_layer.draws, found.uniform.draws, strict=True))


def test_the_first_loss_of_a_grouped_convolution_is_that_of_its_masks():
    net = nn.Conv2d(4, 6, 3, groups=2)
    labels = torch.arange(12) % 2
    x = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 5 * labels[:, None, None, None]
    found = safe_sparsity(net, [(x, labels)], seed=3, draws=2)
    u = torch.rand(2, 3, 2, 9, generator=generator_for("masks", 3))

    def cut_off(density):
        kept = u < density
        return not (kept.any(3).any(1).all() and kept.any(3).any(2).all())

    density = 1 - found.by_layer.draws[0]
    assert cut_off(density - 1e-4) and not cut_off(density + 1e-4)
    assert found.layers[0].signals == found.layers[0].inputs == 4


def test_streamed_tests_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(60, 1, 300, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    x[:, 0] += 1000 + torch.linspace(0, 1.5, 300) * labels[:, None]
    means = _ClassMeans()
    for part, own in zip(x.split(7), labels.split(7), strict=True):
        means.add(part, own)
    p = stats.f_oneway(*(x[labels == k, 0].double().numpy() for k in range(3))).pvalue
    assert means.differ().tolist() == (p < 0.01 / 300).tolist() and 0 < int(means.differ().sum()) < 300
    assert (means.samples, means.classes) == (60, 3)


def test_constant_and_dead_units_carry_nothing_and_such_layers_are_not_judged():
    net = neurons()
    with torch.no_grad():
        net[0].bias[:10] = -100
    assert safe_sparsity(net, planted(), draws=2).layers[1].signals <= NEURONS - 10
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(1 / 3)
    found = safe_sparsity(net, planted(), draws=2)
    assert found.layers[1].signals == 0 and found.layers[1].density == 1
    assert found.by_layer.safe < found.layers[0].weights / sum(layer.weights for layer in found.layers)


class Conv1D(nn.Module):
    """The linear layer of transformers, whose weight is transposed."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


def test_positions_are_looked_at_one_by_one():
    """Two classes of the same mean: a bright first half, or a bright second half; for images, words and transposes."""
    labels = torch.arange(40) % 2
    x = torch.randn(40, 3, 16, generator=torch.Generator().manual_seed(0)) / 10
    x[:, 1, :8] += labels[:, None] - 0.5
    x[:, 1, 8:] -= labels[:, None] - 0.5
    for net, inputs in ((nn.Conv1d(3, 5, 2), x), (nn.Linear(3, 5), x.mT), (Conv1D(5, 3), x.mT)):
        (layer,) = safe_sparsity(net, [(inputs, labels)], draws=2).layers
        assert (layer.inputs, layer.signals) == (3, 1) and layer.weights == net.weight.numel()


def test_the_model_is_left_alone_and_the_seed_decides():
    net, data = neurons().train(), planted()
    before, drawn = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    first, again, other = (safe_sparsity(net, data, seed=seed, draws=3) for seed in (1, 1, 2))
    assert first == again and first.by_layer.draws != other.by_layer.draws and first.layers == other.layers
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items()) and torch.equal(
        drawn, torch.get_rng_state()
    )
    assert net.training and not net[0]._forward_pre_hooks and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, DataNeeded, "none were given"),
        ([], DataNeeded, "0 samples of 0 classes"),
        ([torch.randn(4, 4)], DataNeeded, "needs labels"),
        ([(torch.randn(4, 4), torch.randn(4))], DataNeeded, "one class index per sample; got labels of shape"),
        ([(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))], DataNeeded, "4 samples of 1 classes"),
        ([(torch.ones(8, 4), torch.arange(8) % 2)], NotApplicable, "No layer reads anything that differs"),
    ],
)
def test_without_data_that_show_signals_there_is_one_clear_line(data, error, message):
    with pytest.raises(error, match=message):
        safe_sparsity(nn.Linear(4, 4), data)


def test_a_network_without_kernels_and_samples_that_do_not_come_first_are_refused():
    data = [(torch.randn(8, 4), torch.arange(8) % 2)]
    with pytest.raises(NothingPrunable, match="No linear or convolutional layer"):
        safe_sparsity(nn.ReLU(), data)
    for before in (nn.Flatten(0), nn.Unflatten(0, (2, 4))):
        with pytest.raises(NotApplicable, match="what '1.weight' reads"):
            safe_sparsity(nn.Sequential(before, nn.Linear(4, 4)), data)


USER = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 3))

def data():
    labels = torch.arange(90) % 3
    x = torch.randn(90, 6) + 4 * torch.eye(6)[labels]
    return [(x, labels)], None

def nothing():
    return [(torch.randn(9, 6), torch.randn(9, 3))]

def small():
    return [(torch.randn(9, 5), torch.arange(9) % 3)]
"""


@pytest.fixture
def inspect(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_signals.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["secateur", "inspect", *args])
        try:
            main.run()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    sys.modules.pop("own_signals", None)


def test_on_the_command_line(inspect):
    arguments = ("own_signals:net", "--safe-sparsity", "--data", "own_signals:data")
    code, out, _ = inspect(*arguments)
    assert code == 0 and "0.weight" in out and "safe (95%)" in out and "Assumes that signals are" in out
    code, out, _ = inspect(*arguments, "--seed", "3", "--json")
    data = json.loads(out)
    assert code == 0 and inspect(*arguments, "--seed", "3", "--json")[1] == out
    assert data["layers"][0]["signals"] == 3 and data["classes"] == 3 and len(data["by_layer"]["draws"]) == 20
    assert 0 < data["uniform"]["safe"] < data["by_layer"]["safe"] < data["by_layer"]["mean"] < 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("own_signals:net", "--safe-sparsity"), "give --data module:function"),
        (("own_signals:net", "--safe-sparsity", "--data", "own_signals:nothing"), "one class index per sample"),
        (
            ("own_signals:net", "--safe-sparsity", "--data", "own_signals:small"),
            "does not run on the data: RuntimeError",
        ),
        (("own_signals:net", "--safe-sparsity", "--data", "own_signals:date"), "has no 'date'"),
        (("own_signals", "--safe-sparsity"), "neither module:function nor TASK/NETWORK"),
        (("own_signals:net", "--safe-sparsity", "--why", "0.weight"), "takes --data, --seed and --json only"),
        (("own_signals:net", "--shape", "1,6", "--data", "own_signals:data"), "Only --safe-sparsity looks at data"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(inspect, args, message):
    code, out, err = inspect(*args)
    assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1, err
