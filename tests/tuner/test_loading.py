"""Saved, loaded, exported and merged from memory of any layout, and into models that have none."""

import copy

import pytest
import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from tests.zoo import net_inputs, randomize
from torch import nn

from fedpara_peft import (
    CheckpointError,
    ConversionError,
    FedParaConfig,
    StateError,
    load_local,
    load_local_state,
    local_state,
    loha_to_fedpara,
    save_as_loha,
    save_as_lora,
    save_local,
)

INPUTS = net_inputs()
METHODS = ["fedpara", "pfedpara", "lowrank"]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


class Tied(nn.Module):
    """Convolution, recurrent and linear layers, and a head that shares the embedding's weight."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.embed = nn.Embedding(20, 48)
        self.rnn = nn.LSTM(48, 32, batch_first=True)
        self.hidden = nn.Linear(32, 48)
        self.head = nn.Linear(48, 20)
        self.head.weight = self.embed.weight

    def forward(self, images, ids):
        features = self.norm(self.conv(images)).mean((2, 3))
        sequence, _ = self.rnn(self.embed(ids))
        return self.head(torch.relu(self.hidden(features + sequence[:, -1])))


def other_layout(model):
    """Kernels channels last, matrices column by column."""
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.to(memory_format=torch.channels_last)
        elif p.dim() == 2:
            p.data = p.data.T.contiguous().T
    return model


def trained(layout, targets=("conv", "rnn", "hidden"), **config):
    """A model with random factors, its plain base, and what it puts out."""
    base = layout(Tied())
    config = FedParaConfig(r=3, target_modules=list(targets), **config)
    model = randomize(get_peft_model(copy.deepcopy(base), config)).eval()
    base.load_state_dict(  # the statistics that `randomize` drew
        {"norm." + k: v for k, v in model.get_base_model().norm.state_dict().items()}, strict=False
    )
    return layout(model), base, model(*INPUTS).detach()


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("layout", [lambda m: m, other_layout], ids=["rows", "columns"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_a_model_is_the_same_after_saving_loading_and_merging(
    tmp_path, base_weight, name, layout, low
):
    model, base, expected = trained(layout, base_weight=base_weight, parameterization=name)
    model.save_pretrained(tmp_path / "shared")
    if name == "pfedpara":
        save_local(model, tmp_path / "mine")
    into = Tied(seed=7) if base_weight == "replaced" else base
    again = PeftModel.from_pretrained(
        into, tmp_path / "shared", is_trainable=True, low_cpu_mem_usage=low
    )
    if name == "pfedpara":
        load_local(again, tmp_path / "mine")
    torch.testing.assert_close(again.eval()(*INPUTS), expected, **CLOSE)
    for one in (again.get_base_model(), plain := again.merge_and_unload()):
        assert one.head.weight is one.embed.weight
    torch.testing.assert_close(plain(*INPUTS), expected, **CLOSE)
    assert plain.state_dict().keys() == Tied().state_dict().keys()


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_second_adapter_is_loaded_beside_the_first(tmp_path, name, low):
    model, base, expected = trained(other_layout, parameterization=name)
    model.save_pretrained(tmp_path)
    again = get_peft_model(base, FedParaConfig(r=2, target_modules=["hidden"]))
    again.load_adapter(tmp_path, "b", is_trainable=True, low_cpu_mem_usage=low)
    again.set_adapter("b")
    if name == "pfedpara":
        mine = {k.replace(".default.", ".b."): v for k, v in local_state(model).items()}
        load_local_state(again, mine)
    torch.testing.assert_close(again.eval()(*INPUTS), expected, **CLOSE)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_replaced_adapter_brings_a_model_without_memory_to_life(tmp_path, name, low):
    model, _, expected = trained(other_layout, base_weight="replaced", parameterization=name)
    model.save_pretrained(tmp_path / "shared")
    with torch.device("meta"):
        empty = Tied()
    empty.head.weight = empty.embed.weight
    again = PeftModel.from_pretrained(
        empty, tmp_path / "shared", is_trainable=True, low_cpu_mem_usage=low
    )
    if name == "pfedpara":
        save_local(model, tmp_path / "mine")
        load_local(again, tmp_path / "mine")
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    inner = again.get_base_model()
    assert inner.head.weight is inner.embed.weight
    torch.testing.assert_close(again.eval()(*INPUTS), expected, **CLOSE)


def test_what_no_checkpoint_holds_must_be_there(tmp_path):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.register_buffer("scale", torch.ones(16), persistent=False)

        def forward(self, x):
            return self.layer(x * self.scale)

    config = FedParaConfig(r=2, base_weight="replaced", target_modules=["layer"])
    model = get_peft_model(Positions(), config)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = Positions()
    with pytest.raises(CheckpointError, match=r"scale is on the meta device.*init_empty_weights"):
        PeftModel.from_pretrained(empty, tmp_path)
    with init_empty_weights():
        empty = Positions()
    x = torch.randn(3, 16)
    assert torch.equal(PeftModel.from_pretrained(empty, tmp_path)(x), model(x))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("layout", [lambda m: m, other_layout], ids=["rows", "columns"])
@pytest.mark.parametrize("name", METHODS)
def test_exports_are_the_same_from_any_layout(tmp_path, name, layout, low):
    model, base, expected = trained(layout, ["conv", "hidden"], parameterization=name)
    save_as_lora(model, tmp_path / "lora")
    if name == "fedpara":
        save_as_loha(model, tmp_path / "loha")
        loha_to_fedpara(tmp_path / "loha", tmp_path / "back")
    for folder in tmp_path.iterdir():
        again = PeftModel.from_pretrained(copy.deepcopy(base), folder, low_cpu_mem_usage=low)
        torch.testing.assert_close(again.eval()(*INPUTS), expected, **CLOSE)
    model.merge_adapter()
    torch.testing.assert_close(model(*INPUTS), expected, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(model(*INPUTS), expected, **CLOSE)


def test_what_has_no_values_is_not_written_and_takes_none(tmp_path):
    def empty(**config):
        with torch.device("meta"):
            net = nn.Sequential(nn.Linear(16, 16))
        return get_peft_model(net, FedParaConfig(target_modules=["0"], **config))

    model = empty(parameterization="pfedpara")
    with pytest.raises(StateError, match="meta device"):
        save_local(model, tmp_path)
    with pytest.raises(StateError, match="meta device, which holds no values"):
        load_local_state(model, {k: torch.zeros(v.shape) for k, v in local_state(model).items()})
    with pytest.raises(ConversionError, match="meta device"):
        save_as_lora(empty(), tmp_path)
    assert not list(tmp_path.iterdir())
