"""Every subcommand on a small Llama, in this process."""

import copy
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections import OrderedDict

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.zoo import randomize
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedpara_peft import (
    FederatedArguments,
    FedParaConfig,
    Scaffold,
    plan,
    save_as_loha,
    save_as_lora,
    save_local,
)
from fedpara_peft.cli import main

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "vocab_size": 50,
    "num_attention_heads": 4,
    "architectures": ["LlamaForCausalLM"],
}
IDS = torch.arange(10)[None]


@pytest.fixture(autouse=True)
def _transformers_own_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
    return folder


def adapter(base, folder, **config):
    """A trained adapter in a folder, and its model."""
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), FedParaConfig(**config))
    randomize(model).eval().save_pretrained(folder)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def refused(capsys, *argv):
    """The one line that a command refuses with."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fedpara: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_plan_prints_what_the_planner_says(base, capsys, base_weight):
    options = "--gamma 0.3 --rounds 7 --clients 30 --clients-per-round 4 --strategy scaffold "
    options += "--uplink-codec int8 --megabits-per-s 5 --joules-per-bit 1e-7"
    argv = ["plan", str(base / "config.json"), "--base-weight", base_weight, *options.split()]
    assert main(argv) == 0
    out = capsys.readouterr().out
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**CONFIG)),
        FedParaConfig(gamma=0.3, base_weight=base_weight, target_modules="all-linear"),
    )
    args = FederatedArguments("", num_rounds=7, clients_per_round=4, uplink_codec="int8")
    expected = plan(model, args, 30, Scaffold())
    assert f"{expected.num_values:,} values are communicated, 7 rounds of 4 of 30" in out
    assert (
        f"the run:            {expected.total_bytes / 1e6:,.2f} MB, the dense model sent alike"
        in out
    )
    assert f"at 5 Mbit/s: {expected.total_s(5.0):.3g} s" in out
    assert f"1e-07 J/bit: {expected.energy_j(1e-7):.4g} J" in out
    assert "model.layers.0.mlp.up_proj" in out


def test_energy_is_printed_only_with_a_figure_for_it(base, capsys):
    assert main(["plan", str(base), "--r", "2", "--target-modules", "q_proj,v_proj"]) == 0
    out = capsys.readouterr().out
    assert "energy" not in out
    assert out.count("_proj") == 2
    assert "10 of 100 clients" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--r", "0"], "positive integer"),
        (["--gamma", "2"], "gamma"),
        (["--clients", "2", "--clients-per-round", "3"], "only 2 clients"),
        (["--clients", "0"], "--clients"),
        (["--clients-per-round", "0"], "clients_per_round"),
        (["--rounds", "-1"], "num_rounds"),
        (["--uplink-codec", "zip"], "unknown codec"),
        (["--target-modules", "nothing"], "--target-modules"),
        (["--megabits-per-s", "0"], "must be positive"),
    ],
)
def test_plan_refuses_in_one_line(base, capsys, options, says):
    assert says in refused(capsys, "plan", base, *options)


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert "give MODEL a folder on this machine" in refused(capsys, "plan", "no/such-model")
    assert "give MODEL a folder that exists" in refused(capsys, "plan", tmp_path / "nothing")
    assert "has no config.json" in refused(capsys, "plan", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    assert "no configuration that transformers knows" in refused(capsys, "plan", tmp_path)
    assert "give ADAPTER a folder" in refused(capsys, "inspect", "no/such-adapter")
    assert "holds no adapter" in refused(capsys, "inspect", tmp_path)


def test_inspect(base, tmp_path, capsys):
    model = adapter(base, tmp_path / "a", rank_pattern={"q_proj": 2}, alpha=8)
    assert main(["inspect", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    state = load_file(tmp_path / "a/adapter_model.safetensors")
    count = sum(t.numel() for t in state.values())
    assert re.search(rf"total +{len(state)} +{count:,} +{4 * count / 1e3:.2f} kB", out)
    assert re.search(r"self_attn.q_proj +2 ", out)
    assert re.search(r"self_attn.k_proj +4 ", out)
    assert "alpha: 8" in out
    assert "needs the base model" in out
    assert "local" not in out
    assert count == model.get_nb_trainable_parameters()[0]


def test_inspect_says_what_is_missing(base, tmp_path, capsys):
    model = adapter(base, tmp_path / "a", parameterization="pfedpara", base_weight="replaced")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "local, so not in this adapter: W₂ of every layer" in out
    assert "merging needs only its configuration" in out
    save_local(model, tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert "do not push this folder" in capsys.readouterr().out


def test_inspect_of_a_broken_file(base, tmp_path, capsys):
    adapter(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    assert "save or fetch it again" in refused(capsys, "inspect", tmp_path)
    adapter(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3}))
    assert "cannot be read" in refused(capsys, "inspect", tmp_path)


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_merge(base, tmp_path, capsys, base_weight):
    model = adapter(base, tmp_path / "a", base_weight=base_weight)
    argv = ["merge", tmp_path / "a", "--base", base, "--output", tmp_path / "merged"]
    assert main([str(a) for a in argv]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)
    assert "give --output a new folder" in refused(capsys, *argv)


def test_merge_of_a_personal_model(base, tmp_path, capsys):
    model = adapter(base, tmp_path / "a", parameterization="pfedpara")
    save_local(model, tmp_path / "mine")
    argv = ["merge", str(tmp_path / "a"), "--base", str(base), "--output", str(tmp_path / "m")]
    assert main(argv) == 0
    assert "shared model" in capsys.readouterr().out
    argv[-1] += "2"
    assert main([*argv, "--local", str(tmp_path / "mine")]) == 0
    assert "shared model" not in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m2")
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)


def test_merge_with_another_base(base, tmp_path, capsys):
    adapter(base, tmp_path / "a")
    LlamaForCausalLM(LlamaConfig(**{**CONFIG, "hidden_size": 32})).save_pretrained(tmp_path / "b")
    argv = ["merge", tmp_path / "a", "--base", tmp_path / "b", "--output", tmp_path / "m"]
    assert "give --base the model it was trained on" in refused(capsys, *argv)
    assert not (tmp_path / "m").exists()
    argv = ["convert", "--to", "lora", tmp_path / "a", tmp_path / "m", "--base", tmp_path / "b"]
    assert "give --base the model it was trained on" in refused(capsys, *argv)


def test_convert_there_and_back(base, tmp_path, capsys):
    model = adapter(base, tmp_path / "a")
    config = base / "config.json"

    def convert(to, source, target, *options):
        argv = ["convert", "--to", to, tmp_path / source, tmp_path / target, *options]
        assert main([str(a) for a in argv]) == 0
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(tmp_path / target)
        )

    for converted in (
        convert("lora", "a", "lora", "--base", config),
        convert("loha", "a", "loha", "--base", config),
        convert("fedpara", "loha", "back"),
        convert("lora", "loha", "lora2", "--base", config),
    ):
        assert torch.allclose(logits(converted), logits(model), atol=1e-4)
    assert "LORA of rank 16" in capsys.readouterr().out


def test_a_conversion_whose_targets_are_a_regex(tmp_path, capsys):
    plain = nn.Sequential(
        OrderedDict(fc=nn.Linear(6, 6), block=nn.Sequential(OrderedDict(fc=nn.Linear(6, 6))))
    )
    model = randomize(get_peft_model(copy.deepcopy(plain), FedParaConfig(target_modules="fc")))
    x = torch.randn(3, 6)
    for save, name in ((save_as_lora, "lora"), (save_as_loha, "loha")):
        save(model, tmp_path / name)
        assert main(["inspect", str(tmp_path / name)]) == 0
        assert "target modules: fc\n" in capsys.readouterr().out
    argv = ["convert", "--to", "fedpara", str(tmp_path / "loha"), str(tmp_path / "back")]
    assert main(argv) == 0
    again = PeftModel.from_pretrained(plain, str(tmp_path / "back"))
    torch.testing.assert_close(again(x), model(x))


def test_convert_of_a_personal_model(base, tmp_path, capsys):
    model = adapter(base, tmp_path / "a", parameterization="pfedpara")
    save_local(model, tmp_path / "mine")
    argv = ["convert", "--to", "lora", tmp_path / "a", tmp_path / "lora", "--base", base]
    assert "no personal half" in refused(capsys, *argv)
    assert main([str(a) for a in [*argv, "--local", tmp_path / "mine"]]) == 0
    lora = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora")
    )
    assert torch.allclose(logits(lora), logits(model), atol=1e-4)


def test_convert_refuses_in_one_line(base, tmp_path, capsys):
    adapter(base, tmp_path / "a")
    adapter(base, tmp_path / "r", base_weight="replaced")
    get_peft_model(
        LlamaForCausalLM(LlamaConfig(**CONFIG)), LoHaConfig(target_modules=["q_proj"])
    ).save_pretrained(tmp_path / "loha")
    new = tmp_path / "new"
    for to, source, says in (
        ("lora", "a", "--base"),
        ("fedpara", "a", "already"),
        ("loha", "loha", "already"),
        ("lora", "r", "fedpara merge"),
    ):
        assert says in refused(capsys, "convert", "--to", to, tmp_path / source, new)
    taken = ["convert", "--to", "lora", tmp_path / "a", tmp_path / "r", "--base", base]
    assert "give OUT a new folder" in refused(capsys, *taken)
    assert not new.exists()


def test_a_file_that_cannot_be_written(base, tmp_path, capsys):
    adapter(base, tmp_path / "a")
    (tmp_path / "file").touch()
    argv = ["merge", tmp_path / "a", "--base", base, "--output", tmp_path / "file/merged"]
    assert "file" in refused(capsys, *argv)


def test_help_has_examples(capsys):
    for command in ([], ["plan"], ["inspect"], ["merge"], ["convert"], ["report"]):
        with pytest.raises(SystemExit) as done:
            main([*command, "--help"])
        assert done.value.code == 0
        assert "examples:\n  " in capsys.readouterr().out


PROCESS = """
import sys
import peft
before = set(sys.modules)
import fedpara_peft
print(*sorted({name.partition(".")[0] for name in sys.modules.keys() - before}))
from fedpara_peft.cli import main
sys.exit(main())
"""


@pytest.mark.programs
def test_as_a_process_that_imports_little(base):
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, "plan", str(base), "--r", "0"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "\nfedpara: `r` should be" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr
    # What an import costs is what it imports: nothing heavy beyond peft, and no optional extra.
    extras = {"datasets", "dp_accounting", "flwr", "matplotlib", "pandas", "sklearn", "tensorboard"}
    assert not extras & set(done.stdout.split())


# Damaged and foreign folders.


def _config(**changes):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def _text(text):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def _tensors(change):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return damage


def _cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


DAMAGE = {
    "rank is a text": _config(r="8"),
    "rank is another": _config(r=3),
    "unknown choice": _config(base_weight="x"),
    "another method": _config(peft_type="NOPE"),
    "no method": _config(peft_type=None),
    "method is a list": _config(peft_type=[1]),
    "targets are a number": _config(target_modules=5),
    "targets match nothing": _config(target_modules=["zz"]),
    "targets are missing": _config(target_modules=None),
    "pattern is no regex": _config(rank_pattern={"[": 3}),
    "scale is not finite": _config(alpha=float("nan")),
    "empty configuration": _text(""),
    "configuration is a list": _text("[]"),
    "configuration is null": _text("null"),
    "file is cut off": _cut,
    "no tensors": _tensors(lambda state: {}),
    "half of the tensors": _tensors(lambda state: dict(list(state.items())[:9])),
    "tensors of another model": _tensors(lambda state: {f"x.{k}": v for k, v in state.items()}),
    "flat tensors": _tensors(lambda state: {k: v.flatten() for k, v in state.items()}),
    "scalars": _tensors(lambda state: {k: v.sum() for k, v in state.items()}),
    "cut tensors": _tensors(lambda state: {k: v[:1].clone() for k, v in state.items()}),
    "tensors are not finite": _tensors(lambda state: {k: v * torch.nan for k, v in state.items()}),
}


@pytest.fixture(scope="module")
def sound(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    adapter(base, folder / "frozen")
    adapter(base, folder / "replaced", base_weight="replaced")
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("source", ["frozen", "replaced"])
def test_a_damaged_adapter_is_refused_in_one_line(base, sound, tmp_path, capsys, source, kind):
    shutil.copytree(sound / source, tmp_path / "a")
    DAMAGE[kind](tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a")]) in (0, 2)
    argv = ["merge", tmp_path / "a", "--base", base, "--output", tmp_path / "merged"]
    refused(capsys, *argv)
    assert not (tmp_path / "merged").exists()
    refused(capsys, "convert", "--to", "lora", tmp_path / "a", tmp_path / "lora", "--base", base)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": -4}, "makes no model"),
        ({"hidden_size": "64"}, "no configuration that transformers knows|makes no model"),
        ({"num_attention_heads": 0}, "no configuration that transformers knows|makes no model"),
        ({"architectures": "Llama"}, None),
        ({"architectures": ["LlamaConfig", "Nope"]}, None),
    ],
)
def test_a_base_that_is_none_is_refused_in_one_line(base, tmp_path, capsys, changes, says):
    config = {**json.loads((base / "config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if says is None:  # no class of models is named: a bare model is planned
        assert main(["plan", str(tmp_path)]) == 0
        assert "LlamaModel" in capsys.readouterr().out
        return
    assert re.search(says, refused(capsys, "plan", tmp_path))


def test_damaged_weights_of_a_base(base, sound, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "b")
    argv = ["merge", sound / "frozen", "--base", tmp_path / "b", "--output", tmp_path / "m"]
    (tmp_path / "b/model.safetensors").write_bytes(b"none")
    assert "b cannot be loaded" in refused(capsys, *argv)
    (tmp_path / "b/model.safetensors").unlink()
    assert "a folder that transformers saved" in refused(capsys, *argv)


def test_adapters_of_other_methods(base, tmp_path, capsys):
    for name, config in (
        ("lora", LoraConfig(r=2, target_modules=["q_proj"])),
        ("prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    ):
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**CONFIG)), config)
        model.save_pretrained(tmp_path / name)
        assert main(["inspect", str(tmp_path / name)]) == 0
        argv = ["convert", "--to", "lora", tmp_path / name, tmp_path / "x", "--base", base]
        assert "only FedPara and LoHa adapters convert" in refused(capsys, *argv)
        argv = ["merge", tmp_path / name, "--base", base, "--output", tmp_path / "x"]
        assert "merge it with PEFT itself" in refused(capsys, *argv)
    assert "holds no adapter" in refused(capsys, "inspect", base)


def test_inspect_of_modules_named_as_factors_are(tmp_path, capsys):
    plain = nn.ModuleDict({"base_layer2": nn.Linear(6, 6), "fedpara_head": nn.Linear(6, 2)})
    config = FedParaConfig(r=1, base_weight="replaced", target_modules=["base_layer2"])
    get_peft_model(plain, config).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^base_layer2 +1 +5 ", out, re.M)  # four factors and the bias
    assert re.search(r"^fedpara_head +- +2 ", out, re.M)


REPORTS = {
    "a number": 3,
    "an object": {},
    "numbers": [1, 2],
    "no rounds": [],
    **{
        f"{field} is {value!r}": [(field, value)]
        for field, values in {
            "round": ("x", None, [1]), "train_loss": ("x", [1], {}),
            "metrics": (None, [1], {"a": "b"}), "uplink_bytes": ("x", None),
            "seconds": (None, "x"), "refused": ("x", 3, [[1, 2]], [[None, "norm"]]),
            "client_metrics": (None, "x", {"a": ["b"]}, {"a": [["c", "d"]]}), "epsilon": ("x",),
            "cohort": (None, [None]),
        }.items()
        for value in values
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", REPORTS)
def test_a_report_on_a_damaged_history_is_refused_in_one_line(tmp_path, capsys, kind):
    row = {
        "round": 1, "cohort": [0], "train_loss": 0.5, "metrics": {"eval_loss": 0.4},
        "uplink_bytes": 10, "downlink_bytes": 10, "header_bytes": 2, "seconds": 0.1, "dropped": [],
        "refused": [], "client_metrics": {}, "averaging_bias": None, "epsilon": None,
        "slowest_client_s": None,
    }  # fmt: skip
    history = REPORTS[kind]
    if isinstance(history, list) and history and isinstance(history[0], tuple):
        history = [{**row, **dict(history)}]
    (tmp_path / "history.json").write_text(json.dumps(history))
    refused(capsys, "report", tmp_path)
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "history.json").write_text(json.dumps([row]))
    assert main(["report", str(tmp_path)]) == 0


def test_a_report_on_damaged_settings_and_checkpoints(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    for state in ({}, [], None, {"rounds": 3}, {"rounds": [1]}):
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        refused(capsys, "report", tmp_path)
