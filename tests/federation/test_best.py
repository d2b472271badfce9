"""The best round, early stopping, and what callbacks ask for: also after a run was killed."""

import itertools
import json

import pytest
import torch
from tests.federation.made_up import made_up, sends
from tests.federation.test_resume import InterruptedTestError, StopAfter, final, same
from tests.federation.test_trainer import arguments, toy
from tests.layer_kinds import in_turn
from tests.zoo import adapted, mlp
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fedpara_peft import (
    ArgumentsError,
    FederatedArguments,
    FederatedCallback,
    FederatedControl,
    FederatedTrainer,
    FedParaConfig,
    partition,
)
from fedpara_peft.federation.folder.checkpoint import checkpoints

#: A metric by round, that goes up and down; the best is round 4's, or with lower is better 6's.
SCORES = (0.2, 0.5, 0.4, 0.9, 0.7, 0.1, 0.8, 0.3, 0.85, 0.6)
NAN = float("nan")


class Scores:
    """``compute_metrics`` that tells a score by round, whatever was predicted."""

    def __init__(self, *scores):
        self.scores, self.round = scores, 0

    def __call__(self, prediction):
        return {"score": self.scores[self.round - 1]}

    def watch(self, run):
        """Learn which round is being evaluated."""
        evaluated = run._evaluated

        def watched(server, report):
            self.round = server.round
            return evaluated(server, report)

        run._evaluated = watched


def trainer(folder, scores=SCORES, callbacks=(), **changes):
    settings = {
        "num_rounds": len(scores), "num_local_epochs": 1, "clients_per_round": 3,
        "metric_for_best_model": "score", **changes,
    }  # fmt: skip
    metrics = Scores(*scores)
    found = FederatedTrainer(
        adapted(mlp(norm=False), parameterization="pfedpara"), arguments(folder, **settings),
        partition(toy(), "iid", 5), toy(24), compute_metrics=metrics, callbacks=list(callbacks),
    )  # fmt: skip
    metrics.watch(found._run)
    return found


def state_of(run):
    """The global model and every client's own."""
    return final(run)[0]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


@pytest.mark.parametrize(
    ("lower", "save_every", "store"), in_turn([None, False, True], [0, 3], by=["memory", "disk"])
)
def test_the_best_rounds_model_and_clients_are_in_place(tmp_path, lower, save_every, store):
    greater, best = None if lower is None else not lower, 6 if lower else 4
    run = trainer(
        tmp_path / "run", load_best_model_at_end=True, greater_is_better=greater,
        save_every=save_every, client_store=store, save_total_limit=2,
    )  # fmt: skip
    history = run.train()
    assert [r.metrics["eval_score"] for r in history] == list(SCORES)
    only = trainer(tmp_path / "only", num_rounds=best)
    only.train()
    assert equal(state_of(run), state_of(only))
    longer = trainer(tmp_path / "all")
    longer.train()
    assert not equal(state_of(run), state_of(longer))
    newest = {0: best, 3: 10}[save_every]
    assert {best, newest} <= checkpoints(tmp_path / "run").keys()


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_best_checkpoint_outlives_save_total_limit(tmp_path, limit):
    seen = []

    class Looks(FederatedCallback):
        def on_round_end(self, server, report):
            seen.append(list(checkpoints(tmp_path)))

    trainer(tmp_path, callbacks=[Looks()], save_every=1, save_total_limit=limit).train()
    best = [max(range(n + 1), key=SCORES.__getitem__) + 1 for n in range(len(SCORES))]
    for round, (found, b) in enumerate(zip(seen, best, strict=True), 1):
        assert {round, b} <= set(found), (round, found)
        assert len(found) == min(round, max(limit, len({round, b})))
    assert seen[-1] == {1: [4, 10], 2: [4, 10], 3: [4, 9, 10]}[limit]


def stopping_round(scores, patience, threshold, greater=True):
    """Where transformers' own callback stops, driven as its Trainer drives it."""
    callback = EarlyStoppingCallback(patience, threshold)
    args = TrainingArguments(
        "none", metric_for_best_model="score", greater_is_better=greater, use_cpu=True,
        load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps",
    )  # fmt: skip
    state, control = TrainerState(), TrainerControl()
    for round, score in enumerate(scores, 1):
        callback.on_evaluate(args, state, control, {"eval_score": score})
        if control.should_training_stop:
            return round
        better = (score > state.best_metric if greater else score < state.best_metric) if (
            state.best_metric is not None
        ) else True  # fmt: skip
        if better:
            state.best_metric = score
    return len(scores)


@pytest.mark.parametrize("patience", [1, 2, 3, 4])
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.35])
@pytest.mark.parametrize("greater", [True, False])
def test_it_stops_where_transformers_trainer_would(tmp_path, patience, threshold, greater):
    scores = (0.2, 0.5, 0.4, 0.6, 0.7, 0.1, 0.95, 0.3, 0.85, 0.05, 0.6, 0.5)
    found = made_up_scores(
        tmp_path, scores, early_stopping_patience=patience, early_stopping_threshold=threshold,
        greater_is_better=greater,
    )  # fmt: skip
    assert len(found) == stopping_round(scores, patience, threshold, greater)


def made_up_scores(folder, scores, **changes):
    """The history of a run whose clients train nothing."""
    run, _ = made_up(
        folder, sends, num_rounds=len(scores), **{"metric_for_best_model": "score", **changes}
    )
    found = iter(scores)
    run._evaluate = lambda: {"eval_score": next(found)}
    return run.train()


def test_the_table_of_stopping_rounds_is_no_constant():
    scores = (0.2, 0.5, 0.4, 0.6, 0.7, 0.1, 0.95, 0.3, 0.85, 0.05, 0.6, 0.5)
    table = {
        stopping_round(scores, p, t, g)
        for p, t, g in itertools.product((1, 2, 3, 4), (0.0, 0.25, 0.35), (True, False))
    }
    assert len(table) >= 5


def test_nan_is_never_the_best_and_is_waited_for(tmp_path):
    assert (
        len(made_up_scores(tmp_path / "a", (NAN, 0.1, NAN, NAN, 0.2), early_stopping_patience=2))
        == 4
    )
    assert len(made_up_scores(tmp_path / "b", (NAN, NAN, 0.1), early_stopping_patience=2)) == 2


@pytest.mark.parametrize("stop", range(1, 8))
@pytest.mark.parametrize("save_every", [0, 2])
def test_a_run_that_was_cut_off_has_the_same_best_model_and_end(tmp_path, stop, save_every):
    """Patience 3 after round 4: the last is round 7, of ten."""
    settings = {
        "load_best_model_at_end": True, "early_stopping_patience": 3, "save_every": save_every,
        "save_total_limit": 1,
    }  # fmt: skip
    whole = trainer(tmp_path / "whole", **settings)
    history = whole.train()
    assert len(history) == 7
    cut = trainer(tmp_path / "cut", callbacks=[StopAfter(stop)], **settings)
    with pytest.raises(InterruptedTestError):
        cut.train()
    again = trainer(tmp_path / "cut", **settings)
    resumed = again.train(resume_from_checkpoint=True)
    assert [r.metrics for r in resumed] == [r.metrics for r in history]
    assert same(final(again), final(whole))
    once_more = trainer(tmp_path / "cut", **settings)
    assert len(once_more.train(resume_from_checkpoint=True)) == 7  # nothing is left to do
    assert equal(state_of(once_more), state_of(whole))


def test_the_last_round_of_a_stopped_run_is_saved(tmp_path):
    trainer(tmp_path, early_stopping_patience=3, save_every=4).train()
    assert list(checkpoints(tmp_path)) == [4, 7]


def test_a_best_round_without_a_checkpoint_is_told(tmp_path, caplog):
    trainer(tmp_path, num_rounds=5, save_every=3, metric_for_best_model=None).train()
    run = trainer(tmp_path, load_best_model_at_end=True)
    run.train(resume_from_checkpoint=True)
    assert "round 4 was the best (score 0.9), but has no checkpoint: loading round 5" in caplog.text
    only = trainer(tmp_path / "only", num_rounds=5)
    only.train()
    assert equal(state_of(run), state_of(only))


def test_loss_is_the_metric_unless_another_is_named(tmp_path):
    args = arguments(tmp_path, load_best_model_at_end=True)
    assert args.metric_for_best_model == "loss"
    assert arguments(tmp_path, early_stopping_patience=2).metric_for_best_model == "loss"
    assert arguments(tmp_path).metric_for_best_model is None
    run = trainer(
        tmp_path, metric_for_best_model=None, load_best_model_at_end=True, num_rounds=6,
        learning_rate=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    losses = [r.metrics["eval_loss"] for r in run.train()]
    assert losses.index(min(losses)) + 1 < len(losses)
    assert run._run.round == losses.index(min(losses)) + 1


def test_clients_own_metrics_can_be_the_metric(tmp_path):
    clients = partition(toy(), "iid", 5)
    run = FederatedTrainer(
        mlp(norm=False), arguments(tmp_path, early_stopping_patience=1, learning_rate=3.0,
                                   num_rounds=30),
        clients, client_eval_dataset=clients,
    )  # fmt: skip
    losses = [r.metrics["client_loss_mean"] for r in run.train()]
    assert len(losses) < 30
    assert losses[-1] >= min(losses[:-1])
    assert losses[:-1] == sorted(losses[:-1], reverse=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"load_best_model_at_end": True, "eval_every": 0}, "needs evaluations: eval_every must"),
        ({"early_stopping_patience": 0}, "None never stops early"),
        ({"early_stopping_threshold": -0.1}, "early_stopping_threshold must be in"),
    ],
)
def test_bad_arguments(tmp_path, changes, says):
    with pytest.raises(ArgumentsError, match=says):
        arguments(tmp_path, **changes)


def test_a_metric_that_is_nowhere_is_refused_by_name(tmp_path):
    with pytest.raises(ArgumentsError, match=r"'bleu' is not among .*\(eval_loss, eval_score\)"):
        trainer(tmp_path, metric_for_best_model="bleu").train()
    args = arguments(tmp_path, load_best_model_at_end=True)
    with pytest.raises(ArgumentsError, match="has nothing to be evaluated on: give eval_dataset"):
        FederatedTrainer(mlp(), args, partition(toy(), "iid", 5))


def test_the_card_speaks_of_the_model_that_is_in_place(tmp_path):
    run = trainer(tmp_path, load_best_model_at_end=True)
    run.train()
    run.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "10; this is the model after round 4" in text
    assert "0.9 after round 4" in text
    assert isinstance(run.model.peft_config["default"], FedParaConfig)


def test_names_and_defaults_are_transformers(tmp_path):
    theirs, ours = TrainingArguments("none", use_cpu=True), FederatedArguments("none")
    for name in ("metric_for_best_model", "greater_is_better", "load_best_model_at_end"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.early_stopping_threshold == EarlyStoppingCallback().early_stopping_threshold
    assert ours.per_client_max_steps == theirs.max_steps


# What callbacks ask for.


class Asks(FederatedCallback):
    """Asks for things at the end of rounds: ``Asks(stop=3, save=(1, 2))``."""

    def __init__(self, stop=0, save=(), evaluate=(), before=False, in_evaluation=None):
        self.stop, self.save, self.evaluate = stop, save, evaluate
        self.before, self.in_evaluation, self.seen = before, in_evaluation, []

    def on_train_begin(self, server, control):
        assert isinstance(control, FederatedControl)
        control.should_stop = self.before

    def on_round_end(self, server, report, control):
        self.seen.append(("end", report.round))
        control.should_stop |= report.round == self.stop
        control.should_save |= report.round in self.save
        control.should_evaluate |= report.round in self.evaluate

    def on_evaluate(self, server, report, control):
        assert report.metrics
        self.seen.append(("evaluate", report.round))
        if self.in_evaluation:
            setattr(control, self.in_evaluation, True)


def test_a_callback_stops_the_run_after_a_round_that_is_the_last(tmp_path):
    asks = Asks(stop=3)
    run = trainer(tmp_path, callbacks=[asks], eval_every=2, save_every=2)
    history = run.train()
    assert [r.round for r in history if r.metrics] == [2, 3]  # as the last round always is
    assert list(checkpoints(tmp_path)) == [2, 3]
    assert asks.seen == [
        ("end", 1), ("evaluate", 2), ("end", 2), ("end", 3), ("evaluate", 3),
    ]  # fmt: skip
    only = trainer(tmp_path / "only", num_rounds=3)
    only.train()
    assert equal(state_of(run), state_of(only))


def test_before_the_first_round_a_callback_can_stop_it_all(tmp_path):
    assert len(trainer(tmp_path, callbacks=[Asks(before=True)]).train()) == 0


def test_checkpoints_and_evaluations_are_made_when_asked_for(tmp_path):
    run = trainer(tmp_path, callbacks=[Asks(save=(1, 4), evaluate=(4, 7))], eval_every=5)
    history = run.train()
    assert [r.round for r in history if r.metrics] == [4, 5, 7, 10]
    assert list(checkpoints(tmp_path)) == [1, 4]
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert same(final(run), final(whole))
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert same(final(again), final(whole))


def test_an_evaluation_asked_for_after_the_checkpoint_is_in_the_checkpoint(tmp_path):
    """Or a resumed run would not know that it was the best."""
    settings = {"eval_every": 10, "save_every": 2, "load_best_model_at_end": True}
    cut = trainer(tmp_path, callbacks=[Asks(evaluate=(4,)), StopAfter(6)], **settings)
    with pytest.raises(InterruptedTestError):
        cut.train()
    found = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert found["rounds"][-1]["metrics"]["eval_score"] == SCORES[3]
    again = trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again._run.round == 4
    assert not list(tmp_path.glob(".checkpoint*"))


@pytest.mark.parametrize("asked", [2, 3])
def test_an_evaluation_asked_for_can_be_the_last_and_the_best(tmp_path, asked):
    run = trainer(
        tmp_path, callbacks=[Asks(evaluate=(1, asked))], eval_every=10, num_rounds=10,
        load_best_model_at_end=True, early_stopping_patience=1,
        scores=(0.5, 0.3, 0.2, *[0.9] * 7),
    )  # fmt: skip
    assert len(run.train()) == asked
    assert run._run.round == 1


def test_what_is_asked_in_an_evaluation_is_done(tmp_path):
    trainer(tmp_path, callbacks=[Asks(in_evaluation="should_save")], eval_every=4).train()
    assert list(checkpoints(tmp_path)) == [4, 8, 10]
    asks = Asks(in_evaluation="should_stop", evaluate=(3,))
    asks.on_round_end = lambda server, report, control: setattr(
        control, "should_evaluate", report.round == 3
    )
    history = trainer(tmp_path / "b", callbacks=[asks], eval_every=9).train()
    assert len(history) == 3


def test_callbacks_of_the_old_signature_and_of_some_methods_go_on_working(tmp_path):
    seen = []

    class Old(FederatedCallback):
        def on_train_begin(self, server):
            super().on_train_begin(server)
            seen.append("begin")

        def on_round_end(self, server, report):
            super().on_round_end(server, report)
            seen.append(report.round)

    class Some:
        def on_train_end(self, *given):
            seen.append(len(given))

    class Anything:
        def on_round_end(self, server, report, **more):
            seen.append(sorted(more))

    trainer(tmp_path, num_rounds=1, callbacks=[Old(), Some(), Anything()]).train()
    assert seen == ["begin", 1, ["control"], 2]


class Otherwise(FederatedCallback):
    def on_round_end(self, server, report, wishes):
        pass


@pytest.mark.parametrize("callback", [Otherwise(), TrainerCallback()])
def test_a_callback_that_cannot_be_called_is_told_before_the_run(tmp_path, callback):
    name = type(callback).__name__
    with pytest.raises(ArgumentsError, match=rf"{name}.on_\w+\(.*cannot be called .*take \(server"):
        trainer(tmp_path, callbacks=[callback])
