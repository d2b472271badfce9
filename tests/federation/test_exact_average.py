"""The global weight is the mean of the clients' weights, while all factors train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    ArgumentsError,
    ConversionError,
    FedAdam,
    FederatedArguments,
    FederatedTrainer,
    FedParaConfig,
    FedProx,
    save_as_lora,
)
from fedpara_peft.federation.server.averaging import ExactAverage
from fedpara_peft.federation.state import ServerState, Terms
from fedpara_peft.tuner.scope import remainders


class Net(nn.Module):
    """A layer of every kind that has a weight to factorize."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.lstm(x)[0][:, -1])


def net(base_weight: str = "frozen", r: int = 2, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    start = {"init_weights": False} if base_weight == "frozen" else {}
    config = FedParaConfig(
        r=r, base_weight=base_weight, target_modules="all-supported", **start, **options
    )
    return get_peft_model(Net().double(), config).double()


def clients(count: int = 5) -> list[TensorDataset]:
    rng = torch.Generator().manual_seed(1)
    return [
        TensorDataset(
            torch.randint(11, (4 + i, 7), generator=rng), torch.randint(5, (4 + i,), generator=rng)
        )
        for i in range(count)
    ]


def arguments(folder: Any, **changed: Any) -> FederatedArguments:
    settings: dict[str, Any] = {
        "num_rounds": 4, "clients_per_round": 3, "num_local_epochs": 2, "per_client_batch_size": 2,
        "learning_rate": 0.3, "exact_average": True, "disable_tqdm": True, "eval_every": 0,
    }  # fmt: skip
    return FederatedArguments(str(folder), **{**settings, **changed})


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What the plain model has once everything is merged."""
    merged = copy.deepcopy(model).merge_and_unload()
    return {name: p.detach() for name, p in merged.named_parameters()}


def dense_mean(model: PeftModel, folder: Any, before: dict[str, Tensor], **changed: Any) -> Any:
    """A round by hand: every client's model trained alone from the same start, and merged."""
    found = []
    for data in clients():
        alone = copy.deepcopy(model)
        args = arguments(
            folder / f"alone-{len(data)}", num_rounds=1, clients_per_round=None,
            exact_average=False, **changed,
        )  # fmt: skip
        FederatedTrainer(alone, args, [data]).train()
        found.append((len(data), weights(alone)))
    total = sum(size for size, _ in found)
    return {n: sum(size / total * w[n] for size, w in found) for n in before}


@pytest.mark.parametrize("base_weight", ["frozen", "replaced", "seeded"])
def test_the_global_weights_are_the_mean_of_the_clients_weights(
    base_weight: str, tmp_path: Any
) -> None:
    model = net(base_weight)
    before = weights(model)
    whole = {"per_client_batch_size": 64, "num_local_epochs": 3}  # no order of batches to differ in
    wanted = dense_mean(model, tmp_path, before, **whole)
    args = arguments(tmp_path / "run", num_rounds=1, clients_per_round=None, **whole)
    args.report_averaging_bias = True
    history = FederatedTrainer(model, args, clients()).train()
    found = weights(model)
    moved = max(float((wanted[n] - before[n]).abs().max()) for n in before)
    assert moved > 1e-2
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=1e-13, rtol=0)
    assert history[0].averaging_bias < 1e-12


def test_without_it_the_mean_is_another(tmp_path: Any) -> None:
    args = arguments(tmp_path, exact_average=False, report_averaging_bias=True)
    history = FederatedTrainer(net(), args, clients()).train()
    assert min(report.averaging_bias for report in history) > 1e-4


def test_the_bias_stays_nothing_over_rounds_in_single_precision(tmp_path: Any) -> None:
    # At a rate of 0.3 a weight may grow a hundredfold and stop: its roundings then outweigh change.
    args = arguments(tmp_path, num_rounds=12, learning_rate=0.1, report_averaging_bias=True)
    history = FederatedTrainer(net().float(), args, clients()).train()
    assert max(report.averaging_bias for report in history) <= 1e-6


def test_a_saved_adapter_has_its_remainder(tmp_path: Any) -> None:
    model = net()
    FederatedTrainer(model, arguments(tmp_path / "run"), clients()).train()
    rests = remainders(model)
    assert all(bool(rest.any()) for rest in rests.values())
    model.save_pretrained(tmp_path / "saved")
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net().double(), tmp_path / "saved")
    assert remainders(again).keys() == rests.keys()
    ids = clients()[0].tensors[0]
    wanted = model.eval()(ids)
    torch.testing.assert_close(again.eval()(ids), wanted, atol=1e-6, rtol=0)
    with again.disable_adapter():
        assert not torch.allclose(again(ids), wanted, atol=1e-3)
    with pytest.raises(ConversionError, match="its remainder is dense"):
        save_as_lora(again, tmp_path / "lora")
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged.eval()(ids), wanted, atol=1e-12, rtol=0)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(model(ids), wanted, atol=1e-12, rtol=0)


def follow(
    exact: ExactAverage, server: ServerState, own: dict[str, Tensor], client: int
) -> tuple[dict[str, Tensor], int]:
    """A client's remainders after the bytes that it is sent, and how many these are."""
    found = exact.catch_up(server, client)
    if not found.form.schema:
        return own, 0
    data = found.encode(server).data
    assert len(data) == len(found.form.size)
    read = found.decode(data, server.round)
    if isinstance(read, list):
        for terms in read:
            own = {**own, **exact.moved(own, terms)}
        return own, len(data)
    return read, len(data)


def test_clients_make_the_servers_remainders_from_what_they_are_sent(
    tmp_path: Any, monkeypatch: Any
) -> None:
    """Also those who missed rounds; and the ledger counts these very bytes."""
    counted: dict[tuple[int, int], int] = {}
    own: dict[int, dict[str, Tensor]] = {}
    kinds = set()
    after = ExactAverage.after

    def watched(self: ExactAverage, before: ServerState, *rest: Any) -> ServerState:
        zero = {n: torch.zeros_like(before.params[n]) for n in before.remainders.names}
        for client in rest[2]:
            given = self.catch_up(before, client)
            kinds.add(given.rounds if given.rounds is None else len(given.rounds))
            mine, size = follow(self, before, own.get(client, zero), client)
            for name, rest_ in mine.items():
                assert torch.equal(rest_, before.params[name]), (before.round, client)
            own[client] = mine
            counted[before.round + 1, client] = size
        return after(self, before, *rest)

    monkeypatch.setattr(ExactAverage, "after", watched)

    def wide() -> PeftModel:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(120, 160), nn.Tanh(), nn.Linear(160, 5))
        config = FedParaConfig(r=2, target_modules=["0"], init_weights=False)
        return get_peft_model(plain, config)

    rng = torch.Generator().manual_seed(1)
    data = [
        TensorDataset(torch.randn(6, 120, generator=rng), torch.randint(5, (6,), generator=rng))
        for _ in range(9)
    ]
    args = arguments(tmp_path, num_rounds=14, clients_per_round=2)
    trainer = FederatedTrainer(wide(), args, data)
    trainer.train()
    plainly = arguments(tmp_path / "plain", num_rounds=14, clients_per_round=2, exact_average=False)
    other = FederatedTrainer(wide(), plainly, data)
    other.train()
    extra = {
        (t.round, t.client): t.total_bytes - u.total_bytes
        for t, u in zip(trainer.ledger.transfers(), other.ledger.transfers(), strict=True)
        if t.direction == "downlink"
    }
    assert extra == counted
    assert {None, 0, 1} < kinds, "R itself; nothing; one round; several"


def test_resumed_it_ends_in_the_same_bits(tmp_path: Any) -> None:
    def run(folder: Any, rounds: int, resume: bool = False) -> Any:
        model = net().float()
        args = arguments(folder, num_rounds=rounds, save_every=1)
        trainer = FederatedTrainer(model, args, clients())
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    whole, straight = run(tmp_path / "a", 5)
    run(tmp_path / "b", 2)
    parted, resumed = run(tmp_path / "b", 5, resume=True)
    for (name, one), other in zip(
        whole.state_dict().items(), parted.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert list(straight.ledger.transfers()) == list(resumed.ledger.transfers())


def test_with_ranks_of_their_own_the_weights_mean_is_that_of_all(tmp_path: Any) -> None:
    model = net(r=3)
    args = arguments(tmp_path, num_rounds=1, clients_per_round=None)
    found: list[Any] = []
    take = ExactAverage.after

    def kept(self: ExactAverage, before: Any, ended: Any, mean: Any, taken: Any, w: Any) -> Any:
        result = take(self, before, ended, mean, taken, w)
        found.append((self, before, result, taken, w))
        return result

    ExactAverage.after = kept  # type: ignore[method-assign]
    try:
        FederatedTrainer(model, args, clients(), client_ranks=[1, 2, 3, 1, 2]).train()
    finally:
        ExactAverage.after = take  # type: ignore[method-assign]
    exact, before, ended, taken, w = found[0]
    shares = tuple(x / sum(w) for x in w)
    zero = {n: torch.zeros_like(before.params[n]) for n in before.remainders.names}
    wanted = exact.moved(zero, Terms(0, shares, tuple(taken.values())))
    middle = exact.moved(zero, Terms(0, (1.0,), (exact.own_factors(ended.params),)))
    for name, mean in wanted.items():
        here = middle[name] + ended.params[name] - before.params[name]
        torch.testing.assert_close(here, mean, atol=1e-13, rtol=0)


@pytest.mark.parametrize("strategy", [FedProx(0.1), FedAdam(server_learning_rate=0.01)])
def test_other_server_steps_start_from_that_mean(strategy: Any, tmp_path: Any) -> None:
    args = arguments(tmp_path, report_averaging_bias=True, uplink_codec="int8")
    history = FederatedTrainer(net(), args, clients(), strategy=strategy).train()
    assert max(report.averaging_bias for report in history) < 1e-11


@pytest.mark.parametrize(
    ("options", "config", "found"),
    [
        ({"aggregation": "median"}, {}, "exact_average cannot have aggregation='median'"),
        ({"factor_schedule": "one_block"}, {}, "exact_average cannot have factor_schedule"),
        (
            {"dp_noise_multiplier": 1.0, "clip_update_norm": 1.0}, {},
            "exact_average cannot have dp_noise_multiplier",
        ),
        ({}, {"parameterization": "pfedpara"}, "whose factors all train and are all sent"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_with_is_refused(
    options: Any, config: Any, found: str, tmp_path: Any
) -> None:
    with pytest.raises(ArgumentsError, match=found):
        FederatedTrainer(net(**config), arguments(tmp_path, **options), clients())


def test_a_model_without_adapters_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ArgumentsError, match="and the model has none"):
        FederatedTrainer(Net(), arguments(tmp_path), clients())
