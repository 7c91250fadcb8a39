"""The roles of axes: what a unit of an axis is, found from what operations use it for, never from names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from secateur.structure.dims import Dim, leaves

Role = Literal[
    "channel",
    "head",
    "kv group",
    "query head",
    "head dim",
    "hidden unit",
    "residual stream",
    "expert",
    "",
]

ROLES: dict[Role, str] = {
    "channel": "a feature map or feature",
    "head": "an attention head: its query, key and value",
    "kv group": "a key and value head, with all query heads that share it",
    "query head": "one query head of every group that shares a key and value head",
    "head dim": "one entry of the queries and keys, or of the values, of every head",
    "hidden unit": "a unit between two matrices of an MLP, or of a recurrent layer",
    "residual stream": "one entry of the tensor to which residual branches are added",
    "expert": "one expert of a mixture",
    "": "no unit: its size follows from the inputs, or from a kernel",
}
"""Each role with its meaning."""

COUNTED: frozenset[Role] = frozenset({"head", "kv group", "query head", "expert"})
"""The roles of which an axis is a number of things that have a width of their own."""

Use = Literal["head", "head dim", "copies", "experts", "recurrent", "convolved", "matrix in", "matrix out"]
"""What an operation uses a dim for: the facts from which roles follow."""


def roles_of(uses: Sequence[tuple[Use, Dim]], streams: Iterable[Dim]) -> Callable[[Dim], Role]:
    """Return a function that tells the role of a leaf.

    Args:
        uses: What operations use dims for.
        streams: The dims of sums of branches.
    """
    known: dict[Dim, set[Use]] = defaultdict(set)
    for use, dim in uses:
        for node in leaves(dim):
            known[node].add(use)
    in_stream = {node for dim in streams for node in leaves(dim)}
    heads = [set(leaves(dim)) for use, dim in uses if use == "head"]
    copied = {node for node, facts in known.items() if "copies" in facts}
    shared = {node for nodes in heads if nodes & copied for node in nodes - copied}  # heads beside copies of them

    def role(node: Dim) -> Role:
        if any(reason.startswith(("input", "spatial")) for reason in node.reasons):
            return ""
        facts = known[node]
        if "experts" in facts:
            return "expert"
        if "head" in facts:
            return "query head" if node in copied else "kv group" if node in shared else "head"
        return "head dim" if "head dim" in facts else _of_feature(facts, node in in_stream, not node.reasons)

    return role


def _of_feature(facts: set[Use], in_stream: bool, free: bool) -> Role:
    if in_stream:
        return "residual stream"
    if "recurrent" in facts or {"matrix in", "matrix out"} <= facts:
        return "hidden unit"
    return "channel" if "convolved" in facts or free else ""
