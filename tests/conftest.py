import gc
import os
import re

# One thread per test process: results must not depend on how many tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--device", help="make tests' tensors there; many tests know the CPU alone")
    parser.addoption(
        "--write-tables", action="store_true",
        help="slow tests write the tables of what they find into benchmarks/results",
    )  # fmt: skip


def pytest_collection_modifyitems(items):
    # A name with an address in it differs from process to process: xdist's workers then disagree.
    if unstable := [item.nodeid for item in items if re.search(r"\b0x[0-9a-f]", item.nodeid)]:
        raise pytest.UsageError(f"give these tests ids without addresses: {unstable}")


def pytest_collection_finish(session):
    # A full garbage collection looks at all that was imported otherwise, for a third of a second.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed(request):
    device = request.config.getoption("--device")
    if device is not None:
        torch.set_default_device(device)
    torch.manual_seed(0)
    yield
    if device is not None:
        torch.set_default_device(None)
