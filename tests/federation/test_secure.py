"""Runs with secure aggregation: the plain quantized run, bit for bit, and nothing in the clear."""

import logging

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.federation.runs import FedNova
from tests.federation.test_resume import InterruptedTestError, StopAfter, final, same
from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp

from fedpara_peft import (
    ArgumentsError,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedDyn,
    FederatedTrainer,
    FedProx,
    FedYogi,
    LocalOnly,
    RoundError,
    Scaffold,
    SecureAggregationError,
    partition,
    plan,
)
from fedpara_peft.comm.schema import schema_of
from fedpara_peft.comm.secure.agreement import Summed
from fedpara_peft.comm.secure.messages import HEADER_BYTES, Kind
from fedpara_peft.federation.secure import round as protocol
from fedpara_peft.federation.secure import simulation as glue
from fedpara_peft.federation.secure.fit import require_possible

SECURE = {"secure_aggregation": True, "secure_clip": 0.25}


def trainer(folder, strategy=None, model=None, callbacks=(), clients=5, **changes):
    settings = {"num_rounds": 3, "clients_per_round": 4, **SECURE, **changes}
    model = model or adapted(mlp(norm=False), parameterization="fedpara")
    data = partition(toy(), "quantity", clients, concentration=5.0)
    return FederatedTrainer(
        model, arguments(folder, **settings), data, toy(), strategy=strategy,
        callbacks=list(callbacks),
    )  # fmt: skip


class InTheClear:
    """Client and server of a round that adds plain integers up: the slow obvious twin."""

    def __init__(self, agreed, client=None):
        self.agreed, self.client = agreed, client
        self.came, self.vectors, self.asked = [], [], []

    advertise = all_keys = survivors = lambda self: b""
    share = unmask = lambda self, data: b""
    keys = shares = unmasking = lambda self, client, data: self.asked.append(client)

    def all_shares(self):
        return dict.fromkeys(self.agreed.clients, b"")

    def mask(self, data, values, weight, train_loss):
        numbers = np.array([weight, round(weight * train_loss * 2**16)])
        return bytes(HEADER_BYTES) + np.concatenate([values * weight, numbers]).tobytes()

    def masked(self, client, data):
        self.came.append(client)
        self.vectors.append(np.frombuffer(data[HEADER_BYTES:], np.int64).tolist())

    def total(self):
        *values, weight, loss = map(sum, zip(*self.vectors, strict=True))
        return Summed(np.array(values), weight, loss / 2**16 / weight, tuple(self.came))


def in_the_clear(monkeypatch):
    monkeypatch.setattr(glue, "SecureClient", InTheClear)
    monkeypatch.setattr(protocol, "SecureServer", InTheClear)


def outcome(run):
    state = {k: v.clone() for k, v in run.model.state_dict().items()}
    return state, [r.train_loss for r in run.history], [r.dropped for r in run.history]


RUNS = {
    "FedAvg": (FedAvg(), {}),
    "by examples": (FedAvg(), {"secure_max_examples": 64, "secure_bits": 8}),
    "32 bits": (FedAvg(), {"secure_bits": 32}),
    "FedProx": (FedProx(0.1), {"optim": "adamw", "learning_rate": 0.01}),
    "FedAvgM": (FedAvgM(), {"clip_update_norm": 0.5, "max_update_norm": 100.0}),
    "FedAdam": (FedAdam(), {"downlink_codec": "float16"}),
    "FedYogi": (FedYogi(), {"engine": "batched"}),
    "FedDyn": (FedDyn(), {"num_rounds": 4}),
    "one_block": (FedAvg(), {"factor_schedule": "one_block"}),
    "distributed noise": (
        FedAvg(),
        {
            "dp_mode": "distributed", "dp_noise_multiplier": 0.5, "clip_update_norm": 0.5,
            "dp_noise_seed": 3, "secure_bits": 8,
        },
    ),
    "drop-outs": (
        FedAvg(),
        {
            "clients_per_round": 10, "drop_out_probability": 0.15,
            "unmask_drop_out_probability": 0.1, "secure_drop_outs": 0.45, "num_rounds": 5,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_masked_run_is_the_plain_quantized_run(tmp_path, monkeypatch, name):
    strategy, changes = RUNS[name]
    many = 10 if name == "drop-outs" else 5
    masked = trainer(tmp_path / "a", strategy, clients=many, **changes)
    masked.train()
    in_the_clear(monkeypatch)
    plain = trainer(tmp_path / "b", strategy, clients=many, **changes)
    plain.train()
    one, other = outcome(masked), outcome(plain)
    assert all(torch.equal(v, other[0][k]) for k, v in one[0].items())
    assert one[2] == other[2]
    told = [[0.0 if loss is None else loss for loss in losses] for losses in (one[1], other[1])]
    assert told[0] == pytest.approx(told[1], abs=1e-4)
    assert (None in one[1]) == (name == "distributed noise")
    assert any(one[2]) == (name == "drop-outs")


def test_quantized_is_close_to_the_run_without(tmp_path):
    """At 32 bits nothing but rounding to float32 is between them: weights alike, no drop-outs."""
    model = adapted(mlp(norm=False), parameterization="fedpara")
    secure = trainer(tmp_path / "a", model=model, secure_bits=32, secure_max_examples=1000)
    plain = trainer(
        tmp_path / "b", secure_aggregation=False, secure_clip=None, secure_max_examples=1
    )
    secure.train(), plain.train()
    for name, value in plain.model.state_dict().items():
        assert torch.allclose(value, secure.model.state_dict()[name], atol=2e-5), name
    for a, b in zip(secure.history, plain.history, strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, abs=1e-4)


def test_recorded_traffic_holds_no_update(tmp_path, monkeypatch):
    """All that passes, searched for every client's update: float, quantized or packed."""
    passed, updates = [], []
    passes, mask = glue.SecureSimulation._passes, glue.SecureClient.mask

    def listen(self, client, data):
        passed.append(data)
        return passes(self, client, data)

    def overhear(self, data, values, weight, loss):
        updates.append((self._agreed, values, weight, loss))
        return mask(self, data, values, weight, loss)

    monkeypatch.setattr(glue.SecureSimulation, "_passes", listen)
    monkeypatch.setattr(glue.SecureClient, "mask", overhear)
    run = trainer(tmp_path, num_rounds=2, unmask_drop_out_probability=0.1, seed=4)
    run.train()
    assert len(updates) == 8
    traffic = b"|".join(passed)
    assert len(traffic) > sum(report.uplink_bytes for report in run.history)
    for agreed, values, weight, loss in updates:
        needles = [agreed.vector(values, weight, loss).pack()[:64]]
        scaled = values * weight
        for dtype in ("<i1", "<u1", "<i2", "<i4", "<i8"):
            needles += [v.astype(dtype).tobytes()[:32] for v in (scaled, values, scaled[::-1])]
        real = (values / agreed.levels * SECURE["secure_clip"]).astype(np.float64)
        needles += [real.astype(dtype).tobytes()[:32] for dtype in ("<f2", "<f4", "<f8")]
        assert not any(needle in traffic for needle in needles)
        for data in (d for d in passed if d[5] == Kind.MASKED):
            words = agreed.unpack(data[HEADER_BYTES:]).values
            assert (agreed.values.integers(words) == scaled).mean() < 0.05


def test_only_bytes_reach_the_run(tmp_path, monkeypatch):
    seen = []
    outcomes = glue.SecureSimulation.outcomes

    def watch(self, opened):
        for found in outcomes(self, opened):
            seen.append(found)
            yield found

    monkeypatch.setattr(glue.SecureSimulation, "outcomes", watch)
    run = trainer(tmp_path)
    run.train()
    assert len(seen) == 12
    assert all(o.update is None and o.sent is None and o.size is not None for o in seen)


def test_every_message_is_counted_and_foretold(tmp_path):
    run = trainer(tmp_path, secure_max_examples=100, factor_schedule="one_block")
    foretold = plan(run.model, run.args, 5)
    history = run.train()
    assert history.total_bytes == foretold.total_bytes
    kinds = [t for t in run.ledger.transfers(1) if t.client == history[0].cohort[0]]
    assert [t.direction for t in kinds].count("uplink") == 4
    assert [t.direction for t in kinds].count("downlink") == 4  # the model's too
    assert sum(t.tensor_bytes > 0 for t in kinds) == 2  # the model, and the masked update


@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_is_uninterrupted(tmp_path, stop):
    """Keys are drawn anew, sums are the same."""
    more = {"num_rounds": 4, "save_every": 1, "drop_out_probability": 0.1}
    more |= {"secure_drop_outs": 0.45, "unmask_drop_out_probability": 0.05, "seed": 3}
    whole = trainer(tmp_path / "a", FedDyn(), **more)
    whole.train()
    with pytest.raises(InterruptedTestError):
        trainer(tmp_path / "b", FedDyn(), callbacks=[StopAfter(stop)], **more).train()
    resumed = trainer(tmp_path / "b", FedDyn(), **more)
    resumed.train(resume_from_checkpoint=True)
    assert same(final(whole), final(resumed))


def test_personal_halves_stay_home(tmp_path):
    model = adapted(mlp(norm=False), parameterization="pfedpara")
    run = trainer(tmp_path, model=model)
    run.train()
    numel = sum(t.numel() for t in run._local.shared.values())
    up = [t for t in run.ledger.transfers(1, "uplink") if t.tensor_bytes]
    bits = (2 * 4 * (2**15 - 1)).bit_length()
    assert {t.tensor_bytes for t in up} == {-(-numel * bits // 8) + 16}
    assert any(run.client_state(i).local for i in range(5) if run.client_state(i))


def test_a_lora_adapter_is_summed_as_well(tmp_path):
    model = get_peft_model(mlp(norm=False), LoraConfig(r=2, target_modules=["0"]))
    assert len(trainer(tmp_path, model=model).train()) == 3


# Too few, and a client that says no.


def test_below_the_threshold_the_run_stops_and_says_how_to_go_on(tmp_path):
    run = trainer(tmp_path, unmask_drop_out_probability=0.999, save_every=1)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    said = r"the threshold is 3.*secure_drop_outs"
    with pytest.raises(SecureAggregationError, match=said) as found:
        run.train()
    notes = " ".join(found.value.__notes__)
    assert "quorum=0" in notes
    assert "stopped after round 0 of 3" in notes
    assert all(torch.equal(v, run.model.state_dict()[k]) for k, v in before.items())


def test_a_run_that_stopped_goes_on_when_clients_stay(tmp_path):
    more = {"num_rounds": 6, "save_every": 1, "seed": 2}
    run = trainer(tmp_path / "a", unmask_drop_out_probability=0.3, **more)
    with pytest.raises(SecureAggregationError, match="1 of 4 clients helped to unmask"):
        run.train()
    assert len(run.history) == 2
    again = trainer(tmp_path / "a", unmask_drop_out_probability=0.0, **more)
    again.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "b", **more)
    whole.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


def test_with_quorum_0_such_a_round_changes_nothing(tmp_path, caplog):
    run = trainer(tmp_path, FedDyn(), unmask_drop_out_probability=0.999, quorum=0.0)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        history = run.train()
    assert len(history) == 3
    assert all(report.train_loss is None for report in history)
    assert all(torch.equal(v, run.model.state_dict()[k]) for k, v in before.items())
    assert all(run.client_state(i) is None for i in range(5))  # nor has a client learnt anything
    assert "round 1 changes nothing" in caplog.text


def test_a_client_checks_itself_before_it_masks(tmp_path):
    """Beyond max_update_norm it sends no update, and its masks are taken off the others'."""
    norms = trainer(tmp_path / "a", num_rounds=1, secure_aggregation=False, secure_clip=None)
    sent = {}
    take = norms._run._rounds.take_in
    norms._run._rounds.take_in = lambda opened, update: (
        sent.__setitem__(update.client, update), take(opened, update)
    )  # fmt: skip
    norms.train()
    size = {c: torch.cat([t.flatten() for t in u.update.values()]).norm() for c, u in sent.items()}
    largest = max(size, key=size.get)
    bound = float(sorted(size.values())[-2] * 1.0001)
    run = trainer(tmp_path / "b", num_rounds=1, max_update_norm=bound)
    report = run.train()[0]
    assert report.refused == ((largest, "norm"),)
    assert not any(t.tensor_bytes for t in run.ledger.transfers(1, "uplink") if t.client == largest)


def test_when_all_diverge_the_run_says_so_as_ever(tmp_path):
    run = trainer(tmp_path, learning_rate=1e30)
    with pytest.raises(RoundError, match="updates of the round were refused"):
        run.train()


def test_many_clamped_entries_are_told_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, secure_clip=1e-6).train()
    assert caplog.text.count("beyond secure_clip=1e-06 and clamped") == 1


# What it refuses.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aggregation": "median"}, "aggregation='median': it sees single updates"),
        ({"uplink_codec": "int8"}, "uplink_codec='int8'.*secure_bits=8, 16 or 32"),
        ({"error_feedback": True}, "error_feedback"),
        ({"dp_noise_multiplier": 1.0, "clip_update_norm": 1.0}, "dp_noise_multiplier"),
        ({"report_averaging_bias": True}, "report_averaging_bias"),
        ({"strategy": Scaffold()}, "Scaffold: what it sends beside the update"),
        ({"strategy": FedNova()}, "FedNova: it sees single updates"),
        ({"strategy": LocalOnly()}, "LocalOnly: nothing is sent"),
        ({"model": mlp(norm=True)}, "buffers, first .*group norm"),
        ({"clients_per_round": 1}, "not possible: a threshold of 1 of 1"),
        ({"secure_bits": 32, "secure_max_examples": 2**16}, "lower secure_max_examples"),
    ],
)
def test_what_a_sum_cannot_have_is_refused_by_name(tmp_path, changes, said):
    with pytest.raises(ArgumentsError, match=said):
        trainer(tmp_path, **changes)


def test_ranks_of_clients_are_refused(tmp_path):
    model = adapted(mlp(norm=False), parameterization="fedpara")
    with pytest.raises(ArgumentsError, match="client_ranks"):
        FederatedTrainer(
            model, arguments(tmp_path, **SECURE), partition(toy(), "iid", 5), client_ranks=[1] * 5
        )


def test_several_processes_are_refused(tmp_path):
    args, schema = arguments(tmp_path, **SECURE), schema_of({"w": torch.zeros(3)})
    require_possible(args, FedAvg(), 3, schema)
    with pytest.raises(ArgumentsError, match="2 processes: run it in one"):
        require_possible(args, FedAvg(), 3, schema, processes=2)
    with pytest.raises(ArgumentsError, match="not real floating-point"):
        require_possible(args, FedAvg(), 3, schema_of({"w": torch.zeros(3, dtype=torch.cfloat)}))


def test_arguments_that_would_do_nothing_are_refused(tmp_path):
    with pytest.raises(ArgumentsError, match="secure_aggregation needs secure_clip"):
        arguments(tmp_path, secure_aggregation=True)
    with pytest.raises(ArgumentsError, match="secure_clip does nothing"):
        arguments(tmp_path, secure_clip=1.0)
    for changes in ({"secure_bits": 12}, {"secure_drop_outs": 0.5}, {"secure_max_examples": 0}):
        with pytest.raises(ArgumentsError, match=next(iter(changes))):
            arguments(tmp_path, **SECURE, **changes)
    assert arguments(tmp_path, secure_aggregation=True, clip_update_norm=1.0).secure_clip is None
