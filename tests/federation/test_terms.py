"""A mean is over what the loss is a mean of, however its terms are batched."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tests.federation.test_trainer import arguments as of_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import TokenClassifierOutput

from fedpara_peft import (
    ArgumentsError,
    ClientDataError,
    FederatedTrainer,
    FedParaConfig,
    accuracy,
    partition,
)
from fedpara_peft.federation.data.loss import DefaultLoss, classification_loss, terms_of

G = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(1, 50, (n,), generator=G).tolist() for n in [4] * 8 + [40, 3, 7, 40, 21] * 2]


def arguments(folder, **changes):
    return of_trainer(folder, overwrite_output_dir=True, **changes)


def collate(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=50,
        num_attention_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def bert(kind, **changes):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=50,
        num_attention_heads=2, max_position_embeddings=64, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0, **changes,
    )  # fmt: skip
    return kind(config).double()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


def adapter(model):
    torch.manual_seed(0)
    return get_peft_model(model, FedParaConfig(r=3, target_modules="all-linear")).double()


def tagged(rows):
    batch = collate(rows)
    return {**batch, "labels": torch.where(batch["labels"] < 0, -100, batch["labels"] % 3)}


MODELS = {
    "llama": (llama, collate),
    "llama with FedPara": (lambda: adapter(llama()), collate),
    "llama with LoRA": (
        lambda: get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=2)).double(),
        collate,
    ),
    "gpt2": (gpt2, collate),
    "t5": (t5, collate),
    "masked": (lambda: bert(BertForMaskedLM), collate),
    "tagger": (lambda: bert(BertForTokenClassification, num_labels=3), tagged),
}


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", MODELS)
def test_accumulated_small_batches_are_the_large_one(tmp_path, name):
    """n batches of b rows of unequal length make the step that one of n·b rows makes."""
    build, collator = MODELS[name]

    def step(batch, accumulated):
        net = build()
        start = flat(net)
        args = arguments(
            tmp_path, num_rounds=1, num_local_epochs=1, clients_per_round=1, learning_rate=1.0,
            per_client_batch_size=batch, gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        trainer = FederatedTrainer(net, args, [TEXTS], TEXTS, data_collator=collator)
        report = trainer.train()[-1]
        return flat(net) - start, report.train_loss

    whole, loss = step(18, 1)
    assert whole.norm() > 0
    for batch, accumulated in ((9, 2), (5, 4), (1, 18)):
        parts, found = step(batch, accumulated)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
        assert found == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_one_step_of_each_client_is_central_training_on_all_tokens(tmp_path, accumulated):
    """Clients with equally many tokens a row, in rows of unequal length: 10 in two, 20 in four."""
    lengths = {"ann": [4, 8], "bob": [3, 9, 6, 6]}
    texts = {n: [TEXTS[8][k : 2 * k] for k in each] for n, each in lengths.items()}
    assert [sum(len(t) - 1 for t in each) for each in texts.values()] == [10, 20]
    central, net = adapter(llama()), adapter(llama())
    start, total = flat(central), 0.0
    for row in [*texts["ann"], *texts["bob"]]:  # written out, a row at a time
        logits = central(input_ids=torch.tensor([row])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
    (total / 30).backward()
    with torch.no_grad():
        for p in central.parameters():
            if p.grad is not None:
                p -= 0.7 * p.grad
    args = arguments(
        tmp_path, num_rounds=1, clients_per_round=2, learning_rate=0.7, num_local_epochs=1,
        per_client_batch_size=4 // accumulated, gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    report = FederatedTrainer(net, args, texts, data_collator=collate).train()[-1]
    assert (flat(net) - start).norm() > 0
    # Llama's norms and rotations are in float32, whatever the model's dtype.
    torch.testing.assert_close(flat(net), flat(central), rtol=1e-4, atol=1e-7)
    assert report.train_loss == pytest.approx(float(total.detach()) / 30, rel=1e-6)
    assert (report.local_steps, report.terms) == (2, 30)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_the_mean_over_tokens_whatever_the_batches(tmp_path, name):
    build, collator = MODELS[name]
    net = build().eval()
    with torch.no_grad():
        whole = float(net(**collator(TEXTS)).loss)
    for size in (18, 7, 1):
        args = arguments(tmp_path, clients_per_round=1, eval_batch_size=size)
        trainer = FederatedTrainer(net, args, [TEXTS], data_collator=collator)
        assert trainer.evaluate(TEXTS)["eval_loss"] == pytest.approx(whole, rel=1e-6), size


def test_tokens_are_counted_as_written_out():
    """Of causal models all labels but each row's first; of the others all that count."""
    batch = collate(TEXTS)
    every = sum(map(len, TEXTS))
    for name, (build, _) in MODELS.items():
        model = build()
        causal = name.startswith(("llama", "gpt2"))
        expected = every - len(TEXTS) if causal else every
        logits = torch.zeros(*batch["labels"].shape, 50)
        assert int(terms_of(model, batch, logits)) == expected, name
    labels = {"labels": torch.tensor([0, 1, -100])}
    assert int(terms_of(bert(BertForSequenceClassification), labels, None)) == 2
    assert terms_of(bert(BertForSequenceClassification, num_labels=1), labels, None) is None
    floats = {"labels": torch.zeros(3, 2)}
    assert terms_of(bert(BertForSequenceClassification), floats, None) is None


def test_virtual_tokens_predict_the_first_label_too(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(llama(), config).double().eval()
    with torch.no_grad():
        whole = float(model(**collate(TEXTS)).loss)
    args = arguments(tmp_path, clients_per_round=1, eval_batch_size=5)
    trainer = FederatedTrainer(model, args, [TEXTS], data_collator=collate)
    assert trainer.evaluate(TEXTS)["eval_loss"] == pytest.approx(whole, rel=1e-6)


def test_a_loss_function_may_say_of_how_many_terms_it_is_the_mean(tmp_path):
    x = torch.randn(30, 6, 8, generator=G, dtype=torch.float64)
    y = torch.randint(0, 4, (30, 6), generator=G)
    y[torch.rand(30, 6, generator=G) < 0.6] = -100
    y[:4] = -100  # and rows that teach nothing

    def loss(model, batch):
        logits = model(batch[0])
        mean = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        return mean, logits, int((batch[1] != -100).sum())

    def counted(model, batch):  # stacked clients have tensors, of which Python sees no number
        logits = model(batch[0])
        mean = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        return mean, logits, (batch[1] != -100).sum()

    def trained(compute_loss, batch, accumulated, engine="sequential", clients=1):
        torch.manual_seed(0)
        net = nn.Linear(8, 4).double()
        args = arguments(
            tmp_path, num_rounds=1, num_local_epochs=1, clients_per_round=clients, engine=engine,
            per_client_batch_size=batch, gradient_accumulation_steps=accumulated, momentum=0.5,
            eval_batch_size=batch,
        )  # fmt: skip
        data = partition(TensorDataset(x, y), "iid", clients)
        trainer = FederatedTrainer(net, args, data, TensorDataset(x, y), compute_loss=compute_loss)
        return flat(net), trainer.train()[-1], flat(net)

    _, whole, weights = trained(loss, 30, 1)
    for compute_loss in (loss, None):  # the default counts by itself
        _, report, again = trained(compute_loss, 4, 8)
        torch.testing.assert_close(again, weights)
        assert report.train_loss == pytest.approx(whole.train_loss)
        assert report.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"])
        # Stacked clients whose batches have other numbers of terms, and some none.
        _, one, alone = trained(compute_loss, 2, 1, clients=3)
        _, other, stacked = trained(
            compute_loss and counted, 2, 1, "batched", clients=3,
        )  # fmt: skip
        torch.testing.assert_close(stacked, alone)
        assert other.train_loss == pytest.approx(one.train_loss)


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_a_client_whose_labels_all_are_ignored_is_named(tmp_path, engine):
    nothing = TensorDataset(torch.zeros(5, 8), torch.full((5,), -100))
    args = arguments(tmp_path, engine=engine, clients_per_round=2, on_client_error="raise")
    clients = {"ann": nothing, "bob": nothing}
    with pytest.raises(ClientDataError, match=r"client 'ann': no label counts"):
        FederatedTrainer(nn.Linear(8, 2), args, clients).train()
    with pytest.raises(ArgumentsError, match="no label of the examples counts"):
        FederatedTrainer(nn.Linear(8, 2), args, clients).evaluate(nothing)


#: One data set in batches of many forms; the size is the number of rows that were drawn.
FORMS = {
    "one tensor": lambda x, y: torch.cat([x, y[:, None].float()], 1),
    "nested": lambda x, y: {"meta": {"ids": [1, 2]}, "in": {"x": x}, "y": y},
    "first is short": lambda x, y: (torch.zeros(2), x, y),
    "encoding": lambda x, y: BatchEncoding({"scale": 2.0, "x": x, "y": y}),
    "output": lambda x, y: TokenClassifierOutput(logits=x, loss=None, hidden_states=(y,)),
}
READ = {
    "one tensor": lambda b: (b[:, :3], b[:, 3].long()),
    "nested": lambda b: (b["in"]["x"], b["y"]),
    "first is short": lambda b: b[1:],
    "encoding": lambda b: (b["x"], b["y"]),
    "output": lambda b: (b.logits, b.hidden_states[0]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_batchs_size_is_the_rows_drawn_for_it(tmp_path, form):
    def collator(rows):
        return FORMS[form](*(torch.stack(c) for c in zip(*rows, strict=True)))

    def loss(model, batch):
        x, y = READ[form](batch)
        return F.cross_entropy(model(x), y)

    data = TensorDataset(torch.randn(7, 3, generator=G), torch.randint(0, 2, (7,), generator=G))
    found = []
    for size in (7, 3):
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        args = arguments(
            tmp_path, num_rounds=1, num_local_epochs=1, clients_per_round=1, eval_batch_size=size,
            per_client_batch_size=size, gradient_accumulation_steps=4,
        )  # fmt: skip
        trainer = FederatedTrainer(net, args, [data], data, collator, loss)
        report = trainer.train()[-1]
        found.append((flat(net), report.train_loss, report.metrics["eval_loss"]))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1:] == pytest.approx(found[1][1:], rel=1e-6)


# The default loss.


class Returns(nn.Module):
    """A model that returns these."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


LOGITS = torch.randn(5, 3, generator=G)
LABELS = torch.tensor([0, 2, 1, 2, 0])


@pytest.mark.parametrize(
    "labels",
    [LABELS, LABELS[:, None], LABELS.int(), LABELS.to(torch.uint8), LABELS.short()[:, None]],
)
def test_class_indices_of_any_integer_dtype_and_of_one_column(labels):
    loss = DefaultLoss()(Returns(LOGITS), (None, labels))
    by_hand = -LOGITS.log_softmax(1)[torch.arange(5), LABELS].mean()
    torch.testing.assert_close(loss.mean, by_hand)
    assert int(loss.terms) == 5
    assert DefaultLoss()(Returns({"logits": LOGITS}), {"x": None, "y": labels}).mean == loss.mean


def test_a_class_for_each_position_in_either_layout():
    logits = torch.randn(4, 6, 3, generator=G)
    labels = torch.randint(0, 3, (4, 6), generator=G)
    labels[0, 2:] = -100
    picked = torch.gather(logits.log_softmax(2), 2, labels.clamp(min=0)[..., None])[..., 0]
    by_hand = -picked[labels >= 0].mean()
    for given, targets in (
        (logits, labels),
        (logits, labels[..., None]),
        (logits.transpose(1, 2), labels),
        (logits.transpose(1, 2).unsqueeze(-1), labels[..., None]),
    ):
        loss = classification_loss(given, targets)
        torch.testing.assert_close(loss.mean, by_hand)
        assert int(loss.terms) == int((labels >= 0).sum()) == 20


@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (LOGITS[:, :1], LABELS, r"\(5, 1\), labels \(5,\): cross-entropy of one class is always 0"),
        (LOGITS[:, :1], LABELS[:, None], "of one class is always 0"),
        (LOGITS[:, :1], torch.rand(5, 1), r"labels are torch.float32.* for regression"),
        (LOGITS, torch.rand(5, 3), r"labels are torch.float32.* soft labels"),
        (LOGITS, ["a"] * 5, "labels are list, cross-entropy takes class indices"),
        (LOGITS, LABELS[:4], r"shape \(5, 3\), labels \(4,\): give one class index for each"),
        (LOGITS[:, 0], LABELS, r"shape \(5,\), labels \(5,\): give one class index"),
        (LOGITS, LABELS + 1, r"a label is not in \[0, 3\)"),
        (torch.zeros(2, 3, 3), torch.zeros(2, 3).long(), "classes may be either dimension"),
        ((LOGITS, LOGITS), LABELS, "the model returns a tuple without logits: return the logits"),
        ({"out": LOGITS}, LABELS, "the model returns a dict without logits"),
    ],
)
def test_what_is_no_classification_is_refused_with_its_shapes(logits, labels, says):
    with pytest.raises(ClientDataError, match=says):
        DefaultLoss()(Returns(logits), (None, labels))


@pytest.mark.parametrize("batch", [LOGITS, (LOGITS,), (LOGITS, LOGITS, LABELS)])
def test_batches_that_are_no_pair(batch):
    with pytest.raises(ClientDataError, match="give a mapping or a pair"):
        DefaultLoss()(Returns(LOGITS), batch)


def test_regression_targets_name_the_client_and_the_remedy(tmp_path):
    x = torch.randn(20, 8)
    args = arguments(tmp_path, clients_per_round=1, on_client_error="raise")
    clients = {"ann": TensorDataset(x, x[:, :1])}
    with pytest.raises(ClientDataError, match=r"client 'ann': labels are torch.float32.*regress"):
        FederatedTrainer(nn.Linear(8, 1), args, clients).train()
    mse = lambda model, batch: F.mse_loss(model(batch[0]), batch[1])  # noqa: E731
    FederatedTrainer(nn.Linear(8, 1), args, clients, compute_loss=mse).train()


def test_a_plain_model_may_take_the_labels_and_return_its_loss(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 2)

        def forward(self, x, target):
            logits = self.layer(x)
            return {"loss": F.cross_entropy(logits, target), "logits": logits}

    x = torch.randn(20, 8)
    rows = [{"x": a, "target": int(b)} for a, b in zip(x, x[:, 0] > 0, strict=True)]
    torch.manual_seed(0)
    own = Own()
    plain = nn.Linear(8, 2)
    plain.load_state_dict(own.layer.state_dict())
    args = arguments(tmp_path, num_rounds=1, clients_per_round=1)
    report = FederatedTrainer(own, args, [rows], rows, compute_metrics=accuracy).train()[-1]
    again = FederatedTrainer(plain, args, [rows], rows, compute_metrics=accuracy).train()[-1]
    torch.testing.assert_close(own.layer.weight, plain.weight)
    assert report.metrics == pytest.approx(again.metrics)


def test_a_transformers_model_with_labels_under_another_name(tmp_path):
    rows = [{"input_ids": t[:3], "fine_label": t[0] % 2} for t in TEXTS]
    found = []
    for column in ("fine_label", "labels"):
        data = [{"input_ids": r["input_ids"], column: r["fine_label"]} for r in rows]
        model = bert(BertForSequenceClassification)
        args = arguments(tmp_path, num_rounds=1, clients_per_round=1)
        trainer = FederatedTrainer(model, args, [data], data, compute_metrics=accuracy)
        found.append((trainer.train()[-1].metrics, flat(model)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("compute_loss", "says"),
    [
        (lambda m, b: m(b[0]).sum().item(), "returned a float: return the mean loss"),
        (lambda m, b: m(b[0]), r"returned a loss of \(8, 2\): return a mean, one number"),
        (lambda m, b: (None, m(b[0])), "returned a loss of"),
        (lambda m, b: {"logits": m(b[0])}, "returned a dict"),
    ],
)
def test_a_loss_function_that_returns_no_loss(tmp_path, compute_loss, says):
    data = TensorDataset(torch.randn(8, 4), torch.zeros(8).long())
    args = arguments(tmp_path, clients_per_round=1, on_client_error="raise")
    with pytest.raises(ArgumentsError, match=says):
        FederatedTrainer(nn.Linear(4, 2), args, [data], compute_loss=compute_loss).train()
