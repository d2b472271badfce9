"""Model cards: what is in them, what of a user's they keep, and that pushing keeps them."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model
from tests.federation.test_trainer import arguments, toy
from tests.hub import serve
from tests.zoo import adapted, mlp
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fedpara_peft import FederatedTrainer, FedParaConfig, accuracy, partition
from fedpara_peft.comm.ledger import shown_bytes
from fedpara_peft.tuner.card import note_training

BERT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 20, "max_position_embeddings": 16,
}  # fmt: skip


def card_of(model, folder):
    model.save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def bert(name=""):
    model = BertForSequenceClassification(BertConfig(**BERT))
    model.config._name_or_path = model.name_or_path = name
    config = FedParaConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    return get_peft_model(model, config)


def test_what_is_in_it(tmp_path):
    model = adapted(mlp(), gamma=0.4)
    card = card_of(model, tmp_path)
    assert card.data.library_name == "peft"
    assert card.data.tags == ["fedpara"]
    assert card.data.base_model is None
    text = card.text
    assert text.index("import fedpara_peft") < text.index("from peft import PeftModel")
    trained = sum(p.numel() for p in model.parameters())
    dense = sum(p.numel() for p in mlp().parameters())
    buffers = 65  # the batch norm's, which are no parameters
    assert dense + buffers > trained
    assert f"| values trained | {trained:,} (" in text
    assert f"| bytes | {4 * trained:,} (dense: {4 * dense:,}) |" in text
    assert "| γ | 0.4 |" in text
    assert "More Information" not in text
    assert "personal" not in text
    assert "Federated training" not in text


def test_two_adapters(tmp_path):
    model = adapted(mlp(), base_weight="frozen")
    config = FedParaConfig(r=2, target_modules=["3"], parameterization="pfedpara")
    model.add_adapter("other", config)
    text = card_of(model, tmp_path).text
    assert "### Adapter `default`" in text
    assert 'subfolder="other"' in text
    assert text.count("The personal half") == 1


def test_what_a_user_wrote_is_kept(tmp_path):
    model = bert()
    readme = tmp_path / "README.md"
    readme.write_text(
        "---\nlicense: mit\ntags:\n- mine\nbase_model: me/base\n---\n# Mine\n\nHello.\n"
    )
    card = card_of(model, tmp_path)
    assert card.text.startswith("# Mine\n\nHello.\n")
    assert card.data.license == "mit"
    assert {"mine", "fedpara"} <= set(card.data.tags)
    assert card.data.base_model == "me/base"
    readme.write_text(readme.read_text() + "\nLast words.\n")
    again = card_of(model, tmp_path)
    assert again.text.rstrip().endswith("Last words.")
    assert again.text.count("## FedPara") == 1
    assert card_of(model, tmp_path).content == again.content


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_the_base_model_is_named_where_others_find_it(tmp_path):
    card = card_of(bert("me/bert"), tmp_path / "hub")
    assert card.data.base_model == "me/bert"
    assert {"fedpara", "transformers", "base_model:adapter:me/bert"} == set(card.data.tags)
    assert 'AutoModelForSequenceClassification.from_pretrained("me/bert")' in card.text
    (tmp_path / "base").mkdir()
    card = card_of(bert(str(tmp_path / "base")), tmp_path / "local")
    assert card.data.base_model is None
    assert str(tmp_path) not in card.content


def test_other_methods_keep_their_card(tmp_path):
    model = get_peft_model(mlp(), LoraConfig(target_modules=["0"]))
    card = card_of(model, tmp_path)
    assert "FedPara" not in card.content
    assert "Model Card for Model ID" in card.text


def test_of_the_federated_trainer(tmp_path):
    args = arguments(tmp_path, num_rounds=2, uplink_codec="int8")
    clients = partition(toy(), "iid", 4)
    model = adapted(mlp())
    trainer = FederatedTrainer(model, args, clients, toy(), compute_metrics=accuracy)
    history = trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    text = ModelCard.load(tmp_path / "adapter/README.md").text
    assert "| rounds | 2 |" in text
    assert "| clients | 4, 3 in a round |" in text
    assert "| codecs | int8 up, identity down |" in text
    assert f"| sent | {shown_bytes(history.total_bytes)} (" in text
    assert f"| eval_accuracy | {history[-1].metrics['eval_accuracy']:.4g} after round 2 |" in text
    assert f"| learning rate | {args.learning_rate:g} |" in text


def test_results_are_for_the_hub_to_read(tmp_path):
    model = adapted(mlp())
    note_training(model, {}, {"eval_accuracy": 0.91237, "eval_loss": float("nan")})
    mine = EvalResult("other", "mnist", "MNIST", "accuracy", 0.5)
    data = ModelCardData(model_name="mine", eval_results=[mine])
    (tmp_path / "README.md").write_text(f"---\n{data}\n---\n# Mine\n")
    for _ in range(2):  # written anew, not added to
        card = card_of(model, tmp_path)
    assert card.data.model_name == "mine"
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    ours = "evaluation data of the federated run"
    assert found == {("MNIST", "accuracy"): 0.5, (ours, "accuracy"): 0.9124}


def test_licence_citation_and_ranks(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    BertConfig(**BERT).save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
    card = card_of(bert(str(base)), tmp_path / "of a base")
    assert card.data.license == "cc-by-4.0"
    assert "`cc-by-4.0`, for the adapter" in card.text
    assert "@inproceedings{hyeonwoo2022fedpara," in card.text
    assert "| rank within reach / full rank | 4/32 |" in card.text
    card = card_of(adapted(mlp(), gamma=0.4), tmp_path / "of none")
    assert card.data.license is None
    assert "put `license:` into this card's metadata" in card.text
    assert re.search(r"full rank \| \d+/\d+( to \d+/\d+)? \|", card.text)


def test_transformers_trainer_adds_to_it(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
        trainer = Trainer(bert(), args)
        trainer.save_model()
        trainer.create_model_card(model_name="theirs")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.lstrip().startswith("<!-- This model card has been generated")
    assert "import fedpara_peft" in card.text
    assert "### Training hyperparameters" in card.text
    assert "fedpara" in card.data.tags


PUSH = """
import os, shutil
from huggingface_hub import ModelCard
from fedpara_peft.cli import main
from fedpara_peft.tuner.card import note_training
from tests.zoo import adapted, mlp
model = adapted(mlp())
note_training(model, {"rounds": "7"})
model.push_to_hub("me/adapter", token="hf_test")
card = ModelCard.load("me/adapter")
assert card.data.library_name == "peft", card.data
assert card.data.tags == ["fedpara"], card.data
assert "import fedpara_peft" in card.text and "| rounds | 7 |" in card.text, card.text
assert card.text.lstrip().startswith("# FedPara adapter"), card.text
assert "More Information Needed" not in card.text, card.text
card = ModelCard("---\\nlicense: mit\\n---\\n# Mine\\n\\nHello.\\n")
card.push_to_hub("me/adapter", token="hf_test")
shutil.rmtree(os.environ["HF_HOME"])  # to the cache, the test server has one commit for ever
model.push_to_hub("me/adapter", token="hf_test")
assert main(["inspect", "me/adapter"]) == 0
assert main(["inspect", "me/other"]) == 2
"""


@pytest.mark.programs
def test_pushing_keeps_it(tmp_path):
    server = serve()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PUSH],
            env={
                **os.environ,
                "HF_ENDPOINT": server.url,
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HOME": str(tmp_path / "home"),
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert "me/adapter: FEDPARA" in done.stdout
    assert "fedpara: 'me/other' is no local folder" in done.stderr
    card = ModelCard(server.files["README.md"].decode())
    assert card.text.lstrip().startswith("# Mine\n\nHello.")
    assert card.data.license == "mit"
    assert card.data.library_name == "peft"
    assert card.data.tags == ["fedpara"]
    assert "| rounds | 7 |" in card.text


def test_a_template_that_someone_filled_in_is_kept(tmp_path):
    template = ModelCard.from_template(ModelCardData(), model_description="Of cats.")
    template.save(tmp_path / "README.md")
    assert "Of cats." in card_of(adapted(mlp()), tmp_path).text
