"""Which draws of the parameters a proof tries, where the model's path depends on them, and what each has used."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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
def noting_use(model: nn.Module, state: Mapping[str, Tensor], names: Collection[str]) -> Iterator[set[str]]:
    """Note which of the tensors of a state with these names something is computed from."""
    used = set[str]()
    with _Uses(model, state, names, used) if names else nullcontext():
        yield used


class _Uses(TorchDispatchMode):
    """Adds the name of a tensor where an operation of it, or of a view of it, returns any number."""

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor], names: Collection[str], used: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        aliases, _ = aliases_of(model)
        first = {name: aliases.get(name, name) for name in state}
        # By `id`, with the tensors kept alive: every operation asks, and most have none of these.
        self._names = {id(state[name]): own for name, own in first.items() if own in names}
        self._alive = [*state.values()]
        self._used = used

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        names = {self._names[id(a)] for a in _flat((*args, *(kwargs or {}).values())) if id(a) in self._names}
        if names and returns_view(func):
            views = list(tensors_in(result))
            self._alive += views
            self._names.update((id(view), name) for view in views for name in names)
        elif names and any(tensor.numel() for tensor in tensors_in(result)):  # an expert may run on no rows
            self._used |= names
        return result


def _flat(arguments: Iterable[Any]) -> Iterator[Any]:
    """Yield the arguments of an operation, and those that stand in lists."""
    for argument in arguments:
        if isinstance(argument, tuple | list):
            yield from argument
        else:
            yield argument
