"""Which draws of the parameters a proof tries, where the model's path depends on them, and what each has used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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

IN_VAIN = 16
"""After so many draws in a row that used nothing new, or half of all, what is left to be used is given up."""

APART = 1000
"""Proofs of different seeds try different draws."""


def tries(missing: Callable[[], Collection[str]], least: int = 0) -> Iterator[int]:
    """Yield numbers, so many at least, until nothing is missing any more, or until too many in a row found nothing."""
    done = last = 0
    while done < least or (missing() and done - last < max(IN_VAIN, last)):
        before = len(missing())
        yield done
        done += 1
        last = done if len(missing()) < before else last


def draws(structure: Structure, seed: int, left: Collection[str], least: int) -> Iterator[int]:
    """Yield the seeds of the draws that a proof tries, while parameters are left that it has not used.

    `least` draws are tried where there are several paths, else one.
    """
    for i in tries(lambda: left, least if structure.reads_values else min(least, 1)):
        yield APART * seed + i


def to_use(structure: Structure, names: Iterable[str]) -> dict[str, set[str]]:
    """Return, for each of these axes, the parameters that a proof must have used; nothing if there is one path."""
    if not structure.reads_values:
        return {}
    asked = set(names)
    name_of = {axis.leaf: axis.name for axis in structure.axes if axis.name in asked}
    found: dict[str, set[str]] = {name: set() for name in name_of.values()}
    for parameter in structure.parameters.intersection(structure.order) - structure.only_in_training:
        for node in (node for dim in structure.tensors[parameter] for node in leaves(dim)):
            if node in name_of:
                found[name_of[node]].add(parameter)
    return found


def why_unused(names: Collection[str]) -> str:
    """Return what is wrong where parameters are left that no draw has used."""
    return f"no draw of the parameters has used {min(names)}: pass longer or more example inputs"


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
