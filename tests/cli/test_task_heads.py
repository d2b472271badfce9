"""Adapters of a task, on a base that was saved with another head: merged and converted as trained.

What each command writes is compared with the model that was trained, in Python.
"""

import warnings

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from tests.zoo import randomize
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from fedpara_peft import FedParaConfig, save_local
from fedpara_peft.cli import main

IDS = torch.arange(1, 13).view(2, 6)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}
LLAMA = {**SMALL, "num_hidden_layers": 1, "pad_token_id": 0}
SAVED = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama of 2 labels": lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL, num_hidden_layers=1)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(dim=16, hidden_dim=24, n_layers=1, n_heads=2, vocab_size=40)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40)
    ),
}
AUTO = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoModel,
}
Q = {"target_modules": ["q_proj"]}
# base, task, labels, configuration
CASES = {
    "Llama classifies": ("llama", "SEQ_CLS", 3, Q),
    "Llama regresses": ("llama", "SEQ_CLS", 1, Q),
    "Llama classifies tokens": ("llama", "TOKEN_CLS", 4, Q),
    "Llama without its head": ("llama", "FEATURE_EXTRACTION", None, Q),
    "another head than was saved": ("llama of 2 labels", "SEQ_CLS", 5, Q),
    "a classifier that writes": ("llama of 2 labels", "CAUSAL_LM", None, {
        **Q, "modules_to_save": ["lm_head"]}),
    "Bert classifies": ("bert", "SEQ_CLS", 3, {
        "target_modules": ["query"], "modules_to_save": ["pooler.dense"]}),
    "Bert classifies tokens": ("bert", "TOKEN_CLS", 5, {"target_modules": ["query"]}),
    "Bert answers": ("bert", "QUESTION_ANS", None, {"target_modules": ["query"]}),
    "DistilBert, a head of two layers": ("distilbert", "SEQ_CLS", 3, {"target_modules": ["q_lin"]}),
    "T5": ("t5", "SEQ_2_SEQ_LM", None, {"target_modules": ["q"]}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _transformers_own_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name, build in SAVED.items():
        torch.manual_seed(1)
        build().save_pretrained(folder / name)
    return folder


def loaded(base, task, labels):
    changes = {} if labels is None else {"num_labels": labels}
    return AUTO[task].from_pretrained(base, ignore_mismatched_sizes=True, **changes)


def output(model):
    model = model.eval().double()  # what differs is then the weights, not how they are summed up
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model(input_ids=IDS, **decoder)
    names = ("start_logits", "logits", "last_hidden_state")
    return next(out[name] for name in names if name in out)


def trained(base, folder, task, labels, **config):
    """An adapter in a folder, and what its model says."""
    torch.manual_seed(2)
    model = get_peft_model(
        loaded(base, task, labels), FedParaConfig(**{"r": 2, "task_type": task, **config})
    )
    randomize(model).save_pretrained(folder)
    return model


def run(*argv):
    assert main([str(a) for a in argv]) == 0


def refused(capsys, *argv):
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_a_task_is_merged_and_converted(bases, tmp_path, case):
    name, task, labels, config = CASES[case]
    base = bases / name
    model = trained(base, tmp_path / "a", task, labels, **config)
    again = PeftModel.from_pretrained(loaded(base, task, labels), str(tmp_path / "a"))
    plain = again.merge_and_unload()
    run("merge", tmp_path / "a", "--base", base, "--output", tmp_path / "merged")
    run("convert", "--to", "lora", tmp_path / "a", tmp_path / "lora", "--base", base)
    merged = AUTO[task].from_pretrained(tmp_path / "merged")
    assert type(merged) is type(plain)
    assert merged.config.num_labels == plain.config.num_labels
    state = merged.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    lora = PeftModel.from_pretrained(loaded(base, task, labels), str(tmp_path / "lora"))
    expected = output(model)
    torch.testing.assert_close(output(merged), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(lora), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base_weight", ["replaced", "seeded"])
def test_a_classifier_trained_from_scratch_is_merged(bases, tmp_path, base_weight):
    base = bases / "bert"
    config = {"target_modules": ["query"], "base_weight": base_weight}
    model = trained(base, tmp_path / "a", "SEQ_CLS", 3, **config)
    argv = ("--base", base / "config.json", "--output", tmp_path / "merged")
    run("merge", tmp_path / "a", *argv)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(merged), output(model), rtol=1e-5, atol=1e-5)


def test_the_class_that_an_adapter_without_a_task_names(bases, tmp_path):
    config = {**Q, "task_type": None, "modules_to_save": ["score"]}
    model = trained(bases / "llama", tmp_path / "a", "SEQ_CLS", 3, **config)
    run("merge", tmp_path / "a", "--base", bases / "llama", "--output", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(merged), output(model), rtol=1e-5, atol=1e-5)


def test_a_task_that_does_not_say_which_model_was_trained(bases, tmp_path):
    """Of masked words PEFT has no task: what fits the adapter's tensors is what was saved."""
    net = BertForMaskedLM.from_pretrained(bases / "bert")
    config = FedParaConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION")
    model = randomize(get_peft_model(net, config))
    model.save_pretrained(tmp_path / "a")
    run("merge", tmp_path / "a", "--base", bases / "bert", "--output", tmp_path / "merged")
    merged = BertForMaskedLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(merged), output(model), rtol=1e-5, atol=1e-5)


def test_a_merged_model_has_no_random_weights(bases, tmp_path, capsys):
    """A base for masked words has no pooler; an adapter that does not hold it is not merged."""
    trained(bases / "bert", tmp_path / "a", "SEQ_CLS", 3, target_modules=["query"])
    argv = ["merge", tmp_path / "a", "--base", bases / "bert", "--output", tmp_path / "merged"]
    err = refused(capsys, *argv)
    assert "bert.pooler.dense.bias, bert.pooler.dense.weight: give --base a folder" in err
    assert "classifier" not in err
    assert not (tmp_path / "merged").exists()
    argv = ["convert", "--to", "lora", tmp_path / "a", tmp_path / "lora", "--base", bases / "bert"]
    run(*argv)


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_a_head_that_stays_with_the_client(bases, tmp_path, capsys, base_weight):
    config = {**Q, "local_modules": ["score"], "base_weight": base_weight}
    model = trained(bases / "llama", tmp_path / "a", "SEQ_CLS", 3, **config)
    save_local(model, tmp_path / "mine")
    argv = ["merge", tmp_path / "a", "--base", bases / "llama", "--output", tmp_path / "merged"]
    assert "has score.weight: give --local the client's half" in refused(capsys, *argv)
    run(*argv, "--local", tmp_path / "mine")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(merged), output(model), rtol=1e-5, atol=1e-5)


def test_a_loha_of_a_classifier_becomes_fedpara(bases, tmp_path):
    torch.manual_seed(2)
    net = loaded(bases / "llama", "SEQ_CLS", 3)
    loha = LoHaConfig(r=2, alpha=2, task_type="SEQ_CLS", init_weights=False, **Q)
    model = get_peft_model(net, loha).eval()
    model.save_pretrained(tmp_path / "a")
    run("convert", "--to", "fedpara", tmp_path / "a", tmp_path / "b", "--base", bases / "llama")
    again = PeftModel.from_pretrained(loaded(bases / "llama", "SEQ_CLS", 3), str(tmp_path / "b"))
    torch.testing.assert_close(output(again), output(model), rtol=1e-5, atol=1e-5)
    run("merge", tmp_path / "b", "--base", bases / "llama", "--output", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(merged), output(model), rtol=1e-5, atol=1e-5)
