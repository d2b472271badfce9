"""Codecs, refusals, robust means and noise inside a run."""

import dataclasses
import shutil

import pytest
import torch
from tests.federation.test_resume import InterruptedTestError, StopAfter, final, same
from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp

from fedpara_peft import (
    ArgumentsError,
    CodecError,
    FederatedArguments,
    FederatedTrainer,
    History,
    Scaffold,
    Strategy,
    communicated_state,
    partition,
)
from fedpara_peft.comm.codecs import codec_from_name
from fedpara_peft.comm.payload import Format
from fedpara_peft.comm.schema import schema_of
from fedpara_peft.federation.server.mean import TrimmedMean, aggregate_from_name
from fedpara_peft.federation.server.privacy import GaussianMechanism


def trainer(folder, model=None, strategy=None, **changes):
    return FederatedTrainer(
        model or adapted(mlp(norm=False)),
        arguments(folder, **{"num_rounds": 6, "learning_rate": 0.2, **changes}),
        partition(toy(), "iid", 5),
        strategy=strategy,
    )


@pytest.mark.parametrize("up", ["float16", "int8", "int4", "topk:0.25", "topk:0.25+int8"])
@pytest.mark.parametrize("strategy", [None, Scaffold()])
def test_bytes_are_those_of_the_encoded_payloads(tmp_path, up, strategy):
    run = trainer(tmp_path, None, strategy, uplink_codec=up, downlink_codec="bfloat16")
    history = run.train()
    state = communicated_state(run.model)
    beside = {} if strategy is None else {f"control/{n}": t for n, t in state.items()}
    for direction, name in (("uplink", up), ("downlink", "bfloat16")):
        form = Format(schema_of({**state, **beside}), codec_from_name(name))
        payload = form.encode({**state, **beside}, 3, torch.Generator())
        sizes = {t.total_bytes for t in run.ledger.transfers(direction=direction)}
        assert sizes == {len(payload.data)}
    assert history[-1].train_loss < history[0].train_loss


@pytest.mark.parametrize("feedback", [False, True])
def test_what_the_server_uses_is_what_was_decoded(tmp_path, feedback):
    """One client and one round: the model moved by the decoded payload, the rest is kept."""
    exact = trainer(tmp_path / "a", num_rounds=1, clients_per_round=1)
    start = {k: v.clone() for k, v in communicated_state(exact.model).items()}
    exact.train()
    moved = {k: v - start[k] for k, v in communicated_state(exact.model).items()}
    coded = trainer(
        tmp_path / "b", num_rounds=1, clients_per_round=1, uplink_codec="int8",
        error_feedback=feedback,
    )  # fmt: skip
    history = coded.train()
    (client,) = history[0].cohort
    state = coded.client_state(client)
    for name, value in communicated_state(coded.model).items():
        received = value - start[name]
        step = moved[name].abs().max() / 127
        assert (received - moved[name]).abs().max() <= step * 1.001 + 1e-6
        if feedback:
            torch.testing.assert_close(
                received + state.residual[name], moved[name], atol=1e-6, rtol=1e-5
            )
    assert (state is None) != feedback


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("strategy", [None, Scaffold()])
def test_resume_is_exact_with_residuals(tmp_path, strategy, store):
    settings = {
        "uplink_codec": "topk:0.2+int4", "downlink_codec": "int8", "error_feedback": True,
        "save_every": 2,
    }  # fmt: skip
    whole = trainer(tmp_path / "whole", None, strategy, **settings, num_rounds=7)
    whole.train()
    settings |= {"num_rounds": 7, "client_store": store}
    cut = trainer(tmp_path / "cut", None, strategy, **settings)
    cut.callbacks.append(StopAfter(5))
    with pytest.raises(InterruptedTestError):
        cut.train()
    ahead = [p for p in (tmp_path / "cut" / "clients").iterdir() if "round-5" in p.name]
    assert bool(ahead) == (store == "disk")  # residuals that checkpoint-4 knows nothing of
    again = trainer(tmp_path / "cut", None, strategy, **settings)
    again.train(resume_from_checkpoint=True)
    assert same(final(again), final(whole))
    for client in range(5):
        a, b = (run.client_state(client) for run in (again, whole))
        assert (a is None) == (b is None)
        if a is not None:
            assert a.residual
            assert all(torch.equal(t, b.residual[k]) for k, t in a.residual.items())


def poisoned(run, bad, clients=(1, 3)):
    """Some clients send something else than they trained."""
    train = run._local.train

    def turn(client, *args):
        trained = train(client, *args)
        if client not in clients:
            return trained
        return dataclasses.replace(trained, update=bad(trained.update))

    run._local.train = turn
    return run


def changed(factor):
    def bad(update):
        tensors = {n: t * factor for n, t in update.update.items()}
        return type(update)(update.client, update.num_examples, tensors, update.train_loss)

    return bad


@pytest.mark.parametrize("codec", ["identity", "int8"])
@pytest.mark.parametrize(
    ("factor", "settings", "reason"),
    [(float("nan"), {}, "not_finite"), (1e6, {"max_update_norm": 50.0}, "norm")],
)
def test_bad_updates_are_refused_by_name_and_the_round_goes_on(
    tmp_path, codec, factor, settings, reason, caplog
):
    settings = {**settings, "uplink_codec": codec, "clients_per_round": 5, "num_rounds": 2}
    run = poisoned(trainer(tmp_path, **settings), changed(factor))
    history = run.train()
    for report in history:
        assert report.refused == ((1, reason), (3, reason))
    assert f"round 2, client 3: payload refused ({reason}): the update" in caplog.text
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert History.load(tmp_path / "history.json") == history


@pytest.mark.parametrize(
    ("factor", "settings", "reason"),
    [(float("nan"), {}, "not_finite"), (1e6, {"max_update_norm": 50.0}, "norm")],
)
def test_what_a_strategy_sends_beside_the_update_is_checked_alike(
    tmp_path, factor, settings, reason, caplog
):
    def bad(update):
        control = {n: t * factor for n, t in update.extra["control"].items()}
        return dataclasses.replace(update, extra={"control": control})

    run = trainer(tmp_path, None, Scaffold(), clients_per_round=5, num_rounds=2, **settings)
    for report in poisoned(run, bad).train():
        assert report.refused == ((1, reason), (3, reason))
    assert f"client 1: payload refused ({reason}): the control" in caplog.text


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean:0.4"])
def test_robust_means_hold_against_one_of_five(tmp_path, aggregation):
    settings = {"clients_per_round": 5, "num_rounds": 12, "learning_rate": 0.05}
    robust = poisoned(
        trainer(tmp_path / "r", **settings, aggregation=aggregation), changed(-30.0), {1}
    )
    history = robust.train()
    plain = poisoned(trainer(tmp_path / "p", quorum=0, **settings), changed(-30.0), {1})
    plain_loss = plain.train()[-1].train_loss  # None once every client diverges
    assert history[-1].train_loss < history[0].train_loss
    assert plain_loss is None or plain_loss > history[0].train_loss


def test_trimmed_means_against_sorting_by_hand():
    torch.manual_seed(0)
    states = [{"w": torch.randn(4, 3), "n": torch.tensor(i)} for i in range(7)]
    for share, cut in ((0.0, 0), (0.15, 1), (0.3, 2), (0.5, 3)):
        aggregate = TrimmedMean(states[0], share)
        for state in states:
            aggregate.add(state, 1.0)
        found = aggregate.result()
        for i in range(4):
            for j in range(3):
                values = sorted(float(s["w"][i, j]) for s in states)[cut : 7 - cut]
                assert float(found["w"][i, j]) == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert found["n"] == 3
    assert torch.equal(TrimmedMean(states[0], 0.1).result()["w"], torch.zeros(4, 3))


def test_clipping_bounds_what_a_client_can_do(tmp_path):
    settings = {"num_rounds": 1, "clients_per_round": 5, "clip_update_norm": 0.01}
    run = poisoned(trainer(tmp_path, **settings), changed(1e6))
    start = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    run.train()
    end = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    assert 0.001 < (end - start).norm() <= 0.01 * 1.0001


def test_noise_has_the_stated_size_and_cost(tmp_path):
    accounting = pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
    from dp_accounting import rdp

    def moved(folder, noise):
        run = trainer(
            folder, num_rounds=3, clients_per_round=4, clip_update_norm=0.5,
            dp_noise_multiplier=noise, dp_noise_seed=7, learning_rate=1e-9,
        )  # fmt: skip
        start = torch.cat([p.detach().flatten() for p in run.model.parameters()]).clone()
        history = run.train()
        end = torch.cat([p.detach().flatten() for p in run.model.parameters()])
        return end - start, history

    moves, history = moved(tmp_path / "a", 2.0)
    # Three rounds of independent noise, each 2 · 0.5 / 4 on the mean.
    assert float(moves.std()) == pytest.approx(3**0.5 * 2.0 * 0.5 / 4, rel=0.1)
    assert torch.equal(moves, moved(tmp_path / "b", 2.0)[0])
    accountant = rdp.RdpAccountant(neighboring_relation=accounting.NeighboringRelation.REPLACE_ONE)
    event = accounting.SampledWithoutReplacementDpEvent(5, 4, accounting.GaussianDpEvent(1.0))
    accountant.compose(event, 3)
    assert history[-1].epsilon == pytest.approx(accountant.get_epsilon(1e-5))
    assert history[0].epsilon < history[1].epsilon < history[2].epsilon
    assert moved(tmp_path / "c", 0.0)[1][-1].epsilon is None


def test_the_noise_cannot_be_drawn_again_by_others(tmp_path):
    """The run's seed is published, the noise's is not; a resumed run has the same all the same."""
    pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
    settings = {"num_rounds": 4, "clients_per_round": 4, "clip_update_norm": 0.5,
                "dp_noise_multiplier": 1.0, "save_every": 2}  # fmt: skip

    def state(run):
        return {n: t.clone() for n, t in run.model.state_dict().items()}

    runs = [trainer(tmp_path / name, **settings) for name in "ab"]
    for run in runs:
        run.train()
    first, second = map(state, runs)
    assert all(not torch.equal(first[n], second[n]) for n in first)
    assert "noise_seed" not in (tmp_path / "a" / "settings.json").read_text()
    shutil.rmtree(tmp_path / "a" / "checkpoint-4")
    again = trainer(tmp_path / "a", **settings)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(t, first[n]) for n, t in state(again).items())


def test_how_many_reported_does_not_show_in_the_noise(tmp_path):
    args = FederatedArguments(
        str(tmp_path), clip_update_norm=1.0, dp_noise_multiplier=1.0, drop_out_probability=0.2
    )
    pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
    mechanism = GaussianMechanism(args, 20, 10, [])
    ones = {"w": torch.ones(3, dtype=torch.float64)}
    none = mechanism.add_noise({"w": torch.zeros(3, dtype=torch.float64)}, 0, 5, 1)
    for count in (1, 6, 10):
        noisy = mechanism.add_noise(ones, count, 5, 1)
        torch.testing.assert_close(noisy["w"] - none["w"], ones["w"] * count / 8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dp_noise_multiplier": 1.0}, "needs clip_update_norm"),
        ({"dp_noise_multiplier": 1.0, "clip_update_norm": 1.0, "aggregation": "median"}, "'mean'"),
        ({"aggregation": "mode"}, "mean, median or trimmed_mean:SHARE"),
        ({"aggregation": "trimmed_mean:0.7"}, r"in \[0, 0.5\)"),
        ({"quorum": 2.0}, r"quorum must be in \[0, 1\]"),
        ({"max_update_norm": 0.0}, "None: unlimited"),
        ({"client_sampling": "often"}, "must be one of"),
        ({"drop_out_probability": 1.0}, r"in \[0, 1\)"),
        ({"save_total_limit": 0}, "None keeps all"),
    ],
)
def test_bad_settings(tmp_path, changes, says):
    with pytest.raises(ArgumentsError, match=says):
        trainer(tmp_path, **changes)


def test_what_cannot_be_sent_or_protected_is_refused(tmp_path):
    with pytest.raises(CodecError, match="drops entries of the weights"):
        trainer(tmp_path, downlink_codec="topk:0.1")
    with pytest.raises(CodecError, match="unknown codec 'zip'"):
        trainer(tmp_path, uplink_codec="zip")
    private = {"dp_noise_multiplier": 1.0, "clip_update_norm": 1.0}
    with pytest.raises(ArgumentsError, match="use group norm"):
        trainer(tmp_path, adapted(mlp()), **private)
    with pytest.raises(ArgumentsError, match="control/"):
        trainer(tmp_path, None, Scaffold(), **private)
    assert aggregate_from_name("mean")({}).result() == {}


def test_residuals_are_sent_along_the_next_time(tmp_path):
    """Over a run, what one client meant to send is what arrived and the last residual."""
    meant, arrived = [], []

    class Watches(Strategy):
        def client_extra(self, broadcast, kept, update, steps):
            meant.append(update)
            return {}

        def next_kept(self, broadcast, kept, update, extra, steps):
            arrived.append(update)
            return {}

    run = trainer(
        tmp_path, None, Watches(), clients_per_round=1, num_rounds=12, uplink_codec="topk:0.05",
        error_feedback=True, learning_rate=0.02, engine="sequential",
    )  # fmt: skip
    clients = [r.cohort[0] for r in run.train()]
    assert max(clients.count(c) for c in clients) > 2
    assert len(meant) == len(arrived) == len(clients)
    for client in set(clients):
        mine = [number for number, c in enumerate(clients) if c == client]
        for name, residual in run.client_state(client).residual.items():
            total = sum(meant[number][name].double() for number in mine)
            received = sum(arrived[number][name].double() for number in mine)
            torch.testing.assert_close(
                (received + residual).float(), total.float(), atol=1e-5, rtol=1e-4
            )
            assert residual.norm() > 0
