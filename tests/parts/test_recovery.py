from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from secateur.core.batches import cross_entropy
from secateur.errors import InvalidRecipe
from secateur.parts.recovery.distill import Distill, distillation_loss
from secateur.parts.recovery.fine_tune import FineTune
from secateur.parts.recovery.none import NoRecovery


def logits(seed=0, n=4, classes=5):
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_student_and_teacher_have_no_loss_and_no_gradient():
    student = logits().requires_grad_()
    loss = distillation_loss(student, student.detach(), 4.0)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and student.grad.abs().max() < 1e-12


def test_alpha_zero_is_cross_entropy_bit_for_bit_and_alpha_one_needs_no_labels():
    student, teacher, target = logits(0), logits(1), torch.tensor([0, 1, 2, 3])
    assert torch.equal(Distill(alpha=0).loss(cross_entropy, student, target, teacher), F.cross_entropy(student, target))
    soft = Distill(alpha=1, temperature=2).loss(cross_entropy, student, None, teacher)
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
    wrapped = Distill().loss(cross_entropy, Output(student), target, Output(teacher))
    assert torch.equal(wrapped, Distill().loss(cross_entropy, student, target, teacher))


def test_settings_are_checked():
    assert NoRecovery().epochs == 0 and FineTune(epochs=0.5).epochs == 0.5
    for bad in ({"epochs": 0}, {"lr": -1}, {"optimizer": "adam"}, {"alpha": 2}):
        with pytest.raises(InvalidRecipe):
            Distill(**bad)
