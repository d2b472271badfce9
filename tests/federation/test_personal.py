"""Clients' own tensors: kept apart, kept exactly, evaluated on the client's own data."""

import numpy as np
import pytest
import torch
from tests.federation.test_trainer import arguments, slow_turn, toy
from tests.zoo import adapted, mlp
from torch import nn

from fedpara_peft import (
    ArgumentsError,
    ClientDataError,
    FederatedTrainer,
    LocalOnly,
    accuracy,
    communicated_state,
    local_state,
    partition,
)
from fedpara_peft.federation.client.evaluation import over_clients
from fedpara_peft.federation.data.metrics import higher_is_better
from fedpara_peft.federation.server.sampling import sample_cohort

CASES = {
    "pfedpara": (lambda: adapted(mlp(), parameterization="pfedpara"), {}),
    "pfedpara, frozen": (
        lambda: adapted(mlp(), parameterization="pfedpara", base_weight="frozen"),
        {},
    ),
    "fedper": (lambda: mlp(), {"local_modules": ["3", "5"]}),
    "fedper with batch norm": (lambda: mlp(), {"local_modules": ["1", "5"]}),
    "fedpara, last layer local": (lambda: adapted(mlp(), local_modules=["5"]), {}),
}


def slow_personal(model, args, clients):
    """Personalized FedAvg written out: a whole state dict per client."""
    local = set(local_state(model, args.local_modules))
    shared = set(communicated_state(model, args.local_modules))
    first = {k: v.clone() for k, v in model.state_dict().items()}
    world = dict(first)
    own = {i: {k: first[k] for k in local} for i in range(len(clients))}
    for number in range(args.num_rounds):
        sizes = [len(c) for c in clients]
        cohort = sample_cohort(sizes, args.clients_per_round, args.seed, number)
        sums = {k: torch.zeros(first[k].shape, dtype=torch.float64) for k in shared}
        for i in cohort:
            model.load_state_dict({**first, **world, **own[i]})
            slow_turn(model, args, clients[i], number, i)
            after = {k: v.clone() for k, v in model.state_dict().items()}
            own[i] = {k: after[k] for k in local}
            for k in shared:
                sums[k] += after[k].double() * sizes[i] / sum(sizes[j] for j in cohort)
        for k, v in sums.items():
            floats = first[k].is_floating_point()
            world[k] = (v if floats else v.round()).to(first[k].dtype)
    return world, own


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_personalized_rounds_are_the_slow_ones(tmp_path, case, store):
    build, settings = CASES[case]
    clients = partition(toy(), "dirichlet", 5, concentration=5.0)
    args = arguments(tmp_path, num_rounds=4, client_store=store, **settings)
    world, own = slow_personal(build(), args, clients)
    model = build()
    trainer = FederatedTrainer(model, args, clients)
    trainer.train()
    shared = communicated_state(model, args.local_modules)
    for name, value in shared.items():
        torch.testing.assert_close(value, world[name], atol=2e-6, rtol=1e-5, msg=name)
    for i in range(5):
        personal = trainer.client_model(i)
        for name, value in local_state(personal, args.local_modules).items():
            torch.testing.assert_close(value, own[i][name], atol=2e-6, rtol=1e-5, msg=name)
        for name, value in communicated_state(personal, args.local_modules).items():
            assert torch.equal(value, shared[name]), name
    # Making personal models has not changed the global one.
    first = {k: v for k, v in build().state_dict().items() if k in own[0]}
    assert all(torch.equal(v, first[k]) for k, v in local_state(model, args.local_modules).items())


def test_personal_models_merge(tmp_path):
    clients = partition(toy(), "iid", 4)
    model = adapted(mlp(norm=False), parameterization="pfedpara")
    trainer = FederatedTrainer(model, arguments(tmp_path), clients)
    trainer.train()
    x = toy().tensors[0]
    personal = trainer.client_model(2).eval()
    expected = personal(x)
    merged = personal.merge_and_unload()
    assert isinstance(merged, nn.Sequential)
    torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(trainer.client_model(1).eval()(x), expected)


@pytest.mark.parametrize("kind", ["dense", "fedpara"])
def test_local_only_is_each_client_alone(tmp_path, kind):
    clients = partition(toy(), "iid", 3)
    args = arguments(tmp_path, num_rounds=3, clients_per_round=3)

    def build():
        return mlp() if kind == "dense" else adapted(mlp())

    model = build()
    trainer = FederatedTrainer(model, args, clients, strategy=LocalOnly())
    history = trainer.train()
    assert history.total_bytes == 0
    for i in range(3):
        alone = build()
        for number in range(3):
            slow_turn(alone, args, clients[i], number, i)
        for name, value in trainer.client_model(i).state_dict().items():
            torch.testing.assert_close(value, alone.state_dict()[name], atol=2e-6, rtol=1e-5)


def test_clients_are_evaluated_on_their_own_data(tmp_path):
    names = list("abcdef")
    clients = dict(zip(names, partition(toy(), "iid", 6), strict=True))
    held_out = dict(zip(names, partition(toy(60, seed=1), "iid", 6), strict=True))
    shuffled = {name: held_out[name] for name in reversed(names)}
    model = adapted(mlp(), parameterization="pfedpara")
    trainer = FederatedTrainer(
        model, arguments(tmp_path), clients, compute_metrics=accuracy,
        client_eval_dataset=shuffled,
    )  # fmt: skip
    last = trainer.train()[-1]
    right = []
    for name in names:
        x, y = (torch.stack(c) for c in zip(*held_out[name], strict=True))
        right.append(float((trainer.client_model(name).eval()(x).argmax(1) == y).double().mean()))
    assert last.client_metrics["accuracy"] == pytest.approx(dict(zip(names, right, strict=True)))
    assert last.metrics["client_accuracy_mean"] == pytest.approx(np.mean(right))
    assert last.metrics["client_accuracy_worst_decile"] == pytest.approx(min(right))
    assert last.metrics["client_accuracy_std"] == pytest.approx(np.std(right))
    worst = last.metrics["client_loss_worst_decile"]
    assert worst == pytest.approx(max(last.client_metrics["loss"].values()))


def test_worst_decile():
    found = over_clients(list(range(25)), higher_is_better=True)
    assert found == {"mean": 12.0, "worst_decile": 1.0, "std": pytest.approx(np.std(range(25)))}
    assert over_clients(list(range(25)), higher_is_better=False)["worst_decile"] == 23.0


def test_names_tell_which_way_is_better():
    for name in (
        "loss", "eval_loss", "perplexity", "client_perplexity_worst_decile", "word_error_rate",
        "error", "RMSE", "eval_mae", "client_accuracy_std",
    ):  # fmt: skip
        assert not higher_is_better(name), name
    for name in ("accuracy", "f1", "client_accuracy_worst_decile", "lossless", "measure", "bleu"):
        assert higher_is_better(name), name


def test_the_worst_clients_have_the_highest_perplexity(tmp_path):
    clients = partition(toy(), "iid", 4)
    sizes = iter(range(10, 100))
    trainer = FederatedTrainer(
        mlp(), arguments(tmp_path, num_rounds=1), clients, client_eval_dataset=clients,
        compute_metrics=lambda _: {"perplexity": (n := next(sizes)), "f1": n},
    )  # fmt: skip
    found = trainer.train()[-1].metrics
    assert found["client_perplexity_worst_decile"] == 13
    assert found["client_f1_worst_decile"] == 10


def test_errors_name_the_remedy(tmp_path):
    clients = partition(toy(), "iid", 4)
    args = arguments(tmp_path)
    with pytest.raises(ClientDataError, match=r"3 data sets .*for 4 clients"):
        FederatedTrainer(mlp(), args, clients, client_eval_dataset=clients[:3])
    named = dict(zip("abcd", clients, strict=True))
    with pytest.raises(ClientDataError, match=r"for 4 clients \(\['a', 'b', 'c', 'd'\]\)"):
        FederatedTrainer(mlp(), args, named, client_eval_dataset={"a": clients[0]})
    with pytest.raises(ArgumentsError, match=r"LocalOnly\(\)"):
        FederatedTrainer(mlp(), arguments(tmp_path, local_modules=["0", "1", "3", "5"]), clients)
    with pytest.raises(ClientDataError, match=r"no client 'x'.*\[0, 1, 2, 3\]"):
        FederatedTrainer(mlp(), args, clients).client_model("x")
