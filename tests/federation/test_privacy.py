"""ε for what the sampling is, and clients that are drawn each by itself."""

import math

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy import optimize, stats
from tests.federation.test_trainer import arguments, toy

from fedpara_peft import ArgumentsError, FedAvg, FederatedTrainer, Scaffold, partition
from fedpara_peft.federation.server.privacy import AdaptiveClip, GaussianMechanism
from fedpara_peft.federation.server.sampling import sample_cohort
from fedpara_peft.federation.state import ServerState


def private(tmp_path, **changes):
    settings = {"dp_noise_multiplier": 1.0, "clip_update_norm": 1.0, "dp_noise_seed": 1,
                "client_sampling": "poisson", "eval_every": 0}  # fmt: skip
    return arguments(tmp_path, **{**settings, **changes})


def test_without_sampling_the_tight_accountant_is_the_analytic_gaussian(tmp_path):
    """δ(ε) of T Gaussian mechanisms of noise z is known exactly (Balle & Wang 2018)."""
    args = private(tmp_path, dp_accountant="pld", dp_noise_multiplier=3.0)
    found = GaussianMechanism(args, 10, 10, []).epsilon(25)
    mu = math.sqrt(25) / 3.0

    def delta(eps):
        return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(
            -mu / 2 - eps / mu
        )

    wanted = optimize.brentq(lambda eps: delta(eps) - args.dp_delta, 0.1, 50)
    assert found == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(("name", "library"), [("rdp", RdpAccountant), ("pld", PLDAccountant)])
def test_epsilon_is_the_accountants_for_clients_drawn_by_themselves(tmp_path, name, library):
    args = private(tmp_path, dp_accountant=name, num_rounds=4, clients_per_round=2)
    history = FederatedTrainer(torch.nn.Linear(16, 4), args, partition(toy(), "iid", 6)).train()
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = library(neighboring_relation=relation)
    event = dp_accounting.PoissonSampledDpEvent(2 / 6, dp_accounting.GaussianDpEvent(1.0))
    accountant.compose(event, 4)
    assert history[-1].epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


def test_the_tight_one_counts_less_and_both_less_than_cohorts_of_one_size(tmp_path):
    def spent(**changes):
        return GaussianMechanism(private(tmp_path, **changes), 10_000, 100, []).epsilon(200)

    tight, loose = spent(dp_accountant="pld"), spent(dp_accountant="rdp")
    assert tight < loose < spent(client_sampling="uniform")


def test_clients_are_drawn_each_by_itself():
    cohorts = [sample_cohort([5] * 40, 10, 0, number, "poisson") for number in range(4000)]
    sizes = torch.tensor([float(len(cohort)) for cohort in cohorts])
    # Binomial(40, 1/4): mean 10, variance 7.5; and no pair goes together.
    assert sizes.mean() == pytest.approx(10, abs=0.2)
    assert sizes.var() == pytest.approx(7.5, rel=0.1)
    both = sum({3, 17} <= set(cohort) for cohort in cohorts) / len(cohorts)
    assert both == pytest.approx(1 / 16, abs=0.015)
    assert cohorts[0] == sorted(cohorts[0])


def test_a_round_without_anybody_is_a_round(tmp_path):
    """And with noise it moves the model as any other: that nobody came must not show."""
    args = private(tmp_path, num_rounds=30, clients_per_round=1)
    model = torch.nn.Linear(16, 4)
    history = FederatedTrainer(model, args, partition(toy(), "iid", 4)).train()
    empty = [report for report in history if not report.cohort]
    assert 3 < len(empty) < 20
    assert all(report.uplink_bytes == report.downlink_bytes == 0 for report in empty)
    plain = private(tmp_path / "b", dp_noise_multiplier=0.0, num_rounds=30, clients_per_round=1)
    quiet = FederatedTrainer(torch.nn.Linear(16, 4), plain, partition(toy(), "iid", 4)).train()
    assert [report.cohort for report in quiet] == [report.cohort for report in history]


def test_what_no_epsilon_is_known_of_is_refused(tmp_path):
    clients = partition(toy(), "iid", 4)
    with pytest.raises(ArgumentsError, match="of clients that are drawn by their examples no ε"):
        FederatedTrainer(torch.nn.Linear(16, 4), private(tmp_path, client_sampling="weighted"),
                         clients)  # fmt: skip
    args = private(tmp_path, dp_accountant="pld", client_sampling="uniform")
    with pytest.raises(ArgumentsError, match="'pld' needs client_sampling='poisson'"):
        FederatedTrainer(torch.nn.Linear(16, 4), args, clients)
    args = arguments(tmp_path, client_sampling="poisson")
    with pytest.raises(ArgumentsError, match="its sums over clients count all alike"):
        FederatedTrainer(torch.nn.Linear(16, 4), args, clients, strategy=Scaffold())


class Watched(FedAvg):
    """Sees which updates were clipped, and how long they then are."""

    sees_updates = True

    def server_step(self, server, mean):
        self.seen.append([
            (update.clipped, torch.cat([t.flatten() for t in update.update.values()]).norm().item())
            for update in mean.updates
        ])  # fmt: skip
        return super().server_step(server, mean)

    def __init__(self):
        object.__setattr__(self, "seen", [])


def test_the_clipping_norm_follows_a_quantile_of_the_updates(tmp_path):
    strategy = Watched()
    args = arguments(tmp_path, clip_update_norm=5.0, clip_target_quantile=0.3, num_rounds=60,
                     clip_learning_rate=0.3, clients_per_round=8, eval_every=0)  # fmt: skip
    clients = partition(toy(400), "dirichlet", 12)
    history = FederatedTrainer(torch.nn.Linear(16, 4), args, clients, strategy=strategy).train()
    norms = [report.clip_norm for report in history]
    assert norms[0] == 5.0
    for number, seen in enumerate(strategy.seen):
        for clipped, norm in seen:
            assert norm == pytest.approx(norms[number], rel=1e-5) if clipped else (
                norm <= norms[number] * (1 + 1e-6)
            )  # fmt: skip
        share = sum(not clipped for clipped, _ in seen) / len(seen)
        if number + 1 < len(norms):
            wanted = norms[number] * math.exp(-0.3 * (share - 0.3))
            assert norms[number + 1] == pytest.approx(wanted)
    late = [not clipped for seen in strategy.seen[-30:] for clipped, _ in seen]
    assert sum(late) / len(late) == pytest.approx(0.3, abs=0.1)


def test_the_counts_noise_and_the_sums_together_tell_what_the_multiplier_allows(tmp_path):
    """Two Gaussian mechanisms at once are one of multiplier (z_Δ⁻² + z_b⁻²)^(-1/2)."""
    args = private(tmp_path, dp_noise_multiplier=0.8, clip_target_quantile=0.5,
                   clip_count_std=1.5)  # fmt: skip
    mechanism = GaussianMechanism(args, 100, 40, [])
    zero = {"w": torch.zeros(200_000, dtype=torch.float64)}
    std = mechanism.add_noise(zero, 0, 3, 0, 2.0)["w"].std().item()
    of_sum = std * 40 / 2.0
    # Bits ±1/2: a client moves their sum by a half, so noise of 1.5 is a multiplier of 3.
    together = (of_sum**-2 + 3.0**-2) ** -0.5
    assert together == pytest.approx(0.8, rel=0.01)
    fixed = GaussianMechanism(private(tmp_path, dp_noise_multiplier=0.8), 100, 40, [])
    assert mechanism.epsilon(50) == fixed.epsilon(50)


@pytest.mark.parametrize("clipped", [False, True])
def test_a_client_more_moves_what_the_norm_follows_by_a_half(tmp_path, clipped):
    """That is what the count's noise is for: with more, ε would be of another multiplier."""
    adaptive = AdaptiveClip(private(tmp_path, clip_target_quantile=0.3, clip_count_std=2.0), 8)
    server = ServerState(3, {}, clip_norm=1.0, noise_seed=5)
    without = math.log(adaptive.next(server, 2, 5))
    along = math.log(adaptive.next(server, 2 + (not clipped), 6))
    # log C' = -η (b - γ), with η = 0.2 and b a sum over clients, divided by 8.
    assert (without - along) * 8 / 0.2 == pytest.approx(-0.5 if clipped else 0.5)


def test_clients_that_do_not_report_say_nothing_of_the_norm(tmp_path):
    args = arguments(tmp_path, clip_update_norm=1e6, clip_target_quantile=0.5, num_rounds=12,
                     drop_out_probability=0.4, eval_every=0)  # fmt: skip
    history = FederatedTrainer(torch.nn.Linear(16, 4), args, partition(toy(), "iid", 6)).train()
    reporting = [len(report.cohort) - len(report.dropped) for report in history]
    assert len(set(reporting)) > 1
    for report, then, count in zip(history, history[1:], reporting, strict=False):
        share = 0.5 + count / 2 / (len(report.cohort) * 0.6)  # nobody was clipped
        wanted = report.clip_norm * math.exp(-0.2 * (share - 0.5))
        assert then.clip_norm == pytest.approx(wanted)


def test_a_resumed_run_has_the_same_clipping_norms(tmp_path):
    def run(folder, rounds, resume=False):
        torch.manual_seed(0)
        args = private(folder, clip_target_quantile=0.5, num_rounds=rounds, save_every=1,
                       clients_per_round=4, clip_count_std=2.0)  # fmt: skip
        trainer = FederatedTrainer(torch.nn.Linear(16, 4), args, partition(toy(), "iid", 6))
        history = trainer.train(resume_from_checkpoint=resume)
        return [report.clip_norm for report in history], trainer.model.weight.clone()

    norms, weight = run(tmp_path / "a", 6)
    run(tmp_path / "b", 3)
    again, same = run(tmp_path / "b", 6, resume=True)
    assert again == norms
    assert len(set(norms)) == 6
    assert torch.equal(weight, same)


def test_what_a_moving_norm_cannot_be_with_is_refused(tmp_path):
    with pytest.raises(ArgumentsError, match="needs clip_update_norm, to start from"):
        arguments(tmp_path, clip_target_quantile=0.5)
    with pytest.raises(ArgumentsError, match="clip_target_quantile cannot have buffer_size=2"):
        arguments(tmp_path, clip_target_quantile=0.5, clip_update_norm=1.0, buffer_size=2)
    args = private(tmp_path, clip_target_quantile=0.5, clip_count_std=0.4)
    with pytest.raises(ArgumentsError, match="must be above half of dp_noise_multiplier=1"):
        FederatedTrainer(torch.nn.Linear(16, 4), args, partition(toy(), "iid", 4))
