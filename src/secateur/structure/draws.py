"""Which draws of the parameters a proof tries, where the model's path depends on them, and what each has used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from secateur.structure.dims import leaves
from secateur.structure.inputs import Inputs, aliases_of, has_entries, output_tensors
from secateur.structure.weightless import tensors_in

if TYPE_CHECKING:
    from secateur.structure.structure import Structure

Used = Callable[[Any], set[str]]
"""Returns the names of the parameters that have been used for an output."""

FEWEST_DRAWS = 4
"""So many are tried at least: paths may differ by code without parameters, too."""

IN_VAIN = 16
"""After so many draws in a row that used nothing new, what is left to be used is given up."""

PATIENCE = 4
"""But not before so many for each draw that did use something new: of many experts, the last ones take long."""

MOST_DRAWS = 250
"""More are never tried."""


def tries(missing: Callable[[], Collection[str]], least: int = 0) -> Iterator[int]:
    """Yield numbers, so many at least, until nothing is missing any more, or until too many in a row found nothing."""
    done = in_vain = news = 0
    while done < least or (missing() and done < MOST_DRAWS and in_vain < max(IN_VAIN, PATIENCE * news)):
        before = len(missing())
        yield done
        done += 1
        found = len(missing()) < before
        news += found
        in_vain = 0 if found else in_vain + 1


def draws(structure: Structure, seed: int, left: Collection[str], least: int) -> Iterator[int]:
    """Yield the seeds of the draws that a proof tries, while parameters are left that it has not used.

    `least` draws are tried where there are several paths, and one at most where there is one. Proofs of different seeds
    try different draws.
    """
    for i in tries(lambda: left, least if structure.reads_values else min(least, 1)):
        yield 4 * MOST_DRAWS * seed + i


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
def noting_use(model: nn.Module, state: Mapping[str, Tensor], names: Collection[str], inputs: Inputs) -> Iterator[Used]:
    """Note which of the tensors of a state with these names are used to compute an output from the inputs."""
    if not names:
        yield lambda output: set()
        return
    with _Uses(model, state, names, inputs) as uses:
        yield uses.used_for


class _Uses(TorchDispatchMode):
    """Notes which names a tensor follows from, as long as it does not follow from the inputs.

    They are used where it meets one that does, if any number comes of it: an expert may run on no rows.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor], names: Collection[str], inputs: Inputs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        aliases, _ = aliases_of(model)
        own = {name: aliases.get(name, name) for name in state}
        self._names = WeakIdKeyDictionary({state[name]: {first} for name, first in own.items() if first in names})
        self._follows_inputs = WeakIdKeyDictionary(dict.fromkeys(inputs.tensors(), True))
        self._used = set[str]()

    def used_for(self, output: Any) -> set[str]:
        """Return the names that have been used by the time this output is there; none if it has no entries."""
        return self._used | self._followed(output_tensors(output)) if has_entries(output) else set()

    def _followed(self, tensors: Iterable[Tensor]) -> set[str]:
        return set[str]().union(*(self._names[tensor] for tensor in tensors if tensor in self._names))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors, results = list(tensors_in((args, kwargs))), list(tensors_in(result))
        names = self._followed(tensors)
        if any(tensor in self._follows_inputs for tensor in tensors):
            self._follows_inputs.update(dict.fromkeys(results, True))
            if any(own.numel() for own in results):
                self._used |= names
        elif names:
            self._names.update(dict.fromkeys(results, names))
        if not results:  # the code looks at a value
            self._used |= names
        return result
