"""The training loop."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur.core.batches import Data, Loss, channels_last_is_safe, default_loss, split_batch, to_model
from secateur.core.hooks import Hooks, TrainingState
from secateur.core.masks import Masks
from secateur.core.slots import Precision
from secateur.errors import DataNeeded, TrainingDiverged
from secateur.parts.recovery.fine_tune import FineTune
from secateur.structure.inputs import aliases_of, undisturbed
from secateur.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from secateur.training.data import TensorBatches
from secateur.training.fabric import average_buffers, make_fabric, processes, share_data
from secateur.training.teacher import Teacher

History = list[dict[str, float]]
"""Entries with step, train_loss (mean since the last entry) and lr; validation at the start and after each epoch."""

LOG_ENTRIES = 20
"""A history has about so many entries, or one per epoch if that is more."""

OnStep = Callable[[TrainingState], None]
Evaluate = Callable[[nn.Module], float]
"""Returns the validation metric of a model; higher is better."""


class Trainer:
    """Trains one model, in one or several stretches of steps with one optimizer.

    With several processes every one sees its part of each batch, and batch normalization normalizes that part; the
    running statistics are averaged at the end, so that all processes go on with the same network.

    Args:
        model: Is trained in place.
        settings: Optimizer, learning rate, loss.
        loss: (output, target) -> scalar; default: the model's own for mappings, else cross-entropy.
        teacher: Of the model, for distillation.
        hooks: What methods do around each step.
        precision: ``32-true``, ``bf16-mixed``, or ``auto``: mixed on hardware that has bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: FineTune,
        *,
        loss: Loss | None = None,
        teacher: Teacher | None = None,
        hooks: Sequence[Hooks] = (),
        precision: Precision = "32-true",
    ) -> None:
        self.model, self.settings, self.hooks = model, settings, tuple(hooks)
        self._loss = loss
        self._teacher = teacher
        self._fabric = make_fabric(model, precision)
        self.optimizer = make_optimizer(model, settings)
        self.wrap()
        self._mask_handle: RemovableHandle | None = None

    def wrap(self) -> None:
        """Prepare model and optimizer for this machine; once more after each cut.

        With several processes, what shares the gradients among them knows the parameters that there were.
        """
        self._wrapped, self._wrapped_optimizer = self._fabric.setup(self.model, self.optimizer)

    def mask(self, masks: Masks) -> None:
        """Hold these masks from now on."""
        if self._mask_handle is not None:
            self._mask_handle.remove()
        self._mask_handle = masks.attach(self.optimizer)

    def run(
        self,
        data: Data,
        first: int,
        last: int,
        *,
        lr_span: tuple[float, float] | None = None,
        evaluate: Evaluate | None = None,
        on_step: OnStep | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 0,
    ) -> History:
        """Train from step `first` to step `last` and return the history; a step number stands for a place in the data.

        Hooks may end it earlier (`TrainingState.stop`); the last entry of the history says at which step.

        Args:
            data: Batches; must have a length.
            first: Number of steps done before.
            last: Number of steps done at the end.
            lr_span: Between which steps the learning rate schedule runs; default: these.
            evaluate: Validation metric, at the end of each epoch.
            on_step: Called after each step, for progress bars.
            checkpoint: File to resume from if it exists, and to write at the end of each epoch.
            checkpoint_every: Write it every so many steps too.

        Raises:
            TrainingDiverged: The loss is NaN or infinite.
        """
        data = share_data(data)
        per_epoch = epoch_length(data)
        progress = Progress(step=first)
        this_run = f"steps {first} to {last} of {self.settings.model_dump_json()}"
        if checkpoint is not None and Path(checkpoint).exists():
            progress = load_checkpoint(checkpoint, self.model, self.optimizer, this_run)
        state = TrainingState(self.model, self.optimizer, progress.step, last, first)
        log_every = max(1, min(per_epoch, (last - first) // LOG_ENTRIES))
        self._call("on_start", state)
        if evaluate is not None and progress.step == first < last and not progress.history:
            progress.history.append({"step": first, "validation": self._validate(evaluate)})
        with _training(self.model), _fast_layout(self.model):
            for batch in _batches(data, per_epoch, progress) if progress.step < last else ():
                state.lr = self._set_lr(progress.step, lr_span or (first, last))
                state.loss = self._step(batch, state)
                progress.losses.append(state.loss)
                progress.step = state.step
                if on_step is not None:
                    on_step(state)
                done = progress.step == last or state.stop
                finished = progress.step % per_epoch == 0 or done
                if finished or progress.step % log_every == 0:
                    self._log(progress, state, evaluate if finished else None)
                if checkpoint is not None and (
                    finished or (checkpoint_every and progress.step % checkpoint_every == 0)
                ):
                    save_checkpoint(checkpoint, self.model, self.optimizer, progress, this_run)
                if done:
                    break
        average_buffers(self.model)
        self._call("on_end", state)
        return progress.history

    def _step(self, batch: Any, state: TrainingState) -> float:
        """One optimizer step; returns the loss."""
        batch = to_model(batch, self.model)
        args, kwargs, target = split_batch(batch)
        if self._teacher is None:
            output, lesson = self._wrapped(*args, **kwargs), None
        else:
            with self._fabric.autocast():
                output, lesson = self._teacher.teach(self._wrapped, args, kwargs)
        loss = self.settings.loss(self._loss or default_loss(batch), output, target, lesson)
        for hook in self.hooks:
            term = hook.loss_term(state)
            loss = loss if term is None else loss + term
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"The loss became {value} at step {state.step + 1} (learning rate {state.lr:.3g}). "
                "Lower the learning rate, or look for NaN and infinite values in the data."
            )
        self.optimizer.zero_grad(set_to_none=True)
        self._fabric.backward(loss)
        self._call("after_backward", state)
        self._wrapped_optimizer.step()
        state.step += 1
        self._call("after_step", state)
        return value

    def _set_lr(self, step: int, span: tuple[float, float]) -> float:
        lr = learning_rate(self.settings, (step - span[0]) / max(span[1] - span[0], 1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _log(self, progress: Progress, state: TrainingState, evaluate: Evaluate | None) -> None:
        entry = {"step": progress.step, "train_loss": sum(progress.losses) / len(progress.losses), "lr": state.lr}
        if evaluate is not None:
            entry["validation"] = self._validate(evaluate)
        progress.history.append(entry)
        progress.losses.clear()

    def _validate(self, evaluate: Evaluate) -> float:
        with undisturbed(self.model):
            return evaluate(self.model)

    def _call(self, moment: str, state: TrainingState) -> None:
        for hook in self.hooks:
            getattr(hook, moment)(state)


def learning_rate(settings: FineTune, progress: float) -> float:
    """Return the learning rate at `progress` in [0, 1) of a schedule."""
    if progress < settings.warmup:
        return settings.lr * (progress / settings.warmup)
    if settings.lr_schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (progress - settings.warmup) / (1 - settings.warmup)))


def make_optimizer(model: nn.Module, settings: FineTune) -> Optimizer:
    """Return the optimizer of the settings; vectors (biases, normalization) do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)


def epoch_length(data: Data) -> int:
    """Return the number of batches in one pass.

    Raises:
        DataNeeded: The data have no length, or none.
    """
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError as error:
        raise DataNeeded("Training data must have a length: pass a DataLoader or a list of batches.") from error
    if length == 0:
        raise DataNeeded("The training data are empty.")
    return length


def _batches(data: Data, per_epoch: int, progress: Progress) -> Iterator[Any]:
    """Yield batches from a step on, epoch after epoch, with the random state that an undisturbed run would have."""
    while True:
        epoch, skipped = divmod(progress.step, per_epoch)
        rng, progress.rng = progress.rng, None
        if skipped and rng is not None:
            torch.set_rng_state(progress.epoch_rng)  # a shuffling DataLoader draws its order from this
        else:
            if rng is not None:
                torch.set_rng_state(rng)
            progress.epoch_rng = torch.get_rng_state()
        in_order = data.at_epoch(epoch) if isinstance(data, TensorBatches) else data
        for i, batch in enumerate(in_order):
            if i < skipped:
                continue
            if skipped and i == skipped and rng is not None:
                torch.set_rng_state(rng)
            yield batch


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Set train mode; restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def _fast_layout(model: nn.Module) -> Iterator[None]:
    """Put kernels into the memory layout in which CPU convolutions are fastest, if it is safe; restored.

    What shares gradients among several processes remembers the layout that kernels had before, and would mix them up.
    """
    shared = {owner for aliases in aliases_of(model) for owner in aliases.values()}  # moving them would part them
    kernels = [p for name, p in model.named_parameters() if p.dim() == 4 and name not in shared]
    kernels = kernels if channels_last_is_safe(model) and processes() == 1 else []
    strides = [p.stride() for p in kernels]
    for parameter in kernels:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for parameter, stride in zip(kernels, strides, strict=True):
            parameter.data = torch.empty_strided(
                parameter.shape, stride, dtype=parameter.dtype, device=parameter.device
            ).copy_(parameter.data)


def accuracy(data: Data) -> Evaluate:
    """Return a metric: the fraction of samples of `data` whose largest logit is at the target."""

    def evaluate(model: nn.Module) -> float:
        right = seen = 0
        with undisturbed(model), torch.inference_mode():
            for batch in data:
                args, kwargs, target = split_batch(to_model(batch, model))
                output = model(*args, **kwargs)
                logits: Tensor = getattr(output, "logits", output)
                labels = target.get("labels") if isinstance(target, Mapping) else target
                if not isinstance(labels, Tensor):
                    raise DataNeeded("Validation needs targets: batches (inputs, target), or mappings with 'labels'.")
                right += int((logits.argmax(-1) == labels).sum())
                seen += labels.numel()
        if not seen:
            raise DataNeeded("The validation data are empty; pass a list or a DataLoader, which can be read again.")
        return right / seen

    return evaluate
