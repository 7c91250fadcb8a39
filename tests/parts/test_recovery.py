from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from secateur.core.batches import cross_entropy, own_loss
from secateur.errors import DataNeeded, InvalidInputs, InvalidRecipe
from secateur.parts.recovery.distill import Distill, Lesson, distillation_loss, feature_loss, joint_logits
from secateur.parts.recovery.fine_tune import FineTune
from secateur.parts.recovery.none import NoRecovery


def logits(seed=0, n=4, classes=5):
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_student_and_teacher_have_no_loss_and_no_gradient():
    student = logits().requires_grad_()
    loss = distillation_loss(student, student.detach(), 4.0)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and student.grad.abs().max() < 1e-12


def lesson(*teachers, features=()):
    return Lesson(teachers, tuple(features))


def test_alpha_zero_is_cross_entropy_bit_for_bit_and_alpha_one_needs_no_labels():
    student, teacher, target = logits(0), logits(1), torch.tensor([0, 1, 2, 3])
    hard = Distill(alpha=0).loss(cross_entropy, student, target, lesson(teacher))
    assert torch.equal(hard, F.cross_entropy(student, target))
    soft = Distill(alpha=1, temperature=2).loss(cross_entropy, student, None, lesson(teacher))
    assert torch.equal(soft, distillation_loss(student, teacher, 2.0))


def test_the_loss_is_t_squared_times_kl_summed_over_classes_and_averaged_over_samples():
    student, teacher, t = logits(0), logits(1), 3.0
    p, q = (teacher / t).softmax(1), (student / t).softmax(1)
    expected = t**2 * (p * (p.log() - q.log())).sum(1).mean()
    assert torch.isclose(distillation_loss(student, teacher, t), expected)


def test_constants_added_to_logits_change_nothing():
    student, teacher = logits(0), logits(1)
    shifted = distillation_loss(student + 7, teacher - 3, 4.0)
    assert torch.isclose(shifted, distillation_loss(student, teacher, 4.0))


def test_high_temperature_gradient_is_the_difference_of_logits():
    student, teacher = logits(0), logits(1)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    student.requires_grad_()
    distillation_loss(student, teacher, 1e5).backward()
    assert torch.allclose(student.grad, (student.detach() - teacher) / 5 / 4, rtol=1e-4, atol=1e-5)


def test_outputs_with_logits_are_accepted():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    student, teacher, target = logits(0), logits(1), torch.tensor([0, 1, 2, 3])
    wrapped = Distill().loss(cross_entropy, Output(student), target, lesson(Output(teacher)))
    assert torch.equal(wrapped, Distill().loss(cross_entropy, student, target, lesson(teacher)))


def test_one_batch_computed_by_hand():
    # Logits T log p: at temperature T = 2 the probabilities are p. Teacher (3/4, 1/4), student (1/2, 1/2), label 0.
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = 2 * torch.tensor([[3 / 4, 1 / 4]], dtype=torch.float64).log()
    kl = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    features = [(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 4.0])), (torch.zeros(2), torch.ones(2))]
    ratios = (((1 - 3) ** 2 + (5 - 4) ** 2) / (3**2 + 4**2) + 1) / 2
    settings = Distill(alpha=0.25, temperature=2, features=0.1)
    found = settings.loss(cross_entropy, student, torch.tensor([0]), lesson(teacher, features=features))
    assert found.item() == pytest.approx(0.75 * math.log(2) + 0.25 * 4 * kl + 0.1 * ratios, rel=1e-7)


def test_the_gradient_agrees_with_finite_differences():
    student, target, features = logits(0).requires_grad_(), torch.tensor([0, 1, 2, 3]), logits(3)
    settings = Distill(alpha=0.6, temperature=3, features=0.2)

    def loss(z):
        return settings.loss(cross_entropy, z, target, lesson(logits(1), logits(2), features=[(z.sin(), features)]))

    assert torch.autograd.gradcheck(loss, student) and torch.autograd.gradcheck(
        lambda z: distillation_loss(z, logits(1), 4.0), student
    )


def test_an_ensemble_teaches_the_mean_of_probabilities_not_of_logits():
    first, second, t = logits(1), logits(2), 3.0
    mean = ((first / t).softmax(1) + (second / t).softmax(1)) / 2
    assert torch.allclose((joint_logits([first, second], t) / t).softmax(1), mean, rtol=1e-12)
    assert not torch.allclose(((first + second) / 2 / t).softmax(1), mean, rtol=1e-3)
    student, target = logits(0), torch.tensor([0, 1, 2, 3])
    one, two = (Distill().loss(cross_entropy, student, target, lesson(*[first] * n)) for n in (1, 2))
    assert torch.allclose(one, two, rtol=1e-14)


def test_start_and_end_of_an_answer_are_averaged():
    class Span:
        def __init__(self, seed):
            self.start_logits, self.end_logits = logits(seed), logits(seed + 1)

    found = Distill(alpha=1).loss(cross_entropy, Span(0), None, lesson(Span(5)))
    assert torch.isclose(
        found, (distillation_loss(logits(0), logits(5), 4) + distillation_loss(logits(1), logits(6), 4)) / 2
    )


def test_features_in_16_bits_are_compared_in_32_and_dead_ones_leave_no_nan():
    s, t = torch.full((70000,), 2.0, dtype=torch.float16), torch.ones(70000, dtype=torch.float16)
    assert feature_loss([(s, t)]) == 1  # the sum would be infinite in 16 bits
    assert feature_loss([(torch.zeros(3), torch.zeros(3))]) == 0


def test_what_cannot_be_compared_is_said():
    student, teacher = logits(0), logits(1)
    with pytest.raises(DataNeeded, match=r"no targets, and alpha = 0\.9 .* alpha=1"):
        Distill().loss(cross_entropy, student, None, lesson(teacher))
    with pytest.raises(InvalidInputs, match=r"logits of one shape; got .*\(4, 5\).*\(4, 3\)"):
        Distill().loss(cross_entropy, student, torch.arange(4), lesson(teacher, teacher[:, :3]))
    with pytest.raises(InvalidInputs, match=r"must return a tensor or an object with \.logits; got dict"):
        Distill(alpha=1).loss(cross_entropy, {"out": student}, None, lesson(teacher))
    with pytest.raises(DataNeeded, match="needs targets, and these batches have none"):
        FineTune().loss(cross_entropy, student, None, None)
    with pytest.raises(DataNeeded, match="computed no loss"):
        FineTune().loss(own_loss, student, {}, None)


def test_settings_are_checked():
    assert NoRecovery().epochs == 0 and FineTune(epochs=0.5).epochs == 0.5
    for bad in ({"epochs": 0}, {"lr": -1}, {"optimizer": "adam"}, {"alpha": 2}):
        with pytest.raises(InvalidRecipe):
            Distill(**bad)
