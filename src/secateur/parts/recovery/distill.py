"""Distillation: the dense parent is a free teacher with the same classes and almost the same layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from secateur.core.batches import Loss
from secateur.errors import DataNeeded, InvalidInputs
from secateur.parts.recovery.fine_tune import FineTune


class Lesson(NamedTuple):
    """What teachers say about one batch.

    Attributes:
        outputs: What each of them makes of it.
        features: Pairs (student's, parent's) of equal shape, one per compared module.
    """

    outputs: tuple[Any, ...]
    features: tuple[tuple[Tensor, Tensor], ...] = ()


class Distill(FineTune):
    """Fine-tuning on (1 - alpha) CE + alpha T² KL(teacher || student) + features * R.

    CE stands for the task's loss (Hinton et al., arXiv 1503.02531). The teacher is the unpruned network, in eval mode,
    without gradients; it sees the same inputs. Several teachers are one whose probabilities at temperature T are the
    mean of theirs (`secateur.prune` takes them as ``teachers=``). With alpha = 1 the batches need no targets. Where
    teachers are sure of themselves, the gradient by the logits is up to T times that of CE: if training diverges, lower
    the learning rate.

    R is the mean over some modules of |s - t|² / |t|², with s what the module returns in the student, and t what it
    returns in the parent, of which the units are taken that the cut has kept: no projection is learned. Other teachers
    have no part in it, because their units correspond to nothing in the student.

    Attributes:
        alpha: Weight of the teacher, in [0, 1]; 0 is plain fine-tuning, 1 needs no labels.
        temperature: Softens both distributions; T² keeps the gradient's size.
        features: Weight of R; 0 compares no features.
        modules: Paths of the modules that R compares; empty: all modules in which residual branches are added to their
            stream, and in networks without any, all linear and convolutional layers but the last.
    """

    name = "distill"
    alpha: float = Field(0.9, ge=0, le=1)
    temperature: float = Field(4.0, gt=0)
    features: float = Field(0.0, ge=0)
    modules: tuple[str, ...] = ()

    def loss(self, loss: Loss, output: Any, target: Any, lesson: Lesson) -> Tensor:
        """Return the mixed loss of one batch.

        Raises:
            DataNeeded: There are no targets, and alpha is below 1.
            InvalidInputs: Student and teacher give no logits, or logits of different shapes.
        """
        if target is None and self.alpha < 1:
            raise DataNeeded(
                f"These batches have no targets, and alpha = {self.alpha:g} gives the task's loss a weight. Take "
                "alpha=1, distillation alone, or pass batches (inputs, target)."
            )
        soft = self._soft_loss(output, lesson.outputs)
        mixed = soft if self.alpha == 1 else (1 - self.alpha) * loss(output, target) + self.alpha * soft
        return mixed + self.features * feature_loss(lesson.features) if lesson.features else mixed

    def _soft_loss(self, output: Any, taught: Sequence[Any]) -> Tensor:
        """Return T² KL(teachers || student); of start and end of an answer, the mean."""
        student = logits_of(output)
        teachers = [logits_of(each) for each in taught]
        shapes = [[tuple(logits.shape) for logits in each] for each in (student, *teachers)]
        if any(shape != shapes[0] for shape in shapes):
            raise InvalidInputs(f"Student and teachers need logits of one shape; got {shapes}.")
        t = self.temperature
        losses = [
            distillation_loss(own, joint_logits(theirs, t), t) for own, *theirs in zip(student, *teachers, strict=True)
        ]
        return torch.stack(losses).mean()


def logits_of(output: Any) -> tuple[Tensor, ...]:
    """Return the logits of an output: itself, its ``logits``, or its ``start_logits`` and ``end_logits``.

    Raises:
        InvalidInputs: It is none of these.
    """
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor):
        return (output,)
    start, end = getattr(output, "start_logits", None), getattr(output, "end_logits", None)
    if not isinstance(start, Tensor) or not isinstance(end, Tensor):
        raise InvalidInputs(
            "Distillation compares logits: a network must return a tensor or an object with .logits; got "
            f"{type(output).__name__}."
        )
    return start, end


def joint_logits(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Return logits whose probabilities at this temperature are the mean of those of all teachers."""
    if len(logits) == 1:
        return logits[0]
    log_probabilities = torch.stack([F.log_softmax(each / temperature, -1) for each in logits])
    return temperature * (log_probabilities.logsumexp(0) - math.log(len(logits)))


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


def feature_loss(features: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean over pairs (student's, parent's) of |s - t|² / |t|²; each is a sum over all entries."""
    return torch.stack([_relative(s, t) for s, t in features]).mean()


def _relative(student: Tensor, parent: Tensor) -> Tensor:
    s, t = (x.float() if x.element_size() < 4 else x for x in (student, parent))  # sums are no work for 16 bits
    return (s - t).square().sum() / t.square().sum().clamp_min(torch.finfo(t.dtype).tiny)
