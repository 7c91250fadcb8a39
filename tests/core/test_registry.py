from __future__ import annotations

import subprocess
import sys

import pytest

import secateur as sc
from secateur.core import registry
from secateur.errors import InvalidRecipe, UnknownName
from secateur.testing.conformance import check_method
from secateur.testing.toys import toy

CARD = """---
name: {name}
title: Largest entry
summary: The largest absolute weight of a unit.
paper: none
url: none
year: 2026
paradigm: after training
granularity: ["weight", "channel"]
data: none
reference: none
---

# Largest entry
"""

CODE = """
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion

class Sixth(Criterion):
    name = "{name}"

    def score(self, context):
        return context.sum_over_units({{n: w.abs() ** 6 for n, w in context.weights.items()}})

METHOD = Method("{name}", Recipe(criterion=Sixth()))
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    def write(name="sixth", card=CARD, code=CODE):
        (tmp_path / f"{name}.md").write_text(card.format(name=name))
        (tmp_path / f"{name}.py").write_text(code.format(name=name))
        monkeypatch.setenv(registry.PLUGIN_VARIABLE, str(tmp_path))
        return tmp_path

    yield write
    sys.modules.pop("secateur_plugin_sixth", None)


def test_a_plugin_is_one_python_file_and_one_card(plugin):
    """It appears among the methods, prunes, passes the conformance kit and stands in the README's table."""
    from docs.generate import methods_table

    plugin()
    assert "sixth" in [card.name for card in sc.methods()]
    model, x = toy("resnet20")
    pruned = sc.prune(model, x, method="sixth", granularity="channel", budget=sc.Budget(macs=0.5))
    assert pruned.recipe.criterion.name == "sixth" and pruned.after.macs <= pruned.before.macs / 2
    check_method("sixth")
    assert "The largest absolute weight of a unit." in methods_table()


def test_the_command_line_lists_a_plugin(plugin):
    plugin()
    code = "from secateur.cli.main import run; import sys; sys.argv = ['secateur', 'methods', '--json']; run()"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert '"sixth"' in out


def test_listing_methods_imports_neither_torch_nor_any_method(plugin):
    plugin(name="broken", code="raise RuntimeError('boom')")
    code = "import sys; from secateur.core.registry import cards; n = sorted(cards()); print('torch' in sys.modules, n)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("False") and "broken" in out
    with pytest.raises(RuntimeError, match="boom"):
        sc.method("broken")
    assert sc.method("taylor").name == "taylor"


def test_unknown_methods_suggest_a_near_name():
    with pytest.raises(UnknownName, match="Did you mean 'magnitude'"):
        sc.method("magnitud")


def test_collisions_raise(plugin):
    plugin(name="taylor")
    with pytest.raises(InvalidRecipe, match="Two methods are named 'taylor'"):
        sc.methods()


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("no front matter", "no front matter"),
        (CARD.replace("year: 2026", "year: soon"), "wrong at year"),
        (CARD.replace("data: none", "data: plenty"), "wrong at data"),
        (CARD.replace("summary:", "sumary:"), "wrong at s"),
        (CARD.replace('["weight", "channel"]', "[weight]"), "not JSON"),
        (CARD.replace("name: {name}", "name: other"), "says name: other"),
        (CARD.replace("year: 2026", "year 2026"), "without a colon"),
    ],
)
def test_wrong_cards_are_named(plugin, card, message):
    plugin(card=card)
    with pytest.raises(InvalidRecipe, match=message):
        sc.methods()


def test_a_card_needs_its_python_file_and_a_folder_must_exist(tmp_path, monkeypatch):
    (tmp_path / "alone.md").write_text(CARD.format(name="alone"))
    monkeypatch.setenv(registry.PLUGIN_VARIABLE, str(tmp_path))
    with pytest.raises(InvalidRecipe, match=r"has no Python file beside it"):
        sc.methods()
    monkeypatch.setenv(registry.PLUGIN_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(InvalidRecipe, match="which is not a folder"):
        sc.methods()


def test_a_method_file_must_define_its_method(plugin):
    plugin(code="METHOD = None")
    with pytest.raises(InvalidRecipe, match="must define METHOD"):
        sc.method("sixth")


def test_every_card_agrees_with_its_method():
    for card in sc.methods():
        found = sc.method(card.name)
        assert found.card == card and found.name == card.name
        assert found.recipe.criterion.name in {other.name for other in sc.methods()}
        assert card.text.strip().startswith("# ")
