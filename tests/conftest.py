from __future__ import annotations

import os

import pytest
import torch

os.environ.pop("COLUMNS", None)  # of the worker's terminal; what is set at import would hold for ever


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
