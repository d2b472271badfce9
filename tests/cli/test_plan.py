"""``fedpara plan`` of classifiers: the head is new, trained and sent as a whole."""

import pytest
from peft import get_peft_model
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from fedpara_peft import FederatedArguments, FedParaConfig, plan
from fedpara_peft.cli import main
from fedpara_peft.comm.ledger import shown_bytes

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "vocab_size": 20, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """As most encoders are published: with a head for masked words."""
    folder = tmp_path_factory.mktemp("bert")
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(folder)
    return folder


def test_a_classifier_is_planned_with_its_head(base, capsys):
    argv = "--task-type SEQ_CLS --num-labels 5 --r 2 --target-modules query,value --rounds 7"
    assert main(["plan", str(base), *argv.split()]) == 0
    out = capsys.readouterr().out
    net = BertForSequenceClassification(BertConfig(**SIZES, num_labels=5))
    dense = sum(p.numel() for p in net.parameters())
    config = FedParaConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(net, config)
    expected = plan(model, FederatedArguments("", num_rounds=7, clients_per_round=10), 100)
    assert expected.num_values == 2 * 2 * 2 * (32 + 32) + 5 * 32 + 5
    assert f"BertForSequenceClassification, {dense:,} values" in out
    assert f"{expected.num_values:,} values are communicated, 7 rounds" in out
    assert f"the run:            {shown_bytes(expected.total_bytes)}, the dense" in out


def test_modules_are_trained_whole_by_name(base, capsys):
    argv = ["plan", str(base), "--r", "2", "--target-modules", "query"]
    assert main([*argv, "--modules-to-save", "pooler, transform.dense"]) == 2
    assert "BertForMaskedLM has no module 'pooler'" in capsys.readouterr().err
    assert main([*argv, "--modules-to-save", "transform.dense"]) == 0
    assert f"{2 * 2 * (32 + 32) + 32 * 32 + 32:,} values are comm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--task-type SEQ_2_SEQ_LM", "bert model, of which transformers has none for SEQ_2_SEQ_LM"),
        ("--num-labels 0", "--num-labels must be at least 1, got 0"),
        ("--modules-to-save head", "at its top are bert, cls"),
        ("--target-modules q_proj", "bert: Target modules {'q_proj'} not found"),
    ],
)
def test_what_does_not_fit_is_said_by_name(base, capsys, options, says):
    assert main(["plan", str(base), *options.split()]) == 2
    err = capsys.readouterr().err
    assert says in err.replace(str(base), "bert")
    assert err.count("\n") == 1
