"""Noise that clients add: all of it to their own update, or a share of the sum's."""

import dataclasses
import math

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from tests.federation.runs import FedNova
from tests.federation.test_resume import InterruptedTestError, StopAfter, final, same
from tests.federation.test_trainer import arguments, toy
from tests.zoo import mlp

from fedpara_peft import (
    ArgumentsError,
    FedAvg,
    FedDyn,
    FederatedCallback,
    FederatedTrainer,
    Scaffold,
    SecureAggregationError,
    partition,
    plan,
)
from fedpara_peft.comm.schema import schema_of
from fedpara_peft.comm.secure.agreement import Agreement
from fedpara_peft.comm.secure.noise import discrete_gaussian
from fedpara_peft.federation.folder.facts import training_facts
from fedpara_peft.federation.random import torch_generator
from fedpara_peft.federation.secure.fit import agreement_of, fixed_range, noise_std
from fedpara_peft.federation.server.privacy import GaussianMechanism, clipped, with_own_noise
from fedpara_peft.federation.state import ClientUpdate
from fedpara_peft.integrations.report import write_report

LOCAL = {"dp_mode": "local", "dp_noise_multiplier": 0.7, "clip_update_norm": 0.5, "eval_every": 0}
SHARED = {
    "dp_mode": "distributed", "dp_noise_multiplier": 1.5, "clip_update_norm": 0.5,
    "secure_aggregation": True, "eval_every": 0,
}  # fmt: skip


def trainer(folder, clients=5, strategy=None, callbacks=(), model=None, **more):
    torch.manual_seed(0)
    model = model or torch.nn.Linear(16, 4)
    args = arguments(folder, **{"num_rounds": 2, **more})
    data = partition(toy(), "iid", clients)
    return FederatedTrainer(model, args, data, strategy=strategy, callbacks=list(callbacks))


def update_of(**tensors):
    return ClientUpdate(3, 5, tensors, 1.25)


# ε.


@pytest.mark.parametrize(("name", "library"), [("rdp", RdpAccountant), ("pld", PLDAccountant)])
@pytest.mark.parametrize("mode", [LOCAL, SHARED], ids=["local", "distributed"])
def test_epsilon_is_the_accountants_of_every_round_without_sampling(tmp_path, name, library, mode):
    """Two of eight clients a round: against a server that knows whom it asks that hides nothing."""
    args = arguments(tmp_path, **mode, dp_accountant=name)
    mechanism = GaussianMechanism(args, 8, 2, [])
    z = mode["dp_noise_multiplier"]
    for rounds in (1, 6):
        accountant = library()
        accountant.compose(dp_accounting.GaussianDpEvent(z / 2), rounds)
        wanted = accountant.get_epsilon(args.dp_delta)
        assert mechanism.epsilon(rounds) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("mode", [LOCAL, SHARED], ids=["local", "distributed"])
def test_a_run_reports_it_and_no_loss(tmp_path, mode):
    run = trainer(tmp_path, clients_per_round=3, **mode)
    history = run.train()
    accountant = RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(mode["dp_noise_multiplier"] / 2), 2)
    assert history[-1].epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    assert all(report.train_loss is None for report in history)  # it has no noise
    facts = training_facts(history, run.args, run.strategy, 5, 2)
    assert facts["ε"].endswith(f"against the server, by {mode['dp_mode']} noise")
    write_report(tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"ε = {history[-1].epsilon:.3g} against the server, by {mode['dp_mode']} noise" in page


# All of it to one's own update.


def test_a_clients_noise_is_of_the_multiplier_and_its_update_of_the_norm(tmp_path):
    args = arguments(tmp_path, **LOCAL)
    given = update_of(a=torch.full((300, 1000), 0.1), b=torch.zeros(100_000))
    noisy = with_own_noise(given, args, 4, 9)
    assert noisy.train_loss == 0.0
    assert noisy.update["b"].std().item() == pytest.approx(0.35, rel=0.01)
    kept = noisy.update["a"].mean().item() * math.sqrt(300_000)
    assert kept == pytest.approx(0.5, abs=3 * 0.35)  # 54.8 before it was clipped
    quiet = dataclasses.replace(args, dp_noise_multiplier=1e-9)
    exact = with_own_noise(given, quiet, 4, 9).update["a"].double()
    assert exact.norm().item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("mode", ["central", "local"])
def test_both_parts_of_a_complex_number_have_the_noise_of_a_real_one(tmp_path, mode):
    args = arguments(tmp_path, **LOCAL | {"dp_mode": mode})
    given = {"a": torch.zeros(100_000, dtype=torch.complex64), "b": torch.full((1,), 1.0 - 2.0j)}
    if mode == "local":
        quiet = dataclasses.replace(args, dp_noise_multiplier=1e-9)
        exact, noisy = (with_own_noise(update_of(**given), a, 4, 9).update for a in (quiet, args))
        expected = (0.5 - 1.0j) / math.sqrt(5)  # of norm 0.5
    else:
        mechanisms = [GaussianMechanism(dataclasses.replace(args, dp_noise_multiplier=z), 4, 1, [])
                      for z in (1e-9, 0.7)]  # fmt: skip
        exact, noisy = (mechanism.add_noise(given, 1, 9, 4) for mechanism in mechanisms)
        expected = 1.0 - 2.0j
    assert exact["b"].item() == pytest.approx(expected, rel=1e-6)
    for part in (noisy["a"].real, noisy["a"].imag):
        assert part.std().item() == pytest.approx(0.7 * 0.5, rel=0.01)


def test_noise_is_drawn_anew_for_every_client_round_tensor_and_run(tmp_path):
    args = arguments(tmp_path, **LOCAL)
    given = update_of(a=torch.zeros(50), b=torch.zeros(50))
    other = dataclasses.replace(given, client=4)
    drawn = [
        with_own_noise(one, args, round, seed).update[name]
        for one, round, seed in [(given, 0, 9), (given, 1, 9), (other, 0, 9), (given, 0, 8)]
        for name in ("a", "b")
    ]
    drawn += [with_own_noise(given, args, 0, None).update["a"] for _ in range(2)]
    assert all(not torch.equal(x, y) for i, x in enumerate(drawn) for y in drawn[:i])
    again = with_own_noise(given, args, 0, 9).update
    assert torch.equal(again["a"], drawn[0])


def test_what_diverged_is_still_seen_as_such(tmp_path):
    args = arguments(tmp_path, **LOCAL)
    for bad in (float("nan"), float("inf")):
        found = with_own_noise(update_of(a=torch.tensor([bad, 1.0])), args, 0, 1).update["a"]
        assert not torch.isfinite(found).all()


def test_the_server_sees_noisy_updates_and_clips_them_no_more(tmp_path):
    run = trainer(tmp_path, uplink_codec="float16", **LOCAL, dp_noise_seed=3)
    seen = []
    take = run._run._rounds.take_in
    run._run._rounds.take_in = lambda opened, update: (seen.append(update), take(opened, update))
    run.train()
    expected = 0.35 * math.sqrt(68)
    for update in seen:
        norm = torch.cat([t.flatten() for t in update.update.values()]).norm().item()
        assert norm == pytest.approx(expected, rel=0.35)
        assert norm > 2 * LOCAL["clip_update_norm"]
        assert update.train_loss == 0.0


def test_a_resumed_run_has_the_same_noise_and_another_run_has_not(tmp_path):
    more = {**LOCAL, "save_every": 1, "num_rounds": 3}
    whole = trainer(tmp_path / "a", **more, dp_noise_seed=5)
    whole.train()
    with pytest.raises(InterruptedTestError):
        trainer(tmp_path / "b", callbacks=[StopAfter(1)], **more, dp_noise_seed=5).train()
    resumed = trainer(tmp_path / "b", **more, dp_noise_seed=5)
    resumed.train(resume_from_checkpoint=True)
    assert same(final(whole), final(resumed))
    secret = [trainer(tmp_path / name, **more) for name in ("c", "d")]
    for one in secret:
        one.train()
    assert not torch.equal(secret[0].model.weight, secret[1].model.weight)
    assert "dp_noise_seed" not in (tmp_path / "c" / "settings.json").read_text()
    assert '"dp_mode": "local"' in (tmp_path / "c" / "settings.json").read_text()


@pytest.mark.parametrize(
    "more",
    [
        {"aggregation": "median"},
        {"client_sampling": "weighted", "clients_per_round": 2},
        {"error_feedback": True, "uplink_codec": "int8"},
    ],
)
def test_what_follows_the_noise_is_free(tmp_path, more):
    """No aggregate, codec or sampling of what is protected can undo it, nor changes ε."""
    history = trainer(tmp_path, **LOCAL, **more).train()
    plain = GaussianMechanism(arguments(tmp_path, **LOCAL), 5, 5, []).epsilon(2)
    assert history[-1].epsilon == plain


def test_rounds_that_do_not_wait_have_it_too(tmp_path):
    data = partition(toy(), "iid", 5)
    args = arguments(
        tmp_path, **LOCAL, num_rounds=3, buffer_size=2, concurrency=4, clients_per_round=None
    )
    run = FederatedTrainer(torch.nn.Linear(16, 4), args, data, client_seconds=[1, 2, 3, 4, 5])
    history = run.train()
    assert len(history) == 3
    assert history[-1].epsilon == GaussianMechanism(args, 5, 4, []).epsilon(3)


# A share of the sum's.


def test_the_discrete_gaussian_is_one():
    """Against its mass function, and its variance where the grid is fine."""
    for std in (1.5, 6.0):
        drawn = discrete_gaussian(200_000, std, b"k" * 32)
        ks = np.arange(-int(6 * std), int(6 * std) + 1)
        mass = np.exp(-(ks**2) / (2 * std**2))
        wanted = 200_000 * mass / mass.sum()
        found = np.array([(drawn == k).sum() for k in ks])
        usual = wanted > 20
        chi = ((found - wanted)[usual] ** 2 / wanted[usual]).sum()
        assert chi < usual.sum() + 5 * math.sqrt(2 * usual.sum())
    drawn = discrete_gaussian(100_000, 12345.6, b"k" * 32)
    assert drawn.std() == pytest.approx(12345.6, rel=0.01)
    assert abs(drawn.mean()) < 5 * 12345.6 / math.sqrt(100_000)
    assert not np.array_equal(drawn[:50], discrete_gaussian(50, 12345.6, b"l" * 32))


class Steps(FederatedCallback):
    """What every round adds to the global model."""

    def __init__(self, model):
        self.model, self.moves = model, []
        self.before = self.now()

    def now(self):
        return torch.cat([t.detach().flatten().double() for t in self.model.parameters()])

    def on_round_end(self, server, report):
        after = torch.cat([server.params[n].flatten().double() for n in ("weight", "bias")])
        self.moves.append(after - self.before)
        self.before = after


@pytest.mark.parametrize("dropped", [0, 1])
def test_the_sums_noise_has_the_variance_of_the_clients_that_came(tmp_path, monkeypatch, dropped):
    """With no more than the threshold: z times the norm on the grid, to a few per cent of luck."""
    gone = list(range(dropped))
    monkeypatch.setattr("fedpara_peft.federation.server.round.drop_outs", lambda *_: list(gone))
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 4)
    steps = Steps(model)
    more = {
        "learning_rate": 1e-9,
        "num_rounds": 25,
        "secure_drop_outs": 0.2,
        "clients_per_round": 5,
    }
    run = trainer(tmp_path, callbacks=[steps], model=model, **SHARED, **more)
    run.train()
    came, threshold = 5 - dropped, 4
    how = fixed_range(run.args)
    of_sum = 1.5 * (0.5 + math.sqrt(68) * how.clip / how.levels)
    noise = torch.stack(steps.moves) * came
    wanted = of_sum * math.sqrt(came / threshold)
    assert noise.std().item() == pytest.approx(wanted, rel=4 / math.sqrt(2 * noise.numel()))
    assert abs(noise.mean().item()) < 5 * wanted / math.sqrt(noise.numel())


def test_no_update_is_longer_on_the_grid_than_its_noise_counts_on(tmp_path):
    """Worst rounding, coarse grid, and a clip that a narrow dtype has lifted over the norm."""
    args = arguments(tmp_path, **SHARED, secure_bits=8)
    how = fixed_range(args)
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch_generator(0, str(dtype))
        for numel in (1, 7, 500):
            raw = torch.randn(numel, generator=generator).to(dtype) * 3
            q, _ = how.integers({"w": clipped({"w": raw}, 0.5)["w"]}, ["w"], generator)
            assert np.linalg.norm(q) <= how.levels * 0.5 / how.clip + math.sqrt(numel)


def test_a_sum_with_noise_is_exact_to_its_last_step():
    """At the largest values and noise that were agreed on, in the smallest words that hold them."""
    for noise in (1, 1000, 12345):
        agreed = Agreement(0, (0, 1, 2), 2, 2, 127, noise=noise)
        assert agreed.values.bits == (2 * (3 * 127 + noise)).bit_length()
        total = agreed.zero()
        shares = [noise // 3, noise // 3, noise - 2 * (noise // 3)]
        for share in shares:
            values = np.array([127 + share, -127 - share])
            total = total.plus(agreed.vector(values, 1, 0.0))
        assert total.summed((0, 1, 2)).values.tolist() == [381 + noise, -381 - noise]
        with pytest.raises(SecureAggregationError, match="cannot be summed"):
            agreed.vector(np.array([128 + noise, 0]), 1, 0.0)
        assert agreed.digest != Agreement(0, (0, 1, 2), 2, 2, 127).digest


def test_its_bytes_are_foretold(tmp_path):
    run = trainer(tmp_path, **SHARED)
    foretold = plan(run.model, run.args, 5)
    assert run.train().total_bytes == foretold.total_bytes
    quiet = trainer(tmp_path / "b", **{**SHARED, "dp_noise_multiplier": 0.0, "dp_mode": "central"})
    assert plan(quiet.model, quiet.args, 5).total_bytes < foretold.total_bytes


def test_a_share_is_what_the_threshold_makes_of_the_sums(tmp_path):
    args = arguments(tmp_path, **SHARED, secure_drop_outs=0.3, secure_clip=0.05)
    schema = schema_of({"w": torch.zeros(100)})
    agreed = agreement_of(args, FedAvg(), 0, range(10), schema)
    assert agreed.threshold == 7
    found = noise_std(args, 7, 100)
    assert found * math.sqrt(7) == pytest.approx(1.5 * (10 * 32767 + 10))
    assert agreed.noise == math.ceil(12 * found * math.sqrt(10))


# What cannot hold.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dp_mode": "local"}, "dp_mode='local' does nothing without dp_noise_multiplier"),
        ({**LOCAL, "clip_update_norm": None}, "needs clip_update_norm"),
        ({**LOCAL, "clip_target_quantile": 0.5}, "clip_target_quantile cannot have dp_mode"),
        ({**SHARED, "secure_aggregation": False}, "needs secure_aggregation=True"),
        ({**SHARED, "aggregation": "median"}, "needs aggregation='mean'"),
        ({**LOCAL, "dp_mode": "shuffled"}, "dp_mode must be one of"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(tmp_path, changes, said):
    with pytest.raises(ArgumentsError, match=said):
        arguments(tmp_path, **changes)


@pytest.mark.parametrize(
    ("given", "changes", "said"),
    [
        ({"strategy": Scaffold()}, LOCAL, "tensors that travel would not be protected"),
        ({"strategy": FedNova()}, LOCAL, "dp_mode='local': it asks how many steps"),
        ({"strategy": FedDyn()}, LOCAL, "FedDyn cannot have dp_noise_multiplier"),
        ({"model": mlp(norm=True)}, LOCAL, "group norm instead of batch norm"),
        ({}, {**SHARED, "dp_mode": "central"}, "the server would see the sum without noise"),
        ({}, {**SHARED, "dp_mode": "local"}, "use dp_mode='distributed'"),
        ({}, {**SHARED, "secure_max_examples": 9}, "clients count alike"),
        ({}, {**SHARED, "dp_noise_multiplier": 1e-5}, "raise secure_bits"),
    ],
)
def test_what_a_clients_noise_does_not_protect_is_refused(tmp_path, given, changes, said):
    with pytest.raises(ArgumentsError, match=said):
        trainer(tmp_path, **given, **changes)
