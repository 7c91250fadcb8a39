"""Breaks every rule in every way that a list of simple mistakes can: no wrong structure may pass.

A mutant is *caught* if `verify` fails on one of the networks, or, where only the costs are wrong, if the count of
multiply-adds does. One that is not caught must do no harm: `HARMLESS` lists how that can be, and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
from tests.structure.mutation.judge import CAUGHT, bounded_memory, fixtures, verdict
from tests.structure.mutation.mutants import Mutant, all_mutants, executable_lines, rule_files

MISSED = ("silent", "proof")
"""No proof shows that they are wrong, or not the first: a user who asks `verify` alone would not know."""

HARMLESS = {
    "freer": "the sound rule refuses more than it must (random values, the queries of one key); the oracle agrees",
    "frozen": "what the operation returns is unknown to later ones, and frozen; every cut left is one of the sound's",
    "stumbles": "the rule raises an error, or its dims do not fit the tensor: what the operation touches is frozen; "
    "or the trace does not end",
    "same": "the sides of an equation change places; -1 is 0 in a list of one; what nobody records is frozen anyway; "
    "another operation of the same networks says it, too",
}


def verdicts(mutants: Sequence[Mutant]) -> Counter[str]:
    with bounded_memory():
        found = {mutant: verdict(mutant) for mutant in mutants}
    missed = [f"{what}: {mutant.name} ({network})" for mutant, (what, network) in found.items() if what in MISSED]
    assert not missed, "\n".join(missed)
    counts = Counter(what for what, _ in found.values())
    assert counts.keys() <= {*CAUGHT, *HARMLESS}
    return counts


def test_the_networks_reach_every_line_of_every_rule():
    reached = set().union(*(fixture.lines for fixture in fixtures()))
    for module in rule_files():
        name = module.__name__.rpartition(".")[2]
        missing = executable_lines(module) - {line for file, line in reached if file == name}
        assert not missing, f"no network reaches lines {sorted(missing)} of {module.__file__}"


def test_the_sound_rules_pass_on_every_network():
    for fixture in Random(0).sample(fixtures(), 50):
        assert fixture.structure.verify(fixture.model).ok, fixture.name


def test_no_mutant_of_a_sample_passes():
    assert verdicts(Random(0).sample(all_mutants(), 30))["verify"] >= 5


@pytest.mark.thorough
@pytest.mark.parametrize("file", [module.__name__.rpartition(".")[2] for module in rule_files()])
def test_no_mutant_passes(file, capsys):
    """`verify` catches every mutant that could do harm, but for those that change no more than a cost."""
    counts = verdicts([mutant for mutant in all_mutants() if mutant.file == file])
    with capsys.disabled():
        print(f"\n{file}: {counts.total()} mutants: {dict(counts)}")  # noqa: T201
    assert counts["verify"]
