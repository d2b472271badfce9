"""Secure aggregation among real processes, on Flower over TLS: SuperLink, three SuperNodes.

Flower starts a process for every message, so what clients must not tell rests on their nodes' disks
in between. What crosses the wire is read behind its encryption and searched for every update.
"""

from unittest import mock

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from safetensors.torch import load_file
from tests.slow.flower_trial import Trial, bits, killed, relay, task

from fedpara_peft import FederatedTrainer, History
from fedpara_peft.comm.secure.client import SecureClient


def simulated(folder, rounds, missing):
    """The run in one process, and every update that a client masked in it."""
    from bench_app import secure

    args = secure.arguments({"output-dir": str(folder), "num-rounds": rounds})
    trainer = FederatedTrainer(task.model_fn(), args, task.clients(), task.test_set())
    lost = lambda cohort, _, __, number: sorted(missing.get(number + 1, ()))  # noqa: E731
    updates, mask = [], SecureClient.mask

    def overhear(self, data, values, weight, loss):
        updates.append((self.agreed, values, weight, loss))
        return mask(self, data, values, weight, loss)

    with (
        mock.patch("fedpara_peft.federation.server.round.drop_outs", lost),
        mock.patch.object(SecureClient, "mask", overhear),
    ):
        trainer.train()
    return updates


def ended(trial):
    """The run's history; what its server said, if it has none."""
    file = trial.server / "history.json"
    assert file.exists(), trial.log()[-4000:]
    return History.load(file)


def assert_same_bits(trial, folder, missing=()):
    updates = simulated(folder, trial.rounds, dict(missing))
    name = f"checkpoint-{trial.rounds}/server.safetensors"
    assert bits(load_file(trial.server / name)) == bits(load_file(folder / name))
    return updates


@pytest.mark.parametrize("worker", [0, 1], ids=["a process a message", "a process that stays"])
def test_real_processes_end_in_the_simulations_sum_and_no_update_crosses(tmp_path, worker):
    trial = Trial(tmp_path / "trial", 2, app="secure", worker=worker)
    with trial.federation, relay(trial) as (address, wire):
        trial.start(address=address)
        trial.finish()
    heard = bytes(wire)
    history = ended(trial)
    assert [(r.dropped, r.refused) for r in history] == [((), ())] * 2
    updates = assert_same_bits(trial, tmp_path / "simulated")
    shared = load_file(trial.server / "checkpoint-1" / "server.safetensors")
    assert any(data[:64] in heard for data in bits(shared).values())  # so an update would be seen
    for agreed, values, weight, loss in updates:
        needles = [agreed.vector(values, weight, loss).pack()[:64]]
        needles += [values.astype(dtype).tobytes()[:32] for dtype in ("<i2", "<i4", "<i8")]
        real = values / agreed.levels * 0.25
        needles += [real.astype(dtype).tobytes()[:32] for dtype in ("<f2", "<f4", "<f8")]
        assert not any(needle in heard for needle in needles if np.any(np.frombuffer(needle, "u1")))
    assert len(updates) == 6
    assert not list(trial.folder.rglob("secure-*"))


def test_a_killed_node_is_not_in_the_sum_and_the_run_goes_on(tmp_path):
    trial = Trial(tmp_path / "trial", 3, app="secure", worker=1)
    with trial.federation:
        trial.start()
        trial.wait_for_round(1)
        killed(trial.nodes[2], trial.folder / "node-2")
        trial.finish()
    history = ended(trial)
    missing = {r.round: set(r.dropped) for r in history}
    assert len(history) == 3
    assert set().union(*missing.values()) == {2}
    assert_same_bits(trial, tmp_path / "simulated", missing)
