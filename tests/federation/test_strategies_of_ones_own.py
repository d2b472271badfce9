"""Strategies as users write them: each in its own forty lines, against a hand-written twin."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tests.federation.runs import FedNova
from tests.federation.test_trainer import arguments, slow_turn, toy
from tests.zoo import adapted, mlp

import fedpara_peft
from fedpara_peft import (
    ArgumentsError,
    FedAvg,
    FederatedTrainer,
    ResumeError,
    Strategy,
    partition,
    plan,
)
from fedpara_peft.cli.main import build_parser
from fedpara_peft.federation.server.sampling import sample_cohort
from fedpara_peft.federation.strategies import STRATEGIES, as_strategy
from fedpara_peft.federation.strategies.base import advance, moment

PRIVATE = {"clip_update_norm": 1.0, "dp_noise_multiplier": 1.0}


def unequal():
    return partition(toy(), "quantity", 5, concentration=3.0)


def trainer(folder, strategy, model=None, clients=None, **changes):
    args = arguments(folder, **{"num_rounds": 3, "clients_per_round": 5, **changes})
    return FederatedTrainer(model or mlp(norm=False), args, clients or unequal(), strategy=strategy)


# A mean that goes up beside the update.


@dataclass(frozen=True)
class Curious(Strategy):
    """Damps entries whose clients disagree: Δ / (1 + β (mean Δ²  - Δ²) / (Δ² + ε))."""

    beta: float = 0.1
    uplink: ClassVar[tuple[str, ...]] = ("square",)

    def client_extra(self, broadcast, kept, update, steps):
        return {"square": {n: t.square() for n, t in update.items()}}

    def server_step(self, server, mean):
        step, spread = {}, {}
        for name, delta in mean.update.items():
            spread[name] = (mean.extra["square"][name] - delta.square()).clamp_min(0)
            step[name] = delta / (1 + self.beta * spread[name] / (delta.square() + 1e-8))
        kept = {n: 0.5 * v + 0.5 * spread[n] for n, v in moment(server, "spread").items()}
        return advance(server, step, {"spread": kept})


def test_a_strategy_of_ones_own_runs_is_counted_resumed_and_refused_with_noise(tmp_path):
    settings = {"num_rounds": 4, "save_every": 2}
    run = trainer(tmp_path / "a", Curious(), adapted(mlp(norm=False)), **settings)
    foretold = plan(adapted(mlp(norm=False)), run.args, 5, Curious())
    assert run.train().total_bytes == foretold.total_bytes
    bare = plan(adapted(mlp(norm=False)), run.args, 5)
    assert sum(foretold.uplink_bytes) > 1.9 * sum(bare.uplink_bytes)
    described = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert described["strategy"] == "Curious(beta=0.1)"
    with pytest.raises(ResumeError, match="strategy: "):
        trainer(tmp_path / "a", Curious(0.2), adapted(mlp(norm=False)), **settings).train(True)
    settings["num_rounds"] = 6
    again = trainer(tmp_path / "a", Curious(), adapted(mlp(norm=False)), **settings)
    again.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", Curious(), adapted(mlp(norm=False)), **settings)
    whole.train()
    same_states(again.model.state_dict(), whole.model.state_dict())
    pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
    with pytest.raises(ArgumentsError, match=r"would not be protected, first \['square/"):
        trainer(tmp_path / "noise", Curious(), **PRIVATE)


def same_states(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(t, b[n]) for n, t in a.items())


# Single updates.


def flat(state):
    return torch.cat([t.reshape(-1) for _, t in sorted(state.items())]).double()


@dataclass(frozen=True)
class Recalls(Strategy):
    """Keeps the same tensors under several names: a mean of models and clients' first updates."""

    def next_kept(self, broadcast, kept, update, extra, steps):
        return {"first": kept.get("first", update), "last": update}

    def server_step(self, server, mean):
        after = advance(server, mean.update)
        slow = server.optimizer.get("slow", after.params)
        slow = {n: w if w is slow[n] else w.lerp(slow[n], 0.5) for n, w in after.params.items()}
        return dataclasses.replace(after, optimizer={"slow": slow})


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_what_is_kept_under_several_names_is_written_and_read(tmp_path, store):
    trainer(tmp_path / "a", Recalls(), client_store=store, save_every=1).train()
    again = trainer(tmp_path / "a", Recalls(), client_store=store, num_rounds=5)
    again.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "b", Recalls(), num_rounds=5)
    whole.train()
    for client in again.population.names:
        one, other = (t.client_state(client).strategy for t in (again, whole))
        assert all(torch.equal(t, other[g][n]) for g in one for n, t in one[g].items())
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


@dataclass(frozen=True)
class Krum(Strategy):
    """The update closest to its n - f - 2 nearest neighbours (Blanchard et al. 2017)."""

    byzantine: int = 1
    sees_updates: ClassVar[bool] = True

    def server_step(self, server, mean):
        vectors = torch.stack([flat(u.update) for u in mean.updates])
        squares = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        nearest = max(1, len(vectors) - self.byzantine - 2)
        scores = squares.sort(1).values[:, 1 : nearest + 1].sum(1)
        return advance(server, mean.updates[int(scores.argmin())].update)


def turns(run, number, state):
    """Every client's update of a round, trained by hand from a state, in client order."""
    model, args = mlp(norm=False), run.args
    cohort = sample_cohort(run.population.num_examples, args.clients_per_round, args.seed, number)
    found = {}
    for client in cohort:
        model.load_state_dict(state)
        slow_turn(model, args, run.population.train[client], number, client)
        found[client] = {n: t - state[n] for n, t in model.state_dict().items()}
    return found


def by_hand(run, step):
    state = {n: t.clone() for n, t in mlp(norm=False).state_dict().items()}
    for number in range(run.args.num_rounds):
        moved = step(turns(run, number, state))
        state = {n: t + moved[n] for n, t in state.items()}
    return state


def close(model, expected):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_krum_takes_the_update_that_has_the_closest_neighbours(tmp_path, engine):
    chosen = []

    def step(updates):
        scores = {}
        for i, own in updates.items():
            others = sorted(
                sum(float((own[n] - other[n]).double().square().sum()) for n in own)
                for j, other in updates.items()
                if j != i
            )
            scores[i] = sum(others[: len(updates) - 1 - 2])
        chosen.append(min(scores, key=scores.get))
        return updates[chosen[-1]]

    clients = partition(toy(), "iid", 10)
    settings = {"engine": engine, "num_rounds": 4}
    run = trainer(tmp_path, Krum(), clients=clients, **settings)
    run.train()
    close(run.model, by_hand(run, step))
    assert len(set(chosen)) > 1


def test_krum_does_not_see_what_one_bad_client_sends(tmp_path):
    @dataclass(frozen=True)
    class Attacked(Krum):
        def server_step(self, server, mean):
            updates = [
                dataclasses.replace(u, update={n: -30 * t for n, t in u.update.items()})
                if u.client == 2 else u
                for u in mean.updates
            ]  # fmt: skip
            return super().server_step(server, dataclasses.replace(mean, updates=tuple(updates)))

    clients = partition(toy(), "iid", 5)
    history = trainer(tmp_path, Attacked(), clients=clients, num_rounds=10).train()
    assert history[-1].train_loss < 0.9 * history[0].train_loss


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fednova_against_its_papers_formula(tmp_path, momentum):
    """Clients of unequally many examples make unequally many steps τ; ‖a‖₁ with momentum."""
    run = trainer(
        tmp_path, FedNova(), momentum=momentum, num_local_epochs=2, per_client_batch_size=8
    )
    sizes = run.population.num_examples
    steps = {i: 2 * -(-n // 8) for i, n in enumerate(sizes)}
    assert len(set(steps.values())) > 2

    def norm(count):  # a_k = (1 - βᵏ) / (1 - β), from the last step to the first
        return sum((1 - momentum**k) / (1 - momentum) for k in range(1, count + 1))

    def step(updates):
        total = sum(sizes[i] for i in updates)
        effective = sum(sizes[i] / total * norm(steps[i]) for i in updates)
        names = next(iter(updates.values()))
        return {
            n: sum(
                effective * sizes[i] / total / norm(steps[i]) * u[n].double()
                for i, u in updates.items()
            ).float()
            for n in names
        }

    run.train()
    close(run.model, by_hand(run, step))
    plain = trainer(tmp_path / "plain", FedAvg(), momentum=momentum, num_local_epochs=2,
                    per_client_batch_size=8)  # fmt: skip
    plain.train()
    assert any(
        (t - plain.model.state_dict()[n]).abs().max() > 1e-3
        for n, t in run.model.state_dict().items()
    )


def test_single_updates_are_those_whose_mean_is_taken(tmp_path):
    """Clipped and decoded, in client order; whoever is refused or dropped is not among them."""
    seen = []

    class Watches(Strategy):
        sees_updates = True

        def server_step(self, server, mean):
            seen.append(mean)
            return super().server_step(server, mean)

    settings = {
        "num_rounds": 4, "uplink_codec": "int8", "clip_update_norm": 0.2, "max_update_norm": 50.0,
        "drop_out_probability": 0.4, "client_sampling": "weighted", "clients_per_round": 4,
    }  # fmt: skip
    history = trainer(tmp_path / "a", Watches(), mlp(), **settings).train()
    plain = trainer(tmp_path / "b", FedAvg(), mlp(), **settings).train()
    assert [r.train_loss for r in history] == [r.train_loss for r in plain]
    assert any(report.dropped for report in history)
    for report, mean in zip(history, seen, strict=True):
        came = [c for c in report.cohort if c not in report.dropped]
        assert [u.client for u in mean.updates] == came
        assert mean.weights == (pytest.approx(1 / len(came)),) * len(came)
        for name, value in mean.update.items():
            average = sum(u.update[name].double() for u in mean.updates) / len(came)
            torch.testing.assert_close(value.double(), average, atol=1e-7, rtol=1e-5)
        for update in mean.updates:
            assert float(flat(update.update).norm()) <= 0.2 * (1 + 1e-5)
            batches = -(-update.num_examples // 8) - (update.num_examples % 8 == 1)
            assert update.steps.count == 2 * batches
            assert not update.buffers
    seen.clear()
    sizes = trainer(tmp_path / "c", Watches(), num_rounds=1)
    sizes.train()
    numbers = sizes.population.num_examples
    assert seen[0].weights == pytest.approx([n / sum(numbers) for n in numbers])


def test_other_strategies_hold_no_single_update(tmp_path):
    class Watches(Strategy):
        def server_step(self, server, mean):
            assert mean.updates == mean.weights == ()
            return super().server_step(server, mean)

    trainer(tmp_path, Watches(), num_rounds=1).train()


def test_single_updates_have_no_noise_so_they_are_refused_with_it(tmp_path):
    says = "Krum cannot have dp_noise_multiplier: it sees single updates"
    with pytest.raises(ArgumentsError, match=says):
        trainer(tmp_path, Krum(), **PRIVATE)
    args = arguments(tmp_path, **PRIVATE)
    with pytest.raises(ArgumentsError, match=says):
        plan(mlp(norm=False), args, 5, Krum())


def test_names_of_strategies_are_written_once():
    """The command line and errors derive from the registry; all are public, and in the docs."""
    page = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text()
    choices = subcommand("plan")["--strategy"].choices
    assert list(choices) == [name.lower() for name in STRATEGIES]
    for name, strategy in STRATEGIES.items():
        assert getattr(fedpara_peft, name) is strategy
        assert f"| `{name}`" in page
        assert type(as_strategy(name.lower())) is strategy
    with pytest.raises(ArgumentsError, match=", ".join(STRATEGIES)):
        as_strategy("fedsgd")


def subcommand(name):
    parser = build_parser()
    (commands,) = (a for a in parser._actions if a.choices and name in a.choices)
    return commands.choices[name]._option_string_actions
