"""Secure aggregation over NVIDIA FLARE: the simulation's sum, with the messages of Flower's."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("nvflare", reason="the extra 'nvflare' is not installed")

from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import make_reply
from tests.integrations import flower_task as task
from tests.integrations import secure_task
from tests.integrations.test_nvflare import SITES, history, run, simulate

from fedpara_peft.comm.ledger import Ledger

SECURE = {**secure_task.SECURE, "num_rounds": 2}


@pytest.fixture(autouse=True)
def _without_batch_norm(monkeypatch):
    monkeypatch.setattr(task, "model_fn", secure_task.model_fn)


def assert_same_state(folder):
    ours, theirs = (
        load_file(folder / where / "checkpoint-2" / "server.safetensors")
        for where in ("server", "simulated")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_masked_sum_over_sites_is_the_simulations(tmp_path):
    losses = []

    def watch(site, job, result):
        losses.append((result["train_loss"], result["num_examples"]))
        return result

    assert run(tmp_path, watch, **SECURE).reason is None
    trainer = simulate(tmp_path, **SECURE)
    assert_same_state(tmp_path)
    timeless = {"seconds": 0.0, "slowest_client_s": None}
    assert [dataclasses.replace(r, **timeless) for r in history(tmp_path)] == [
        dataclasses.replace(r, **timeless) for r in trainer.history
    ]
    ledger = Ledger.load(tmp_path / "server" / "ledger.npy")
    assert list(ledger.transfers()) == list(trainer.ledger.transfers())
    assert losses == [(0.0, 0)] * 2 * 4 * len(SITES)
    assert not list(tmp_path.rglob("secure-*"))


def test_a_site_that_goes_after_masking_is_in_the_sum_and_below_the_threshold_it_stops(tmp_path):
    def gone(*sites):
        def spoil(site, job, result):
            here = job["round"] == 1 and job["wants"] == "UNMASKING" and site in sites
            return make_reply(ReturnCode.EXECUTION_EXCEPTION) if here else result

        return spoil

    more = {**SECURE, "secure_drop_outs": 0.34}
    assert run(tmp_path, gone(SITES[1]), **more).reason is None
    simulate(tmp_path, **more)
    assert_same_state(tmp_path)
    stopped = run(tmp_path / "again", gone(*SITES[1:]), **more)
    assert "SecureAggregationError: 1 of 3 clients helped to unmask" in stopped.reason
