"""Trainers of transformers and trl on Flower nodes: to the bit what a simulation has of them."""

import functools
import pickle

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import Context, RecordDict
from tests.federation.test_local_trainer import llama, of_transformers, of_trl, said, tokens
from tests.integrations.test_flower import LocalGrid, _task, run_folder  # noqa: F401
from transformers import Trainer

from fedpara_peft import (
    AgreementError,
    ArgumentsError,
    FederatedArguments,
    FederatedTrainer,
    FedProx,
    History,
)
from fedpara_peft.comm.ledger import Ledger
from fedpara_peft.federation.folder.store import DiskStore
from fedpara_peft.integrations.engine.node import Node, NodeSetup
from fedpara_peft.integrations.flower import client_app, server_app

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*use_reentrant")
model_fn = functools.partial(llama, dropout=0.1, parameterization="pfedpara")


def by_round(folder):
    """A function that makes each client's trainer; its rate follows the rounds."""

    def make(model, dataset, client, round):
        given = of_transformers(folder, learning_rate=0.01 / (1 + round))
        return given(model=model, train_dataset=dataset)

    return make


KINDS = {
    "Trainer": (of_transformers, tokens),
    "SFTTrainer": (of_trl, said),
    "function": (by_round, tokens),
}


def arguments(folder):
    return FederatedArguments(str(folder), num_rounds=2, save_every=1, disable_tqdm=True)


def run(tmp_path, given, data, given_to_nodes=None, **more):
    own = given_to_nodes or [given] * len(data)
    args = arguments(tmp_path / "server")
    apps = [client_app(model_fn, data.__getitem__, args, local_trainer=trainer) for trainer in own]
    server = server_app(model_fn, args, len(data), local_trainer=given, **more)
    server(LocalGrid(apps, tmp_path), Context(1, 1, {}, RecordDict(), {}))


@pytest.mark.programs
@pytest.mark.parametrize("kind", KINDS)
def test_a_node_trains_with_the_trainer_that_it_is_given(tmp_path, kind):
    make, rows = KINDS[kind]
    given, data = make(tmp_path / "own"), [rows(10), rows(6, seed=1)]
    run(tmp_path, given, data)
    trainer = FederatedTrainer(
        model_fn(), arguments(tmp_path / "simulated"), data, local_trainer=given
    )
    trainer.train()
    ours, theirs = (
        load_file(tmp_path / where / "checkpoint-2" / "server.safetensors")
        for where in ("server", "simulated")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for client in range(len(data)):
        kept = DiskStore(run_folder(tmp_path, client)).get(client).local
        expected = trainer.client_state(client).local
        assert expected.keys() == kept.keys()
        assert all(torch.equal(kept[name], expected[name]) for name in expected)
    history = History.load(tmp_path / "server" / "history.json")
    assert [r.train_loss for r in history] == [r.train_loss for r in trainer.history]
    ledger = Ledger.load(tmp_path / "server" / "ledger.npy")
    assert list(ledger.transfers()) == list(trainer.ledger.transfers())
    trainer.save_model(tmp_path / "model")
    ours, theirs = (
        [line for line in (tmp_path / where / "README.md").read_text().splitlines()
         if "local training" in line]
        for where in ("server/model", "model")
    )  # fmt: skip
    assert ours == theirs
    assert len(ours) == 1


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"learning_rate": 0.02}, "local_trainer's: args: learning_rate: 0.01 here, 0.02 there"),
        (None, "local_trainer: 'Trainer' here, None there"),
    ],
)
def test_a_node_with_another_trainer_trains_nobody(tmp_path, own, says):
    """Nor does one without any: clients that train differently are not one run."""
    given = of_transformers(tmp_path / "own")
    other = own and of_transformers(tmp_path / "own", **own)
    with pytest.raises(AgreementError, match=says):
        run(tmp_path, given, [tokens(4)], [other], deadline_s=0.5)


def test_a_worker_can_be_given_one(tmp_path):
    """It goes to the worker's process as the other functions do."""
    args = arguments(tmp_path)
    given = of_transformers(tmp_path / "own")
    setup = NodeSetup(model_fn, tokens, args, str(tmp_path / "node"), local_trainer=given)
    again = pickle.loads(pickle.dumps(setup))
    assert again.local_trainer.func is Trainer
    assert Node(again).introduce(4).facts == Node(setup).introduce(4).facts


def test_what_it_would_ignore_is_refused_on_both_ends(tmp_path):
    given = of_transformers(tmp_path / "own")
    with pytest.raises(ArgumentsError, match="FedProx corrects every gradient"):
        run(tmp_path, given, [tokens(4)], strategy=FedProx(0.1))
    args = FederatedArguments(str(tmp_path), optim="adamw")
    setup = NodeSetup(model_fn, tokens, args, str(tmp_path / "node"), local_trainer=given)
    with pytest.raises(ArgumentsError, match="optim='adamw' is for clients without"):
        Node(setup)
