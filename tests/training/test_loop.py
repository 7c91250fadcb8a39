from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secateur.core.hooks import Hooks
from secateur.core.masks import Masks
from secateur.errors import DataNeeded, InvalidFile, InvalidRecipe, PlanMismatch, TrainingDiverged
from secateur.parts.recovery.distill import Distill
from secateur.parts.recovery.fine_tune import FineTune
from secateur.training.data import TensorBatches
from secateur.training.fabric import chosen_precision
from secateur.training.loop import Trainer, accuracy, learning_rate, make_optimizer
from secateur.training.teacher import Teacher

SETTINGS = FineTune(epochs=3, lr=0.05)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3)
    )


def batches(**options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 1, 6, 6, generator=generator)
    y = torch.randint(0, 3, (50,), generator=generator)
    return TensorBatches(x, y, batch_size=8, shuffle=True, **options)


def jitter(x, generator):
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_training_lowers_the_loss_and_keeps_a_history():
    model = network()
    history = Trainer(model, SETTINGS).run(batches(), 0, 21, evaluate=accuracy(batches()))
    assert history[-1]["train_loss"] < history[1]["train_loss"] and history[-1]["step"] == 21
    assert [e["step"] for e in history if "validation" in e] == [0, 7, 14, 21] and 0 <= history[-1]["validation"] <= 1
    assert model.training and next(model.parameters()).is_contiguous()


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "safe"), [(4, 1, 2, False), (4, 1, 1, True), (4, 3, 2, True), (16, 1, 2, True)]
)
def test_narrow_strided_1x1_convolutions_are_not_trained_in_the_channels_last_layout(channels, kernel, stride, safe):
    narrow, other = nn.Conv2d(channels, 3, kernel, stride), nn.Conv2d(3, 3, 2)
    model = nn.Sequential(narrow, other, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layouts = []
    narrow.register_forward_hook(lambda module, inputs, _: layouts.append(inputs[0].stride(1) == 1))

    class Watch(Hooks):
        def after_step(self, state):
            layouts.append(other.weight.stride(1) == 1)

    images = torch.randn(4, channels, 6, 6).to(memory_format=torch.channels_last)
    data = TensorBatches(images, torch.tensor([0, 1, 2, 0]), batch_size=4)
    Trainer(model, SETTINGS, hooks=[Watch()]).run(data, 0, 1)
    assert layouts == [safe, safe]


@pytest.mark.parametrize("stop_at", [5, 7, 16])
@pytest.mark.parametrize("loader", [False, True])
def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(tmp_path, stop_at, loader):
    data = batches(augment=jitter)
    if loader:
        data = DataLoader(TensorDataset(data.inputs, data.targets), batch_size=8, shuffle=True)

    class Stop(Exception):
        pass

    def stop(state):
        if state.step == stop_at + 1:
            raise Stop

    undisturbed = network()
    torch.manual_seed(3)
    expected = Trainer(undisturbed, SETTINGS).run(data, 0, 21, evaluate=accuracy(batches()))

    killed = network()
    torch.manual_seed(3)
    file = tmp_path / "run.ckpt"
    with pytest.raises(Stop):
        Trainer(killed, SETTINGS).run(
            data, 0, 21, on_step=stop, checkpoint=file, checkpoint_every=1, evaluate=accuracy(batches())
        )
    resumed = network(seed=9)
    torch.manual_seed(77)
    found = Trainer(resumed, SETTINGS).run(data, 0, 21, checkpoint=file, evaluate=accuracy(batches()))
    assert same(resumed, undisturbed) and found == expected


def test_a_finished_run_is_not_run_again(tmp_path):
    model = network()
    Trainer(model, SETTINGS).run(batches(), 0, 7, checkpoint=tmp_path / "a")
    again = network(seed=5)
    Trainer(again, SETTINGS).run(batches(), 0, 7, checkpoint=tmp_path / "a")
    assert same(model, again)


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    file = tmp_path / "a.ckpt"
    Trainer(network(), SETTINGS).run(batches(), 0, 3, checkpoint=file)
    other = nn.Sequential(*network(seed=1)[:5], nn.Linear(64, 4))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(PlanMismatch, match=r"another model: '5.weight' has shape \(3, 64\) there and \(4, 64\) here"):
        Trainer(other, SETTINGS).run(batches(), 0, 3, checkpoint=file)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    with pytest.raises(PlanMismatch, match="another run"):
        Trainer(network(), FineTune(epochs=3, lr=0.1)).run(batches(), 0, 3, checkpoint=file)
    with pytest.raises(PlanMismatch, match="another run"):
        Trainer(network(), SETTINGS).run(batches(), 0, 2, checkpoint=file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InvalidFile, match="damaged"):
        Trainer(network(), SETTINGS).run(batches(), 0, 3, checkpoint=file)


def test_nan_stops_with_the_step_and_what_to_do():
    data = [
        (torch.randn(4, 1, 6, 6), torch.zeros(4).long()),
        (torch.full((4, 1, 6, 6), torch.nan), torch.zeros(4).long()),
    ]
    with pytest.raises(TrainingDiverged, match=r"became nan at step 2 .*Lower the learning rate"):
        Trainer(network(), SETTINGS).run(data, 0, 4)


def test_hooks_run_in_order_and_loss_terms_are_added():
    calls = []

    class Recorder(Hooks):
        def on_start(self, state):
            calls.append("start")

        def loss_term(self, state):
            calls.append("loss")
            return 1000 * state.model[5].bias.sum()

        def after_backward(self, state):
            calls.append("backward")
            assert state.model[5].bias.grad.mean() > 900

        def after_step(self, state):
            calls.append("step")

        def on_end(self, state):
            calls.append("end")

    Trainer(network(), SETTINGS, hooks=[Recorder()]).run(batches(), 0, 2)
    assert calls == ["start", "loss", "backward", "step", "loss", "backward", "step", "end"]
    assert all(
        getattr(Hooks(), name)(None) is None
        for name in ("on_start", "loss_term", "after_backward", "after_step", "on_end")
    )


def test_masks_hold_and_can_be_changed_between_stretches():
    model = network()
    trainer = Trainer(model, SETTINGS)
    first, second = (torch.rand(3, 64) < p for p in (0.5, 0.2))
    trainer.mask(Masks(model, {"5.weight": first}))
    trainer.run(batches(), 0, 4)
    assert not model[5].weight[~first].any() and model[5].weight[first].all()
    trainer.mask(Masks(model, {"5.weight": second & first}))
    trainer.run(batches(), 4, 8)
    assert not model[5].weight[~(second & first)].any()


def test_the_learning_rate_follows_its_schedule():
    cosine = FineTune(lr=0.2, warmup=0.2)
    assert learning_rate(cosine, 0.1) == pytest.approx(0.1)
    assert learning_rate(cosine, 0.2) == pytest.approx(0.2)
    assert learning_rate(cosine, 0.6) == pytest.approx(0.1)
    assert learning_rate(cosine, 1.0) == pytest.approx(0.0)
    assert learning_rate(FineTune(lr=0.2, lr_schedule="constant"), 0.9) == 0.2
    trainer = Trainer(network(), cosine)
    history = trainer.run(batches(), 5, 6, lr_span=(0, 10))
    assert history[0]["lr"] == pytest.approx(learning_rate(cosine, 0.5))


def test_only_matrices_decay():
    groups = make_optimizer(network(), FineTune(weight_decay=0.3)).param_groups
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert all(p.dim() > 1 for p in groups[0]["params"]) and all(p.dim() == 1 for p in groups[1]["params"])
    assert isinstance(make_optimizer(network(), FineTune(optimizer="adamw")), torch.optim.AdamW)


def test_distillation_follows_the_teacher_and_leaves_it_alone():
    student, teacher = network(0), network(1)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    x = batches().inputs

    def distance():
        with torch.no_grad():
            return (student.eval()(x).softmax(1) - teacher.eval()(x).softmax(1)).abs().mean().item()

    far = distance()
    teacher.train()
    settings = Distill(epochs=20, lr=0.1, alpha=1.0)
    Trainer(student.train(), settings, teacher=Teacher(settings, student, teacher)).run(batches(), 0, 140)
    assert teacher.training and all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert distance() < far / 2


def test_a_teacher_keeps_its_memory():
    student, teacher = network(0), network(1)
    teacher[0].weight.data = torch.randn(3, 3, 1, 4).permute(3, 2, 0, 1)  # a layout of its own
    before = [(p.data_ptr(), p.stride()) for p in teacher.parameters()]
    settings = Distill(epochs=1, lr=0.1, alpha=1.0)
    Trainer(student, settings, teacher=Teacher(settings, student, teacher)).run(batches(), 0, 2)
    assert [(p.data_ptr(), p.stride()) for p in teacher.parameters()] == before


def test_networks_over_volumes_train():
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8, 3))
    data = TensorBatches(torch.randn(8, 1, 4, 4, 4), torch.arange(8) % 3, batch_size=4)
    history = Trainer(model, FineTune(epochs=20, lr=0.1)).run(data, 0, 40)
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_layouts_are_restored():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 3))
    model[1].to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    Trainer(model, SETTINGS).run(TensorBatches(torch.randn(8, 4, 6, 6), torch.arange(8) % 3, batch_size=4), 0, 2)
    assert [p.stride() for p in model.parameters()] == strides


def test_an_unknown_precision_is_refused():
    with pytest.raises(InvalidRecipe, match="Unknown precision '8-true'; known: 32-true, bf16-mixed, auto"):
        Trainer(network(), SETTINGS, precision="8-true")


def test_bfloat16_trains():
    model = network()
    history = Trainer(model, SETTINGS, precision="bf16-mixed").run(batches(), 0, 14)
    assert history[-1]["train_loss"] < history[0]["train_loss"] and model[5].weight.dtype == torch.float32


@pytest.mark.parametrize(("name", "has", "expected"), [("avx512_bf16", True, "bf16-mixed"), ("avx2", True, "32-true")])
def test_precision_auto_is_mixed_only_where_the_processor_multiplies_in_bfloat16(monkeypatch, name, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: has, "amx_bf16": False, "num_sockets": 1})
    assert chosen_precision("auto", torch.device("cpu")) == expected
    assert chosen_precision("bf16-mixed", torch.device("cpu")) == "bf16-mixed"


def test_data_without_length_or_content_are_refused():
    with pytest.raises(DataNeeded, match="must have a length"):
        Trainer(network(), SETTINGS).run(iter([]), 0, 1)
    with pytest.raises(DataNeeded, match="empty"):
        Trainer(network(), SETTINGS).run([], 0, 1)


def test_batches_depend_on_seed_and_epoch_and_shares_make_up_the_whole():
    data = batches(seed=1)
    first = [y.tolist() for _, y in data]
    assert first == [y.tolist() for _, y in data] and len(data) == 7
    assert first != [y.tolist() for _, y in data.at_epoch(1)] and first != [y.tolist() for _, y in batches(seed=2)]
    halves = [[y.tolist() for _, y in data.share(rank, 2)] for rank in (0, 1)]
    for whole, left, right in zip(first, *halves, strict=True):
        assert sorted(left + right) == sorted(whole[: len(whole) // 2 * 2]) and len(left) == len(right)


def test_validation_data_need_targets():
    with pytest.raises(DataNeeded, match="needs targets"):
        accuracy([batches().inputs])(network())
    with pytest.raises(DataNeeded, match="empty"):
        accuracy([])(network())
    mapped = nn.Module()
    mapped.p = nn.Parameter(torch.zeros(1))
    mapped.forward = lambda x, labels: torch.eye(3)
    assert accuracy([{"x": torch.zeros(3), "labels": torch.tensor([0, 1, 0])}])(mapped) == pytest.approx(2 / 3)


def test_accuracy_counts_right_answers_in_eval_mode():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            assert not self.training
            return x

    x = torch.eye(4)
    assert accuracy([(x, torch.tensor([0, 1, 2, 0]))])(Fixed()) == 0.75
