"""``adapter_names=[…]``: every sample of a batch with its own adapter, as PEFT's LoRA has it."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.layer_kinds import KINDS, Holder, inputs
from tests.zoo import randomize
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fedpara_peft import FedParaConfig, MixedBatchError

NAMES = ["b", "default", "__base__", "c", "default", "__base__"]


def adapters(net, first="default", **config):
    """Three adapters of different ranks and forms, moved away from zero; the first is active."""
    forms = {first: ("fedpara", None), "b": ("pfedpara", "tanh"), "c": ("lowrank", None)}
    model = None
    for r, (name, (form, tanh)) in enumerate(forms.items(), 2):
        settings = {"target_modules": "all-supported", **config}
        settings.update(r=r, parameterization=form, nonlinearity=tanh)
        if model is None:
            model = get_peft_model(net, FedParaConfig(**settings), name)
        else:
            model.add_adapter(name, FedParaConfig(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "fedpara_" in name:
                p.normal_(0, 0.4)
    return model.eval()


def one_at_a_time(model, names, call):
    """What each sample gives when its adapter is the only one."""
    found = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                found.append(call(i))
        else:
            model.set_adapter(name)
            found.append(call(i))
    model.set_adapter("default")
    return found


def batch_of_six(kind):
    x = inputs(kind)
    if kind in ("lstm", "gru", "rnn"):
        return torch.randn(4, 6, 12), 1
    return torch.cat([inputs(kind) for _ in range(6)])[:6] if x.dim() > 1 else None, 0


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "conv2d unbatched"])
def test_every_layer_kind(kind):
    torch.manual_seed(0)
    model = adapters(Holder(kind), target_modules=["layer"])
    x, dim = batch_of_six(kind)
    expected = one_at_a_time(model, NAMES, lambda i: model(x.narrow(dim, i, 1)))
    out = model(x, adapter_names=NAMES)
    torch.testing.assert_close(out, torch.cat(expected, dim), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x, adapter_names=NAMES), out, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out.select(dim, 0), model(x).select(dim, 0))  # and it is over


def test_an_lstm_with_a_state_for_each_sequence():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(12, 10, 2, batch_first=True, bidirectional=True)

        def forward(self, x, h, c):
            out, (h, c) = self.rnn(x, (h, c))
            return out, h.transpose(0, 1), c.transpose(0, 1)

    model = adapters(Net())
    x, h, c = torch.randn(6, 4, 12), torch.randn(4, 6, 10), torch.randn(4, 6, 10)
    found = model(x, h, c, adapter_names=NAMES)

    def call(i):
        return model(x[i : i + 1], h[:, i : i + 1].contiguous(), c[:, i : i + 1].contiguous())

    expected = one_at_a_time(model, NAMES, call)
    for ours, theirs in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-5, rtol=1e-5)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((6,), 4), batch_first=True)
    with pytest.raises(MixedBatchError, match="rnn: a packed input"):
        model(packed, h, c, adapter_names=NAMES)


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=50, **options,
        )
    )  # fmt: skip


IDS = torch.arange(1, 43).reshape(6, 7) % 50


def test_a_llama_with_layers_that_only_some_adapters_have():
    model = adapters(llama(), task_type="CAUSAL_LM")
    model.add_adapter("more", FedParaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    names = ["more", *NAMES[1:]]
    out = model(input_ids=IDS, adapter_names=names).logits
    expected = one_at_a_time(model, names, lambda i: model(input_ids=IDS[i : i + 1]).logits)
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["greedy", "beams", "beams in a generation_config", "samples"])
def test_generating_with_adapter_names(how):
    model = adapters(llama(), task_type="CAUSAL_LM")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    repeats = 1
    if how == "beams":
        options["num_beams"] = 3
    elif how == "samples":
        options.update(num_return_sequences=2, do_sample=True, top_k=1)
        repeats = 2
    elif how != "greedy":
        settings = copy.deepcopy(model.generation_config)
        settings.update(**options, num_beams=3)
        options = {"generation_config": settings}
    found = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
    expected = one_at_a_time(
        model, NAMES, lambda i: model.generate(input_ids=IDS[i : i + 1], **options)
    )
    assert len(found) == 6 * repeats
    assert torch.equal(found, torch.cat(expected))


def test_an_encoder_sees_its_samples_once_under_beam_search():
    torch.manual_seed(0)
    net = T5ForConditionalGeneration(
        T5Config(
            vocab_size=50, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    model = adapters(net, target_modules=["q", "v", "wi", "wo"], task_type="SEQ_2_SEQ_LM")
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "min_new_tokens": 5}
    found = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
    expected = one_at_a_time(
        model, NAMES, lambda i: model.generate(input_ids=IDS[i : i + 1], **options)
    )
    assert torch.equal(found, torch.cat(expected))


def test_modules_to_save_go_with_the_samples_adapter():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(12, 20), nn.Linear(20, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)))

    model = adapters(Net(), target_modules=["body"], modules_to_save=["head"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.normal_()
    x = torch.randn(6, 12)
    expected = one_at_a_time(model, NAMES, lambda i: model(x[i : i + 1]))
    torch.testing.assert_close(
        model(x, adapter_names=NAMES), torch.cat(expected), atol=1e-5, rtol=1e-5
    )


def test_a_transformer_encoder_with_adapter_names():
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    model = adapters(net, target_modules=["linear1", "linear2"])
    x = torch.randn(6, 5, 32)
    with torch.no_grad():
        expected = one_at_a_time(model, NAMES, lambda i: model(x[i : i + 1]))
        out = model(x, adapter_names=NAMES)
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_names_under_autocast_and_on_a_quantized_base(dtype):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=dtype)
    model = adapters(nn.Sequential(layer).to("cpu"), target_modules=["0"])
    x = torch.randn(6, 64)
    with torch.autocast("cpu", dtype=dtype):
        out = model(x, adapter_names=NAMES)
        expected = one_at_a_time(model, NAMES, lambda i: model(x[i : i + 1]))
    torch.testing.assert_close(out, torch.cat(expected), atol=2e-2, rtol=2e-2)
    assert out.dtype == expected[0].dtype


def test_what_cannot_be_is_refused_and_leaves_no_hook():
    model, x = adapters(nn.Sequential(nn.Linear(12, 20)), target_modules=["0"]), torch.randn(3, 12)
    wrong = [
        (["b", "c"], "2 names for 3 samples at 0"),
        (["b", "c", "nobody"], r"holds nobody; the model has b, c, default and __base__"),
        ("b", "must be a list"),
        (None, None),
    ]
    for names, says in wrong:
        if says is None:
            torch.testing.assert_close(model(x, adapter_names=None), model(x))
            continue
        with pytest.raises(MixedBatchError, match=says):
            model(x, adapter_names=names)
        assert not any(m._forward_pre_hooks for m in model.modules())
        model(x)
    model.train()
    with pytest.raises(MixedBatchError, match=r"call model.eval\(\)"):
        model(x, adapter_names=["b", "b", "c"])
    model.eval().merge_adapter()
    with pytest.raises(MixedBatchError, match="adapters merged"):
        model(x, adapter_names=["b", "b", "c"])
    model.unmerge_adapter()
    with model.disable_adapter():  # as PEFT has it: no adapter at all then
        base = model(x)
        assert torch.equal(model(x, adapter_names=["b", "b", "c"]), base)
    conv = adapters(nn.Sequential(nn.Conv2d(12, 10, 3)), target_modules=["0"])
    with pytest.raises(MixedBatchError, match="an input without samples"):
        conv(torch.randn(12, 6, 6), adapter_names=["b"] * 12)
    replaced = FedParaConfig(r=2, base_weight="replaced", target_modules=["0"])
    alone = get_peft_model(nn.Sequential(nn.Linear(12, 20)), replaced).eval()
    with pytest.raises(MixedBatchError, match="leave adapter_names out"):
        alone(x, adapter_names=["default"] * 3)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 20)

    def forward(self, x):
        weight = self.layer.weight
        assert (weight.dtype, weight.shape, weight.device) == (torch.float32, (20, 12), x.device)
        assert isinstance(weight, torch.Tensor)
        assert "UnreadableWeight(layer" in repr(weight)
        return F.linear(x, weight, self.layer.bias)


def test_a_parent_that_computes_with_the_weight_is_refused_by_name():
    model = adapters(Reader(), target_modules=["layer"])
    with pytest.raises(MixedBatchError, match="the parent of layer reads its weight"):
        model(torch.randn(2, 12), adapter_names=["b", "c"])
    torch.manual_seed(0)
    mamba = MambaForCausalLM(
        MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=1, vocab_size=50)
    )
    model = adapters(mamba, target_modules=["dt_proj", "in_proj"])
    with pytest.raises(MixedBatchError, match=r"layers\.0\.mixer\.dt_proj.*exclude_modules"):
        model(IDS, adapter_names=NAMES)
    model = adapters(copy.deepcopy(model).unload(), target_modules=["in_proj", "out_proj"])
    expected = one_at_a_time(model, NAMES, lambda i: model(IDS[i : i + 1]).logits)
    with torch.no_grad():
        out = model(IDS, adapter_names=NAMES).logits
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_names_and_values_are_loras():
    """The same call on the same model with LoRA's adapters, exported from ours."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(12, 20)), FedParaConfig(r=1, target_modules=["0"])
    )
    lora = get_peft_model(
        copy.deepcopy(model).unload(), LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    )
    randomize(model)
    layer, other = model.base_model.model[0], lora.base_model.model[0]
    first, second = layer.halves("default")
    with torch.no_grad():
        other.lora_A["default"].weight.copy_((first.y * second.y).T)
        other.lora_B["default"].weight.copy_(first.x * second.x)
    x, names = torch.randn(3, 12), ["__base__", "default", "__base__"]
    torch.testing.assert_close(
        model.eval()(x, adapter_names=names), lora.eval()(x, adapter_names=names)
    )
