"""Quantized bases: the adapter acts on activations; merging goes through PEFT's back-ends."""

import pytest
import torch
from peft import get_peft_model
from tests.zoo import randomize
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from fedpara_peft import FedParaConfig, UnsupportedLayerError

pytestmark = pytest.mark.filterwarnings("ignore")  # of the quantization libraries


def bnb_8bit(tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)).to("cpu"), ["0"]


def bnb_4bit(tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    return nn.Sequential(layer).to("cpu"), ["0"]


def torchao_int8(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=32,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
        dtype=torch.bfloat16,
    )
    return model, ["q_proj"]


def layer_of(model):
    return next(m for m in model.modules() if hasattr(m, "get_delta_weight"))


@pytest.mark.parametrize("path", ["auto", "compose", "khatri_rao"])
@pytest.mark.parametrize("build", [bnb_8bit, bnb_4bit, torchao_int8])
def test_forward_backward_and_merge(build, path, tmp_path):
    plain, targets = build(tmp_path)
    config = FedParaConfig(r=3, target_modules=targets, compute_path=path)
    # In eval mode bitsandbytes repacks 4-bit weights for the CPU at the first forward pass, and
    # PEFT's back-end then dequantizes them wrongly, for every method: stay in training mode.
    model = randomize(get_peft_model(plain, config), 0.5).train()
    layer = layer_of(model)
    assert layer.quantization_backend is not None
    x = torch.randn(5, 64, dtype=torch.bfloat16 if build is torchao_int8 else torch.float32)
    with torch.no_grad(), model.disable_adapter():
        base = layer(x).float()
    expected = base + x.float() @ layer.get_delta_weight("default").T
    out = layer(x)
    error = (out.float() - expected).norm() / expected.norm()
    assert error < (2e-2 if x.dtype == torch.bfloat16 else 1e-5)
    out.float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 4
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)
    model.merge_adapter()
    with torch.no_grad():
        error = (layer(x).float() - expected).norm() / expected.norm()
        assert error < 0.12  # requantized
        model.unmerge_adapter()
        error = (layer(x).float() - expected).norm() / expected.norm()
    assert error < 0.12


def test_a_quantized_weight_cannot_be_replaced(tmp_path):
    plain, _ = bnb_4bit(tmp_path)
    with pytest.raises(UnsupportedLayerError, match="use base_weight='frozen'"):
        get_peft_model(plain, FedParaConfig(base_weight="replaced", target_modules=["0"]))
    assert "Linear4bit" in repr(plain)
