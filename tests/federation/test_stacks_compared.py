"""What a stack would train wrongly is found before it counts, whenever it begins to."""

import copy

import pytest
import torch
from peft import get_peft_model
from tests.federation.test_batched import stacked  # noqa: F401
from tests.federation.test_together import Frozen, alike, both, pairs
from tests.federation.test_trainer import arguments
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fedpara_peft import ArgumentsError, FederatedTrainer, FedParaConfig

CLIENTS, LENGTH = 8, 8


class Mixer(nn.Module):
    """Attention that gets everybody's mask beside its clients' rows."""

    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.temperature = nn.Parameter(torch.ones(width))

    def forward(self, x, mask):
        scores = (self.query(x) * self.temperature) @ self.key(x).transpose(-1, -2) + mask
        return scores.softmax(-1) @ self.value(x)


class Masked(nn.Module):
    def __init__(self, length=LENGTH, width=6):
        super().__init__()
        self.words = nn.Embedding(11, width).requires_grad_(False)
        self.mixer, self.head = Mixer(width), nn.Linear(width, 3)
        self.register_buffer("mask", torch.full((length, length), -1e9).triu(1), persistent=False)

    def forward(self, x):
        return self.head(self.mixer(self.words(x), self.mask).mean(1))


def words(rows, length=LENGTH):
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(CLIENTS):
        x = torch.randint(0, 11, (rows, length), generator=g)
        found.append(TensorDataset(x, x[:, 0] % 3))
    return found


@pytest.mark.parametrize(
    ("rows", "stacks"), [(8, True), (9, False)], ids=["8 rows", "8 rows, then one"]
)
def test_a_mask_as_long_as_there_are_rows_at_last(tmp_path, caplog, rows, stacks):
    """With a row of each client at the end the mask, of as many, could be theirs."""
    one, other = both(
        tmp_path, Masked, words(rows), "auto", per_client_batch_size=8, learning_rate=0.5,
        num_local_epochs=4,
    )  # fmt: skip
    assert ("cannot be stacked: " in caplog.text) is not stacks
    alike(one, other)


class Pulled:
    """To where the model began, as one who does not know FedProx writes it."""

    def __init__(self):
        self.began = None

    def __call__(self, model, batch):
        if self.began is None:
            self.began = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss + sum((p - self.began[n]).square().sum() for n, p in model.named_parameters())


def test_a_penalty_on_the_weights_counts_or_is_refused(tmp_path, stacked):  # noqa: F811
    """It pulls to the start, so its gradient is nothing in the first step."""
    with pytest.raises(ArgumentsError, match="a trained parameter outside of the module"):
        both(tmp_path, Frozen, pairs(), more={"compute_loss": Pulled()})
    one, other = both(tmp_path / "auto", Frozen, pairs(), "auto", more={"compute_loss": Pulled()})
    alike(one, other)
    del stacked[:]
    whole = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))  # noqa: E731
    one, other = both(tmp_path / "whole", whole, pairs(), more={"compute_loss": Pulled()})
    assert stacked == [8, 8]
    alike(one, other)


class LooksAtARowThatMoved(Frozen):
    """At its batch's first, from where that was in the beginning: in the first step at nothing."""

    def __init__(self):
        super().__init__()
        self.began = copy.deepcopy(self.last).requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        found = self.last(x)
        return found + 30 * (found - self.began(x))[:1].square()


@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_wrong_from_the_second_step_on(tmp_path, caplog, steps):
    """In the first round or, where that has one step, in the second."""
    one, other = both(tmp_path, LooksAtARowThatMoved, pairs(), "auto", per_client_max_steps=steps)
    alike(one, other)
    assert "gradients of last" in caplog.text


def test_sizes_and_dtypes_of_trained_parameters_may_be_asked_for(tmp_path, stacked):  # noqa: F811
    class Asks(Frozen):
        def forward(self, x):
            assert self.last.weight.numel() == 18
            return super().forward(x.to(self.last.weight.dtype)) / self.last.weight.shape[0]

    one, other = both(tmp_path, Asks, pairs())
    assert stacked == [8, 8]
    alike(one, other)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("client", [0, 3])
def test_a_label_that_is_none_is_of_its_client(tmp_path, caplog, stacked, frozen, client):  # noqa: F811
    def build():
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        model[0].requires_grad_(not frozen)
        return model

    clients = pairs()
    clients[client].tensors[1][0] = 7
    histories = []
    for engine in ("sequential", "batched", "auto"):
        torch.manual_seed(0)
        args = arguments(
            tmp_path / engine, engine=engine, num_rounds=2, clients_per_round=8,
            on_client_error="refuse",
        )  # fmt: skip
        history = FederatedTrainer(build().double(), args, clients).train()
        assert [r.refused for r in history] == [((client, "failed"),)] * 2
        histories.append([r.train_loss for r in history])
    assert histories[1:] == [pytest.approx(histories[0])] * 2
    assert "cannot be stacked" not in caplog.text


def test_a_scalar_is_clipped_with_the_rest(tmp_path, stacked):  # noqa: F811
    class Scaled(Frozen):
        def __init__(self):
            super().__init__()
            self.scale = Scale()

        def forward(self, x):
            return self.scale(super().forward(x))

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.tensor(3.0))

        def forward(self, x):
            return x * self.by

    one, other = both(tmp_path, Scaled, pairs(), max_grad_norm=0.1)
    assert stacked == [8, 8]
    alike(one, other)


@pytest.mark.parametrize("frozen", [True, False])
def test_attention_that_returns_no_weights(tmp_path, stacked, frozen):  # noqa: F811
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(11, 6).requires_grad_(not frozen)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = self.words(x)
            found, weights = self.attention(x, x, x, need_weights=False)
            assert weights is None
            return self.head(found.mean(1))

    one, other = both(tmp_path, Attends, words(5))
    assert stacked == [8, 8]
    alike(one, other)


def test_with_an_exact_average(tmp_path, stacked):  # noqa: F811
    def build():
        config = FedParaConfig(r=2, target_modules=["0", "2"], init_weights=False)
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        return get_peft_model(net, config)

    one, other = both(tmp_path, build, pairs(), exact_average=True)
    assert stacked == [8, 8]
    alike(one, other)


def test_batches_in_which_no_label_counts_prove_nothing(tmp_path, stacked):  # noqa: F811
    """A model that cannot be stacked is found by the first clients that learn something."""

    class LooksAtTheFirst(Frozen):
        def forward(self, x):
            return super().forward(x - x[:1])

    clients = pairs()
    for client in (0, 7):
        clients[client].tensors[1][:] = -100
    with pytest.raises(ArgumentsError, match="differ by"):
        both(tmp_path, LooksAtTheFirst, clients, on_client_error="refuse")
