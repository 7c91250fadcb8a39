"""The parts of the coverage command that judge: tags, survivors, verdicts, limits of time."""

from __future__ import annotations

import copy

import pytest
import torch
from benchmarks.coverage.judge import ForeignTensor, judge, kept_units, survivors, tag, tagged
from benchmarks.coverage.processes import OutOfTime, in_child, within
from benchmarks.coverage.table import failure, helped_verdict, our_verdict, shares, verdicts
from torch import nn

import secateur as sc


class Attention(nn.Module):
    """Two heads of width 3 on a normalized stream of 8."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 18), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, t, 8) -> (n, t, 4)."""
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1)
        return self.out(y)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def pair(model: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module, sc.Structure]:
    tag(model)
    return model, copy.deepcopy(model), sc.trace(model, torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def cut_mlp(small: nn.Module, rows: list[int], normalized: list[int], columns: list[int]) -> None:
    first, norm, last = small[0], small[1], small[3]
    first.weight, first.bias = nn.Parameter(first.weight[rows]), nn.Parameter(first.bias[rows])
    norm.weight, norm.bias = nn.Parameter(norm.weight[normalized]), nn.Parameter(norm.bias[normalized])
    norm.normalized_shape = (len(normalized),)
    last.weight = nn.Parameter(last.weight[:, columns])


def cut_attention(small: Attention, kept: list[int]) -> None:
    rows = [6 * part + i for part in range(3) for i in kept]
    small.qkv.weight, small.qkv.bias = nn.Parameter(small.qkv.weight[rows]), nn.Parameter(small.qkv.bias[rows])
    small.out.weight = nn.Parameter(small.out.weight[:, kept])


@pytest.mark.parametrize("shape", [(7,), (64, 3, 3, 3), (1000, 4000), (2, 1)])
def test_every_entry_has_a_value_of_its_own(shape):
    holder = nn.ParameterList([nn.Parameter(torch.zeros(shape))])
    tag(holder)
    values = holder[0].detach()
    assert values.unique().numel() == values.numel()
    if len(shape) > 1 and values.numel() > 100:
        assert values.var().item() * values[0].numel() == pytest.approx(1, rel=0.3)


def test_only_parameters_and_statistics_are_tagged():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.register_buffer("table", torch.zeros(4, 4))
    assert set(tagged(model)) == {
        *("0.weight", "0.bias", "1.weight", "1.bias"),
        *("1.running_mean", "1.running_var"),
    }


def test_survivors_are_read_from_the_values():
    dense, small, structure = pair(mlp(), (2, 5))
    cut_mlp(small, [1, 6, 4], [1, 6, 4], [1, 6, 4])
    kept = survivors(dense, small)
    assert [index.tolist() for index in kept["0.weight"]] == [[1, 6, 4], [0, 1, 2, 3, 4]]
    assert [index.tolist() for index in kept["3.weight"]] == [[0, 1, 2], [1, 6, 4]]
    assert kept_units(structure, kept)["0"].nonzero().flatten().tolist() == [1, 4, 6]


def test_new_values_are_no_slice():
    dense, small, _ = pair(mlp(), (2, 5))
    small[0].weight = nn.Parameter(small[0].weight[:4] * 2)
    with pytest.raises(ForeignTensor, match=r"0\.weight"):
        survivors(dense, small)
    small[0].weight = nn.Parameter(dense[0].weight.flatten()[[0, 6, 12, 18]].view(2, 2))
    with pytest.raises(ForeignTensor, match="no slice"):
        survivors(dense, small)


def test_a_cut_through_a_normalization_is_right():
    dense, small, structure = pair(mlp(), (2, 5))
    cut_mlp(small, [0, 2, 3, 7], [0, 2, 3, 7], [0, 2, 3, 7])
    right, error = judge(dense, small, structure)
    assert right and error < 1e-12


def test_members_that_lose_different_units_are_wrong():
    dense, small, structure = pair(mlp(), (2, 5))
    cut_mlp(small, [0, 2, 3, 7], [0, 2, 3, 7], [0, 2, 3, 6])
    assert not judge(dense, small, structure)[0]


@pytest.mark.parametrize(
    ("kept", "heads", "right"),
    [
        ([0, 1, 2], 1, True),  # a whole head
        ([0, 2, 3, 5], 2, True),  # the same dims of both
        ([0, 2, 3, 4], 2, True),  # other dims of each, as many
        ([0, 1, 2, 3], 2, False),  # unequal: the second head gets a dim of the first
    ],
)
def test_scrambled_heads_are_wrong(kept, heads, right):
    dense, small, structure = pair(Attention(), (2, 3, 8))
    cut_attention(small, kept)
    small.heads = heads
    assert judge(dense, small, structure)[0] is right


def test_our_own_cuts_are_right():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    tag(model)
    inputs = torch.randn(2, 3, 6, 6)
    pruned = sc.prune(model, inputs, granularity="channel", budget=sc.Budget(macs=0.5))
    right, error = judge(model.eval(), pruned.model, sc.trace(model, inputs))
    assert right and error < 1e-12


def test_a_default_scale_of_attention_is_not_judged():
    class Default(Attention):
        def forward(self, x):
            n, t, _ = x.shape
            q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).reshape(n, t, -1))

    dense, small, structure = pair(Default(), (2, 3, 8))
    cut_attention(small, [0, 2, 3, 5])
    assert judge(dense, small, structure)[0]


def test_work_out_of_time_is_stopped():
    with pytest.raises(OutOfTime, match=r"0\.05 s"), within(0.05):
        while True:
            pass


def test_children_report_results_errors_and_crashes():
    assert in_child(lambda x: {"twice": 2 * x}, 4)["twice"] == 8
    assert in_child(dict)["peak_mb"] > 10
    assert in_child(lambda: 1 / 0)["crashed"] == "ZeroDivisionError: division by zero"
    assert "exit code 3" in in_child(exits)["crashed"]


def exits() -> None:
    import os

    os._exit(3)


ROWS = [
    {
        "name": "hf:a",
        "stages": {"trace": True, "verify": True, "prune": True, "right": True},
        "seconds": {"trace": 1.0, "verify": 2.0, "prune": 3.0},
        "prunable_share": 0.5,
        "torch_pruning": {
            "plain": {"verdict": "wrong", "seconds": 1.0},
            "head dims": {"verdict": "right", "seconds": 2.0},
        },
    },
    {
        "name": "hf:b",
        "stages": {"trace": True, "verify": False},
        "seconds": {"trace": 1.0, "verify": 2.0},
        "torch_pruning": {"plain": {"verdict": "no-op"}},
    },
]


def test_tables_count_what_failed():
    assert [our_verdict(row) for row in ROWS] == ["right", "fails"]
    assert [helped_verdict(row) for row in ROWS] == ["right", "no-op"]
    assert our_verdict({"stages": {"right": False}}) == "wrong"
    cells = shares(ROWS)["Hugging Face"]
    assert (cells["networks"], cells["trace"], cells["verify"], cells["prunable"]) == ("2", "2", "1", "25.0 %")
    lines = {(title, tool): rest for title, tool, *rest in verdicts(ROWS, ["hf:b"])}
    assert lines["Hugging Face", "secateur"] == ["2", "1", "0", "0", "1", "6.0"]
    assert lines["Hugging Face", "Torch-Pruning"] == ["2", "0", "1", "1", "0", ""]
    assert lines["Hugging Face", "Torch-Pruning with help"] == ["2", "1", "0", "1", "0", "2.0"]
    assert lines["the 1 architectures", "secateur"] == ["1", "0", "0", "0", "1", ""]


def test_tables_say_how_much_was_not_run():
    found = shares(ROWS, {"hf": 5, "torchvision": 7, "timm": 9})
    assert [(library, cells["listed"], cells["networks"]) for library, cells in found.items()] == [
        ("Hugging Face", "5", "2"),
        ("torchvision", "7", "0"),
        ("timm", "9", "0"),
    ]
    assert found["timm"]["prunable"] == "" and {title for title, *_ in verdicts(ROWS, [])} == {"Hugging Face"}
    assert failure({"failed": "at \x1b[96mstep 1\x1b[0m"}) == "at step 1"
