"""Every example runs as its first line says, without a network or a data set."""

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image, Value
from tests.forks import run_script

pytestmark = pytest.mark.programs

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(script, *arguments):
    return run_script(EXAMPLES / script, "--disable_tqdm", "True", *arguments)


def smoke(script, output, *arguments):
    done = run(script, "--output_dir", output, "--smoke", "True", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern, text):
    return float(re.search(pattern, text).group(1).replace(",", ""))


@pytest.mark.parametrize("script", ["vgg16_cifar.py", "resnet18_cifar.py"])
def test_image_nets_learn(script, tmp_path):
    said = smoke(script, tmp_path)
    assert ", 0.125 times as wide," in said
    assert number(r"fedpara trains ([\d,]+)", said) < 0.2 * number(r"has ([\d,]+) param", said)
    assert number(r"accuracy ([\d.]+)%", said) > 18  # a tenth are right by chance
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()


def test_images_take_a_method_a_split_and_a_strategy_by_name(tmp_path):
    options = "--method lowrank --split dirichlet --strategy FedProx --num_clients 3"
    said = smoke("vgg16_cifar.py", tmp_path, *options.split(), "--strategy_args", '{"mu": 0.1}')
    assert "lowrank trains" in said


def test_characters_are_predicted(tmp_path):
    said = smoke("lstm_shakespeare.py", tmp_path)
    assert number(r"next character: ([\d.]+)%", said) > 20  # always guessing a blank: 15


def test_a_language_model_is_tuned_saved_merged_and_speaks(tmp_path):
    said = smoke("finetune_llm.py", tmp_path)
    assert number(r"([\d.]+) after", said) < 0.8 * number(r"loss ([\d.]+) before", said)
    assert "it goes on: 'The " in said
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "script", ["vgg16_cifar.py", "lstm_shakespeare.py", "finetune_llm.py --model tiny"]
)
def test_a_missing_data_set_is_explained(script, tmp_path):
    done = run(*script.split(), "--output_dir", tmp_path, "--data", tmp_path / "nowhere")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "nowhere" in last
    assert "--data" in last
    assert "--smoke True" in last


def test_plays_are_cut_by_role(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from lstm_shakespeare import load_windows

    plays = tmp_path / "plays.txt"
    plays.write_text(f"First Lord:\n{'a' * 100}\n{'b' * 100}\n\nFool:\nWhy: {'c' * 160}\n\nExeunt")
    roles = load_windows(str(plays), smoke=False)
    assert roles.keys() == {"First Lord", "Fool"}
    assert roles["First Lord"] == ["a" * 81, "a" * 20 + "\n" + "b" * 60]
    assert [len(piece) for piece in roles["Fool"]] == [81, 81]


def test_rows_of_single_characters_become_the_same_windows(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from lstm_shakespeare import load_windows, windows

    text = "".join(chr(97 + i % 23) for i in range(400))
    rows = [{"character_id": "A", "x": text[i : i + 80], "y": text[i + 80]} for i in range(320)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    assert load_windows(str(tmp_path), smoke=False) == {"A": windows(text)}


@pytest.mark.parametrize("columns", [("img", "label"), ("img", "fine_label"), ("image", "label")])
def test_images_are_found_under_each_data_sets_names(columns, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from vision import as_tensors

    pixels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    pictures = [PIL.Image.fromarray(pixels), PIL.Image.fromarray(pixels[..., 0])]  # one is grey
    features = Features({columns[0]: Image(), columns[1]: Value("int64")})
    rows = Dataset.from_dict({columns[0]: pictures, columns[1]: [3, 5]}, features=features)
    images, labels = as_tensors(rows, None).tensors
    assert labels.tolist() == [3, 5]
    assert (images[0].permute(1, 2, 0).numpy() == pixels).all()
    assert (images[1].numpy() == pixels[..., 0]).all()
    assert len(as_tensors(rows, 1)) == 1


def test_vgg16_has_the_papers_sizes(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from vgg16_cifar import vgg16
    from vision import factorize, trained

    assert trained(vgg16(10)) == 15_253_578
    assert trained(factorize(vgg16(10), "dense", 0.1)) == 15_253_578
    assert trained(factorize(vgg16(10), "fedpara", 0.1)) == 1_546_844  # 10.14%
    assert trained(factorize(vgg16(10), "lowrank", 0.1)) == 1_563_336  # 10.25%
