"""What a client weighs in the mean: by its rows, by its tokens, or as all others."""

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    ArgumentsError,
    FederatedArguments,
    FederatedTrainer,
    FedParaConfig,
    Scaffold,
)

#: Rows, and of how many of a row's eight tokens the label counts: far from any proportion.
CLIENTS = {"ann": (2, 8), "bob": (5, 1), "cai": (3, 4), "dan": (1, 3)}
RATE = 0.5


class Words(nn.Module):
    """The next token from this one."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 16)
        self.head = nn.Linear(16, 7)

    def forward(self, ids):
        return self.head(self.table(ids))


def words(adapter=True):
    torch.manual_seed(0)
    model = Words().double()
    if not adapter:
        return model
    config = FedParaConfig(r=1, base_weight="replaced", target_modules="all-supported")
    return get_peft_model(model, config).double()


def data():
    """By client: ids and labels, of which -100 do not count."""
    rng = torch.Generator().manual_seed(1)
    found = {}
    for name, (rows, counting) in CLIENTS.items():
        ids, labels = (torch.randint(7, (rows, 8), generator=rng) for _ in range(2))
        labels[:, counting:] = -100
        found[name] = TensorDataset(ids, labels)
    return found


def arguments(folder, **more):
    settings = {
        "num_rounds": 1, "per_client_batch_size": 64, "learning_rate": RATE, "disable_tqdm": True,
        "on_client_error": "raise", "client_weighting": "tokens",
    }  # fmt: skip
    return FederatedArguments(str(folder), **{**settings, **more})


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def central_step(model, weigh):
    """A step of plain gradient descent, by hand, on the union: rows' losses weighed by ``weigh``.

    Args:
        model: in place.
        weigh: from a client's numbers of rows and of tokens that count to what a token weighs.
    """
    total = torch.zeros((), dtype=torch.float64)
    whole = 0.0
    for set_ in data().values():
        ids, labels = set_.tensors
        scores = model(ids)
        rows, count = len(ids), int((labels >= 0).sum())
        each = weigh(rows, count)
        for row, targets in zip(scores, labels, strict=True):
            for score, target in zip(row, targets.tolist(), strict=True):
                if target >= 0:
                    total = total - each * (score[target] - score.exp().sum().log())
                    whole += each
    (total / whole).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= RATE * p.grad
    return trained(model), float(total.detach() / whole)


def counting_loss(model, batch):
    """A loss of one's own, which returns of how many tokens it is the mean."""
    ids, labels = batch
    scores = model(ids).log_softmax(-1)
    counts = labels >= 0
    picked = scores.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -picked[counts].mean(), scores, counts.sum()


@pytest.mark.parametrize("adapter", [True, False], ids=["FedPara", "plain"])
@pytest.mark.parametrize("loss", [None, counting_loss], ids=["labels of -100", "a third value"])
def test_clients_weighed_by_tokens_make_the_step_on_everybodys_tokens(tmp_path, adapter, loss):
    """One local step each: the mean over the union's tokens, in float64, whatever their rows."""
    model = words(adapter)
    history = FederatedTrainer(model, arguments(tmp_path), data(), compute_loss=loss).train()
    expected, mean = central_step(words(adapter), lambda rows, count: 1.0)
    for name, tensor in trained(model).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-14, rtol=1e-12)
    assert history[0].train_loss == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize(
    ("weighting", "weigh"),
    [
        ("examples", lambda rows, count: rows / count),
        ("uniform", lambda rows, count: 1 / count),
    ],
)
def test_by_rows_or_alike_it_is_another_step(tmp_path, weighting, weigh):
    model = words()
    args = arguments(tmp_path, client_weighting=weighting)
    FederatedTrainer(model, args, data()).train()
    expected, _ = central_step(words(), weigh)
    by_tokens, _ = central_step(words(), lambda rows, count: 1.0)
    for name, tensor in trained(model).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-14, rtol=1e-12)
    apart = max(float((by_tokens[n] - t).abs().max()) for n, t in expected.items())
    assert apart > 1e-3


def test_stacked_clients_weigh_by_their_tokens_too(tmp_path):
    """Of equally many rows, and unequally many tokens."""
    clients = {
        name: TensorDataset(*(column[:1] for column in own.tensors)) for name, own in data().items()
    }
    model, alone = words(), words()
    FederatedTrainer(model, arguments(tmp_path / "a", engine="batched"), clients).train()
    FederatedTrainer(alone, arguments(tmp_path / "b", engine="sequential"), clients).train()
    for name, tensor in trained(model).items():
        torch.testing.assert_close(tensor, trained(alone)[name], atol=1e-12, rtol=1e-10)


def test_the_exact_average_is_of_weights_weighed_by_tokens(tmp_path):
    model = words()
    args = arguments(tmp_path, exact_average=True, report_averaging_bias=True, num_local_epochs=3)
    assert FederatedTrainer(model, args, data()).train()[0].averaging_bias < 1e-12


def test_tokens_are_those_of_the_round(tmp_path):
    """Two epochs see each twice; a client of few steps weighs what it has seen."""
    seen = {}
    args = arguments(tmp_path, num_local_epochs=2)
    trainer = FederatedTrainer(words(), args, data())
    take_in = trainer._run._rounds.take_in

    def watched(opened, update):
        seen[trainer.population.names[update.client]] = trainer._run._rounds.weight(update)
        take_in(opened, update)

    trainer._run._rounds.take_in = watched
    trainer.train()
    assert seen == {name: 2.0 * rows * counting for name, (rows, counting) in CLIENTS.items()}


def test_a_late_clients_tokens_are_kept_in_the_checkpoint(tmp_path):
    """Resumed, it weighs what it would have."""

    def run(folder, rounds, resume=False):
        model = words()
        args = arguments(folder, num_rounds=rounds, buffer_size=2, save_every=1)
        seconds = {"ann": 1.0, "bob": 5.2, "cai": 1.7, "dan": 3.1}
        trainer = FederatedTrainer(model, args, data(), client_seconds=seconds)
        trainer.train(resume_from_checkpoint=resume)
        return trained(model)

    whole = run(tmp_path / "a", 4)
    run(tmp_path / "b", 2)
    parted = run(tmp_path / "b", 4, resume=True)
    assert all(torch.equal(whole[name], tensor) for name, tensor in parted.items())


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"aggregation": "median"}, "aggregation='median': it does not weigh"),
        ({"client_sampling": "weighted"}, "client_sampling='weighted': who is drawn"),
        ({"dp_noise_multiplier": 1.0, "clip_update_norm": 1.0}, "dp_noise_multiplier"),
        ({"secure_aggregation": True, "secure_clip": 1.0}, "secure_aggregation: a weight"),
        (
            {"client_weighting": "uniform", "secure_max_examples": 8},
            "client_weighting='uniform' cannot have secure_max_examples=8",
        ),
        ({"client_weighting": "rows"}, "client_weighting must be one of"),
    ],
)
def test_what_it_cannot_be_with_is_refused(tmp_path, more, found):
    with pytest.raises(ArgumentsError, match=found):
        arguments(tmp_path, **more)


def test_a_strategy_of_clients_that_weigh_alike_is_refused(tmp_path):
    with pytest.raises(ArgumentsError, match=r"Scaffold cannot have client_weighting='tokens'"):
        FederatedTrainer(words(), arguments(tmp_path), data(), strategy=Scaffold())


def test_a_local_trainer_that_does_not_say_its_tokens_is_refused(tmp_path):
    def make(model, dataset, client, round):
        told = SimpleNamespace(training_loss=1.0, global_step=1)
        return SimpleNamespace(train=lambda: told)

    args = FederatedArguments(
        str(tmp_path), num_rounds=1, client_weighting="tokens", disable_tqdm=True,
        on_client_error="raise",
    )  # fmt: skip
    trainer = FederatedTrainer(words(), args, data(), local_trainer=make)
    with pytest.raises(ArgumentsError, match="does not say on how many tokens"):
        trainer.train()
