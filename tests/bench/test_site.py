from __future__ import annotations

import html
import json
import re
import socket
import threading
import urllib.request
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

import secateur as sc
from secateur.atomic import written_atomically
from secateur.bench.benchmarks import Claim, find_benchmark
from secateur.bench.plan import plan
from secateur.bench.records import Reported
from secateur.bench.site import build, entries, serve
from secateur.bench.site.build import build_site, slots_of
from secateur.bench.site.serve import Site
from secateur.bench.store import Store
from secateur.bench.summary import summarize
from secateur.cli import leaderboard
from secateur.core.method import method
from secateur.core.registry import cards
from secateur.errors import InvalidFile
from secateur.parts.recovery.fine_tune import FineTune
from secateur.testing.records import CODE, record, records

BENCHMARK = find_benchmark("digits/resnet8")
RUNS = plan(BENCHMARK, str(BENCHMARK.task.data))


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "records")
    for one in records(BENCHMARK):
        store.publish(one)
    return store


def run_of(arm, budget, seed=0):
    return next(run for run in RUNS if (run.arm, run.budget_label, run.seed) == (arm, budget, seed))


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.ids = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.found |= {values[key] for key in ("href", "src") if values.get(key)}


def stamp_of(text):
    found = re.search('<meta name="stamp" content="(.+?)">', text)
    return found and found.group(1)


def board_of(page):
    text = re.search(r'id="board">(.*?)</script>', page.read_text(), re.S).group(1)
    return json.loads(text)


def test_every_page_is_written_and_every_link_leads_somewhere(store, tmp_path):
    out = tmp_path / "site"
    (board,) = build_site(store, out)
    assert board.benchmark == BENCHMARK and len(board.records) == len(RUNS) == board.official * 3
    pages = {path.relative_to(out).as_posix() for path in out.rglob("*.html")}
    assert pages == {
        *("index.html", "record.html", "framework.html", "add-a-method.html", "benchmarks/digits-resnet8.html"),
        *(f"methods/{name}.html" for name in cards()),
    }
    for page in out.rglob("*.html"):
        assert "assets/live.js" in page.read_text() and stamp_of(page.read_text()) is None  # nobody serves them
        for link in Links(page.read_text()).found:
            if not link.startswith(("http", "#", "data:")):
                assert (page.parent / link.partition("#")[0]).is_file(), f"{page}: {link}"
        assert "http" not in "".join(re.findall(r'(?:src|<link[^>]*href)="([^"]*)"', page.read_text()))  # no network


def test_the_table_says_what_the_records_say(store, tmp_path):
    build_site(store, tmp_path / "site")
    lines = board_of(tmp_path / "site/benchmarks/digits-resnet8.html")["lines"]
    assert next(line["arm"] for line in lines) == "dense" and len(lines) == len(RUNS) / 3
    line = next(x for x in lines if (x["arm"], x["budget"]) == ("taylor", "macs=0.25"))
    values = [100 * record(run_of("taylor", "macs=0.25", seed)).value for seed in (0, 1, 2)]
    rivals = [100 * record(run_of("random", "macs=0.25", seed)).value for seed in (0, 1, 2)]
    assert line["value"][0] == pytest.approx(sum(values) / 3, abs=1e-3) and line["value"][2] == 3
    differences = [ours - theirs for ours, theirs in zip(values, rivals, strict=True)]
    mean, _, _, low, high, n = line["against"]["random"]
    assert (mean, low, high) == pytest.approx((sum(differences) / 3, min(differences), max(differences)), abs=1e-3)
    assert n == 3 and line["effective"] is None  # it is smaller
    masked = next(x for x in lines if (x["arm"], x["budget"]) == ("taylor", "sparsity=0.9"))
    assert masked["effective"] == pytest.approx(90)
    assert line["x"] == pytest.approx(
        {"sparsity": 75, "macs": 25, "params": 25, "bytes": 25, "latency eager": 43.75}, abs=1e-3
    )
    assert line["speedup"]["eager"][0] == pytest.approx(4 / 1.75, abs=1e-3)
    assert line["command"] == "secateur bench run digits/resnet8 --methods taylor --budgets macs=0.25"
    page = (tmp_path / "site/benchmarks/digits-resnet8.html").read_text()
    low, high = (sum(record(run_of("taylor", b, k)).value for k in (0, 1, 2)) / 3 for b in ("macs=0.25", "macs=0.5"))
    area = low * 0.75 + (high - low) * 0.5  # kept MACs 0.25 and 0.5 of 1, above an accuracy of 0
    assert f'<td>taylor</td><td>channel</td><td class="number">{area:.4f}</td>' in page and high > low
    masked = next(x for x in lines if (x["arm"], x["budget"]) == ("taylor", "sparsity=0.95"))
    assert masked["x"]["bytes"] == 100 and "latency eager" not in masked["x"] and masked["units"] == "weight"


def test_each_record_is_in_the_data_file_that_its_address_names(store, tmp_path):
    out = tmp_path / "site"
    build_site(store, out)
    lines = board_of(out / "benchmarks/digits-resnet8.html")["lines"]
    addresses = [address for line in lines for _, _, address in line["records"]]
    assert len(set(addresses)) == len(RUNS)
    for address in addresses:
        name, _, found = address.removeprefix("record.html#").partition("/")
        text = (out / "data" / f"{name}.js").read_text()
        content = json.loads(text.removeprefix("secateurRecords(").removesuffix(");\n"))[found]
        assert content["record"]["id"] == found and (store.folder / content["file"]).is_file()
        assert content["record"]["run"]["seed"] == int(content["command"].split("--seeds ")[1])


def test_the_same_records_give_the_same_files_and_old_pages_go(store, tmp_path):
    out = tmp_path / "site"
    build_site(store, out)
    first = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "methods/gone.html").write_text("x")
    (out / "data/gone-0.js").write_text("x")
    build_site(store, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == first


def test_unofficial_failed_and_refused_records_are_shown_as_such(tmp_path):
    store = Store(tmp_path / "records")
    for seed in (0, 1, 2):
        store.publish(record(run_of("taylor", "macs=0.5", seed), code=CODE.model_copy(update={"clean": False})))
        store.publish(record(run_of("random", "macs=0.5", seed), failed=seed == 2))
    edited = store.path(store.publish(record(run_of("magnitude", "macs=0.5"))).run)
    edited.write_text(edited.read_text().replace('"n": 10000', '"n": 10001'))
    (board,) = build_site(store, tmp_path / "site")
    lines = {line["arm"]: line for line in board.entries}
    assert lines["taylor"]["reasons"] == ["made with changes that were not committed"]
    assert [seed for seed, *_ in lines["random"]["failures"]] == [2] and len(lines["random"]["records"]) == 2
    assert not lines["random"]["official"] and board.official == 0 and "magnitude" not in lines
    page = (tmp_path / "site/benchmarks/digits-resnet8.html").read_text()
    assert edited.name in page and "was changed after it was written" in page


def test_papers_figures_stand_beside_ours_and_only_where_they_belong(store):
    paper = Reported(
        method="taylor", granularity="channel", budget={"macs": 0.5}, metric="accuracy", value=0.9, source="P"
    )
    benchmark = BENCHMARK.model_copy(update={"reported": (paper,)})
    rows = summarize(store.read()[0], benchmark)
    address = entries.places(benchmark.name, store.read()[0])
    lines = [entries.entry(row, benchmark, cards(), address) for row in rows]
    shown = [(line["arm"], line["budget"]) for line in lines if line["reported"]]
    assert shown == [("taylor", "macs=0.5")]


def test_claims_of_papers_stand_on_the_page_with_their_verdict(store, tmp_path, monkeypatch):
    claim = Claim(method="taylor", says="Taylor is better than chance", source="P", arm="taylor", above="random")
    benchmark = BENCHMARK.model_copy(update={"claims": (claim, claim.model_copy(update={"above": "no such arm"}))})
    monkeypatch.setattr(build, "find_benchmark", lambda name: benchmark)
    monkeypatch.setattr(build, "benchmark_names", lambda: (benchmark.name,))
    (board,) = build_site(store, tmp_path / "site")
    budgets = [budget.value for ladder in benchmark.ladders for budget in ladder.budgets]
    assert len(board.claims) == len(budgets) and {found.claim for found in board.claims} == {claim}
    page = (tmp_path / "site/benchmarks/digits-resnet8.html").read_text()
    assert page.count("Taylor is better than chance") == len(budgets) and "taylor above random" in page
    found = board.claims[0]
    difference = f"{100 * found.paired.difference.mean:+.2f} ± ".replace("-", "\N{MINUS SIGN}")
    assert difference in page and f"<b>{found.verdict}</b>" in page


def test_the_training_of_a_dense_network_is_told_even_where_it_is_the_usual_one():
    run = RUNS[0]
    assert entries.recovery_words(run) == "trained 20 epochs"
    usual = run.model_copy(update={"training": {"name": "fine-tune", "lr": 0.2}})
    assert entries.recovery_words(usual) == f"trained {FineTune().epochs:g} epochs"


def test_sentences_name_the_leader_its_ties_and_who_beats_random(tmp_path):
    store = Store(tmp_path)
    for arm, value in {"taylor": 0.95, "magnitude": 0.80, "random": 0.90}.items():
        for seed in (0, 1, 2):
            store.publish(record(run_of(arm, "macs=0.5", seed), value=value + 0.001 * seed))
    (sentence,) = entries.verdicts(summarize(store.read()[0], BENCHMARK))
    assert sentence == (
        "50 % of the MACs, by channel: the highest mean is that of taylor, 95.10 %. "
        "Against random pruning, seed by seed: better: taylor; worse: magnitude; undecided: 0."
    )
    assert entries.budget_words("sparsity=0.98") == "98 % sparsity"


def test_a_single_seed_does_not_lead_where_there_are_official_results(tmp_path):
    store = Store(tmp_path)
    store.publish(record(run_of("taylor", "macs=0.5", 0), value=0.99))
    (sentence,) = entries.verdicts(summarize(store.read()[0], BENCHMARK))
    assert "the highest mean (unofficial) is that of taylor, 99.00 %" in sentence
    for seed in (0, 1, 2):
        store.publish(record(run_of("magnitude", "macs=0.5", seed), value=0.80))
    (sentence,) = entries.verdicts(summarize(store.read()[0], BENCHMARK))
    assert "the highest mean is that of magnitude, 80.00 %" in sentence and "taylor" not in sentence


def test_slots_in_words():
    words = slots_of(method("taylor").recipe.but(granularity={"name": "channel", "round_to": 8}))
    assert words["criterion"] == "taylor" and words["granularity"] == "channel (round_to=8)"
    assert words["mask_from"] == "end" and words["schedule"] == "one-shot"


def test_served_pages_follow_the_records(store, tmp_path):
    counts, addresses, ready = [], [], threading.Event()
    site = Site(store, tmp_path / "site", counts.append, pytest.fail)
    site.refresh()

    def on_address(address):
        addresses.append(address)
        ready.set()

    thread = threading.Thread(target=site.serve, args=(0, on_address))
    thread.start()
    try:
        assert ready.wait(60)
        page = urllib.request.urlopen(addresses[0] + "index.html")
        text = page.read().decode()
        assert "ResNet-8 on handwritten digits" in text and page.headers["Cache-Control"] == "no-store"
        first = urllib.request.urlopen(addresses[0] + "built").read().decode()
        assert first and stamp_of(text) == first and site.refresh() is False
        store.path(RUNS[0]).unlink()
        assert site.refresh() is True and counts == [len(RUNS), len(RUNS) - 1]
        last = urllib.request.urlopen(addresses[0] + "built").read().decode()
        assert last != first and {stamp_of(page.read_text()) for page in site.out.rglob("*.html")} == {last}
    finally:
        site.stop()
        thread.join(20)
    assert not thread.is_alive()


def test_a_server_started_anew_does_not_pass_for_the_last_one(store, tmp_path):
    stamps = set()
    for _ in range(2):
        site = Site(store, tmp_path / "site", lambda records: None, pytest.fail)
        site.refresh()
        stamps.add(site.stamp)
    assert len(stamps) == 2


def test_a_folder_that_cannot_be_written_to_is_named(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidFile, match="Cannot build the pages in .*file/site: .*Not a directory"):
        build_site(store, tmp_path / "file/site")


def test_the_command_line_does_not_blame_the_port_for_the_folder(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidFile, match="Cannot build the pages in"):
        leaderboard.serve(store.folder, tmp_path / "file/site", port=0, browser=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidFile, match=f"Cannot serve on port {port}: Address already in use"):
            leaderboard.serve(store.folder, tmp_path / "site", port=port, browser=False)


def test_half_written_and_vanished_files_are_no_news(store, tmp_path, monkeypatch):
    site = Site(store, tmp_path / "site", lambda records: None, pytest.fail)
    assert site.refresh() is True
    with pytest.raises(KeyboardInterrupt), written_atomically(store.path(RUNS[0])) as temporary:
        assert temporary.suffix == ".json" and site.refresh() is False
        raise KeyboardInterrupt
    listed = list(store.folder.rglob("*.json"))
    folder = SimpleNamespace(rglob=lambda pattern: [*listed, store.folder / "digits/ghost.json"])
    monkeypatch.setattr(site, "store", SimpleNamespace(folder=folder))
    assert site.refresh() is False


def test_a_failed_build_is_told_once_and_tried_again(store, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "SECONDS", 0.01)
    builds, problems, recovered, ended = [], [], threading.Event(), []
    tries = iter([InvalidFile("disk"), InvalidFile("disk"), ValueError("bad value")])

    def broken(*arguments):
        if (problem := next(tries, None)) is None:
            return build_site(*arguments)
        raise problem

    site = Site(store, tmp_path / "site", lambda n: (builds.append(n), recovered.set()), problems.append)
    site.refresh()
    recovered.clear()
    monkeypatch.setattr(serve, "build_site", broken)
    store.path(RUNS[0]).unlink()
    thread = threading.Thread(target=site._watch, args=(SimpleNamespace(shutdown=lambda: ended.append(True)),))
    thread.start()
    assert recovered.wait(60)
    site.stop()
    thread.join(20)
    assert ended and problems == ["disk", "ValueError: bad value"] and builds == [len(RUNS), len(RUNS) - 1]


def test_the_method_that_the_guide_shows_works(store, tmp_path, monkeypatch):
    build_site(store, tmp_path / "site")
    page = (tmp_path / "site/add-a-method.html").read_text()
    code, card, _ = (html.unescape(text) for text in re.findall('<code>((?:"""|---|export).*?)</code>', page, re.S))
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/sixth.py").write_text(code)
    (tmp_path / "methods/sixth.md").write_text(card)
    monkeypatch.setenv("SECATEUR_METHODS_PATH", str(tmp_path / "methods"))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    pruned = sc.prune(model, torch.zeros(1, 2), method="sixth", budget=sc.Budget(sparsity=0.5))
    assert pruned.model[0].weight.tolist() == [[0, -2], [0, 3]]
