"""Distillation: the dense parent is a free teacher with the same classes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from secateur.core.batches import Loss
from secateur.parts.recovery.fine_tune import FineTune


class Distill(FineTune):
    """Fine-tuning on (1 - alpha) CE + alpha T² KL(teacher || student) (Hinton et al., arXiv 1503.02531).

    The teacher is the unpruned network, in eval mode, without gradients; it sees the same inputs.

    Attributes:
        alpha: Weight of the teacher, in [0, 1]; 0 is plain fine-tuning, 1 needs no labels.
        temperature: Softens both distributions; T² keeps the gradient's size.
    """

    name = "distill"
    needs_teacher: ClassVar[bool] = True
    alpha: float = Field(0.9, ge=0, le=1)
    temperature: float = Field(4.0, gt=0)

    def loss(self, loss: Loss, output: Any, target: Any, teacher_output: Any) -> Tensor:
        """Return the mixed loss of one batch."""
        student, teacher = getattr(output, "logits", output), getattr(teacher_output, "logits", teacher_output)
        soft = distillation_loss(student, teacher, self.temperature)
        return soft if self.alpha == 1 else (1 - self.alpha) * loss(output, target) + self.alpha * soft


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² KL(softmax(teacher / T) || softmax(student / T)), summed over classes, averaged over all other dims.

    Args:
        student: Logits of shape (..., classes).
        teacher: Logits of the same shape.
        temperature: T > 0.
    """
    classes = student.shape[-1]
    log_student = F.log_softmax(student / temperature, -1).reshape(-1, classes)
    log_teacher = F.log_softmax(teacher / temperature, -1).reshape(-1, classes)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
