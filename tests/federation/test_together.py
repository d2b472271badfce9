"""Clients' rows in one batch are clients one after the other, for models with much in common."""

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tests.federation.test_batched import stacked  # noqa: F401
from tests.federation.test_trainer import arguments
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fedpara_peft import ArgumentsError, FederatedTrainer, FedParaConfig, Scaffold
from fedpara_peft.federation.data.loss import Loss, read_loss

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROWS, LENGTH, WORDS = 5, 8, 40


def llama():
    config = transformers.LlamaConfig(**SIZES, vocab_size=WORDS, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": WORDS}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        **sizes, **none, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(**SIZES, **NO_DROPOUT, vocab_size=WORDS, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def t5():
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=WORDS, dropout_rate=0,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit():
    config = transformers.ViTConfig(**SIZES, **NO_DROPOUT, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


class Reader(nn.Module):
    """A recurrent net over tokens, with a state to begin with."""

    def __init__(self, kind=nn.LSTM, batch_first=True):
        super().__init__()
        self.batch_first = batch_first
        self.words = nn.Embedding(WORDS, 10)
        self.recurrent = kind(10, 12, num_layers=2, batch_first=batch_first)
        self.head = nn.Linear(12, WORDS)

    def forward(self, input_ids):
        words = self.words(input_ids)
        if not self.batch_first:
            words = words.transpose(0, 1)
        first = torch.ones(2, len(input_ids), 12, dtype=words.dtype)
        state = (first, first) if isinstance(self._kind(), nn.LSTM) else first
        found, _ = self.recurrent(words, state)
        return self.head(found if self.batch_first else found.transpose(0, 1))

    def _kind(self):
        return getattr(self.recurrent, "base_layer", self.recurrent)


def texts(clients=6, rows=ROWS, length=LENGTH, labels=None, padded=True):
    """Rows as a tokenizer makes them; of several lengths, and as padded to one."""
    g = torch.Generator().manual_seed(1)
    found = []
    for _ in range(clients):
        own = []
        for _ in range(rows):
            ids = torch.randint(2, WORDS, (length,), generator=g)
            whole = torch.arange(length) < torch.randint(3, length, (1,), generator=g)
            ids = torch.where(whole, ids, 0)
            row = {"input_ids": ids.tolist()}
            if padded:
                row["attention_mask"] = whole.long().tolist()
            if labels:
                row["labels"] = int(torch.randint(labels, (1,), generator=g))
            else:
                row["labels"] = torch.where(whole, ids, -100).tolist()
            own.append(row)
        found.append(own)
    return found


def images(clients=6):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(clients, ROWS, 3, 8, 8, generator=g).double()
    y = torch.randint(3, (clients, ROWS), generator=g).tolist()
    return [
        [{"pixel_values": x[c, i], "labels": y[c][i]} for i in range(ROWS)] for c in range(clients)
    ]


MODELS = {
    "Llama": (llama, ["q_proj", "down_proj"], texts),
    "GPT-2": (gpt2, ["c_attn"], texts),
    "BERT, a loss of its own": (bert, ["query", "dense"], lambda: texts(labels=3)),
    "T5": (t5, ["q", "wi"], texts),
    "ViT": (vit, ["q_proj", "fc1"], images),
}
ADAPTERS = {
    "FedPara": lambda names: FedParaConfig(r=2, target_modules=names, init_weights=False),
    "FedPara, with a head": lambda names: FedParaConfig(
        r=2, target_modules=names, init_weights=False, modules_to_save=HEADS
    ),
    "LoRA": lambda names: LoraConfig(
        r=2, target_modules=names, init_lora_weights=False, fan_in_fan_out="c_attn" in names
    ),
}
HEADS = ["classifier", "lm_head", "final_layer_norm"]


def both(folder, build, clients, engine="batched", strategy=None, more=None, **settings):
    """The same run with either engine, in float64."""
    runs = []
    for name in ("sequential", engine):
        torch.manual_seed(0)
        args = arguments(
            folder / name, engine=name, num_rounds=2,
            **{"per_client_batch_size": 2, "clients_per_round": len(clients), **settings},
        )  # fmt: skip
        trainer = FederatedTrainer(
            build().double(), args, clients, strategy=strategy, **(more or {})
        )
        runs.append((trainer, trainer.train()))
    return runs


def alike(one, other, tolerance=1e-9):
    (a, history), (b, again) = one, other
    for (name, x), y in zip(
        a.model.state_dict().items(), b.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=10 * tolerance, msg=name)
    for r, s in zip(history, again, strict=True):
        assert r.train_loss == pytest.approx(s.train_loss, rel=tolerance)
        assert r.uplink_bytes == s.uplink_bytes


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_transformers(tmp_path, stacked, name, adapter):  # noqa: F811
    build, targets, data = MODELS[name]
    clients = data()
    trains = []

    def adapted():
        model = build()
        config = ADAPTERS[adapter](targets)
        if getattr(config, "modules_to_save", None):
            present = {n.rpartition(".")[2] for n, _ in model.named_modules()}
            heads = HEADS[2:] if name == "T5" else HEADS  # T5's lm_head is its embedding
            config.modules_to_save = [head for head in heads if head in present]
        found = get_peft_model(model, config)
        trains.append([n for n, p in found.named_parameters() if p.requires_grad])
        return found

    one, other = both(tmp_path, adapted, clients, momentum=0.9, strategy=Scaffold())
    assert stacked == [6, 6]
    assert len(trains[0]) > 1
    alike(one, other, 1e-5)  # some find norms and losses in float32, whatever the model has


def _adapted_llama():
    return get_peft_model(llama(), ADAPTERS["FedPara"](["q_proj", "down_proj"]))


def _adapted_vit():
    config = ADAPTERS["LoRA"](["q_proj", "fc1"])
    config.modules_to_save = ["classifier"]
    return get_peft_model(vit(), config)


def _factorized_reader():
    config = FedParaConfig(r=3, target_modules=["recurrent", "words"], base_weight="replaced")
    return get_peft_model(Reader(), config)


def _factorized_net():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))
    return get_peft_model(net, FedParaConfig(r=3, target_modules=["1"], base_weight="replaced"))


IN_BFLOAT16 = {
    "Llama": (_adapted_llama, texts),
    "ViT": (_adapted_vit, images),
    "LSTM": (_factorized_reader, lambda: texts(padded=False)),
    "MLP": (_factorized_net, images),
}


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_bfloat16(tmp_path, stacked, name):  # noqa: F811
    """Both engines end as near to full precision, and to each other."""
    build, data = IN_BFLOAT16[name]
    clients = [[_single(row) for row in client] for client in data()]
    if name == "MLP":
        clients = [[(row["pixel_values"], row["labels"]) for row in client] for client in clients]
    moved = []
    for engine, precision in (("sequential", "no"), ("sequential", "bf16"), ("batched", "bf16")):
        torch.manual_seed(0)
        model = build()
        args = arguments(
            tmp_path / engine / precision, engine=engine, mixed_precision=precision, num_rounds=2,
            per_client_batch_size=2, clients_per_round=6, learning_rate=0.03,
        )  # fmt: skip
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        FederatedTrainer(model, args, clients).train()
        ends = dict(model.named_parameters())
        moved.append(torch.cat([(ends[n] - p).detach().flatten() for n, p in before.items()]))
    assert stacked == [6, 6]
    full, alone, together = moved
    rounding = (alone - full).norm()
    assert 0 < rounding < 0.1 * full.norm()
    assert (together - alone).norm() < 2 * rounding
    assert (together - full).norm() < 2 * rounding


def _single(row):
    return {
        key: value.float() if isinstance(value, torch.Tensor) else value
        for key, value in row.items()
    }


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("form", ["replaced", "frozen", "seeded", "plain"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_nets(tmp_path, stacked, kind, form, batch_first):  # noqa: F811
    def build():
        model = Reader(kind, batch_first)
        if form == "plain":
            return model
        config = FedParaConfig(
            r=2, target_modules=["recurrent"], base_weight=form, init_weights=form != "frozen",
            modules_to_save=["head"] if form == "frozen" else None,
        )  # fmt: skip
        return get_peft_model(model, config)

    clients = texts(padded=False)
    one, other = both(tmp_path, build, clients, max_grad_norm=0.5)
    assert stacked == [6, 6]
    alike(one, other)


def test_rows_that_a_collator_draws_for(tmp_path, stacked):  # noqa: F811
    """Every client draws from its own stream, epoch after epoch, as it does alone."""

    def masked(rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        hidden = torch.rand(ids.shape) < 0.3
        shift = int(np.random.randint(3))
        return {"input_ids": ids.masked_fill(hidden, 1), "labels": (ids + shift) % WORDS}

    more = {"data_collator": masked}
    one, other = both(tmp_path, Reader, texts(padded=False), more=more, num_local_epochs=3)
    assert stacked == [6, 6]
    alike(one, other)


def test_rows_that_a_collator_packs(tmp_path, stacked):  # noqa: F811
    """Two rows of the data in one of the batch."""

    def packed(rows):
        ids = torch.tensor([row["input_ids"] for row in rows]).flatten().view(-1, 2 * LENGTH)
        return {"input_ids": ids, "labels": ids}

    more = {"data_collator": packed}
    clients = texts(padded=False, rows=4)
    one, other = both(tmp_path, Reader, clients, more=more, per_client_batch_size=4)
    assert stacked == [6, 6]
    alike(one, other)


def test_clients_of_several_sizes_make_equally_many_steps(tmp_path, stacked):  # noqa: F811
    clients = [rows[: 4 + i % 3] for i, rows in enumerate(texts(padded=False, rows=6))]
    one, other = both(tmp_path, Reader, clients, per_client_max_steps=2)
    assert stacked == [6, 6]
    alike(one, other)


class Frozen(nn.Module):
    """Something of all clients before what is a client's own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.first.requires_grad_(False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def pairs(clients=8, rows=12):
    g = torch.Generator().manual_seed(0)
    return [
        TensorDataset(
            torch.randn(rows, 6, generator=g).double() + 0.2 * c,
            torch.randint(3, (rows,), generator=g),
        )
        for c in range(clients)
    ]


LOSSES = {
    "smoothed": lambda model, batch: F.cross_entropy(
        model(batch[0]), batch[1], label_smoothing=0.1
    ),
    "weighted": lambda model, batch: F.cross_entropy(
        model(batch[0]), batch[1], torch.tensor([1.0, 2.0, 0.5]).double()
    ),
    "by hand": lambda model, batch: (
        (model(batch[0]) - F.one_hot(batch[1], 3)).square().mean()
        + 0.1 * model(batch[0]).abs().mean()
    ),
    "with outputs and terms": lambda model, batch: _told(model(batch[0]), batch[1]),
    "of two parts": lambda model, batch: (
        F.cross_entropy(model(batch[0]), batch[1])
        + F.l1_loss(model(-batch[0]), model(batch[0])) / 2
    ),
}


def _told(logits, labels):
    counts = labels.ne(2)
    losses = F.cross_entropy(logits, labels, reduction="none") * counts
    return losses.sum() / counts.sum(), logits, counts.sum()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_ones_own(tmp_path, stacked, name):  # noqa: F811
    one, other = both(tmp_path, Frozen, pairs(), more={"compute_loss": LOSSES[name]})
    assert stacked == [8, 8]
    alike(one, other)


MIXED = {
    "rows of a batch against each other": lambda model, batch: F.cross_entropy(
        model(batch[0]) @ model(batch[0]).T, torch.arange(len(batch[0]))
    ),
    "the largest row": lambda model, batch: model(batch[0]).norm(dim=1).topk(1).values[0],
    "a total of terms": lambda model, batch: (
        F.cross_entropy(model(batch[0]), batch[1]), None, len(batch[0])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_what_is_no_mean_of_rows_goes_one_by_one(tmp_path, name):
    more = {"compute_loss": MIXED[name]}
    one, other = both(tmp_path, Frozen, pairs(), "auto", more=more)
    alike(one, other)
    with pytest.raises(ArgumentsError, match="engine='batched' is not possible"):
        both(tmp_path / "b", Frozen, pairs(), more=more)


def test_one_number_is_no_loss_of_several_clients():
    mean = torch.tensor([1.0, 2.0, 3.0])
    assert read_loss(Loss(mean), clients=3).mean is mean
    for found in (Loss(mean[0]), mean[0], Loss(mean[:2])):
        with pytest.raises(ArgumentsError, match="returned a loss of"):
            read_loss(found, clients=3)


class Branches(Frozen):
    """Takes another way where a batch's mean is high."""

    bound = 0.5

    def forward(self, x):
        found = super().forward(x)
        return found * 2 if x.mean() > self.bound else found


@pytest.mark.parametrize("bound", [-9.0, 0.7, 9.0])
def test_a_branch_is_taken_where_all_agree(tmp_path, bound):
    def build():
        model = Branches()
        model.bound = bound
        return model

    one, other = both(tmp_path, build, pairs(), per_client_batch_size=4)
    alike(one, other)


class Peeks(Frozen):
    def forward(self, x):
        found = super().forward(x)
        return found * 2 if x.std() > 100 else found


class LooksAtARow(Frozen):
    """At the first or the last of its batch, from all others."""

    def __init__(self, row):
        super().__init__()
        self.row = row

    def forward(self, x):
        return super().forward(x - x[self.row])


class Calls(Frozen):
    """Uses a layer's weight without calling it."""

    def forward(self, x):
        return F.linear(torch.tanh(self.first(x)), self.last.weight, self.last.bias)


class Positions(Frozen):
    """A table that no client's rows go into."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1, 6)

    def forward(self, x):
        return super().forward(x + self.table(torch.zeros(1, dtype=torch.long)))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Peeks, "asks for the content of a tensor of the whole batch"),
        (lambda: LooksAtARow(0), "gradients of .* differ"),
        (lambda: LooksAtARow(-1), "gradients of .* differ"),
        (Calls, "a trained parameter outside of the module"),
        (Positions, "called on what is no client's"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(tmp_path, kind, says):
    with pytest.raises(ArgumentsError, match=says):
        both(tmp_path, kind, pairs())


def test_batches_of_several_shapes(tmp_path):
    clients = [rows for n in (5, 7) for rows in texts(4, padded=False, length=n)]
    one, other = both(tmp_path, Reader, clients, engine="auto")
    alike(one, other)
    with pytest.raises(ArgumentsError, match="pad rows to one length"):
        both(tmp_path / "b", Reader, clients)


def test_a_row_that_cannot_be_read_is_of_its_client(tmp_path, caplog):
    clients = texts(padded=False)
    clients[3][1] = {"input_ids": "not a text", "labels": None}
    for engine in ("auto", "batched"):
        args = arguments(tmp_path / engine, engine=engine, num_rounds=1, clients_per_round=6)
        caplog.clear()
        FederatedTrainer(Reader().double(), args, clients).train()
        assert "client 3" in caplog.text
        assert "cannot be stacked" not in caplog.text


@pytest.mark.parametrize("count", [8, 16, 17, 40])
def test_stacks_are_of_like_sizes(tmp_path, stacked, count):  # noqa: F811
    args = arguments(tmp_path, engine="auto", num_rounds=1, clients_per_round=count)

    def build():
        torch.manual_seed(0)
        return get_peft_model(llama(), FedParaConfig(r=1, target_modules=["q_proj"]))

    FederatedTrainer(build(), args, texts(count, padded=False)).train()
    assert sum(stacked) == count
    assert max(stacked) - min(stacked) <= 1
    assert max(stacked) <= 16
