"""The round against the same thing written out, and what the trainer promises about bytes."""

import collections.abc
import json

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tests.zoo import adapted, mlp
from torch import nn
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from fedpara_peft import (
    ArgumentsError,
    ClientDataError,
    FedAvg,
    FederatedArguments,
    FederatedCallback,
    FederatedTrainer,
    FedParaConfig,
    History,
    RoundError,
    accuracy,
    communicated_state,
    partition,
)
from fedpara_peft.comm.payload import Format
from fedpara_peft.comm.schema import schema_of
from fedpara_peft.federation.client.local import LocalTrainer
from fedpara_peft.federation.random import derived_seed, torch_generator
from fedpara_peft.federation.server.sampling import sample_cohort
from fedpara_peft.federation.state import Broadcast, RoundReport


def toy(examples=120, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 16, generator=generator)
    return TensorDataset(x, (x @ torch.randn(16, 4, generator=generator)).argmax(1))


def arguments(tmp_path, **changes):
    defaults = {
        "output_dir": str(tmp_path),
        "num_rounds": 3,
        "clients_per_round": 3,
        "per_client_batch_size": 8,
        "num_local_epochs": 2,
        "disable_tqdm": True,
    }
    return FederatedArguments(**{**defaults, **changes})


def slow_turn(model, args, client, number, i):
    """A client's local training written out, with a new optimizer."""
    model.train()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.learning_rate * args.learning_rate_decay**number,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )
    torch.manual_seed(derived_seed(args.seed, number, i, "training"))
    for epoch in range(args.num_local_epochs):
        generator = torch_generator(args.seed, number, i, f"batches {epoch}")
        order = torch.randperm(len(client), generator=generator)
        for part in order.split(args.per_client_batch_size * args.gradient_accumulation_steps):
            rows = [client[j] for j in part.tolist()]
            x, y = (torch.stack(column) for column in zip(*rows, strict=True))
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()


def slow_fedavg(model, args, clients):
    """FedAvg written out: load_state_dict, a new SGD a client, weights averaged in float64."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for number in range(args.num_rounds):
        cohort = sample_cohort([len(c) for c in clients], args.clients_per_round, args.seed, number)
        total = sum(len(clients[i]) for i in cohort)
        sums = {k: torch.zeros(v.shape, dtype=torch.float64) for k, v in state.items()}
        for i in cohort:
            model.load_state_dict(state)
            slow_turn(model, args, clients[i], number, i)
            for k, v in model.state_dict().items():
                sums[k] += v.double() * len(clients[i]) / total
        state = {
            k: (v if state[k].is_floating_point() else v.round()).to(state[k].dtype)
            for k, v in sums.items()
        }
    return state


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.01, "learning_rate_decay": 0.5},
        {"max_grad_norm": 0.1, "seed": 7, "per_client_batch_size": 500, "clients_per_round": 5},
    ],
)
@pytest.mark.parametrize("kind", ["dense", "fedpara", "lora"])
def test_fedavg_is_fedavg(tmp_path, kind, settings):
    clients = partition(toy(), "dirichlet", 5, concentration=5.0)

    def build():
        if kind == "dense":
            return mlp()
        if kind == "lora":
            return get_peft_model(mlp(norm=False), LoraConfig(target_modules=["0", "2"], r=2))
        return adapted(mlp())

    args = arguments(tmp_path, **settings)
    expected = slow_fedavg(build(), args, clients)
    model = build()
    FederatedTrainer(model, args, clients).train()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=1e-5, msg=name)


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path):
    clients = partition(toy(), "dirichlet", 5, concentration=5.0)
    args = arguments(tmp_path, gradient_accumulation_steps=3, per_client_batch_size=5, momentum=0.5)
    expected = slow_fedavg(mlp(norm=False), args, clients)
    model = mlp(norm=False)
    FederatedTrainer(model, args, clients).train()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=1e-5, msg=name)


def test_one_client_with_one_step_is_central_sgd(tmp_path):
    data = toy()
    args = arguments(
        tmp_path, num_rounds=4, clients_per_round=1, num_local_epochs=1, per_client_batch_size=120
    )
    model = mlp(norm=False)
    FederatedTrainer(model, args, [data]).train()
    central = mlp(norm=False)
    optimizer = torch.optim.SGD(central.parameters(), lr=args.learning_rate)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(central(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), central.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_same_seed_same_bits(tmp_path):
    def run(seed):
        model = adapted(mlp())
        clients = partition(toy(), "iid", 5)
        args = arguments(tmp_path, seed=seed, overwrite_output_dir=True)
        FederatedTrainer(model, args, clients).train()
        return torch.cat([v.double().flatten() for v in model.state_dict().values()])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("kind", ["dense", "fedpara", "lowrank"])
def test_bytes_are_the_payloads_lengths(tmp_path, kind):
    model = mlp(norm=False) if kind == "dense" else adapted(mlp(norm=False), parameterization=kind)
    trainer = FederatedTrainer(model, arguments(tmp_path), partition(toy(), "iid", 6))
    history = trainer.train()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = communicated_state(model)
    payload = Format(schema_of(state)).encode(state, round=2)
    assert payload.size.tensor_bytes == 4 * parameters
    for report in history:
        assert report.uplink_bytes == report.downlink_bytes == 3 * len(payload.data)
        assert report.header_bytes == 6 * payload.size.header_bytes
        sent = {t.client for t in trainer.ledger.transfers(report.round, "uplink")}
        assert sent == set(report.cohort)
    assert history.total_bytes == trainer.ledger.total_bytes() == 18 * len(payload.data)


def test_history_and_evaluation(tmp_path):
    train, test = toy(), toy(40, seed=0)
    model = adapted(mlp())
    args = arguments(tmp_path, num_rounds=5, eval_every=2, save_every=2, learning_rate=0.2)
    clients = dict(zip("abcdef", partition(train, "iid", 6), strict=True))
    trainer = FederatedTrainer(model, args, clients, test, compute_metrics=accuracy)
    history = trainer.train()
    assert trainer.population.names == list("abcdef")
    assert [r.round for r in history] == [1, 2, 3, 4, 5]
    assert [round for round, _, _ in history.curve("eval_accuracy")] == [2, 4, 5]
    assert history[-1].metrics == trainer.evaluate()  # the global model is left in place
    model.eval()
    right = (model(test.tensors[0]).argmax(1) == test.tensors[1]).double().mean()
    assert history[-1].metrics["eval_accuracy"] == pytest.approx(float(right))
    assert history[-1].train_loss < history[0].train_loss
    reached = history[-1].metrics["eval_accuracy"]
    assert history.bytes_to_target("eval_accuracy", reached) <= history.total_bytes
    assert history.rounds_to_target("eval_accuracy", 0) == 2
    assert history.bytes_to_target("eval_accuracy", 1.1) is None
    assert History.load(tmp_path / "history.json") == history
    saved = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert saved == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    again = PeftModel.from_pretrained(mlp(seed=5), tmp_path / "checkpoint-5").eval()
    assert torch.equal(again(test.tensors[0]), model(test.tensors[0]))


def test_a_frozen_base_is_not_changed_by_its_clients(tmp_path):
    """Batch-norm statistics of a frozen base start afresh for each client and end as they were."""
    model = adapted(mlp(), base_weight="frozen")
    before = {k: v.clone() for k, v in model.state_dict().items() if "fedpara_" not in k}
    FederatedTrainer(model, arguments(tmp_path), partition(toy(), "iid", 3)).train()
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_datasets_collators_losses_callbacks_and_trackers(tmp_path):
    x, y = toy().tensors
    rows = Dataset.from_dict({"inputs": x.tolist(), "label": y.tolist()})
    seen = []

    class Watch(FederatedCallback):
        def on_round_end(self, server, report):
            seen.append((server.round, report.round))

    plain = mlp(norm=False)
    arrow = FederatedTrainer(
        plain, arguments(tmp_path, report_to="tensorboard"), partition(rows, "iid", 4), rows,
        callbacks=[Watch()], compute_metrics=accuracy,
    )  # fmt: skip
    history = arrow.train()
    assert seen == [(1, 1), (2, 2), (3, 3)]
    assert list(tmp_path.rglob("events.out.tfevents*"))

    def collate(items):
        return {
            "x": torch.tensor([i["inputs"] for i in items]),
            "y": torch.tensor([i["label"] for i in items]),
        }

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    custom = mlp(norm=False)
    FederatedTrainer(
        custom, arguments(tmp_path), partition(rows, "iid", 4), rows, collate, compute_loss=loss
    ).train()
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), custom.parameters(), strict=True)
    )
    assert history[-1].metrics["eval_loss"] > 0


def test_saving_a_plain_model(tmp_path):
    model = mlp()
    trainer = FederatedTrainer(model, arguments(tmp_path, clients_per_round=1), [toy()])
    trainer.save_model()
    from safetensors.torch import load_model

    other = mlp(seed=1)
    load_model(other, tmp_path / "model.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"client_fraction": 0.5}, "not both"),
        ({"clients_per_round": None, "client_fraction": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"clients_per_round": 0}, r"clients_per_round must be in \[1, ∞\), got 0"),
        ({"num_local_epochs": 0}, "num_local_epochs must be in"),
        ({"learning_rate_decay": 0.0}, "1 keeps the learning rate"),
        ({"learning_rate": -1.0}, r"learning_rate must be in \(0, ∞\), got -1.0"),
        ({"max_grad_norm": 0.0}, "None does not clip"),
    ],
)
def test_bad_arguments(tmp_path, changes, says):
    with pytest.raises(ArgumentsError, match=says):
        arguments(tmp_path, **changes)


def test_bad_clients_and_models(tmp_path):
    data = toy()
    none = TensorDataset(torch.zeros(0, 16), torch.zeros(0, dtype=torch.long))
    args = arguments(tmp_path, clients_per_round=1)
    with pytest.raises(ClientDataError, match=r"1 clients have no data, first \['b'\]"):
        FederatedTrainer(mlp(), args, {"a": data, "b": none})
    with pytest.raises(ClientDataError, match="there are no clients"):
        FederatedTrainer(mlp(), args, [])
    with pytest.raises(ClientDataError, match=r"partition\(…\)"):
        FederatedTrainer(mlp(), args, data)
    with pytest.raises(ArgumentsError, match="only 2 clients"):
        FederatedTrainer(mlp(), arguments(tmp_path), [data, data])
    with pytest.raises(ArgumentsError, match="is_trainable=True"):
        FederatedTrainer(mlp().requires_grad_(False), args, [data])
    with pytest.raises(ArgumentsError, match="give eval_dataset"):
        FederatedTrainer(mlp(), args, [data]).evaluate()


def test_a_diverging_client_leaves_the_last_good_model(tmp_path):
    model = adapted(mlp())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    args = arguments(tmp_path, learning_rate=1e30, clients_per_round=1, quorum=1.0)
    with pytest.raises(RoundError, match=r"client 0: .*diverged in round 1.*lower learning_rate"):
        FederatedTrainer(model, args, [toy()]).train()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_a_transformers_model_with_its_own_loss(tmp_path, base_weight):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=32,
        num_attention_heads=2,
    )  # fmt: skip
    rows = [{"input_ids": [(i + j) % 31 for j in range(9)]} for i in range(40)]
    data = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    model = get_peft_model(
        LlamaForCausalLM(config),
        FedParaConfig(
            r=4, target_modules="all-linear", base_weight=base_weight, task_type="CAUSAL_LM"
        ),
    )
    args = arguments(tmp_path, num_rounds=6, learning_rate=0.5, max_grad_norm=1.0)
    trainer = FederatedTrainer(model, args, partition(data, "iid", 4), data)
    history = trainer.train()
    assert history[-1].metrics["eval_loss"] < history[0].metrics["eval_loss"]
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_cohort_sizes():
    assert FederatedArguments("x").cohort_size(7) == 7
    assert FederatedArguments("x", client_fraction=0.16).cohort_size(100) == 16
    assert FederatedArguments("x", client_fraction=0.01).cohort_size(10) == 1
    draws = [sample_cohort([1] * 10, 3, 0, t) for t in range(200)]
    assert all(sorted(set(d)) == d for d in draws)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=10)
    assert counts.min() > 30
    assert json.dumps(draws[0])


def test_targets_are_reached_from_the_better_side():
    reports = [
        RoundReport(n, (0,), None, {"eval_loss": 4.0 - n, "bleu": n}, 10, 5, 1, 0.5)
        for n in (1, 2, 3)
    ]
    history = History(tuple(reports))
    assert history.rounds_to_target("eval_loss", 2.0) == 2
    assert history.bytes_to_target("eval_loss", 2.0) == 30
    assert history.rounds_to_target("eval_loss", 0.5) is None
    assert history.rounds_to_target("eval_loss", 2.0, higher_is_better=True) == 1
    assert history.rounds_to_target("bleu", 2) == 2
    assert history.bytes_to_target("bleu", 2, higher_is_better=False) == 15


@pytest.mark.parametrize("overflow", [False, True])
def test_fp16_loses_no_step(tmp_path, overflow):
    """The scale shrinks until gradients fit, and the same batch is tried again."""
    clients = partition(toy(), "iid", 3)
    args = arguments(tmp_path, num_rounds=1, num_local_epochs=1)

    def loss(model, batch):
        factor = 1e3 if overflow else 1.0
        return factor * nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    def trained(precision):
        model = mlp(norm=False)
        args.learning_rate = 0.1 if not overflow else 1e-4
        args.mixed_precision = precision
        local = LocalTrainer(model, args, Accelerator(cpu=True), FedAvg(), loss)
        start = Broadcast({k: v.clone() for k, v in communicated_state(model).items()})
        trained = local.train(1, clients[1], 0, start)
        return trained.update, local.gradients.loss_scale

    wide, _ = trained("no")
    narrow, scale = trained("fp16")
    assert (scale < 2**16) == overflow
    for name, value in narrow.update.items():
        assert value.dtype == torch.float32
        error = (value - wide.update[name]).norm() / wide.update[name].norm()
        assert error < 0.02, name


def test_every_trainer_of_a_process_has_its_own_precision(tmp_path):
    seen = []

    def loss(model, batch):
        logits = model(batch[0])
        seen.append(logits.dtype)
        return nn.functional.cross_entropy(logits.float(), batch[1])

    trainers = {}
    for name in ("no", "bf16", "fp16", None):
        model = adapted(mlp(norm=False))
        args = arguments(
            tmp_path / str(name), mixed_precision=name, num_rounds=6, learning_rate=0.3
        )
        clients = partition(toy(), "iid", 3)
        trainers[name] = FederatedTrainer(model, args, clients, compute_loss=loss)
    wanted = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name, trainer in trainers.items():
        seen.clear()
        history = trainer.train()
        assert set(seen) == {wanted.get(name, torch.float32)}
        assert history[-1].train_loss < history[0].train_loss
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_drop_outs_and_weighted_sampling(tmp_path):
    clients = partition(toy(), "quantity", 5, concentration=1.0)
    args = arguments(
        tmp_path, num_rounds=30, drop_out_probability=0.6, client_sampling="weighted",
        clients_per_round=2,
    )  # fmt: skip
    model = mlp(norm=False)
    trainer = FederatedTrainer(model, args, clients)
    history = trainer.train()
    dropped = sum(len(r.dropped) for r in history) / 60
    assert 0.4 < dropped < 0.8
    per_client = history[0].downlink_bytes // 2
    for report in history:
        assert report.downlink_bytes == 2 * per_client  # they were sent the model all the same
        assert report.uplink_bytes == (2 - len(report.dropped)) * per_client
        assert (report.train_loss is None) == (len(report.dropped) == 2)
    assert any(report.train_loss is None for report in history)
    drawn = torch.bincount(torch.tensor([c for r in history for c in r.cohort]), minlength=5)
    sizes = torch.tensor([len(c) for c in clients])
    assert drawn[sizes.argmax()] > drawn[sizes.argmin()]


def test_a_round_without_a_report_changes_nothing(tmp_path):
    model = mlp(norm=False)
    args = arguments(tmp_path, num_rounds=1, drop_out_probability=0.999, clients_per_round=1)
    FederatedTrainer(model, args, partition(toy(), "iid", 3)).train()
    assert all(
        torch.equal(v, mlp(norm=False).state_dict()[k]) for k, v in model.state_dict().items()
    )


def test_weighted_sampling_averages_alike(tmp_path):
    clients = partition(toy(), "quantity", 3, concentration=1.0)
    args = arguments(tmp_path, num_rounds=1, client_sampling="weighted", clients_per_round=3)
    model = mlp(norm=False)
    FederatedTrainer(model, args, clients).train()
    expected = None
    for i in range(3):
        alone = mlp(norm=False)
        slow_turn(alone, args, clients[i], 0, i)
        flat = torch.cat([p.detach().flatten() for p in alone.parameters()]).double() / 3
        expected = flat if expected is None else expected + flat
    found = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_clients_are_not_copied_and_may_be_made_when_asked_for(tmp_path):
    whole = toy()

    class Lazy(collections.abc.Sequence):
        made = 0

        def __len__(self):
            return 6

        def __getitem__(self, i):
            if i >= 6:
                raise IndexError(i)
            self.made += 1
            return torch.utils.data.Subset(whole, range(20 * i, 20 * i + 20))

    lazy = Lazy()
    trainer = FederatedTrainer(mlp(norm=False), arguments(tmp_path), lazy)
    assert trainer.population.train is lazy
    before = lazy.made
    trainer.train()
    assert lazy.made - before == 9 + 3  # three clients a round, and three to know the data by
