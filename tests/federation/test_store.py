"""Client states by version, in memory and on disk, against a plain dictionary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpara_peft.federation.folder.store import DiskStore, MemoryStore
from fedpara_peft.federation.state import ClientState


def state(client, version):
    return ClientState(
        {"a/b.c": torch.tensor([client, version])},
        {"control": {"w": torch.tensor(version / 7)}},
        optimizer={
            "step": {"a/b.c": torch.tensor(float(version))},
            "count int": {"w": torch.tensor(2**60 + version)},
        },
    )


def same(found, expected):
    if found is None or expected is None:
        return found is expected
    return (
        torch.equal(found.local["a/b.c"], expected.local["a/b.c"])
        and torch.equal(found.strategy["control"]["w"], expected.strategy["control"]["w"])
        and torch.equal(found.optimizer["step"]["a/b.c"], expected.optimizer["step"]["a/b.c"])
        and torch.equal(found.optimizer["count int"]["w"], expected.optimizer["count int"]["w"])
    )


@pytest.mark.parametrize("kind", ["memory", "disk"])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_random_histories(tmp_path_factory, kind, data):
    """Rounds, checkpoints, and going back to the last checkpoint in a new process."""
    folder = tmp_path_factory.mktemp("store")

    def opened():
        return MemoryStore(DiskStore(folder)) if kind == "memory" else DiskStore(folder)

    store, saved, checkpoint, now = opened(), {}, 0, {}
    version = 0
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["round", "round", "checkpoint", "crash", "failure"]))
        if action in ("round", "failure"):
            cohort = data.draw(st.sets(st.integers(0, 4), min_size=1))
            for client in cohort:
                store.put(client, version + 1, state(client, version + 1))
            if action == "failure":
                store.rollback(version)
                continue
            version += 1
            now = {**now, **{c: state(c, version) for c in cohort}}
            store.prune([checkpoint, version], cohort)
        elif action == "checkpoint":
            store.commit()
            checkpoint, saved = version, dict(now)
            store.prune([checkpoint, version])
        else:
            DiskStore(folder).rollback(checkpoint)
            store, version, now = opened(), checkpoint, dict(saved)
        for client in range(5):
            assert same(store.get(client), now.get(client)), (client, action)
    if kind == "disk":
        assert len(list(folder.iterdir())) <= 2 * 5  # the newest, and the checkpoint's


def test_an_unfinished_file_is_not_a_state(tmp_path):
    DiskStore(tmp_path).put(3, 1, state(3, 1))
    (tmp_path / ".client-3.round-2.safetensors").write_bytes(b"half")
    assert same(DiskStore(tmp_path).get(3), state(3, 1))
    assert DiskStore(tmp_path).get(2) is None
