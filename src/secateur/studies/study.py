"""What a study is: claims, what was found, tables and figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from secateur.atomic import written_atomically
from secateur.environment import environment
from secateur.measure.report import Page, Section, Table

OnProgress = Callable[[str, int, int], None]
"""Called with (what is done now, finished parts, all parts)."""


@dataclass(frozen=True)
class Claim:
    """Something that a theory says, and what was found.

    Attributes:
        statement: In words.
        source: Who says so, and where; or that it follows by a derivation.
        expected: The figure or the relation that it predicts.
        found: What came out.
        holds: The verdict.
    """

    statement: str
    source: str
    expected: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Exhibit:
    """A figure or a table, with what it shows.

    Attributes:
        title: In a few words.
        caption: What is to be seen, and under which settings.
        figure: Plotly's HTML, or "".
        table: Rows of text, or None.
        claims: Which claims of the study it bears on, counted from 0; the page says them with their verdicts below it.
    """

    title: str
    caption: str
    figure: str = ""
    table: Table | None = None
    claims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What a study has found.

    Attributes:
        claims: With their verdicts.
        exhibits: In the order of reading.
        data: All numbers behind them.
    """

    claims: tuple[Claim, ...]
    exhibits: tuple[Exhibit, ...]
    data: dict[str, Any]

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(claim.holds for claim in self.claims)

    def caption(self, exhibit: Exhibit) -> str:
        """Return the claims that an exhibit bears on, each with its source and its verdict, and then its caption."""
        claims = [self.claims[i] for i in exhibit.claims]
        verdicts = ("holds" if claim.holds else "does not hold" for claim in claims)
        judged = [f"{c.statement.rstrip('.')} ({c.source}): {v}." for c, v in zip(claims, verdicts, strict=True)]
        return "\n".join([*judged, exhibit.caption])


@dataclass(frozen=True)
class Study:
    """A theory that can be run.

    Attributes:
        name: As on the command line.
        title: In words.
        question: What it answers.
        source: The paper.
        run: (seed, progress) -> findings; under 10 minutes on two cores.
    """

    name: str
    title: str
    question: str
    source: str
    run: Callable[[int, OnProgress], Findings]

    def report(self, folder: Path, seed: int, progress: OnProgress) -> Findings:
        """Run the study and write ``NAME.json`` and ``NAME.html`` into a folder, which is made if need be."""
        start = perf_counter()
        findings = self.run(seed, progress)
        seconds = round(perf_counter() - start, 1)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "study": self.name,
            "seed": seed,
            "claims": [asdict(claim) for claim in findings.claims],
            "data": findings.data,
            "seconds": seconds,
            "environment": environment(),
        }
        with written_atomically(folder / f"{self.name}.json") as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self._page(findings).write(folder / f"{self.name}.html")
        return findings

    def _page(self, findings: Findings) -> Page:
        rows = [(c.statement, c.expected, c.found, "holds" if c.holds else "fails", c.source) for c in findings.claims]
        head = ("claim", "expected", "found", "verdict", "source")
        sections = [Section("Claims", table=Table(head, rows, text_columns=(0, 1, 2, 3, 4)))]
        sections += [
            Section(e.title, table=e.table, figure=e.figure, caption=findings.caption(e)) for e in findings.exhibits
        ]
        return Page(self.title, self.title, f"{self.question} {self.source}.", sections=sections)
