"""Rounds that do not wait for every client, against the same thing written out."""

import dataclasses
import heapq
import itertools
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.federation.test_resume import InterruptedTestError, StopAfter, final, same
from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    ArgumentsError,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedDyn,
    FederatedCallback,
    FederatedTrainer,
    FedProx,
    History,
    LocalOnly,
    ResumeError,
    RoundError,
    Scaffold,
    partition,
    plan,
)
from fedpara_peft.federation.observers.log import tell_round
from fedpara_peft.federation.observers.trackers import _numbers
from fedpara_peft.federation.random import numpy_generator
from fedpara_peft.federation.server.cohort import Cohort
from fedpara_peft.federation.server.mean import WeightedMean
from fedpara_peft.federation.server.round import RoundServer
from fedpara_peft.federation.simulation import Simulation
from fedpara_peft.federation.state import ClientUpdate
from fedpara_peft.integrations.report import write_report

#: One client takes four times as long as another, none equally long as any.
SECONDS = [1.0, 4.1, 1.3, 3.7, 0.9]
CODEC = {"uplink_codec": "topk:0.2+int4", "downlink_codec": "int8", "error_feedback": True}
KEEP = {"optim": "adamw", "learning_rate": 0.01, "optimizer_state": "keep"}


def trainer(folder, strategy=None, seconds=SECONDS, callbacks=(), ranks=None, **changes):
    """Five clients, four of whom are at work at once; the server steps after two updates."""
    given = {"buffer_size": 2, "clients_per_round": 4, "num_rounds": 7, "eval_every": 3, **changes}
    parameterization = given.pop("parameterization", "pfedpara")
    model = adapted(mlp(norm=given.pop("norm", False)), parameterization=parameterization)
    return FederatedTrainer(
        model, arguments(folder, **given), partition(toy(), "quantity", 5, concentration=3.0),
        toy(), strategy=strategy, callbacks=list(callbacks), client_seconds=seconds,
        client_ranks=ranks,
    )  # fmt: skip


class Watch(FederatedCallback):
    """Every server state, from before the first round on."""

    def __init__(self):
        self.servers = []

    def on_train_begin(self, server):
        self.servers.append(server)

    def on_round_end(self, server, report):
        self.servers.append(server)


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        (FedAvg(), {"drop_out_probability": 0.3, "norm": True}),
        (FedAvgM(), {**CODEC, "client_sampling": "weighted"}),
        (FedAdam(), {"max_update_norm": 0.45, "quorum": 0.0, "aggregation": "median"}),
        (FedProx(0.1), {**KEEP, "parameterization": "fedpara"}),
        (FedAvg(), {"engine": "batched", "parameterization": "fedpara"}),
        (FedAvg(), {"ranks": [1, 2, 3, 1, 2]}),
    ],
)
@pytest.mark.parametrize("seconds", [[1.0] * 5, SECONDS])
def test_a_buffer_as_large_as_the_cohort_is_the_synchronous_run(tmp_path, strategy, more, seconds):
    """Whatever the speeds: everybody is waited for."""
    waits = trainer(tmp_path / "waits", strategy, seconds, **{**more, "buffer_size": None})
    late = trainer(tmp_path / "late", strategy, seconds, **{**more, "buffer_size": 4})
    expected, found = waits.train(), late.train()
    assert same(final(late), final(waits))
    timeless = {
        "seconds": 0.0, "slowest_client_s": None, "staleness_mean": None, "staleness_max": None,
    }  # fmt: skip
    assert [dataclasses.replace(r, **timeless) for r in found] == [
        dataclasses.replace(r, **timeless) for r in expected
    ]
    if "max_update_norm" in more:
        assert any(r.refused for r in found)
    assert {r.staleness_max for r in found} <= {0, None}


def linear_clients(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((n, 3)), rng.standard_normal(n)) for n in sizes]


def by_hand(clients, seconds, k, rounds, exponent, most, rate, beta):
    """FedBuff's events, one after the other, on least squares in float64."""
    w, v, clock = np.zeros(3), np.zeros(3), 0.0
    at_work, idle, reports = [], set(range(len(clients))), []
    for version in range(rounds):
        for i in sorted(idle):
            x, y = clients[i]
            gradient = 2 * x.T @ (x @ w - y) / len(y)
            heapq.heappush(at_work, (clock + seconds[i], version, i, -rate * gradient))
        idle, total, examples, ages, refused = set(), np.zeros(3), 0, [], []
        while at_work and len(ages) < k:
            clock, start, i, change = heapq.heappop(at_work)
            idle.add(i)
            age = version - start
            if most is not None and age > most:
                refused.append(i)
                continue
            ages.append(age)
            total += len(clients[i][1]) * (1 + age) ** -exponent * change
            examples += len(clients[i][1])
        v = beta * v + total / examples
        w = w + v
        reports.append((clock, tuple(sorted(idle)), sorted(refused), max(ages), np.mean(ages)))
    return w, reports


@settings(
    max_examples=15, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    seconds=st.lists(
        st.one_of(st.sampled_from([1.0, 2.0, 4.0]), st.floats(0.3, 5.0)), min_size=5, max_size=5
    ),
    k=st.integers(1, 5),
    exponent=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    most=st.sampled_from([None, 0, 1, 3]),
    beta=st.sampled_from([0.0, 0.9]),
)
def test_the_run_is_the_events_written_out(tmp_path_factory, seconds, k, exponent, most, beta):
    clients = linear_clients([4, 9, 6, 5, 7])
    data = [TensorDataset(*map(torch.from_numpy, client)) for client in clients]
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    args = arguments(
        tmp_path_factory.mktemp("run"), num_rounds=9, clients_per_round=5, num_local_epochs=1,
        per_client_batch_size=9, learning_rate=0.05, buffer_size=k, staleness_exponent=exponent,
        max_staleness=most, eval_every=0,
    )  # fmt: skip
    run = FederatedTrainer(
        model, args, data, strategy=FedAvgM(beta), client_seconds=seconds,
        compute_loss=lambda model, batch: nn.functional.mse_loss(model(batch[0])[:, 0], batch[1]),
    )  # fmt: skip
    history = run.train()
    w, reports = by_hand(clients, seconds, k, 9, exponent, most, 0.05, beta)
    np.testing.assert_allclose(model.weight.detach().numpy()[0], w, rtol=1e-11, atol=1e-13)
    found = [
        (r.clock_s, r.cohort, [c for c, _ in r.refused], r.staleness_max, r.staleness_mean)
        for r in history
    ]
    assert found == reports
    assert {reason for r in history for _, reason in r.refused} <= {"stale"}


def test_a_step_of_nothing_but_an_old_update_is_a_small_one(tmp_path):
    """With one update a step the divisor of the mean must not make up for its scale."""
    steps, buffers = [], []
    for exponent in (0.0, 2.0):
        watch = Watch()
        run = trainer(
            tmp_path / str(exponent), seconds=[9.0, 4.0, 9.0, 9.0, 9.0], buffer_size=1,
            clients_per_round=5, callbacks=[watch], staleness_exponent=exponent, num_rounds=3,
            norm=True, parameterization="fedpara", eval_every=0,
        )  # fmt: skip
        history = run.train()
        before, after = watch.servers[2], watch.servers[3]
        steps.append({n: after.params[n] - w for n, w in before.params.items()})
        buffers.append({n: after.params[n] for n in after.buffers})
    # Client 1 after 4 and 8 s, then client 0.
    assert [r.staleness_max for r in history] == [0, 0, 2]
    for name, step in steps[0].items():
        if name not in buffers[0]:
            torch.testing.assert_close(step / 9, steps[1][name], atol=1e-6, rtol=1e-4)
    assert buffers[0]
    for name, buffer in buffers[0].items():
        torch.testing.assert_close(buffer, buffers[1][name])


def test_changes_are_scaled_by_their_age_and_states_weigh_by_it():
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape):
        return {"w": torch.randn(shape, generator=generator, dtype=torch.float64)}

    cohort = Cohort(drawn(3), drawn(2), ("group",), WeightedMean, keep=True)
    cases = [(3.0, 1.0), (1.0, 0.5), (2.0, 0.25)]
    updates = [
        ClientUpdate(i, 5, drawn(3), 0.1, {"group": drawn(3)}, drawn(2)) for i in range(len(cases))
    ]
    for update, (weight, discount) in zip(updates, cases, strict=True):
        cohort.add(update, weight, discount)
    mean, total = cohort.mean(10), sum(w for w, _ in cases)
    pairs = list(zip(updates, cases, strict=True))
    for found, of in (
        (mean.update["w"], lambda u: u.update["w"]),
        (mean.extra["group"]["w"], lambda u: u.extra["group"]["w"]),
    ):
        torch.testing.assert_close(found, sum(w * s * of(u) for u, (w, s) in pairs) / total)
    expected = sum(w * s * u.buffers["w"] for u, (w, s) in pairs) / sum(w * s for w, s in cases)
    torch.testing.assert_close(cohort.buffers()["w"], expected)
    seen = sum(w * u.update["w"] for w, u in zip(mean.weights, mean.updates, strict=True))
    torch.testing.assert_close(seen, mean.update["w"])  # single updates are those that were used


@pytest.mark.parametrize(("stop", "store"), [(3, "memory"), (4, "disk")])
@pytest.mark.parametrize(
    "more",
    [
        {"drop_out_probability": 0.1, "max_staleness": 1, "seed": 2},
        {**CODEC, "client_seconds_sigma": 0.4},
        {**KEEP, "engine": "sequential"},
        {"ranks": [1, 2, 3, 1, 2], "norm": False},
        {"norm": True, "parameterization": "fedpara", "max_update_norm": 0.7},
    ],
)
def test_resumed_with_updates_on_their_way_is_uninterrupted(tmp_path, stop, store, more):
    more = {"save_every": 2, "client_store": store, "quorum": 0.0, **more}
    watch = Watch()
    whole = trainer(tmp_path / "whole", FedAvgM(), callbacks=[watch], **more)
    history = whole.train()
    assert any(flight.outcome for flight in watch.servers[stop - stop % 2].flights)
    with pytest.raises(InterruptedTestError):
        trainer(tmp_path / "cut", FedAvgM(), callbacks=[StopAfter(stop)], **more).train()
    again = trainer(tmp_path / "cut", FedAvgM(), **more)
    resumed = again.train(resume_from_checkpoint=True)
    assert same(final(again), final(whole))
    timeless = {"seconds": 0.0, "slowest_client_s": None}
    assert [dataclasses.replace(r, **timeless) for r in resumed] == [
        dataclasses.replace(r, **timeless) for r in history
    ]


def test_a_run_that_goes_on_takes_up_those_who_are_still_at_work(tmp_path):
    trainer(tmp_path / "cut", num_rounds=3, save_every=3).train()
    longer = trainer(tmp_path / "cut", save_every=3)
    longer.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert same(final(longer), final(whole))


def test_a_failed_round_leaves_those_at_work_as_they_were(tmp_path):
    watch = Watch()
    run = trainer(tmp_path, callbacks=[watch], on_client_error="raise", num_rounds=5)
    normal = run._local.train

    def fails_late(client, dataset, round, *args):
        if round == 3:
            raise RoundError("no more")
        return normal(client, dataset, round, *args)

    run._local.train = fails_late
    with pytest.raises(RoundError):
        run.train()
    three = trainer(tmp_path / "three", num_rounds=3)
    three.train()
    assert same(({**final(run)[0]}, []), ({**final(three)[0]}, []))


def test_nobody_begins_again_while_at_work_and_as_many_as_asked_are(tmp_path):
    watch = Watch()
    run = trainer(tmp_path, callbacks=[watch], drop_out_probability=0.2, concurrency=4,
                  clients_per_round=None, num_rounds=12)  # fmt: skip
    history = run.train()
    down = {r.round: [t.client for t in run.ledger.transfers(r.round, "downlink")] for r in history}
    for before, report in zip(watch.servers, history, strict=False):
        busy = [flight.client for flight in before.flights]
        began = down[report.round]
        assert not set(busy) & set(began)
        assert len(busy) + len(began) == len({*busy, *began}) == 4
        assert set(report.cohort) <= {*busy, *began}
    assert any(report.dropped for report in history)
    assert max(report.staleness_max for report in history) >= 2


@pytest.mark.parametrize("more", [{}, CODEC, {"uplink_codec": "int8"}])
def test_bytes_are_those_of_the_payloads_when_they_are_sent(tmp_path, monkeypatch, more):
    """Down when a client begins, up when its turn has ended."""
    down, up = [], {}
    opens, turns = RoundServer.open, Simulation.turns

    def with_payloads(self, server, *, encode=False):
        opened = opens(self, server, encode=True)
        for client in opened.cohort:
            down.append((opened.number + 1, client, len(opened.sent_to(client).payload.data)))
        return opened

    def encoded(self, clients, opened, *, encode=False, keep=None):
        for outcome in turns(self, clients, opened, encode=True, keep=keep):
            up[opened.number, outcome.client] = len(outcome.payload)
            yield outcome

    monkeypatch.setattr(RoundServer, "open", with_payloads)
    monkeypatch.setattr(Simulation, "turns", encoded)
    watch = Watch()
    run = trainer(tmp_path, callbacks=[watch], max_staleness=1, **more)
    history = run.train()
    counted = list(run.ledger.transfers())
    assert [(t.round, t.client, t.total_bytes) for t in counted if t.direction == "downlink"] == (
        down
    )
    began = {}
    for server in watch.servers:
        began |= {(server.round, flight.client): flight.start for flight in server.flights}
    arrived = [t for t in counted if t.direction == "uplink"]
    assert [t.total_bytes for t in arrived] == [
        up[began.get((t.round - 1, t.client), t.round - 1), t.client] for t in arrived
    ]
    assert any(reason == "stale" for r in history for _, reason in r.refused)
    assert len(down) - len(arrived) == len(watch.servers[-1].flights)  # the stale ones are counted
    assert sum(r.uplink_bytes for r in history) == sum(t.total_bytes for t in arrived)


def test_of_an_update_that_is_too_old_nothing_is_kept(tmp_path):
    """The only slow client is refused each time; its own half stays as it was."""
    run = trainer(
        tmp_path, seconds={0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 3.5}, max_staleness=1,
        clients_per_round=5, num_rounds=9, buffer_size=4,
    )  # fmt: skip
    history = run.train()
    refused = [c for r in history for c, _ in r.refused]
    assert refused == [4, 4]
    assert run.client_state(4) is None
    assert run.client_state(0) is not None
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            run.client_model(0).state_dict(), run.client_model(4).state_dict()
        )


def test_the_clock_of_a_round_that_waits_is_its_slowest_clients(tmp_path):
    given = dict(zip(range(5), SECONDS, strict=True))
    clocks = []
    for number, seconds in enumerate([given, SECONDS, given.get, lambda name: SECONDS[name]]):
        run = trainer(tmp_path / str(number), seconds=seconds, buffer_size=None)
        history = run.train()
        clocks.append([report.clock_s for report in history])
    expected = np.cumsum([max(SECONDS[client] for client in r.cohort) for r in history])
    assert clocks == [list(expected)] * 4
    assert all(r.staleness_mean is r.staleness_max is None for r in history)
    plain = trainer(tmp_path / "plain", seconds=None, buffer_size=None).train()
    assert [r.clock_s for r in plain] == [None] * 7


def test_seconds_vary_from_round_to_round_as_seed_round_and_client_say(tmp_path):
    run = trainer(tmp_path, buffer_size=None, client_seconds_sigma=0.5, seed=11)
    history = run.train()

    def of(client, round):
        z = numpy_generator(11, round, client, "seconds").standard_normal()
        return SECONDS[client] * math.exp(0.5 * z)

    slowest = [max(of(c, r.round - 1) for c in r.cohort) for r in history]
    np.testing.assert_allclose([r.clock_s for r in history], np.cumsum(slowest), rtol=1e-12)
    assert len({round(s / t, 9) for s, t in itertools.pairwise(slowest)}) > 3


def test_half_of_the_clients_four_times_slower_no_longer_set_the_pace(tmp_path):
    seconds = [1.0, 4.0, 1.0, 4.0, 1.0]
    waits = trainer(tmp_path / "waits", FedAvg(), seconds, buffer_size=None, num_rounds=6)
    late = trainer(tmp_path / "late", FedAvg(), seconds, num_rounds=12)
    rounds = waits.train(), late.train()
    assert sum(len(r.cohort) for r in rounds[0]) == sum(len(r.cohort) for r in rounds[1])
    assert rounds[1][-1].clock_s < 0.6 * rounds[0][-1].clock_s


@pytest.mark.parametrize(
    ("strategy", "more", "message"),
    [
        (Scaffold(), {}, "buffer_size cannot have Scaffold: .* updates_may_be_late"),
        (FedDyn(), {}, "buffer_size cannot have FedDyn"),
        (LocalOnly(), {}, "buffer_size cannot have LocalOnly"),
        (None, {"clip_update_norm": 1.0, "dp_noise_multiplier": 1.0, "parameterization": "fedpara"},
         "buffer_size cannot have dp_noise_multiplier: its ε counts on a cohort drawn alike"),
        (None, {"factor_schedule": "one_block"}, "buffer_size cannot have factor_schedule='one_bl"),
        (None, {"report_averaging_bias": True}, "buffer_size cannot have report_averaging_bias"),
        (None, {"seconds": None}, "buffer_size needs client_seconds in a simulation"),
        (None, {"seconds": None, "buffer_size": None, "client_seconds_sigma": 0.1},
         "client_seconds_sigma needs client_seconds"),
        (None, {"buffer_size": 5}, "buffer_size=5, but only 4 clients are at work at once"),
        (None, {"buffer_size": 0}, r"buffer_size must be in \[1, ∞\), got 0; None waits"),
        (None, {"max_staleness": 1, "buffer_size": None}, "max_staleness is of rounds that do not"),
        (None, {"concurrency": 4}, "give concurrency, client_fraction or clients_per_round"),
        (None, {"concurrency": 6, "clients_per_round": None}, "concurrency=6, but there are only"),
        (None, {"seconds": [1.0] * 4}, "client_seconds has 4 times for 5 clients"),
        (None, {"seconds": {0: 1.0, 7: 2.0}}, "client_seconds must have every client's name"),
        (None, {"seconds": [1.0, 1.0, 0.0, 1.0, 1.0]}, "client 2: 0.0 is no time"),
        (None, {"seconds": lambda name: math.nan}, "client 0: nan is no time"),
    ],
)  # fmt: skip
def test_what_it_cannot_have_is_refused_by_name(tmp_path, strategy, more, message):
    with pytest.raises(ArgumentsError, match=message):
        trainer(tmp_path, strategy, **more)


def test_a_plan_is_of_rounds_that_wait(tmp_path):
    with pytest.raises(ArgumentsError, match="a plan is of rounds that wait for their cohort"):
        plan(mlp(), arguments(tmp_path, buffer_size=2), 5)


def test_a_run_is_resumed_with_the_same_seconds_and_the_same_buffer(tmp_path):
    trainer(tmp_path, num_rounds=2, save_every=1).train()
    for more in ({"seconds": [2.0, *SECONDS[1:]]}, {"buffer_size": 3}, {"max_staleness": 2}):
        with pytest.raises(ResumeError, match=r"client_seconds: |buffer_size: |max_staleness: "):
            trainer(tmp_path, **more).train(resume_from_checkpoint=True)


def test_reports_trackers_and_pages_show_clock_and_staleness(tmp_path, caplog):
    history = trainer(tmp_path, num_rounds=5).train()
    assert History.load(tmp_path / "history.json").rounds == history.rounds
    report = history[-1]
    told = _numbers(report)
    assert (told["clock_s"], told["staleness_mean"], told["staleness_max"]) == (
        report.clock_s, report.staleness_mean, report.staleness_max,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        tell_round(logging.getLogger("told"), report, 5)
    assert f"clock {report.clock_s:.1f} s, staleness" in caplog.text
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    page = write_report(tmp_path).read_text()
    assert "<td>simulated clock</td>" in page
    assert "server steps in the mean of rounds, at most" in page
    assert ">at most</th>" in page
    value = report.metrics["eval_loss"]
    first = next(r for r in history if r.metrics and r.metrics["eval_loss"] <= value)
    assert history.clock_to_target("eval_loss", value) == first.clock_s
    assert history.clock_to_target("eval_loss", -1.0) is None
