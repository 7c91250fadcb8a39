"""The leaderboard in a real browser. `make browser` installs what this needs; without it the tests skip and say so."""

from __future__ import annotations

import os
import queue
import shutil
import threading
from pathlib import Path

import pytest

from secateur.bench.benchmarks import find_benchmark
from secateur.bench.site import serve
from secateur.bench.site.build import build_site
from secateur.bench.statistics import pareto_front
from secateur.bench.store import Store
from secateur.measure.report import MINUS
from secateur.testing.records import records

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install secateur[slow-tests]")
exceptions = pytest.importorskip("selenium.common.exceptions")
waiting = pytest.importorskip("selenium.webdriver.support.wait")
AXE = Path(os.environ.get("SECATEUR_AXE", ".venv/axe/package/axe.min.js"))
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver: make browser"),
]
BOARD = "benchmarks/digits-resnet8.html"
PAGES = ("index.html", BOARD, "framework.html", "methods/taylor.html", "add-a-method.html")
WIDTHS = (390, 1280)
MADE_UP = [f"made-up-{i}" for i in range(40)]
BENCHMARK = find_benchmark("digits/resnet8")
LINES = len({record.run.group for record in records(BENCHMARK, MADE_UP)})
"""Dense, and each arm at each budget that it has."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leaderboard")
    store = Store(folder / "records")
    for one in records(BENCHMARK, MADE_UP):
        store.publish(one)
    build_site(store, folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def opened(site, browser):
    """Open a page at a width in a color scheme; afterwards nothing may stand in the console."""

    def opened(page, width=1280, scheme="light"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get("about:blank")  # so that an address which differs in its fragment alone is loaded anew
        browser.get((site / page.partition("#")[0]).as_uri() + page[len(page.partition("#")[0]) :])
        return browser

    browser.get_log("browser")
    yield opened
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def elements(driver, selector):
    return driver.find_elements("css selector", selector)


def rows(driver):
    return [row.text for row in elements(driver, "#table tbody tr:not(.detail)")]


def column(driver, heading):
    """The texts of the visible column with this heading, empty cells left out."""
    titles = [cell.text for cell in elements(driver, "#table thead th")]
    place = next(i for i, title in enumerate(titles) if title.startswith(heading)) + 1
    return [cell.text for cell in elements(driver, f"#table tbody tr:not(.detail) td:nth-child({place})") if cell.text]


def choose(driver, name, value):
    select = driver.find_element("name", name)
    driver.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
        select,
        value,
    )


def traces(driver):
    """Name, costs and values of every arm in the plot."""
    drawn = driver.execute_script("return document.getElementById('plot').data.map(t => [t.name, t.x, t.y])")
    return [trace for trace in drawn if not trace[0].startswith("Pareto front")]


def fronts(driver):
    """The points (cost, value) of the Pareto fronts in the plot, by units."""
    drawn = driver.execute_script("return document.getElementById('plot').data.map(t => [t.name, t.x, t.y])")
    start = "Pareto front, "
    return {n.removeprefix(start): list(zip(x, y, strict=True)) for n, x, y in drawn if n.startswith(start)}


def test_filters_change_plot_and_table_alike(opened):
    driver = opened(BOARD)
    everything = len(traces(driver))
    assert len(rows(driver)) == 100 and elements(driver, "#more")[0].is_displayed()  # the first page
    driver.find_element("name", "search").send_keys("taylor")
    shown = rows(driver)
    assert len(shown) == 1 + 4 and all("taylor" in row for row in shown[1:])  # dense stays
    assert {name for name, _, _ in traces(driver)} == {"taylor"} and everything > 40
    choose(driver, "units", "weight")
    assert len(rows(driver)) == 1 + 2 and len(traces(driver)) == 1
    assert f"3 of {LINES} lines" in driver.find_element("id", "shown").text
    driver.find_element("name", "official").click()
    assert len(rows(driver)) == 1 + 2


def test_of_many_methods_those_of_best_rank_are_drawn(opened):
    driver = opened(BOARD)
    lines = driver.execute_script("return JSON.parse(document.getElementById('board').textContent).lines")
    ranks = {}
    for line in lines:
        if line["role"] == "method" and line.get("value"):
            ranks[line["arm"]] = min(line["rank"], ranks.get(line["arm"], line["rank"]))
    drawn = {name for name, _, _ in traces(driver)}
    methods = drawn & ranks.keys()
    assert (
        len(ranks) > 40
        and len(methods) == 40
        and drawn - methods == {"random", "scratch-e", "scratch-b", "bottleneck-e"}
    )
    assert max(ranks[name] for name in methods) <= min(ranks[name] for name in ranks.keys() - methods)
    assert "Drawn are the 40 methods of best rank" in driver.find_element("id", "plot-caption").text
    lines = [{"arm": f"m{i}", "role": "method", "rank": i} for i in range(60)]
    lines += [{"arm": f"m{i}+fresh", "role": "control"} for i in range(60)] + [{"arm": "random", "role": "control"}]
    found = driver.execute_script("return best(arguments[0]).map((line) => line.arm)", lines)
    assert found == [f"m{i}" for i in range(40)] + [f"m{i}+fresh" for i in range(40)] + ["random"]
    driver.find_element("name", "search").send_keys("taylor")
    assert "Drawn are" not in driver.find_element("id", "plot-caption").text


def test_headings_sort_both_ways(opened):
    driver = opened(BOARD)
    heading = next(cell for cell in elements(driver, "#table thead th") if cell.text.startswith("accuracy"))
    for order, down in (("descending", True), ("ascending", False)):
        heading.find_element("tag name", "button").click()
        values = [float(text.split(" ±")[0]) for text in column(driver, "accuracy")]
        assert heading.get_attribute("aria-sort") == order and values == sorted(values, reverse=down)
    assert len(set(values)) > 50


def test_more_rows_come_on_demand(opened):
    driver = opened(BOARD)
    for shown in range(200, LINES + 100, 100):
        driver.find_element("id", "more").click()
        assert len(rows(driver)) == min(shown, LINES)
    assert not driver.find_element("id", "more").is_displayed()


def test_the_axis_can_be_switched(opened):
    driver = opened(BOARD)
    costs = {}
    for axis in ("macs", "sparsity", "bytes", "latency eager"):
        choose(driver, "axis", axis)
        costs[axis] = {x for _, xs, _ in traces(driver) for x in xs}
    assert costs["macs"] == {50, 25, 10, 5} and costs["sparsity"] == {50, 75, 90, 95}
    assert costs["bytes"] == {50, 25, 100} and costs["latency eager"] == {62.5, 43.75}


@pytest.mark.parametrize(("axis", "sign"), [("macs", 1), ("sparsity", -1), ("latency eager", 1)])
def test_the_front_of_the_chosen_axis_is_drawn(opened, axis, sign):
    driver = opened(BOARD)
    driver.find_element("name", "search").send_keys("made-up-1")
    choose(driver, "axis", axis)
    found = fronts(driver)
    assert found.keys() == ({"channel"} if axis.startswith("latency") else {"channel", "weight"})
    for units, front in found.items():
        choose(driver, "units", units)
        points = [(sign * x, y) for _, xs, ys in traces(driver) for x, y in zip(xs, ys, strict=True)]
        assert [(sign * x, y) for x, y in front] == [points[i] for i in pareto_front(points)] and len(points) > 10
        assert fronts(driver).keys() == {units}


def test_methods_that_are_not_drawn_count_for_the_front(opened):
    driver = opened(BOARD)
    driver.execute_script(  # the best point is that of the method of worst rank
        "const data = JSON.parse(document.getElementById('board').textContent);"
        "const line = data.lines.find((line) => line.role === 'method' && line.x.macs === 25);"
        "for (const own of data.lines.filter((other) => other.arm === line.arm)) own.rank = 1000;"
        "line.arm = 'unseen'; line.value[0] = 99.9; new Board(data);"
    )
    assert "unseen" not in {name for name, _, _ in traces(driver)} and (25, 99.9) in fronts(driver)["channel"]


def test_a_point_opens_its_line_the_line_its_record_and_the_record_its_command(opened):
    driver = opened(BOARD)
    driver.find_element("name", "search").send_keys("taylor")
    driver.execute_script(
        "const plot = document.getElementById('plot');"
        "plot.emit('plotly_click', {points: [{customdata: plot.data[0].customdata[0]}]})"
    )
    detail = driver.find_element("css selector", "tr.detail")
    assert "secateur bench run digits/resnet8 --methods taylor" in detail.text
    line = next(
        line
        for line in driver.execute_script("return JSON.parse(document.getElementById('board').textContent).lines")
        if line["arm"] == "taylor" and line["command"] in detail.text
    )
    low, high = (f"{end:+.2f}".replace("-", MINUS) for end in line["against"]["random"][3:5])
    assert f"bootstrap {low} to {high} over 3 seeds" in detail.text and "just the range" in detail.text
    command = detail.find_element("css selector", ".command code").text
    address = detail.find_element("link text", "seed 1").get_attribute("href")
    detail.find_element("css selector", ".command button").click()
    box = driver.find_element("name", "search")
    box.clear()
    box.send_keys(webdriver.Keys.CONTROL, "v")
    assert box.get_attribute("value") == command
    driver.get(address)
    heading = driver.find_element("tag name", "h1").text
    assert heading.startswith("taylor") and heading.endswith("seed 1") and "seed 1" in driver.title
    assert driver.find_element("css selector", ".command code").text.endswith("--seeds 1")
    assert "Official." in driver.find_element("id", "record").text and elements(driver, ".js-plotly-plot")


def test_an_open_page_follows_the_records(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "SECONDS", 0.1)
    store = Store(tmp_path / "records")
    first, second, *_ = records(BENCHMARK)
    store.publish(first)
    address = queue.Queue()
    site = serve.Site(store, tmp_path / "site", lambda count: None, pytest.fail)
    site.refresh()
    thread = threading.Thread(target=site.serve, args=(0, address.put))
    thread.start()
    wait = waiting.WebDriverWait(
        browser, 20, ignored_exceptions=(exceptions.NoSuchElementException, exceptions.StaleElementReferenceException)
    )
    try:
        browser.get(address.get(timeout=20) + "index.html")
        number = lambda driver: driver.find_element("css selector", ".facts dd").text  # noqa: E731
        assert number(browser) == "1"
        store.publish(second)
        wait.until(lambda driver: number(driver) == "2")
        store.path_of(first).unlink()
        wait.until(lambda driver: number(driver) == "1")
    finally:
        browser.get("about:blank")  # it would ask a server that is gone
        site.stop()
        thread.join(20)


def test_an_unknown_record_is_said_to_be_unknown(opened):
    driver = opened("record.html#digits-resnet8-0/0123")
    driver.implicitly_wait(10)
    assert "no such record" in driver.find_element("css selector", ".error").text
    driver.implicitly_wait(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", [*PAGES, "record"])
def test_pages_fit_and_are_accessible(opened, site, page, width, scheme, tmp_path):
    if page == "record":
        text = (site / BOARD).read_text()
        start = text.index("record.html#")
        page = text[start : text.index('"', start)]
    driver = opened(page, width, scheme)
    wide = driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0, f"{page} is {wide} px wider than {width} px"
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 22, 28)" if scheme == "dark" else "rgb(255, 255, 255)")
    if not AXE.is_file():
        pytest.skip("needs axe-core: make browser")
    driver.execute_script(AXE.read_text())
    found = driver.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {preload: false}).then(result => done(result.violations))"
    )
    serious = [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]
    assert serious == []
