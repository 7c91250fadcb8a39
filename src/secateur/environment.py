"""Facts about the machine and the packages that a figure depends on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("secateur", "torch", "lightning-fabric", "numpy", "onnxruntime", "openvino")


def environment() -> dict[str, str | int]:
    """Return processor, number of cores, system, Python and package versions; no names of people or machines."""
    facts: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def commit() -> tuple[str | None, bool]:
    """Return the git commit of this code, and whether nothing but records differs from it.

    Outside a git checkout, or without git, the commit is None and nothing is known to be clean.
    """
    here = Path(__file__).parent
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name, folder=here)  # not a checkout of something else
        head = _git("rev-parse", "HEAD", folder=here)
        root = _git("rev-parse", "--show-toplevel", folder=here)
        changed = _git("status", "--porcelain", "--", "src", "bench", "pyproject.toml", folder=Path(root))
    except (OSError, subprocess.SubprocessError):
        return None, False
    return head, not changed


def _git(*arguments: str, folder: Path) -> str:
    call = ["git", *arguments]
    return subprocess.run(call, cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
