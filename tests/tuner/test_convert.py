"""Exact conversions, loaded with PEFT's own classes."""

import copy

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.zoo import LORA_IDS, LoraKinds, Net, adapted, mlp, randomize
from torch import nn

from fedpara_peft import (
    ConversionError,
    FedParaConfig,
    loha_to_fedpara,
    save_as_loha,
    save_as_lora,
)


@pytest.mark.parametrize("effective", [True, False])
@pytest.mark.parametrize("name", ["fedpara", "pfedpara", "lowrank"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_lora_is_the_same_model(tmp_path, name, effective):
    plain = LoraKinds()
    targets = ["embed", "one", "two", "old"]
    config = FedParaConfig(
        r=2, alpha=3, rank_pattern={"two": 1}, alpha_pattern={"one": 5}, parameterization=name,
        target_modules=targets, modules_to_save=["head"], use_effective_conv2d=effective,
    )  # fmt: skip
    model = randomize(get_peft_model(copy.deepcopy(plain), config)).eval()
    lora = save_as_lora(model, tmp_path)
    assert lora.r == {"fedpara": 4, "pfedpara": 6, "lowrank": 2}[name]
    assert "fedpara" not in (tmp_path / "adapter_config.json").read_text().lower()
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert type(next(iter(again.peft_config.values()))) is LoraConfig
    torch.testing.assert_close(again(LORA_IDS), model(LORA_IDS), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(
        again.merge_and_unload()(LORA_IDS), model(LORA_IDS), atol=5e-6, rtol=1e-5
    )


def test_trained_biases_go_along(tmp_path):
    plain = mlp(norm=False)
    model = randomize(adapted(copy.deepcopy(plain), base_weight="frozen", bias="fedpara_only"))
    assert save_as_lora(model, tmp_path).bias == "lora_only"
    x = torch.randn(3, 16)
    again = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(again(x), model(x), atol=2e-6, rtol=1e-5)


class LoHaNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(6, 5, 3)
        self.two = nn.Conv2d(5, 7, (3, 1))
        self.three = nn.Conv2d(7, 7, 1)
        self.head = nn.Linear(7, 8)

    def forward(self, x):
        x = self.two(self.one(x).unsqueeze(-1))
        return self.head(self.three(x).mean((2, 3)))


@pytest.mark.parametrize("effective", [True, False])
def test_loha_there_and_back(tmp_path, effective):
    x = torch.randn(2, 6, 9)
    plain = LoHaNet()
    config = LoHaConfig(
        r=2, alpha=5, rank_pattern={"two": 3}, alpha_pattern={"head": 1}, init_weights=False,
        use_effective_conv2d=effective, target_modules=["one", "two", "three", "head"],
    )  # fmt: skip
    loha = get_peft_model(copy.deepcopy(plain), config).eval()
    loha.save_pretrained(tmp_path / "loha")
    loha_to_fedpara(tmp_path / "loha", tmp_path / "ours")
    ours = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(ours(x), loha(x), atol=2e-6, rtol=1e-5)
    save_as_loha(ours, tmp_path / "back")
    back = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "back").eval()
    torch.testing.assert_close(back(x), loha(x), atol=1e-6, rtol=1e-5)
    for key, value in loha.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


class Twice(nn.Module):
    """Two layers of one name, the second deeper and of another kind."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.LSTM(6, 6), "wide": nn.Linear(6, 6)})

    def forward(self, x):
        return self.block["wide"](self.block["fc"](self.wide(self.fc(x)))[0])


@pytest.mark.parametrize(
    ("save", "expected"), [(save_as_lora, LoraConfig), (save_as_loha, LoHaConfig)]
)
def test_a_name_that_ends_another_layers_name(tmp_path, save, expected):
    """PEFT takes a listed name for every layer whose name ends in it."""
    plain, x = Twice(), torch.randn(3, 6)
    config = FedParaConfig(
        r=2, alpha=3, rank_pattern={"^fc": 1}, alpha_pattern={"^fc": 7}, target_modules="fc|wide"
    )
    model = randomize(get_peft_model(copy.deepcopy(plain), config)).eval()
    save(model, tmp_path / "one")
    again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "one").eval()
    assert type(again.peft_config["default"]) is expected
    torch.testing.assert_close(again(x), model(x), atol=2e-6, rtol=1e-5)
    assert {n for n, m in again.base_model.model.named_modules() if hasattr(m, "base_layer")} == {
        "fc", "wide",
    }  # fmt: skip
    # Ranks and scales by pattern: each layer has its own, whatever other names end in.
    config = FedParaConfig(
        r=2, rank_pattern={"^wide": 3}, alpha_pattern={"^wide": 7}, target_modules=["wide"]
    )
    model = randomize(get_peft_model(copy.deepcopy(plain), config)).eval()
    written = save(model, tmp_path / "two")
    assert written.target_modules == {"wide", "block.wide"}
    again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "two").eval()
    torch.testing.assert_close(again(x), model(x), atol=2e-6, rtol=1e-5)


CONVOLUTIONS = {
    # what PEFT's LoRA and LoHa cannot do, what they can, and options that change nothing
    "dilation": (lambda: nn.Conv2d(4, 5, 3, dilation=(1, 2)), {"lora"}),
    "reflect": (lambda: nn.Conv1d(4, 5, 3, padding=1, padding_mode="reflect"), {"lora", "loha"}),
    "circular": (
        lambda: nn.Conv2d(4, 5, 3, padding="same", padding_mode="circular"), {"lora", "loha"},
    ),
    "stride": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=(1, 0)), set()),
    "same": (lambda: nn.Conv2d(4, 5, 3, padding="same"), set()),
    "dilated point": (lambda: nn.Conv2d(4, 5, 1, dilation=2), set()),
    "nothing to pad": (lambda: nn.Conv2d(4, 5, 3, padding_mode="circular"), set()),
}  # fmt: skip


@pytest.mark.parametrize(("method", "save"), [("lora", save_as_lora), ("loha", save_as_loha)])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_are_the_same_or_refused(tmp_path, kind, method, save):
    build, lacking = CONVOLUTIONS[kind]
    plain = nn.Sequential(build())
    model = randomize(adapted(copy.deepcopy(plain), base_weight="frozen", alpha=5)).eval()
    if method in lacking:
        with pytest.raises(ConversionError, match=r"0: PEFT's .*, the layer has .*exclude_modules"):
            save(model, tmp_path / "x")
        assert not (tmp_path / "x").exists()
        return
    save(model, tmp_path)
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: adapted(mlp()), "merge_and_unload"),
        (lambda: adapted(mlp(), base_weight="seeded"), "base_weight='seeded' has no base weight"),
        (lambda: adapted(mlp(), base_weight="frozen", nonlinearity="tanh"), "tanh has no exact"),
        (lambda: adapted(Net(), base_weight="frozen"), "recurrent layers"),
        (
            lambda: adapted(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), base_weight="frozen"),
            "grouped convolutions",
        ),
        (
            lambda: get_peft_model(mlp(), LoraConfig(target_modules=["0"])),
            "no FedPara adapter 'default'",
        ),
    ],
)
def test_what_has_no_exact_lora_is_refused(tmp_path, build, says):
    with pytest.raises(ConversionError, match=says):
        save_as_lora(build(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_missing_local_half_is_refused(tmp_path):
    model = randomize(adapted(mlp(), base_weight="frozen", parameterization="pfedpara"))
    model.save_pretrained(tmp_path / "shared")
    shared = PeftModel.from_pretrained(mlp(), tmp_path / "shared")
    with pytest.raises(ConversionError, match="load_local"):
        save_as_lora(shared, tmp_path / "lora")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"parameterization": "pfedpara"}, "LoHa has no 'pfedpara'"),
        ({"nonlinearity": "tanh"}, "nonlinearity='tanh'"),
        ({"bias": "all"}, "LoHa trains no biases"),
    ],
)
def test_what_has_no_exact_loha_is_refused(tmp_path, config, says):
    with pytest.raises(ConversionError, match=says):
        save_as_loha(adapted(mlp(), base_weight="frozen", **config), tmp_path)


def test_kinds_that_loha_lacks_and_folders_that_are_none(tmp_path):
    with pytest.raises(ConversionError, match="no form for Embedding"):
        save_as_loha(adapted(nn.Sequential(nn.Embedding(9, 8)), base_weight="frozen"), tmp_path)
    with pytest.raises(ConversionError, match=r"no adapter_model.safetensors"):
        loha_to_fedpara(tmp_path / "nowhere", tmp_path)


@pytest.mark.parametrize("save", [save_as_lora, save_as_loha])
def test_a_call_in_the_order_of_pefts_own_save_as_lora(tmp_path, save):
    model = adapted(mlp(norm=False), base_weight="frozen")
    for arguments in ((tmp_path / "x", model, 8), (tmp_path / "x", model), (model, "x", 8)):
        with pytest.raises(ConversionError, match=rf"{save.__name__}\(model, folder.*model goes"):
            save(*arguments)
    assert not (tmp_path / "x").exists()


def test_a_conversion_onto_its_own_source_is_refused(tmp_path):
    model = randomize(adapted(nn.Sequential(nn.Linear(9, 8)), base_weight="frozen"))
    model.save_pretrained(tmp_path / "ours")
    save_as_loha(model, tmp_path / "loha")
    (tmp_path / "link").symlink_to(tmp_path / "loha")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for convert, says in (
        (lambda: save_as_lora(model, tmp_path / "ours"), "ours holds a FEDPARA.*another folder"),
        (lambda: save_as_loha(model, str(tmp_path / "ours")), "ours holds a FEDPARA"),
        (lambda: loha_to_fedpara(tmp_path / "loha", tmp_path / "loha"), "loha holds a LOHA"),
        (lambda: loha_to_fedpara(tmp_path / "loha", tmp_path / "link"), "link holds a LOHA"),
    ):
        with pytest.raises(ConversionError, match=says):
            convert()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    save_as_loha(model, tmp_path / "loha")  # the same again is no other adapter
    (tmp_path / "ours/adapter_config.json").write_text("[")
    with pytest.raises(ConversionError, match="cannot be read, which would be overwritten"):
        save_as_lora(model, tmp_path / "ours")


def test_a_damaged_loha_is_refused(tmp_path):
    model = randomize(adapted(nn.Sequential(nn.Linear(9, 8)), base_weight="frozen"))
    save_as_loha(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    first = next(iter(state))
    for damaged, says in (
        ({}, "no LoHa factors"),
        ({k: v for k, v in state.items() if k != first}, r"0 lacks hada_w1_a .*is damaged"),
        ({**state, first: state[first].flatten()}, r"0.hada_w1_a is \(24,\) .*is damaged"),
    ):
        save_file(damaged, path)
        with pytest.raises(ConversionError, match=says):
            loha_to_fedpara(tmp_path, tmp_path / "new")
    path.write_bytes(b"no header")
    with pytest.raises(ConversionError, match="cannot be read"):
        loha_to_fedpara(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
