"""The only place that turns scores into kept units. Counts are exact, ties are broken by index, nobody thresholds."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from secateur.core.units import Cost, Kept, Limits, LinearCost, Scores
from secateur.errors import BudgetUnreachable


def top_k(priorities: Scores, k: int) -> Kept:
    """Return the `k` units of highest priority over all groups; among equals, those that come first.

    Args:
        priorities: One number per unit, without NaN.
        k: How many units to keep, in [0, number of units].
    """
    flat = torch.cat([values.flatten() for values in priorities.values()])
    kept = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if k > 0:
        # kthvalue is linear in the number of units; a full sort of 10^8 weights is not.
        limit = flat.kthvalue(flat.numel() - k + 1).values
        kept = flat > limit
        among_equals = (flat == limit).nonzero().flatten()
        kept[among_equals[: k - int(kept.sum())]] = True
    return _split(kept, priorities)


def select(priorities: Scores, cost: Cost, target: float, limits: Limits | None = None, tolerance: float = 0.0) -> Kept:
    """Return the largest set of highest priorities whose cost is at most `target`.

    Units leave one by one, lowest priority first (among equals the last one first), until the cost is met. Then those
    that still fit come back, highest priority first, because the last unit to leave may have been a large one. With
    `limits.multiple` units leave in chunks, with `limits.ties` in step.

    Args:
        priorities: One number per unit, comparable between groups, without NaN.
        cost: The cost of keeping so many units of each group; must not fall when a count rises.
        target: The allowed cost.
        limits: Floors, multiples and ties.
        tolerance: Accepted overshoot relative to `target` when even the smallest network costs more.

    Raises:
        BudgetUnreachable: The smallest network that the limits allow costs more.
    """
    limits = limits or Limits()
    sizes = {group: values.numel() for group, values in priorities.items()}
    if limits == Limits() and isinstance(cost, LinearCost) and len(set(cost.per_unit.values())) == 1:
        unit = next(iter(cost.per_unit.values()))
        k = int((target - cost.fixed) / unit + 1e-9)
        if k >= 0:
            return top_k(priorities, min(k, sum(sizes.values())))
    exits = _exits(priorities, limits)
    counts_after = _Counts(sizes, exits)
    steps = _fewest_exits(cost, counts_after, target)
    counts = counts_after(steps)
    reached = cost(counts)
    if reached > target * (1 + tolerance):
        raise BudgetUnreachable(
            f"The budget cannot be met: it allows {target:,.6g}, and the smallest network that can be reached costs "
            f"{reached:,.6g}. Widen the scope, or lower the minimum number of units."
        )
    counts = _give_back(cost, target, exits, steps, counts)
    return {group: _best(values, counts[group]) for group, values in priorities.items()}


def fewest(sizes: Mapping[str, int], limits: Limits) -> dict[str, int]:
    """Return how many units of each group stay in the smallest network that the limits allow."""
    counts = {}
    for groups in _classes(sizes, limits):
        for group in groups:
            step = limits.steps.get(group, 1)
            counts[group] = step * _floor(sizes[group] // step, *_in_events(groups, limits))
    return counts


def _give_back(cost: Cost, target: float, exits: _Exits, steps: int, counts: dict[str, int]) -> dict[str, int]:
    """Return counts to which no further unit can be added: events are undone, latest first, where the budget allows."""
    by_class, order = exits.class_index[:steps].sort(stable=True)
    sizes = torch.bincount(by_class, minlength=len(exits.classes)).tolist()
    gone = int((exits.priority[:steps] == -torch.inf).sum())  # those left in an earlier round: they were first
    events = [piece[piece >= gone].tolist() for piece in order.split(sizes)]
    latest = [(-own[-1], i) for i, own in enumerate(events) if own]
    heapq.heapify(latest)
    while latest:
        event, i = heapq.heappop(latest)
        amount = int(exits.amount[-event])
        more = {group: counts[group] + amount * exits.steps.get(group, 1) for group in exits.classes[i]}
        if cost({**counts, **more}) > target:
            continue  # nor will the units of this class that left before it, which are worth less and cost as much
        counts = {**counts, **more}
        events[i].pop()
        if events[i]:
            heapq.heappush(latest, (-events[i][-1], i))
    return counts


@dataclass(frozen=True)
class _Exits:
    """Removal events in the order in which they happen: from which class of groups, and how many units each."""

    classes: list[tuple[str, ...]]
    class_index: Tensor
    amount: Tensor
    priority: Tensor
    steps: Mapping[str, int]


class _Counts:
    """Number of units left in each group after the first n removal events."""

    def __init__(self, sizes: Mapping[str, int], exits: _Exits) -> None:
        self.sizes, self.exits = sizes, exits

    def __call__(self, n: int) -> dict[str, int]:
        gone = torch.bincount(
            self.exits.class_index[:n], weights=self.exits.amount[:n].double(), minlength=len(self.exits.classes)
        )
        return {
            group: self.sizes[group] - int(gone[i]) * self.exits.steps.get(group, 1)
            for i, groups in enumerate(self.exits.classes)
            for group in groups
        }

    def __len__(self) -> int:
        return self.exits.class_index.numel()


def _fewest_exits(cost: Cost, counts_after: _Counts, target: float) -> int:
    """Return the smallest number of events after which the cost is at most `target` (or all of them)."""
    low, high = 0, len(counts_after)
    while low < high:
        middle = (low + high) // 2
        if cost(counts_after(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    return low


def _exits(priorities: Scores, limits: Limits) -> _Exits:
    classes = _classes(priorities, limits)
    keys, indices, amounts = [], [], []
    for i, groups in enumerate(classes):
        # Tied groups lose their r-th worst units together, so the priority is the mean of theirs.
        worst_first = torch.stack([_in_steps(priorities[g], limits.steps.get(g, 1)) for g in groups]).mean(0)
        key, amount = _chunks(worst_first, *_in_events(groups, limits))
        keys.append(key)
        amounts.append(amount)
        indices.append(torch.full((key.numel(),), i))
    key, index = torch.cat(keys).cpu(), torch.cat(indices)
    # Stable on the reversed list: among equal priorities the last unit leaves first.
    order_of_exit = (key.numel() - 1) - key.flip(0).sort(stable=True).indices
    # Within one class events must keep their own order; reversing equal ones is harmless only for equal amounts.
    amount = _amounts_in_order(index[order_of_exit], amounts)
    return _Exits(classes, index[order_of_exit], amount, key[order_of_exit], limits.steps)


def _classes(groups: Iterable[str], limits: Limits) -> list[tuple[str, ...]]:
    """Return the groups that lose units together as one tuple each, in the order of their first members."""
    order = {group: i for i, group in enumerate(groups)}
    tied = {group for tie in limits.ties for group in tie}
    return sorted([*((g,) for g in order if g not in tied), *limits.ties], key=lambda members: order[members[0]])


def _in_steps(values: Tensor, step: int) -> Tensor:
    """Return the mean priority of each step's units, worst step first."""
    return values.flatten().double().sort().values.view(-1, step).mean(1)


def _in_events(groups: tuple[str, ...], limits: Limits) -> tuple[int, int]:
    """Return the minimum and the multiple of a class, counted in steps; wide members alone are rounded, not heads."""
    steps = [limits.steps.get(group, 1) for group in groups]
    wide = [step for step in steps if step > 1] or [1 for group in groups if group not in limits.unrounded]
    multiples = [limits.multiple // gcd(limits.multiple, step) for step in wide]
    fewest = [max(limits.minimum, limits.least.get(group, 0)) for group in groups]
    return max(-(-n // step) for n, step in zip(fewest, steps, strict=True)), max(multiples, default=1)


def _amounts_in_order(index: Tensor, amounts: list[Tensor]) -> Tensor:
    """Return each event's amount so that every class takes its own amounts in their own order."""
    result = torch.empty(index.numel(), dtype=torch.long)
    result[index.sort(stable=True).indices] = torch.cat(amounts).cpu()
    return result


def _chunks(worst_first: Tensor, minimum: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Return priority and size of each chunk that may leave: the mean of its units; the first one makes counts even."""
    n = worst_first.numel()
    removable = n - _floor(n, minimum, multiple)
    first = removable % multiple
    sizes = ([first] if first else []) + [multiple] * (removable // multiple)
    if multiple == 1:
        return worst_first[:removable], torch.ones(removable, dtype=torch.long)
    if not sizes:
        return worst_first[:0], torch.zeros(0, dtype=torch.long)
    means = torch.stack([chunk.mean() for chunk in worst_first[:removable].split(sizes)])
    return means, torch.tensor(sizes)


def _floor(n: int, minimum: int, multiple: int) -> int:
    least = minimum if multiple == 1 else max(minimum, multiple)
    return min(n, -(-least // multiple) * multiple)


def _best(values: Tensor, count: int) -> Tensor:
    return top_k({"": values}, count)[""]


def _split(kept: Tensor, like: Scores) -> Kept:
    pieces = kept.split([values.numel() for values in like.values()])
    return {group: piece.view(values.shape) for (group, values), piece in zip(like.items(), pieces, strict=True)}
