"""Which draws of the parameters a proof tries, where the model's path depends on them, and what each has used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from secateur.structure.dims import leaves
from secateur.structure.inputs import aliases_of
from secateur.structure.operations import returns_view
from secateur.structure.weightless import tensors_in

if TYPE_CHECKING:
    from secateur.structure.structure import Structure

FEWEST_DRAWS = 4
"""So many are tried at least: paths may differ by code without parameters, too."""

MOST_DRAWS = 16
"""So many are tried until all parameters in question have been used; what none of them has used is not proved."""


def draws(structure: Structure, seed: int) -> range:
    """Return the seeds of the draws that a proof may try; proofs of other seeds try others."""
    return range(MOST_DRAWS * seed, MOST_DRAWS * seed + (MOST_DRAWS if structure.reads_values else 1))


def enough(structure: Structure, done: int, left: set[str]) -> bool:
    """Return whether a proof may end after so many draws, with these parameters left to be used."""
    return not left and done >= min(FEWEST_DRAWS, len(draws(structure, 0)))


def to_use(structure: Structure, names: Iterable[str]) -> set[str]:
    """Return the parameters that a proof of these axes must have used: none if there is one path alone."""
    if not structure.reads_values:
        return set()
    axes = {structure.axis(name).leaf for name in names}
    reached = structure.parameters.intersection(structure.order) - structure.only_in_training
    return {name for name in reached if any(node in axes for dim in structure.tensors[name] for node in leaves(dim))}


@contextmanager
def noting_use(model: nn.Module, structure: Structure, state: Mapping[str, Tensor]) -> Iterator[set[str]]:
    """Note the names of the tensors of a state from which something is computed, if that depends on their values."""
    used = set[str]()
    with _Uses(model, state, used) if structure.reads_values else nullcontext():
        yield used


class _Uses(TorchDispatchMode):
    """Adds the name of a tensor where an operation of it, or of a view of it, returns any number."""

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor], used: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        aliases, _ = aliases_of(model)
        self.name_of = WeakIdKeyDictionary({tensor: aliases.get(name, name) for name, tensor in state.items()})
        self.used = used

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        names = {self.name_of[tensor] for tensor in tensors_in((args, kwargs)) if tensor in self.name_of}
        if names and returns_view(func):
            self.name_of.update((tensor, name) for tensor in tensors_in(result) for name in names)
        elif any(tensor.numel() for tensor in tensors_in(result)):  # an expert may run on no rows
            self.used |= names
        return result
