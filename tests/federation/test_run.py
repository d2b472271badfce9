"""The run and nothing but the run: what it makes of outcomes, wherever they come from."""

import pytest
import torch
from tests.federation.made_up import made_up, refused, sends
from tests.zoo import mlp

from fedpara_peft import FedAvgM, History, ResumeError, RoundError
from fedpara_peft.comm.ledger import PAPER_MEGABITS_PER_S


def moved(model):
    """By how much every parameter moved, if all did alike."""
    start = dict(mlp(norm=False).named_parameters())
    steps = torch.cat([(p - start[n]).detach().flatten() for n, p in model.named_parameters()])
    assert float(steps.max() - steps.min()) < 1e-5
    return float(steps.mean())


def test_a_round_is_the_mean_of_what_came_and_tells_who_did_not(tmp_path):
    def outcome(client, opened):
        if client == 1:
            return None
        if client == 2:
            return refused(2)
        return sends(client, opened, value=client, loss=client)

    run, _ = made_up(tmp_path, outcome, num_rounds=1)
    (report,) = run.train()
    mean = (40 * 3 + 50 * 4) / (10 + 40 + 50)
    assert moved(run.model) == pytest.approx(mean, rel=1e-5)
    assert report.train_loss == pytest.approx(mean)
    assert report.cohort == ("ann", "bob", "cy", "dee", "eve")
    assert report.dropped == ("bob",)
    assert report.refused == (("cy", "norm"),)
    sizes = {t.total_bytes for t in run.ledger.transfers(direction="uplink")}
    assert len(sizes) == 1
    assert report.uplink_bytes == 3 * sizes.pop()
    assert report.downlink_bytes == 5 * report.uplink_bytes // 3  # FedAvg's are equally long


def test_a_stray_message_of_a_silent_client_is_refused_and_the_client_dropped(tmp_path):
    run, _ = made_up(
        tmp_path,
        lambda c, opened: refused(c, "duplicate", reported=False) if c == 4 else sends(c, opened),
        num_rounds=1,
    )
    (report,) = run.train()
    assert report.refused == (("eve", "duplicate"),)
    assert report.dropped == ("eve",)


def test_the_servers_optimizer_takes_one_step_a_round(tmp_path):
    run, _ = made_up(tmp_path, sends, FedAvgM(server_momentum=0.5), num_rounds=3)
    run.train()
    assert moved(run.model) == pytest.approx(1 + 1.5 + 1.75, rel=1e-5)


@pytest.mark.parametrize(("quorum", "passes"), [(0.6, True), (0.8, False), (None, True)])
def test_the_quorum_counts_what_can_be_used(tmp_path, quorum, passes):
    run, backend = made_up(
        tmp_path,
        lambda c, opened: refused(c) if c in (1, 3) else sends(c, opened),
        num_rounds=2,
        quorum=quorum,
    )
    if passes:
        run.train()
        assert moved(run.model) == pytest.approx(2)
        return
    with pytest.raises(RoundError, match=r"3 of 5 .*quorum is 80%; 2 were refused.*lower quorum"):
        run.train()
    assert moved(run.model) == 0
    assert backend.asked == [("begin", 0, []), ("rollback", 0)]


def test_when_everybody_fails_their_own_error_is_raised(tmp_path):
    fault = ZeroDivisionError("in everybody's data")

    def outcome(client, opened):
        if opened.number == 1:
            return refused(client, "failed", fault)
        return refused(client, "failed", fault) if client == 0 else sends(client, opened)

    run, backend = made_up(tmp_path, outcome)
    with pytest.raises(ZeroDivisionError) as caught:
        run.train()
    assert "stopped after round 1 of 3" in caught.value.__notes__[-1]
    assert moved(run.model) == pytest.approx(1)  # the last good state
    assert backend.asked[-1] == ("rollback", 1)
    assert len(History.load(tmp_path / "history.json")) == 1


def test_what_clients_keep_is_durable_before_a_checkpoint_speaks_of_it(tmp_path):
    settings = {"num_rounds": 5, "save_every": 2, "save_total_limit": 2}
    saved = []

    class Looks:
        on_train_begin = on_train_end = lambda self, *given: None

        def on_round_end(self, server, report):
            saved.append(sorted(p.name for p in tmp_path.glob("checkpoint-*")))

    run, backend = made_up(tmp_path, sends, callbacks=[Looks()], **settings)
    run.train()
    assert backend.asked == [
        ("begin", 0, []), ("end", 1, [1]),
        ("commit",), ("end", 2, [2, 2]), ("end", 3, [2, 3]),
        ("commit",), ("end", 4, [2, 4, 4]),
        ("commit",), ("end", 5, [4, 5, 5]),
    ]  # fmt: skip
    assert saved[1] == ["checkpoint-2"]
    assert saved[-1] == ["checkpoint-4", "checkpoint-5"]


def test_the_slowest_clients_time_survives_a_resumed_run(tmp_path):
    """Of those that sent something; whoever sends nothing is waited for by nobody."""

    def outcome(client, opened):
        if (client, opened.number) == (4, 1):
            return refused(4, "diverged", seconds=99.0)
        return sends(client, opened, seconds=client + 0.25 * opened.number)

    made_up(tmp_path, outcome, num_rounds=4, save_every=1)[0].train()
    run, backend = made_up(tmp_path, outcome, num_rounds=6, save_every=1)
    history = run.train(resume=True)
    assert backend.asked[0] == ("begin", 4, [1, 2, 3, 4])
    times = [r.slowest_client_s for r in history]
    assert times == [4, 3.25, 4.5, 4.75, 5, 5.25]
    for bandwidth in PAPER_MEGABITS_PER_S:
        sending = sum(run.ledger.round_s(r.round, bandwidth) for r in history)
        assert history.wall_clock_s(run.ledger, bandwidth) == pytest.approx(sum(times) + sending)
    with pytest.raises(ResumeError, match="learning_rate"):
        made_up(tmp_path, outcome, learning_rate=0.5)[0].train(resume=True)


def test_where_no_times_are_measured_none_are_told(tmp_path):
    run, _ = made_up(
        tmp_path, lambda c, opened: sends(c, opened, seconds=None if c == 2 else 1.0), num_rounds=1
    )
    assert run.train()[0].slowest_client_s is None
