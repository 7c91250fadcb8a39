"""A runner that is killed, workers that are killed, disks that are full: the next run ends with the same records."""

from __future__ import annotations

import os
import random
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from secateur.bench.benchmarks import plan, read_benchmark
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


PORTS = (
    "port",
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
"""Of a Ray cluster: where its agents choose their own, it gives up on a busy machine before they have told them."""


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of two workers that is there before the runner and after it; its address and its first process."""
    pytest.importorskip("ray", reason="needs ray: pip install 'secateur[ray]'")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as Ray starts clusters, with a token of this test's own
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # not 15: on a busy machine they would wait for minutes
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "600000")  # not 30 s, for the same reason
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # short: sockets below it have at most 107 characters
        call = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"]
        call += ["--num-cpus=2", f"--temp-dir={folder}", "--include-dashboard=false", "--disable-usage-stats"]
        call += [f"--{name}={port}" for name, port in zip(PORTS, ports, strict=True)]
        head = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 120
            while not any("raylet/raylet" in command(p) for p in descendants(head.pid)):
                assert head.poll() is None and time.monotonic() < until
                time.sleep(0.1)
            yield f"127.0.0.1:{ports[0]}", head.pid
            assert head.poll() is None  # the runner has left the cluster as it was
        finally:
            below = descendants(head.pid)
            head.terminate()
            head.wait(60)
            for process in below:
                kill(process)


def test_ray_gives_the_same_records_and_a_killed_worker_costs_only_its_job(tmp_path, undisturbed, cluster, request):
    address, head = cluster
    runner = start(tmp_path, "--executor", "ray", "--address", address)
    request.addfinalizer(runner.kill)
    before, killed = {}, []
    while runner.poll() is None and len(killed) < 3:
        time.sleep(0.05)  # jobs are at work most of the time: look often enough to meet two
        at_work = [process for process in descendants(head) if "ray::attempt" in command(process)]
        if len(at_work) == 2 and len(snapshot(tmp_path)) > len(before) + 1:
            assert before.items() <= snapshot(tmp_path).items()  # to the byte, times too: nothing was made again
            before = snapshot(tmp_path)
            kill(at_work[0])
            killed.append(len(before))
        assert command(head)  # without a cluster the runner would wait for minutes
    assert runner.wait(1500) == 0 and len(killed) == 3 and 0 < killed[0] < killed[2] < len(RUNS)
    assert before.items() <= snapshot(tmp_path).items()
    assert finish(tmp_path) == undisturbed


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_submitit_gives_the_same_records(tmp_path, undisturbed):
    pytest.importorskip("submitit")
    assert finish(tmp_path, "--executor", "slurm", "--address", "local") == undisturbed
