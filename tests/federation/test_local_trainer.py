"""Trainers of transformers and trl as a client's local step: what they do alone, they do here."""

import copy
import functools
import gc
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from tests.federation.test_local_loss import Moon
from tests.federation.test_processes import run as launched
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fedpara_peft import (
    ArgumentsError,
    ClientDataError,
    FederatedArguments,
    FederatedCallback,
    FederatedTrainer,
    FedParaConfig,
    FedProx,
    Scaffold,
    communicated_state,
)
from fedpara_peft.federation.client.trainers.given import trainer_seed
from fedpara_peft.federation.random import derived_seed

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*use_reentrant")
WORDS = [f"w{i}" for i in range(60)]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUIET = {
    "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
    "save_strategy": "no", "bf16": False,
}  # fmt: skip


def tokenizer():
    names = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", *WORDS]
    made = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    found.chat_template = CHAT
    return found


def llama(dropout=0.0, parameterization="fedpara"):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=65, pad_token_id=0,
        eos_token_id=1, bos_token_id=None, num_attention_heads=4, attention_dropout=dropout,
    )  # fmt: skip
    adapter = FedParaConfig(
        r=2, parameterization=parameterization, target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), adapter)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    return model


def tokens(rows, seed=0):
    """Texts of unequal length, whose prompt does not count."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 14, (rows,), generator=generator).tolist()
    ids = [torch.randint(5, 65, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100] * (i % 4) + row[i % 4 :] for i, row in enumerate(ids)]}
    )


def said(rows, seed=0):
    """Prompts and completions, as text."""
    generator = torch.Generator().manual_seed(seed)
    words = [
        [WORDS[i] for i in torch.randint(0, 60, (8,), generator=generator).tolist()]
        for _ in range(rows)
    ]
    halves = {"prompt": [" ".join(w[:4]) for w in words]}
    return Dataset.from_dict({**halves, "completion": [" " + " ".join(w[4:]) for w in words]})


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {"input_ids": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])
        for name, fill in padded.items()
    }


def of_transformers(folder, **changes):
    settings = {
        "num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 0.01,
        "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**QUIET, **settings, **changes})
    return functools.partial(Trainer, args=args, data_collator=collate)


def of_trl(folder, **changes):
    trl = pytest.importorskip("trl", reason="the extra 'llm' is not installed")
    settings = {
        "num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 0.01,
        "max_length": 32, "gradient_checkpointing": True,
    }  # fmt: skip
    args = trl.SFTConfig(str(folder), **{**QUIET, **settings, **changes})
    return functools.partial(trl.SFTTrainer, args=args, processing_class=tokenizer())


KINDS = {
    "Trainer": (of_transformers, tokens, {}),
    "checkpointing": (of_transformers, tokens, {"gradient_checkpointing": True}),
    "bf16": (of_transformers, tokens, {"bf16": True}),
    "NEFTune": (of_transformers, tokens, {"neftune_noise_alpha": 5.0}),
    "SFTTrainer": (of_trl, said, {}),
    "packing": (of_trl, said, {"packing": True, "packing_strategy": "wrapped", "max_length": 12}),
}


def flat(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def alone(model, given, data, seed, round=0, client=0):
    """The same trainer run alone, with a seed that anybody can give it."""
    args = copy.deepcopy(given.keywords["args"])
    args.seed = trainer_seed(derived_seed(seed, round, client, "training"), args.seed)
    trainer = given.func(model=model, train_dataset=data, **{**given.keywords, "args": args})
    return trainer.train(), trainer


def federated(folder, model, given, clients, rounds=1, **changes):
    arguments = FederatedArguments(
        str(folder), num_rounds=rounds, disable_tqdm=True, on_client_error="raise", **changes
    )
    return FederatedTrainer(model, arguments, clients, local_trainer=given)


def after_the_server(start, ended, rows):
    """What a server makes of one client's weights: its mean is of sums, w + (22 Δ) / 22."""
    return {n: w + (ended[n] - w) * rows / rows for n, w in start.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_one_client_is_the_trainer_alone(tmp_path, kind):
    build, data, changes = KINDS[kind]
    given, rows = build(tmp_path / "own", **changes), data(22)
    expected, model = llama(dropout=0.1), llama(dropout=0.1)
    start = flat(model)
    told, _ = alone(expected, given, rows, seed=3)
    report = federated(tmp_path, model, given, [rows], seed=3).train()[-1]
    assert same(flat(model), after_the_server(start, flat(expected), 22))
    assert all(not torch.equal(w, start[n]) for n, w in flat(model).items())
    assert report.local_steps == told.global_step > 1
    # The trainer's own is a mean over steps, this one over tokens.
    assert report.train_loss == pytest.approx(told.training_loss, rel=0.05)


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_two_rounds_are_the_trainer_alone_twice_with_a_new_optimizer(tmp_path, kind):
    build, data, changes = KINDS[kind]
    given, rows = build(tmp_path / "own", **changes), data(22)
    model, state = llama(), flat(llama())
    federated(tmp_path, model, given, [rows], rounds=2).train()
    for number in range(2):
        expected = llama()
        expected.load_state_dict(state, strict=False)
        alone(expected, given, rows, seed=0, round=number)
        state = after_the_server(state, flat(expected), 22)
    assert same(flat(model), state)


def test_clients_are_weighed_and_told_as_by_hand(tmp_path):
    """Two clients: the mean of what the trainers alone find; loss and tokens counted by hand."""
    clients = {"ann": tokens(16, seed=1), "bob": tokens(8, seed=2)}
    given = of_transformers(tmp_path / "own", gradient_accumulation_steps=1)
    model, start = llama(), flat(llama())
    report = federated(tmp_path, model, given, clients).train()[-1]
    ended, counts = [], []
    for i, data in enumerate(clients.values()):
        expected = llama()
        alone(expected, given, data, seed=0, client=i)
        ended.append(flat(expected))
        counts.append([sum(label != -100 for label in row["labels"][1:]) for row in data])
    mean = {n: w + (2 * (ended[0][n] - w) + (ended[1][n] - w)) / 3 for n, w in start.items()}
    for n, w in flat(model).items():
        torch.testing.assert_close(w, mean[n])
    assert report.terms == sum(map(sum, counts))
    assert report.local_steps == 4 + 2


def test_the_loss_is_the_mean_over_tokens(tmp_path):
    """At a learning rate of 0 it is the model's own on all rows, however unequal the batches."""
    rows, model = tokens(22), llama()
    with torch.no_grad():
        whole = float(model.eval()(**collate(list(rows))).loss)
    given = of_transformers(tmp_path / "own", learning_rate=0.0)
    report = federated(tmp_path, model, given, [rows]).train()[-1]
    assert report.train_loss == pytest.approx(whole, rel=1e-5)


def test_rows_are_counted_where_the_model_counts_no_tokens(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, labels):
            logits = self.layer(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    x, net = torch.randn(10, 4), Net()
    rows = [{"x": a, "labels": int(a.sum() > 0)} for a in x]
    with torch.no_grad():
        whole = float(net(x, torch.tensor([r["labels"] for r in rows]))["loss"])
    args = TrainingArguments(
        str(tmp_path / "own"), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=0.0,
        **QUIET,
    )  # fmt: skip
    report = federated(tmp_path, net, functools.partial(Trainer, args=args), [rows]).train()[-1]
    assert (report.terms, report.local_steps) == (20, 6)
    assert report.train_loss == pytest.approx(whole, rel=1e-5)


def described(model):
    """All that a model is beside its parameters' values, and what its card tells of a run."""
    told = {"training_facts", "training_metrics"}
    modules = {
        name: {key: repr(value) for key, value in vars(m).items() if key not in told}
        for name, m in model.named_modules()
        if not list(m.children())
    }
    others = {
        name: {
            key: repr(value)
            for key, value in vars(m).items()
            if key not in told | {"_modules", "_parameters", "_buffers"}
        }
        for name, m in model.named_modules()
        if list(m.children())
    }
    for module in modules.values():
        del module["_parameters"]
    tensors = [
        (n, p.data_ptr(), p.dtype, p.requires_grad, p.grad, p._backward_hooks)
        for n, p in model.named_parameters()
    ]
    configs = [model.config.to_dict(), model.generation_config.to_dict()]
    return modules, others, tensors, configs, model.get_base_model().forward


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_leaves_nothing_but_what_it_trained(tmp_path, kind):
    build, data, changes = KINDS[kind]
    given, model = build(tmp_path / "own", **changes), llama()
    trainer = federated(tmp_path / "run", model, given, [data(8), data(8, seed=1)])
    before, environment = described(model), dict(os.environ)
    state = dict(AcceleratorState._shared_state)
    trainer.train()
    assert described(model) == before
    assert dict(os.environ) == environment
    assert dict(AcceleratorState._shared_state) == state
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left == {".lock", "history.json", "settings.json", "ledger.npy"}
    assert model.training_facts["local training"] == given.func.__name__
    assert not (tmp_path / "own").exists()
    assert given.keywords["args"].output_dir == str(tmp_path / "own")


def test_garbage_is_looked_for_among_what_a_turn_made(tmp_path):
    seen = []

    class Watches(TrainerCallback):
        def on_train_end(self, args, state, control, **more):
            seen.append((gc.get_freeze_count(), len(gc.get_objects())))

    given = functools.partial(of_transformers(tmp_path / "own"), callbacks=[Watches()])
    gc.unfreeze()  # what the tests froze
    try:
        federated(tmp_path / "a", llama(), given, [tokens(8)], rounds=2).train()
        assert gc.get_freeze_count() == 0
        assert len(seen) == 2
        assert all(others < frozen / 10 for frozen, others in seen)
    finally:
        gc.freeze()
    federated(tmp_path / "b", llama(), given, [tokens(8)]).train()
    assert gc.get_freeze_count() > 0  # somebody else's


def test_checkpoints_of_a_trainer_go_with_its_turn(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    seen = []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **more):
            seen.append(Path(args.output_dir, f"checkpoint-{state.global_step}").exists())

    given = of_transformers(tmp_path / "own", save_strategy="steps", save_steps=1)
    given = functools.partial(given, callbacks=[Watch()])
    federated(tmp_path / "run", llama(), given, [tokens(22)]).train()
    assert seen == [True] * 3
    assert not list((tmp_path / "temporary").iterdir())
    assert not (tmp_path / "own").exists()


def test_a_trainer_that_fails_leaves_nothing_either(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            raise RuntimeError("no more")

    given = of_transformers(
        tmp_path / "own", neftune_noise_alpha=5.0, gradient_checkpointing=True, bf16=True
    )
    model = llama()
    trainer = federated(tmp_path, model, functools.partial(given, callbacks=[Fails()]), [tokens(8)])
    before, state = described(model), dict(AcceleratorState._shared_state)
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    assert described(model) == before
    assert dict(AcceleratorState._shared_state) == state


def test_what_a_trainer_casts_or_moves_is_trained_where_it_was(tmp_path):
    """As SFTTrainer does with adapters of quantized models."""

    class Casts(Trainer):
        def __init__(self, model, **named):
            for p in model.parameters():
                if p.requires_grad:
                    p.data = p.data.to(torch.bfloat16)
            super().__init__(model, **named)

    args = of_transformers(tmp_path / "own", learning_rate=0.05).keywords["args"]
    given = functools.partial(Casts, args=args, data_collator=collate)
    rows, model, expected = tokens(22), llama(), llama()
    start, memory = flat(model), {n: p.data_ptr() for n, p in model.named_parameters()}
    alone(expected, given, rows, seed=0)
    federated(tmp_path, model, given, [rows]).train()
    ended = {n: w.float() for n, w in flat(expected).items()}
    assert same(flat(model), after_the_server(start, ended, 22))
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == memory


def test_callbacks_that_remember_begin_anew_and_others_watch_all(tmp_path):
    class Watch(TrainerCallback):
        def __init__(self):
            self.begun = 0

        def on_train_begin(self, args, state, control, **more):
            self.begun += 1

    stops, watch = EarlyStoppingCallback(early_stopping_patience=1), Watch()
    given = of_transformers(
        tmp_path / "own", num_train_epochs=4, learning_rate=0.0, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    given = functools.partial(given, callbacks=[stops, watch], eval_dataset=tokens(4))
    report = federated(tmp_path, llama(), given, [tokens(8), tokens(8, seed=1)]).train()[-1]
    assert report.local_steps == 2 * 2  # each stops after its second epoch, not the second at once
    assert stops.early_stopping_patience_counter == 0
    assert watch.begun == 2


def test_the_local_half_stays_and_trains(tmp_path):
    model = llama(parameterization="pfedpara")
    clients = {"ann": tokens(8), "bob": tokens(8, seed=1)}
    trainer = federated(tmp_path, model, of_transformers(tmp_path / "own"), clients, rounds=2)
    trainer.train()
    ann, bob = (trainer.client_state(name).local for name in clients)
    assert ann.keys() == bob.keys() != set()
    assert all(not torch.equal(t, bob[n]) for n, t in ann.items())
    assert not set(ann) & set(communicated_state(model))


def test_clients_of_lower_rank_and_blocks_that_rest(tmp_path):
    rows = [tokens(8), tokens(8, seed=1)]
    given = of_transformers(tmp_path / "own")
    args = FederatedArguments(str(tmp_path / "a"), num_rounds=1, disable_tqdm=True)
    model, start = llama(), flat(llama())
    FederatedTrainer(model, args, rows, client_ranks=[1, 1], local_trainer=given).train()
    for n, w in flat(model).items():
        assert torch.equal(w[:, 1:], start[n][:, 1:])  # nobody has the second column
        assert not torch.equal(w[:, :1], start[n][:, :1])
    args = FederatedArguments(
        str(tmp_path / "b"), num_rounds=1, disable_tqdm=True, factor_schedule="one_block"
    )
    model = llama()
    FederatedTrainer(model, args, rows, local_trainer=given).train()
    moved = [not torch.equal(w, start[n]) for n, w in flat(model).items()]
    assert sum(moved) == len(moved) / 4


class Stop(FederatedCallback):
    def on_round_end(self, server, report):
        if report.round == 2:
            raise KeyboardInterrupt


@pytest.mark.programs
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, kind):
    build, data, changes = KINDS[kind]
    given, clients = build(tmp_path / "own", **changes), [data(8), data(12, seed=1)]

    def run(folder, callbacks=()):
        model = llama(dropout=0.1, parameterization="pfedpara")
        args = FederatedArguments(str(folder), num_rounds=4, save_every=1, disable_tqdm=True)
        trainer = FederatedTrainer(model, args, clients, callbacks=callbacks, local_trainer=given)
        return trainer, model

    whole, expected = run(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", [Stop()])[0].train()
    again, model = run(tmp_path / "parts")
    again.train(resume_from_checkpoint=True)
    assert same(flat(model), flat(expected))
    for i in range(2):
        assert same(again.client_state(i).local, whole.client_state(i).local)


def test_a_run_is_not_resumed_with_another_trainer(tmp_path):
    rows = [tokens(8)]
    federated(tmp_path, llama(), of_transformers("own"), rows, save_every=1).train()
    other = of_transformers("elsewhere", learning_rate=0.02)
    again = federated(tmp_path, llama(), other, rows, rounds=2, save_every=1)
    with pytest.raises(Exception, match=r"local_trainer.*0\.01.*0\.02"):
        again.train(resume_from_checkpoint=True)
    moved = of_transformers("elsewhere")  # where it would write to is nothing of the run
    federated(tmp_path, llama(), moved, rows, rounds=2, save_every=1).train(True)


def test_a_function_makes_each_clients_trainer(tmp_path):
    """It is told who trains, and when; the rate may follow the rounds."""
    asked = []

    def make(model, dataset, client, round):
        asked.append((client, round))
        given = of_transformers(tmp_path / "own", learning_rate=0.01 / (1 + round), bf16=True)
        return given(model=model, train_dataset=dataset)

    model, clients = llama(), {"ann": tokens(8), "bob": tokens(8, seed=1)}
    before = described(model)
    trainer = federated(tmp_path / "run", model, make, clients, rounds=2)
    trainer.train()
    assert asked == [("ann", 0), ("bob", 0), ("ann", 1), ("bob", 1)]
    assert described(model) == before
    again = llama()
    federated(tmp_path / "again", again, make, clients, rounds=2).train()
    assert same(flat(model), flat(again))


def test_a_functions_seeds_differ_by_round_and_client(tmp_path):
    """transformers' Trainer seeds everything with the same seed whenever it is made."""
    drawn = []

    class Draws(TrainerCallback):
        def on_train_begin(self, args, state, control, **more):
            drawn.append(float(torch.rand(())))

    def make(model, dataset, client, round):
        given = of_transformers(tmp_path / "own")
        return given(model=model, train_dataset=dataset, callbacks=[Draws()])

    rows = tokens(8)
    federated(tmp_path, llama(), make, [rows, rows], rounds=2).train()
    assert len(set(drawn)) == 4


def test_any_object_that_trains_the_model(tmp_path):
    class Loop:
        def __init__(self, model, rows):
            self.model, self.rows = model, rows

        def train(self):
            optimizer = torch.optim.SGD(
                [p for p in self.model.parameters() if p.requires_grad], lr=0.1
            )
            loss = self.model(**collate(list(self.rows))).loss
            loss.backward()
            optimizer.step()
            return SimpleNamespace(training_loss=loss.item(), global_step=1)

    model, rows = llama(), tokens(8)
    expected, start = llama(), flat(llama())
    found = Loop(expected, rows).train()
    report = federated(tmp_path, model, lambda m, d, c, r: Loop(m, d), [rows]).train()[-1]
    assert same(flat(model), after_the_server(start, flat(expected), 8))
    assert (report.train_loss, report.local_steps) == (pytest.approx(found.training_loss), 1)
    assert report.terms is None


REFUSED = {
    "optim": ({"optim": "adamw"}, r"optim='adamw' is for clients without a local_trainer"),
    "rate": ({"learning_rate": 0.3}, "learning_rate=0.3 is for clients without"),
    "batch": ({"per_client_batch_size": 4}, "per_client_batch_size=4 is for clients without"),
    "keep": ({"optimizer_state": "keep"}, "optimizer_state='keep' is for clients without"),
    "decay": ({"composed_weight_decay": 0.1}, "composed_weight_decay=0.1 is for"),
    "engine": ({"engine": "batched"}, "engine='batched' cannot have a local_trainer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_a_trainer_would_ignore_are_refused(tmp_path, case):
    changes, says = REFUSED[case]
    with pytest.raises(ArgumentsError, match=says):
        federated(tmp_path, llama(), of_transformers("own"), [tokens(8)], **changes)


@pytest.mark.parametrize("strategy", [FedProx(0.1), Scaffold(), Moon(1.0)], ids=type)
def test_strategies_that_reach_into_a_clients_steps_are_refused_by_name(tmp_path, strategy):
    args = FederatedArguments(str(tmp_path), num_rounds=1)
    with pytest.raises(ArgumentsError, match=type(strategy).__name__):
        FederatedTrainer(
            llama(), args, [tokens(8)], strategy=strategy, local_trainer=of_transformers("own")
        )


def test_strategies_on_the_server_are_not(tmp_path):
    args = FederatedArguments(str(tmp_path), num_rounds=1, disable_tqdm=True)
    given, model = of_transformers("own"), llama()
    FederatedTrainer(model, args, [tokens(8)], strategy="fedadam", local_trainer=given).train()
    assert not same(flat(model), flat(llama()))


MISTAKES = {
    "no args": (lambda: functools.partial(Trainer), r"functools.partial\(Trainer, args="),
    "a class": (lambda: Trainer, "give Trainer its arguments"),
    "a trainer": (lambda: 3, "local_trainer is 3: give functools.partial"),
    "optimizers": (
        lambda: functools.partial(of_transformers("own"), optimizers=(None, None)),
        "has optimizers: they would remember",
    ),
    "model": (lambda: functools.partial(of_transformers("own"), model=llama()), "has model: every"),
    "position": (lambda: functools.partial(Trainer, None), "by their names"),
    "hub": (lambda: of_transformers("own", push_to_hub=True), "push_to_hub=True"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_before_the_run(tmp_path, case):
    given, says = MISTAKES[case]
    with pytest.raises(ArgumentsError, match=says):
        federated(tmp_path, llama(), given(), [tokens(8)])


def test_an_optimizer_beside_it_is_refused(tmp_path):
    args = FederatedArguments(str(tmp_path), num_rounds=1)
    with pytest.raises(ArgumentsError, match="give optimizer or local_trainer"):
        FederatedTrainer(
            llama(), args, [tokens(8)], optimizer=torch.optim.AdamW,
            local_trainer=of_transformers("own"),
        )  # fmt: skip


def test_what_cannot_be_trained_names_the_client(tmp_path):
    nothing = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [[-100] * 3] * 4})
    with pytest.raises(ClientDataError, match="client 'ann': no label counts"):
        federated(tmp_path, llama(), of_transformers("own"), {"ann": nothing}).train()

    def other(model, dataset, client, round):
        return of_transformers(tmp_path / "own")(model=llama(), train_dataset=dataset)

    with pytest.raises(ArgumentsError, match="client 'ann': local_trainer trains a Peft"):
        federated(tmp_path / "b", llama(), other, {"ann": tokens(8)}).train()
    with pytest.raises(ArgumentsError, match="returned a int: return what has a train"):
        federated(tmp_path / "c", llama(), lambda *given: 3, [tokens(8)]).train()


@pytest.mark.programs
def test_two_processes_with_a_trainer_are_one(tmp_path):
    """Each trains clients of its own; none wants to share one with the others."""
    for processes in (1, 2):
        done = launched(processes, "trainer_runs.py", tmp_path / str(processes))
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / n / "final.safetensors") for n in "12")
    assert same(one, two)
    assert len(json.loads((tmp_path / "2" / "history.json").read_text())) == 2
