"""Similarity of representations: how alike do two networks see the same samples, layer by layer?

Tang, Maddox, Dickens, Diethe, Damianou: Similarity of Neural Networks with Gradients (arXiv 2003.11498); centered
kernel alignment: Kornblith, Norouzi, Lee, Hinton (ICML 2019). A layer is a kernel between samples,

    K = X Xᵀ                     of its features X (samples x features), or
    K = (X Xᵀ) * (G Gᵀ)          with the gradients G of the predicted log-likelihood by these features,

so that layers of any widths can be compared. Gradients see what the rest of the network makes of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from secateur.core.batches import Data, batch_size, split_batch, to_model
from secateur.core.randomness import generator_for
from secateur.errors import DataNeeded, InvalidInputs, NotApplicable, UnknownName
from secateur.structure.inputs import undisturbed

Kernels = dict[str, Tensor]
"""One positive semidefinite matrix per layer, in float64."""
SOFTENING = 0.5
"""The power of the predicted probabilities that weight the log-likelihood (the paper's beta)."""

REMEMBERED = 2**26
"""Most numbers that exact kernels keep of features, beside those of two batches."""


class Sketch(NamedTuple):
    """A random projection of the samples to fewer (Clarkson & Woodruff), for more data than a kernel can hold.

    Each sample is added with a random sign to one row of each of `entries` parts of the sketch. Sketched kernels
    overstate similarity when the samples are many more than the rows: compare them only with sketches of equal size and
    seed, on the same batches in the same order.

    Attributes:
        rows: The number of rows that all samples are projected to.
        entries: To how many of them each sample is added; divides `rows`.
        seed: Controls the projection, which is the same for all layers and networks.
    """

    rows: int = 512
    entries: int = 1
    seed: int = 0


class _Seen(NamedTuple):
    """Features and, if asked for, gradients of one layer: (samples, features)."""

    features: Tensor
    gradients: Tensor | None


def kernels(
    model: nn.Module,
    data: Data,
    layers: Sequence[str] | None = None,
    *,
    at: Literal["output", "input"] = "output",
    gradients: bool = False,
    sketch: Sketch | None = None,
) -> Kernels:
    """Return the kernel of each layer's output (or input), not centered; the model is left as it was.

    Without a sketch the kernel is exact, of shape (samples, samples). The features of all pairs of batches meet: those
    of the first batches are remembered, up to `REMEMBERED` numbers, the others computed anew whenever they are needed,
    so that memory is bounded. With a sketch, each batch goes through once, and for each
    layer (rows, features) numbers are held.

    Args:
        model: Any network; in eval mode meanwhile.
        data: Batches; no labels are used.
        layers: Paths of modules that return a tensor; default: all linear and convolutional ones that run.
        at: Which side of the layers to look at.
        gradients: Multiply by the kernel of gradients of sum of q log p by the features, with p the predicted
            probabilities and q proportional to their square roots, held fixed.
        sketch: Project the samples.

    Raises:
        UnknownName: The model has no such layer.
        DataNeeded: There are no data.
        InvalidInputs: A sketch whose rows its entries do not divide.
    """
    batches = [to_model(batch, model) for batch in data]
    if not batches:
        raise DataNeeded("Similarity compares how networks see data, and there are none. Pass some batches.")
    see = _eyes(model, _layers(model, layers), at == "input", gradients)
    return _exact(see, batches) if sketch is None else _sketched(see, batches, sketch)


def _exact(see: Callable[[Any], dict[str, _Seen]], batches: Sequence[Any]) -> Kernels:
    rows = torch.tensor([0, *(batch_size(batch) for batch in batches)]).cumsum(0).tolist()
    recall = _remembering(see, batches)
    found: Kernels = {}
    for i in range(len(batches)):
        seen = recall(i)
        for j in range(i + 1):
            other = seen if j == i else recall(j)
            for name in seen:
                block = _products(seen[name].features, other[name].features)
                if (mine := seen[name].gradients) is not None and (theirs := other[name].gradients) is not None:
                    block = block * _products(mine, theirs)
                kernel = found.setdefault(name, torch.zeros(rows[-1], rows[-1], dtype=torch.float64))
                kernel[rows[i] : rows[i + 1], rows[j] : rows[j + 1]] = block
                kernel[rows[j] : rows[j + 1], rows[i] : rows[i + 1]] = block.T
    return found


def _remembering(see: Callable[[Any], dict[str, _Seen]], batches: Sequence[Any]) -> Callable[[int], dict[str, _Seen]]:
    """Return a function from a batch's number to what is seen of it, remembered as far as there is room."""
    memory: dict[int, dict[str, _Seen]] = {}
    room = REMEMBERED

    def recall(i: int) -> dict[str, _Seen]:
        nonlocal room
        if i in memory:
            return memory[i]
        seen = see(batches[i])
        size = sum(values.numel() for each in seen.values() for values in each if values is not None)
        if size <= room:
            room -= size
            memory[i] = seen
        return seen

    return recall


def _sketched(see: Callable[[Any], dict[str, _Seen]], batches: Sequence[Any], sketch: Sketch) -> Kernels:
    if sketch.rows % sketch.entries:
        raise InvalidInputs(f"The entries of a sketch must divide its rows; got {sketch.entries} and {sketch.rows}.")
    generator = generator_for("sketch", sketch.seed)
    sums: dict[str, list[Tensor]] = {}
    for batch in batches:
        project = _projection(batch_size(batch), sketch, generator)
        project = torch.cat([project, torch.ones_like(project[:1])])  # the last row sums up
        for name, seen in see(batch).items():
            projected = [project @ _with_ones(values) for values in seen if values is not None]
            sums[name] = [a + b for a, b in zip(sums[name], projected, strict=True)] if name in sums else projected
    return {name: _sketched_kernel(totals) for name, totals in sums.items()}


def _with_ones(values: Tensor) -> Tensor:
    ones = torch.ones_like(values[:, :1])
    return torch.cat([values, ones], 1).cpu().double()


def _sketched_kernel(totals: Sequence[Tensor]) -> Tensor:
    """Return a kernel from the projected features, and gradients, if any; the last row and column are sums and counts.

    Features alone are centered here: after a projection with random signs it would be too late. In the product with
    gradients the signs cancel, and it is centered like any other kernel.
    """
    features = totals[0][:-1, :-1]
    if len(totals) == 1:
        mean = totals[0][-1:, :-1] / totals[0][-1, -1]
        features = features - totals[0][:-1, -1:] * mean
        return features @ features.T
    gradients = totals[1][:-1, :-1]
    return (features @ features.T) * (gradients @ gradients.T)


def _projection(samples: int, sketch: Sketch, generator: torch.Generator) -> Tensor:
    """Return a matrix (rows, samples) with `entries` nonzeros in each column, each in a part of its own."""
    part = sketch.rows // sketch.entries
    row = torch.randint(part, (sketch.entries, samples), generator=generator)
    row += part * torch.arange(sketch.entries)[:, None]
    sign = 2.0 * torch.randint(2, row.shape, generator=generator).double() - 1
    return torch.zeros(sketch.rows, samples, dtype=torch.float64).scatter_(0, row, sign / sketch.entries**0.5)


def _products(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().T).cpu()


# ------------------------------------------------------------------------------------------ what a network sees


def _layers(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if names is None:
        return {n: m for n, m in modules.items() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    for name in names:
        if name not in modules:
            raise UnknownName("layer", name, modules)
    return {name: modules[name] for name in names}


def _eyes(
    model: nn.Module, layers: Mapping[str, nn.Module], reads: bool, gradients: bool
) -> Callable[[Any], dict[str, _Seen]]:
    """Return a function from a batch to what each layer makes of it."""

    def see(batch: Any) -> dict[str, _Seen]:
        args, kwargs, _ = split_batch(batch)
        with undisturbed(model), torch.set_grad_enabled(gradients), _tapped(layers, reads, gradients) as tapped:
            output = model(*args, **kwargs)
            slopes: Sequence[Tensor | None] = [None] * len(tapped)
            if gradients:
                slopes = torch.autograd.grad(_likelihood(output), list(tapped.values()), materialize_grads=True)
        return {
            name: _Seen(x.detach().flatten(1), None if g is None else g.flatten(1))
            for (name, x), g in zip(tapped.items(), slopes, strict=True)
        }

    return see


@contextmanager
def _tapped(layers: Mapping[str, nn.Module], reads: bool, gradients: bool) -> Iterator[dict[str, Tensor]]:
    """Yield the outputs (or inputs) of layers by name, as they come; later operations cannot change them in place."""
    tapped: dict[str, Tensor] = {}

    def tap(name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise NotApplicable(f"A {type(value).__name__} passes the layer {name!r}, not a tensor; leave it out.")
        tapped[name] = value if value.requires_grad or not gradients else value.detach().requires_grad_()
        return tapped[name].clone()

    def listener(name: str) -> Any:
        if reads:
            return lambda module, inputs: (tap(name, inputs[0]), *inputs[1:])
        return lambda module, inputs, output: tap(name, output)

    with ExitStack() as stack:
        for name, layer in layers.items():
            register = layer.register_forward_pre_hook if reads else layer.register_forward_hook
            stack.callback(register(listener(name)).remove)
        yield tapped


def _likelihood(output: Any) -> Tensor:
    """Return the sum over samples and classes of q log p, q fixed: the paper's label-free signal."""
    log_p: Tensor = getattr(output, "logits", output).log_softmax(-1)
    return ((SOFTENING * log_p.detach()).softmax(-1) * log_p).sum()


# ---------------------------------------------------------------------------------------------------- comparison


def cka(first: Tensor, second: Tensor) -> float:
    """Return the centered kernel alignment <A, B> / (|A| |B|) of two kernels, in [0, 1]; 0 if one is constant."""
    a, b = centered(first), centered(second)
    size = float(a.norm() * b.norm())
    return min(1.0, float((a * b).sum()) / size) if size > 0 else 0.0


def bures(first: Tensor, second: Tensor) -> float:
    """Return the normalized Bures similarity tr((A½ B A½)½) / sqrt(tr A tr B) of two centered kernels, in [0, 1]."""
    a, b = centered(first), centered(second)
    values, vectors = torch.linalg.eigh(a)
    root = vectors * _root(values) @ vectors.T
    size = float((a.trace() * b.trace()).sqrt())
    return float(_root(torch.linalg.eigvalsh(root @ b @ root)).sum()) / size if size > 0 else 0.0


def _root(eigenvalues: Tensor) -> Tensor:
    """Return the roots of eigenvalues in rising order; those that are rounding of zero would have large ones."""
    least = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1]
    return torch.where(eigenvalues > least, eigenvalues, 0.0).sqrt()


def distance(first: Tensor, second: Tensor) -> float:
    """Return the Euclidean distance |A - B| of two centered kernels."""
    return float((centered(first) - centered(second)).norm())


def centered(kernel: Tensor) -> Tensor:
    """Return H K H with H = I - 1 1ᵀ / n: the kernel of features whose mean is zero."""
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


_INDICES = {"cka": cka, "bures": bures, "distance": distance}


@dataclass(frozen=True)
class Similarity:
    """How alike each layer of one network is to each layer of another.

    Attributes:
        first: Names of the layers of the first network.
        second: Names of the layers of the second.
        values: Shape (first, second).
        index: Which index was taken.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    values: Tensor
    index: str

    def of_same(self) -> dict[str, float]:
        """Return the similarity of each layer to the layer of the same name, where there is one."""
        return {
            name: float(self.values[i, self.second.index(name)])
            for i, name in enumerate(self.first)
            if name in self.second
        }


def similarity(
    first: nn.Module,
    second: nn.Module,
    data: Data,
    layers: Sequence[str] | None = None,
    *,
    gradients: bool = False,
    sketch: Sketch | None = None,
    index: Literal["cka", "bures", "distance"] = "cka",
) -> Similarity:
    """Return how alike the layers of two networks are, pair by pair, on the same data.

    Args:
        first: For example the dense network.
        second: For example the pruned one.
        data: Batches; both networks see them in the same order.
        layers: See `kernels`; those that one network lacks are left out there.
        gradients: See `kernels`.
        sketch: See `kernels`.
        index: Centered kernel alignment, normalized Bures similarity, or Euclidean distance.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> round(similarity(net, net, [torch.eye(3)]).of_same()["0"], 6)
        1.0
    """
    batches = list(data)
    known = [None if layers is None else [n for n in layers if n in dict(m.named_modules())] for m in (first, second)]
    one, other = (
        kernels(model, batches, names, gradients=gradients, sketch=sketch)
        for model, names in zip((first, second), known, strict=True)
    )
    compare = _INDICES[index]
    values = torch.tensor([[compare(a, b) for b in other.values()] for a in one.values()], dtype=torch.float64)
    return Similarity(tuple(one), tuple(other), values, index)


def some_samples(data: Data, samples: int) -> list[Any]:
    """Return the first batches of some data, up to and including the one with which there are enough samples."""
    found: list[Any] = []
    for batch in data:
        found.append(batch)
        if sum(map(batch_size, found)) >= samples:
            break
    return found
