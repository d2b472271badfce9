"""Conversions as a whole: at a rank, beside PEFT's own, their memory, the example, commands."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.convert.written import batch, block, close, dense, loha_factors, write_loha
from tests.forks import run_script
from tests.hub import serve
from tests.zoo import LORA_IDS, LoraKinds, adapted, mlp, randomize
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from fedpara_peft import (
    ConversionError,
    FedParaConfig,
    FedParaLayer,
    convert_adapter,
    inspect_adapter,
    save_as_lora,
)
from fedpara_peft.cli import main
from fedpara_peft.tuner.kinds import LAYER_KINDS, Linear

ROOT = Path(__file__).parent.parent.parent


def dense_best(weight, k):
    """The best rank-k of a weight as a matrix of its outputs' rows, in float64."""
    u, s, v = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    return ((u[:, :k] * s[:k]) @ v[:k]).reshape(weight.shape)


@pytest.mark.parametrize("effective", [True, False])
@pytest.mark.parametrize("name", ["fedpara", "pfedpara", "lowrank"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_every_kind_of_layer_at_a_rank_is_the_dense_best(tmp_path, name, effective):
    torch.manual_seed(0)
    plain = LoraKinds()
    config = FedParaConfig(
        r=3, alpha=2, parameterization=name, use_effective_conv2d=effective,
        target_modules=["embed", "one", "two", "old"],
    )  # fmt: skip
    model = randomize(get_peft_model(copy.deepcopy(plain), config)).eval()
    k = 2
    done = convert_adapter(model, tmp_path, "lora", rank=k)
    assert {layer.rank for layer in done.layers} == {k}
    errors = {layer.name: layer.error for layer in done.layers}
    wanted = copy.deepcopy(plain)
    for key, layer in model.base_model.model.named_modules():
        if isinstance(layer, FedParaLayer):
            delta = layer.get_delta_weight("default").detach()
            best = dense_best(delta, k)
            error = float((delta - best).norm() / delta.norm())
            assert errors[key] == pytest.approx(error, abs=1e-6)
            with torch.no_grad():
                wanted.get_submodule(key).weight += best.to(torch.float32)
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    close(again(LORA_IDS), wanted(LORA_IDS))


def test_a_tolerance_gives_each_layer_its_own_rank(tmp_path):
    torch.manual_seed(0)
    plain = mlp(norm=False)
    model = randomize(adapted(copy.deepcopy(plain), base_weight="frozen", r=4)).eval()
    config = save_as_lora(model, tmp_path, tolerance=0.3)
    done = convert_adapter(model, tmp_path, "lora", tolerance=0.3)
    assert all(0 < layer.error <= 0.3 for layer in done.layers)
    assert config.r == max(layer.rank for layer in done.layers) < 16
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    for layer in done.layers:
        lora = again.base_model.model.get_submodule(layer.name).get_delta_weight("default")
        ours = model.base_model.model.get_submodule(layer.name).get_delta_weight("default")
        ours, lora = ours.detach(), lora.detach()
        assert float((ours - lora).norm() / ours.norm()) == pytest.approx(layer.error, abs=1e-5)


def test_pefts_own_conversion_works_and_is_as_good_where_it_goes(tmp_path):
    """PEFT's, of linear layers only, is the same approximation; at r² either is exact."""
    torch.manual_seed(0)
    plain, x = mlp(norm=False), torch.randn(5, 16)
    options = {"base_weight": "frozen", "alpha": 2, "target_modules": ["0", "2"]}
    model = randomize(adapted(copy.deepcopy(plain), **options)).eval()
    for k in (2, 5, 9):
        peft.save_as_lora(tmp_path / f"peft{k}", model, k)
        save_as_lora(model, tmp_path / f"ours{k}", rank=k)
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / f"peft{k}")
        ours = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / f"ours{k}")
        close(ours(x), theirs(x))
    close(ours(x), model(x))
    config, state = peft.convert_to_lora(model, 4)
    assert config.r == 4
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in state)
    conv = randomize(adapted(nn.Sequential(nn.Conv2d(4, 4, 3)), base_weight="frozen"))
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(conv, 4)
    save_as_lora(conv, tmp_path / "conv", rank=4)


def test_half_precision_says_what_rounding_costs(tmp_path):
    """The exact form's products are rounded to the factors' dtype; the error counts that."""
    own = loha_factors(40, 30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    write_loha(tmp_path / "a.safetensors", {"a": own}, {"a": 2})
    done = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b", "lora")
    state = load_file(tmp_path / "b" / "adapter_model.safetensors")
    up, down = (state[f"base_model.model.a.lora_{one}.weight"].double() for one in "BA")
    wide = {name: factor.double() for name, factor in own.items()}
    weight = (wide["hada_w1_a"] @ wide["hada_w1_b"]) * (wide["hada_w2_a"] @ wide["hada_w2_b"])
    error = float((weight - up @ down).norm() / weight.norm())
    assert done.error == pytest.approx(error, rel=1e-4)
    assert 1e-4 < error < 1e-2


MEMORY = """
import resource, sys, fedpara_peft
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for rank in (None, 4):
    fedpara_peft.convert_adapter(sys.argv[1], sys.argv[3], "kohya", prefix="lora_unet_", rank=rank)
before = peak()
for rank in (None, 4):
    fedpara_peft.convert_adapter(sys.argv[2], sys.argv[3], "kohya", prefix="lora_unet_", rank=rank)
print(peak() - before)
"""


@pytest.mark.programs
def test_memory_is_that_of_a_layer_and_not_of_the_file(tmp_path):
    """From 1 layer to 48 of 2.6 MB each (5.2 MB as LoRA): what is held does not grow with them."""
    g = torch.Generator().manual_seed(0)
    own = loha_factors(20_000, 20_000, 8, generator=g)
    for name, layers in (("one", 1), ("many", 48)):
        state = {f"m{i}.{key}": f.clone() for i in range(layers) for key, f in own.items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    del state
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "many", "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *files],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "many.safetensors").stat().st_size > 110e6
    assert float(done.stdout) < 40  # MB


def test_nothing_is_left_when_a_later_layer_fails(tmp_path):
    """The first layer is converted and written before the second one is looked into."""
    g = torch.Generator().manual_seed(0)
    layers = {f"lora_unet_{n}": loha_factors(4, 5, 2, generator=g) for n in "ab"}
    layers["lora_unet_b"]["hada_w2_b"][1, 2] = float("nan")
    write_loha(tmp_path / "a.safetensors", layers, dict.fromkeys(layers, 1))
    for to, target in (("kohya", "b.safetensors"), ("lora", "b/c")):
        with pytest.raises(ConversionError, match=r"lora_unet_b\..* has values that are not"):
            convert_adapter(
                tmp_path / "a.safetensors", tmp_path / target, to,
                base={"a": (4, 5), "b": (4, 5)}, rank=2,
            )  # fmt: skip
        assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_target_is_replaced_whole_or_not_at_all(tmp_path):
    g = torch.Generator().manual_seed(0)
    own = loha_factors(4, 5, 2, generator=g)
    write_loha(tmp_path / "a.safetensors", {"lora_unet_a": own}, {"lora_unet_a": 1})
    target = tmp_path / "b.safetensors"
    convert_adapter(tmp_path / "a.safetensors", target, "kohya")
    before = target.read_bytes()
    (tmp_path / "a.safetensors").write_bytes(b"none")
    with pytest.raises(ConversionError, match="cannot be read"):
        convert_adapter(tmp_path / "a.safetensors", target, "kohya")
    assert target.read_bytes() == before
    # In place: the source is read to its end before its file is replaced.
    convert_adapter(target, target, "kohya", rank=1)
    assert load_file(target)["lora_unet_a.lora_down.weight"].shape == (1, 5)


@pytest.mark.parametrize("options", [{}, {"rank": 2}])
def test_factors_without_values(tmp_path, options):
    with torch.device("meta"):
        model = adapted(nn.Sequential(nn.Linear(5, 4)), base_weight="frozen")
    with pytest.raises(ConversionError, match="on the meta device"):
        convert_adapter(model, tmp_path / "a", "lora", **options)
    assert not list(tmp_path.iterdir())


def test_what_a_model_trains_beside_its_layers(tmp_path):
    model = randomize(adapted(mlp(norm=False), base_weight="frozen", bias="fedpara_only"))
    with pytest.raises(ConversionError, match=r"bias is trained beside the layers.*to a folder"):
        convert_adapter(model, tmp_path / "a.safetensors", "lora", prefix="")
    with pytest.raises(ConversionError, match="has a FedPara adapter already"):
        convert_adapter(model, tmp_path / "a", "fedpara")
    table = randomize(adapted(nn.Sequential(nn.Embedding(9, 8)), base_weight="frozen"))
    with pytest.raises(ConversionError, match="0 is an embedding, which kohya has no layout for"):
        convert_adapter(table, tmp_path / "a.safetensors", "kohya", prefix="")
    assert not list(tmp_path.iterdir())


class Halved(nn.Linear):
    """A layer of a user's, which computes half of what it says."""

    def forward(self, x):
        return super().forward(x) / 2


class HalvedKind(Linear):
    kind = "halved"
    base_classes = (Halved,)

    def forward(self, x):
        weight = self.get_base_layer().weight + self.get_delta_weight("default")
        return nn.functional.linear(x, weight, self.get_base_layer().bias) / 2

    def lora_factors(self, adapter_name, key):
        """PEFT's LoRA adds to what the layer gives: half of the weight's."""
        given = Linear.lora_factors(self, adapter_name, key)
        return {**given, "lora_B.weight": given["lora_B.weight"] / 2}


@pytest.mark.parametrize("options", [{}, {"rank": 9}, {"rank": 2}])
def test_a_kind_of_ones_own_answers_for_itself(tmp_path, monkeypatch, options):
    monkeypatch.setattr("fedpara_peft.tuner.kinds.LAYER_KINDS", [*LAYER_KINDS, HalvedKind])
    torch.manual_seed(0)
    plain, x = nn.Sequential(Halved(12, 10), nn.Linear(10, 9)), torch.randn(3, 12)
    config = FedParaConfig(r=3, alpha=2, target_modules=["0", "1"])
    model = randomize(get_peft_model(copy.deepcopy(plain), config)).eval()
    done = convert_adapter(model, tmp_path, "lora", **options)
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    if options.get("rank") == 2:
        layer = model.base_model.model[0]
        best = dense_best(layer.get_delta_weight("default").detach() / 2, 2)
        found = again.base_model.model[0].get_delta_weight("default")
        close(found, best)
        assert done.error > 0
    else:
        close(again(x), model(x))


@pytest.mark.parametrize(
    ("conv", "says"),
    [
        (nn.Conv2d(6, 7, 3, dilation=2), "dilation"),
        (nn.Conv2d(6, 7, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(12, 8, 3, groups=2), "groups=2"),
    ],
)
def test_convolutions_that_peft_computes_in_another_way(tmp_path, conv, says):
    base = nn.ModuleDict({"a": conv})
    g = torch.Generator().manual_seed(0)
    m, n, *kernel = conv.weight.shape
    write_loha(
        tmp_path / "a.safetensors", {"a": loha_factors(m, n, 2, kernel, generator=g)}, {"a": 1}
    )
    with pytest.raises(ConversionError, match=f"convolves in another way, the layer has {says}"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "b", "lora", base=base)
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "b", "fedpara", base=base)


def test_layers_that_pefts_loha_lacks(tmp_path):
    g = torch.Generator().manual_seed(0)
    base = nn.ModuleDict({"a": nn.Conv3d(4, 5, 3), "b": Conv1D(5, 4), "c": nn.Conv3d(4, 5, 1)})
    for name, kernel, says in (
        ("a", (3, 3, 3), "a is a Conv3d"), ("b", (), "b is transformers' Conv1D"),
        ("c", (), "c is a Conv3d"),
    ):  # fmt: skip
        own = loha_factors(5, 4, 2, kernel, generator=g)
        write_loha(tmp_path / f"{name}.safetensors", {name: own}, {name: 1})
        with pytest.raises(ConversionError, match=f"{says}, which PEFT's LoHa has no form for"):
            convert_adapter(tmp_path / f"{name}.safetensors", tmp_path / "x", "loha", base=base)
        convert_adapter(tmp_path / f"{name}.safetensors", tmp_path / name, "fedpara", base=base)
        found = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        delta = found.base_model.model[name].get_delta_weight("default")
        wanted = dense(own, 1.0)
        close(
            delta.T if name == "b" else delta,
            wanted.reshape(wanted.shape + delta.shape[wanted.dim() :]),
        )


# The command line.


def told(capsys, *argv):
    status = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_file_is_inspected_and_converted_from_the_shell(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    names = {"proj_in": (7, 6, ()), "down_blocks_0_to_q": (6, 8, ()),
             "down_blocks_0_conv_1": (5, 7, (3, 3))}  # fmt: skip
    layers = {
        f"lora_unet_{n}": loha_factors(m, k, 3, c, generator=g) for n, (m, k, c) in names.items()
    }
    source = tmp_path / "style.safetensors"
    write_loha(
        source, layers, dict.fromkeys(layers, 1.5), {"ss_output_name": "a style", "ss_x": "y"}
    )
    status, out, _ = told(capsys, "inspect", source)
    assert status == 0
    assert "kohya (lora_unet_)" in out
    assert "layers: 3 x LoHa" in out
    assert "ss_output_name: a style" in out
    assert "ss_x" not in out
    assert re.search(
        r"^lora_unet_down_blocks_0_conv_1 +LoHa Tucker +3 +1.5 +5 x 7 x 3 x 3 ", out, re.M
    )
    found = inspect_adapter(source)
    assert found.layout == "kohya (lora_unet_)"
    assert [(x.rank, x.alpha, x.shape, x.has_core) for x in found.layers] == [
        (3, 1.5, (5, 7, 3, 3), True), (3, 1.5, (6, 8), False), (3, 1.5, (7, 6), False),
    ]  # fmt: skip
    assert sum(x.num_bytes for x in found.layers) == sum(
        t.nbytes for t in load_file(source).values()
    )
    base = block()
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    argv = ["convert", source, tmp_path / "lora", "--to", "lora"]
    status, _, err = told(capsys, *argv)
    assert status == 2
    assert "lora_unet_" in err
    assert "give base=" in err
    argv += ["--base", tmp_path / "base", "--rank", 4]
    status, out, _ = told(capsys, *argv)
    assert status == 0
    assert "LORA of rank 4, 3 layers of kohya (lora_unet_)" in out
    assert re.search(r"^down_blocks.0.conv_1 +4 +9 +0\.\d+$", out, re.M)
    assert re.search(r"^all +4 +0\.\d+$", out, re.M)
    assert PeftModel.from_pretrained(base, tmp_path / "lora")(batch()).shape == (2, 5, 4, 4)
    status, _, err = told(capsys, *argv)
    assert status == 2
    assert "exists" in err
    for to in ("kohya", "lycoris"):
        status, out, _ = told(
            capsys, "convert", source, tmp_path / f"{to}.safetensors", "--to", to, "--component",
            "unet",
        )  # fmt: skip
        assert status == 0
        status, out, _ = told(capsys, "inspect", tmp_path / f"{to}.safetensors")
        assert f"3 x {'LoRA' if to == 'kohya' else 'LoHa'}" in out
        assert "sshs_model_hash" in out
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        assert json.loads(file.metadata()["fedpara.conversion"])["to"] == "kohya"


def test_options_of_the_command(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    own = loha_factors(20, 15, 3, generator=g)
    state = write_loha(
        tmp_path / "a.safetensors", {"diffusion_model.a": own}, {"diffusion_model.a": 1}
    )
    save_file({**state, "diffusion_model.b.diff": torch.ones(3)}, tmp_path / "a.safetensors")
    argv = ["convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "kohya"]
    status, _, err = told(capsys, *argv, "--tolerance", 0.5)
    assert status == 2
    assert "diffusion_model.b is a full diff (diff)" in err
    status, out, _ = told(
        capsys, *argv, "--tolerance", 0.5, "--keep-others", "--prefix", "lora_unet_x_"
    )
    assert status == 0
    assert "copied as they are: 1 layer, diffusion_model.b" in out
    rank, error = re.search(r"^all +(\d+) +([\d.]+)$", out, re.M).groups()
    assert int(rank) < 9
    assert 0 < float(error) <= 0.5
    assert {key.partition(".")[0] for key in load_file(tmp_path / "b.safetensors")} == {
        "lora_unet_x_a", "lora_unet_x_b",
    }  # fmt: skip
    with pytest.raises(SystemExit):
        main([str(a) for a in [*argv, "--rank", 3, "--tolerance", 0.5]])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.programs
def test_a_file_on_the_hub(tmp_path):
    own = loha_factors(4, 5, 2, generator=torch.Generator().manual_seed(0))
    write_loha(tmp_path / "a.safetensors", {"lora_unet_a": own}, {"lora_unet_a": 1})
    server = serve()
    server.files["style.safetensors"] = (tmp_path / "a.safetensors").read_bytes()
    run = "import sys; from fedpara_peft.cli import main; sys.exit(main())"
    try:
        done = [
            subprocess.run(
                [sys.executable, "-c", run, *argv], capture_output=True, text=True, timeout=300,
                env={**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0",
                     "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")},
            )
            for argv in (
                ["inspect", "me/adapter/style.safetensors"],
                ["convert", "me/adapter/style.safetensors", tmp_path / "b.safetensors", "--to",
                 "kohya"],
            )
        ]  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert "kohya (lora_unet_)" in done[0].stdout
    assert load_file(tmp_path / "b.safetensors")["lora_unet_a.lora_up.weight"].shape == (4, 4)


def test_a_damaged_file_is_refused_in_one_line(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    own = loha_factors(4, 5, 2, generator=g)
    del own["hada_w2_a"]
    write_loha(tmp_path / "a.safetensors", {"x.y": own}, {"x.y": 1})
    for argv in (
        ("inspect", tmp_path / "a.safetensors"),
        ("inspect", tmp_path),  # the only file of its folder
        ("convert", tmp_path / "a.safetensors", tmp_path / "b", "--to", "fedpara"),
    ):
        status, _, err = told(capsys, *argv)
        assert status == 2
        assert "x.y lacks hada_w2_a" in err
        assert err.count("\n") == 1
    assert not (tmp_path / "b").exists()


CONFIG = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 30}  # fmt: skip


def test_pefts_loha_of_a_language_model_from_the_shell(tmp_path, capsys):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    plain.save_pretrained(tmp_path / "base")
    config = LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"], init_weights=False)
    loha = get_peft_model(copy.deepcopy(plain), config).eval()
    loha.save_pretrained(tmp_path / "loha")
    ids = torch.tensor([[1, 2, 3]])
    for target, options in (("a", []), ("b", ["--base", tmp_path / "base" / "config.json"])):
        argv = ["convert", tmp_path / "loha", tmp_path / target, "--to", "lora", *options]
        status, out, _ = told(capsys, *argv)
        assert status == 0
        assert "LORA of rank 4, 2 layers of PEFT (base_model.model.)" in out
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / target).eval()
        close(again(ids).logits, loha(ids).logits)


@pytest.mark.programs
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lycoris", "diffusers")),
    reason="lycoris-lora and diffusers are not installed",
)
def test_the_example_runs(tmp_path):
    script = ROOT / "examples" / "lycoris_to_lora.py"
    done = run_script(script, "--output_dir", tmp_path, "--rank", "64", "--steps", "4")
    assert done.returncode == 0, done.stderr
    assert "LyCORIS (lycoris_): 77 layers of rank up to 8, exactly" in done.stdout
    assert "relative error 0.00e+00" in done.stdout
    missed = float(re.search(r"images: ([\d.]+)% of the change", done.stdout).group(1))
    assert missed < 0.1


@pytest.mark.parametrize("to", ["lycoris", "kohya"])
def test_a_file_that_readers_would_refuse_is_not_written(tmp_path, to):
    config = FedParaConfig(r=2, alpha=0, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    target = tmp_path / "a.safetensors"
    if to == "lycoris":
        with pytest.raises(ConversionError, match="has alpha 0"):
            convert_adapter(model, target, to, prefix="")
        assert not target.exists()
    else:
        convert_adapter(model, target, to, prefix="lora_unet_")
        inspect_adapter(target)
