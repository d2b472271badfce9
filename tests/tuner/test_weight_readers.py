"""Models that read a layer's weight instead of calling the layer get the weight that it applies."""

import copy

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tests.layer_kinds import FORMS, KINDS, build, inputs, twin
from tests.zoo import randomize
from torch import nn
from torch.nn import functional as F
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fedpara_peft import FedParaConfig, composed_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensor")
IDS = torch.arange(18).reshape(2, 9) % 50


def random_adapter(net, std=0.5, **config):
    config = {"r": 2, "target_modules": "all-supported", **config}
    return randomize(get_peft_model(net, FedParaConfig(**config)), std)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("mode", ["frozen", "replaced"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_read_is_the_weight_applied(kind, mode, form):
    model = build(kind, mode, form, torch.float64)
    layer, x = model.base_model.model.layer, inputs(kind, torch.float64)
    names = layer.specs["default"].plans
    assert len(names) == 1 or kind in ("lstm", "gru", "rnn")
    plain = KINDS[kind][0]().double()
    read = {name: getattr(layer, name) for name in names}
    biases = {name: getattr(layer.get_base_layer(), name) for name in layer.bias_names()}
    out = torch.func.functional_call(plain, {**read, **biases}, (x,))
    out = out[0] if isinstance(out, tuple) else out
    exact = twin(model, kind)(x)
    torch.testing.assert_close(out, exact)
    factors = [p for n, p in model.named_parameters() if "fedpara_" in n]
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), factors),
        torch.autograd.grad(exact.square().sum(), factors),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    for name in names:
        assert getattr(layer, name).dtype == read[name].dtype
    model.merge_adapter()
    for name in names:
        torch.testing.assert_close(getattr(layer, name), read[name], atol=1e-12, rtol=0)
    if mode == "frozen":
        model.unmerge_adapter()
        with model.disable_adapter():
            for name in names:
                assert getattr(layer, name) is getattr(layer.get_base_layer(), name)


def encoder(layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, layers)


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["layers.1.linear1"]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("loaded", ["trainable", "for inference"])
def test_a_transformer_encoder_runs_its_adapters(training, grad, padded, targets, loaded):
    model = random_adapter(encoder(), target_modules=targets)
    if loaded == "for inference":
        model.requires_grad_(False)
    model.train(training)
    x = torch.randn(3, 7, 32)
    mask = torch.arange(7) >= torch.tensor([[7], [5], [3]]) if padded else None
    exact = copy.deepcopy(model).merge_and_unload().double().train()  # train(): no fast path
    expected = exact(x.double(), src_key_padding_mask=mask)
    with torch.set_grad_enabled(grad):
        out = model(x, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask
    torch.testing.assert_close(out.double()[kept], expected[kept], atol=1e-4, rtol=1e-4)
    if grad and loaded == "trainable":
        out[kept].square().sum().backward()
        for name, p in model.named_parameters():
            assert "fedpara_" not in name or p.grad.abs().sum() > 0, name


def test_a_transformer_encoder_in_half_precision_and_with_replaced_weights():
    for dtype, mode in ((torch.bfloat16, "frozen"), (torch.float32, "replaced")):
        model = random_adapter(
            encoder().to(dtype), target_modules=["linear1", "linear2"], base_weight=mode, std=0.3
        ).eval()
        x = torch.randn(3, 7, 32, dtype=dtype)
        merged = copy.deepcopy(model).merge_and_unload().double().train()
        with torch.no_grad():
            out = model(x)
        assert out.dtype == dtype
        error = (out.double() - merged(x.double())).norm() / out.double().norm()
        assert error < (3e-2 if dtype == torch.bfloat16 else 1e-5)


def mamba(kind):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 50}
    rank = {} if kind == "mamba2" else {"time_step_rank": 16}
    if kind == "mamba2":
        config = Mamba2Config(**small, num_heads=8, head_dim=8, n_groups=2, chunk_size=4)
        return Mamba2ForCausalLM(config)
    classes = {"mamba": (MambaConfig, MambaForCausalLM)}
    config, model = classes.get(kind, (FalconMambaConfig, FalconMambaForCausalLM))
    return model(config(**small, **rank))


@pytest.mark.parametrize("mode", ["frozen", "replaced"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_mamba_trains_every_factor_merges_and_generates(kind, mode):
    model = random_adapter(mamba(kind), 0.3, base_weight=mode)
    targeted = {n.split(".fedpara_")[0].split(".")[-1] for n, _ in model.named_parameters()}
    read = {"conv1d"} if mode == "frozen" else set()  # depthwise: its factors would be larger
    read |= set() if kind == "mamba2" else {"dt_proj"}
    assert {"in_proj", "out_proj", *read} <= targeted
    model.train()(IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        assert "fedpara_" not in name or p.grad.abs().sum() > 0, name
    model.eval()
    merged = copy.deepcopy(model).merge_and_unload().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, atol=2e-4, rtol=2e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(input_ids=IDS, **options), merged.generate(input_ids=IDS, **options)
    )


def test_t5_asks_for_a_weights_dtype_alone():
    torch.manual_seed(0)
    net = T5ForConditionalGeneration(
        T5Config(
            vocab_size=50,
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )
    model = random_adapter(net, target_modules=["wo", "wi", "q"]).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        ours = model(input_ids=IDS, labels=IDS).logits
        torch.testing.assert_close(
            ours, merged(input_ids=IDS, labels=IDS).logits, atol=1e-4, rtol=1e-4
        )


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 20)

    def forward(self, x):
        return F.linear(x, self.layer.weight, self.layer.bias)


def test_dropouts_hold_for_a_reader():
    model = random_adapter(Reader(), target_modules=["layer"], rank_dropout=0.5).train()
    layer, x = model.base_model.model.layer, torch.randn(4, 12)
    base, delta = layer.get_base_layer().weight, layer.get_delta_weight("default")
    for _ in range(5):
        rows = (layer.weight - base)[:, 0] / delta[:, 0]
        assert ((rows.abs() < 1e-4) | ((rows - 2).abs() < 1e-4)).all()  # 0, or 1 / (1 - p)
        assert not torch.allclose(rows, rows[0].expand(20))
    skipping = random_adapter(Reader(), target_modules=["layer"], module_dropout=1.0).train()
    layer = skipping.base_model.model.layer
    assert torch.equal(layer.weight, layer.get_base_layer().weight)
    assert not torch.equal(skipping(x), skipping.eval()(x))


@pytest.mark.parametrize("mode", ["frozen", "replaced"])
def test_the_jacobian_correction_sees_a_weight_that_was_read(mode):
    model = random_adapter(Reader(), target_modules=["layer"], base_weight=mode)
    with composed_weights(model) as found:
        out = model(torch.randn(3, 12)).square().sum()
    (record,) = found.values()
    (grad,) = torch.autograd.grad(out, [record.weight])
    assert grad.abs().sum() > 0


def test_a_personal_half_that_trains_through_readings_is_kept():
    """Loading the shared half starts the personal one anew only where it was never trained."""
    config = {"parameterization": "pfedpara", "target_modules": ["layer"]}
    drawn = FedParaConfig(r=2, base_weight="replaced", **config)
    shared = get_peft_model_state_dict(
        random_adapter(Reader(), base_weight="replaced", std=0.3, **config)
    )
    for trains in (False, True):
        model = get_peft_model(Reader(), copy.deepcopy(drawn)).train()
        personal = model.base_model.model.layer.halves("default")[1].x
        model(torch.randn(3, 12)).sum().backward()  # a forward pass says nothing of values
        if trains:
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        before = personal.detach().clone()
        set_peft_model_state_dict(model, shared)
        assert torch.equal(personal, before if trains else torch.zeros_like(before))


@pytest.mark.filterwarnings("ignore:.*(tie|tied|is_gradient_checkpointing)")  # PEFT's remarks
@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
def test_merging_into_a_tied_embedding_leaves_its_head_alone(targets):
    torch.manual_seed(0)
    net = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            vocab_size=50, tie_word_embeddings=True,
        )
    )  # fmt: skip
    assert net.lm_head.weight is net.model.embed_tokens.weight
    model = random_adapter(net, target_modules=targets).eval()
    expected = model(input_ids=IDS).logits.detach()
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert plain.config.tie_word_embeddings is False
