"""A runner that is killed, workers that are killed, disks that are full: the next run ends with the same records."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secateur.bench.benchmarks import read_benchmark
from secateur.bench.plan import plan
from secateur.bench.store import Store

TINY = Path(__file__).parent / "tiny.yaml"
METHODS = ["magnitude", "random", "scratch-e"]
RUNS = plan(read_benchmark(TINY), "aad86d75f68cbe8d", METHODS)
DISTURBANCES = 20

pytestmark = pytest.mark.slow


def start(folder, *options):
    """A runner in a process of its own."""
    code = "from secateur.cli.main import run; run()"
    where = ["--results", str(folder / "results"), "--scratch", str(folder / "scratch")]
    call = [sys.executable, "-c", code, "bench", "run", str(TINY), "--methods", ",".join(METHODS), *where, *options]
    return subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(folder, *options):
    assert start(folder, *options).wait(1500) == 0
    records, refused = Store(folder / "results").read()
    assert refused == []
    return {record.id: record.repeatable() for record in records}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    records = finish(tmp_path_factory.mktemp("undisturbed"))
    assert records.keys() == {run.id for run in RUNS} and {r["status"] for r in records.values()} == {"ok"}
    return records


def parents():
    """The parent of each process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    return found


def descendants(pid):
    """Processes below one."""
    tree = parents()
    found, queue = [], [pid]
    while queue:
        children = [child for child, parent in tree.items() if parent == queue[0]]
        found += children
        queue = queue[1:] + children
    return found


def workers(pid):
    """The processes that run jobs: forked from a child of the runner that has PyTorch loaded."""
    tree = parents()
    return [process for process, parent in tree.items() if tree.get(parent) == pid]


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def fill_the_disk(pid):
    """From now on nothing that belongs to this runner can write a byte to a file."""
    for process in [pid, *descendants(pid)]:
        try:
            resource.prlimit(process, resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        except (ProcessLookupError, PermissionError):
            pass


def snapshot(folder):
    return {path: path.read_bytes() for path in (folder / "results").rglob("*.json") if not path.name.startswith(".")}


def test_whatever_is_killed_the_records_are_those_of_an_undisturbed_run(tmp_path, undisturbed):
    choose = random.Random(0)
    done, grid = [], 0
    while len(done) < DISTURBANCES:
        folder = tmp_path / str(grid)
        runner = start(folder)
        while runner.poll() is None and len(done) < DISTURBANCES:
            target = len(snapshot(folder)) + choose.choice([0, 0, 1, 2])
            while runner.poll() is None and (len(snapshot(folder)) < target or not workers(runner.pid)):
                time.sleep(0.05)
            time.sleep(choose.uniform(0, 3))
            if runner.poll() is not None:
                break
            before = snapshot(folder)
            what = choose.choice(["runner", "worker", "disk"])
            below = descendants(runner.pid)
            if what == "worker" and workers(runner.pid):
                kill(choose.choice(workers(runner.pid)))
            elif what == "disk":
                fill_the_disk(runner.pid)
            else:
                kill(runner.pid)
                runner.wait()
                until = time.monotonic() + 20  # its workers must not go on: the next runner would run the same jobs
                while any(Path(f"/proc/{p}").exists() for p in below) and time.monotonic() < until:
                    time.sleep(0.1)
                assert not any(Path(f"/proc/{p}").exists() for p in below)
            done.append((what, len(before)))
            assert before.items() <= snapshot(folder).items()  # what is written stays as it is
        runner.wait()
        if len(snapshot(folder)) == len(RUNS):
            grid += 1
    assert len({count for _, count in done}) > 3 and {what for what, _ in done} == {"runner", "worker", "disk"}
    for number in range(grid + 1):
        before = snapshot(tmp_path / str(number))
        assert finish(tmp_path / str(number)) == undisturbed
        assert before.items() <= snapshot(tmp_path / str(number)).items()
        assert not list((tmp_path / str(number)).rglob(".*"))  # half-written files are swept away


def test_ray_gives_the_same_records_and_a_killed_worker_costs_only_its_job(tmp_path, undisturbed):
    pytest.importorskip("ray")
    runner = start(tmp_path, "--executor", "ray")
    killed = 0
    while runner.poll() is None and killed < 3:
        time.sleep(0.1)  # a job is at work most of the time: look often enough to meet one
        if len(snapshot(tmp_path)) > 3 * (killed + 1):
            at_work = [p for p in descendants(runner.pid) if "ray::attempt" in command(p)]
            if at_work:
                kill(at_work[0])
                killed += 1
    assert runner.wait(1500) == 0 and killed == 3
    assert finish(tmp_path) == undisturbed


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_submitit_gives_the_same_records(tmp_path, undisturbed):
    pytest.importorskip("submitit")
    assert finish(tmp_path, "--executor", "slurm", "--address", "local") == undisturbed
