"""base_weight="seeded": begins as a dense weight, is saved and sent as factors alone."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from tests.zoo import Net, adapted, net_inputs, randomize
from torch import nn

from fedpara_peft import (
    CheckpointError,
    ConfigError,
    ConversionError,
    FedParaConfig,
    FedParaLayer,
    MixedBatchError,
    ReplacedWeightError,
    communicated_state,
    composed_weight_decay,
    load_local,
    save_as_lora,
    save_local,
)
from fedpara_peft.maths.compose import compose
from fedpara_peft.maths.starts.seeded import seeded_uniform

FORMS = ["fedpara", "lowrank", "pfedpara"]


def seeded(form="fedpara", **more):
    return adapted(Net(), base_weight="seeded", parameterization=form, **more)


def weights(model):
    """Every factorized weight in float64: base plus P(θ), composed as the formula says."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, FedParaLayer):
            for weight, plan in layer.specs["default"].plans.items():
                halves = [h.to(torch.float64) for h in layer.halves("default", weight)]
                delta = compose(halves, layer.specs["default"].parameterization)
                base = getattr(layer.get_base_layer(), weight).detach().double()
                found[f"{name}.{weight}"] = (base + delta.reshape(base.shape), plan)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_it_begins_as_the_dense_weight_of_its_seed(form):
    for name, (weight, plan) in weights(seeded(form, base_seed=3)).items():
        expected = seeded_uniform(3, f"{name}/base", weight.shape, plan.shape.variance)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_the_plain_one_with_these_weights(form):
    model = randomize(seeded(form)).eval()
    images, ids = net_inputs()
    plain = Net().eval()
    state = plain.state_dict()
    own = {k.replace(".base_layer", ""): v for k, v in model.base_model.model.state_dict().items()}
    for name in state:
        state[name] = own[name] if name in own else state[name]
    for name, (weight, _) in weights(model).items():
        state[name] = weight.detach().float()
    plain.load_state_dict(state)
    expected = plain(images, ids)
    torch.testing.assert_close(model(images, ids), expected, rtol=1e-4, atol=1e-4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(model(images, ids), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # not a bit lost
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is Net
    assert merged.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(merged(images, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_the_base_is_saved_and_it_comes_back(tmp_path, form, meta):
    model = randomize(seeded(form, base_seed=11)).eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME)
    bases = [f"{name.rpartition('.')[0]}.base_layer.weight" for name in weights(model)]
    assert not [key for key in saved if key.endswith(tuple(bases))]
    torch.manual_seed(99)
    again = PeftModel.from_pretrained(
        Net(), tmp_path, is_trainable=True, low_cpu_mem_usage=meta
    ).eval()
    if form == "pfedpara":
        save_local(model, tmp_path / "mine")
        load_local(again, tmp_path / "mine")
    inputs = net_inputs()
    assert torch.equal(model(*inputs), again(*inputs))


def test_as_many_bytes_travel_as_without_a_base():
    sent, other = (
        {n: t.shape for n, t in communicated_state(adapted(Net(), base_weight=base)).items()}
        for base in ("seeded", "replaced")
    )
    assert sent == other


def test_gradients_are_those_of_the_dense_weight_by_the_chain_rule():
    model = randomize(seeded())
    images, ids = net_inputs()
    model(images, ids).square().sum().backward()
    got = model.base_model.model.hidden
    twin = copy.deepcopy(model)
    dense = twin.base_model.model
    layer = dense.hidden
    halves = [h.to(torch.float64) for h in layer.halves("default")]
    factors = [f.detach().requires_grad_() for h in halves for f in h.tensors()]
    x1, y1, x2, y2 = factors
    weight = layer.get_base_layer().weight.detach().double() + (x1 @ y1.T) * (x2 @ y2.T)
    plain = nn.Linear(32, 48)
    plain.bias.data.copy_(layer.get_base_layer().bias)
    plain.weight = nn.Parameter(weight.float())
    dense.hidden = plain
    dense(images, ids).square().sum().backward()
    expected = torch.autograd.grad(weight, factors, plain.weight.grad.double())
    found = [f.grad.double() for h in got.halves("default") for f in h.tensors()]
    for own, right in zip(found, expected, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-3, atol=1e-3)
    assert got.get_base_layer().weight.grad is None


def test_a_base_that_differs_is_refused_by_name(tmp_path):
    model = seeded(base_seed=1)
    model.peft_config["default"].base_digest["hidden.weight"] = "0" * 16
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"hidden\.weight: base_seed=1 gives a base .* 0{16}"):
        PeftModel.from_pretrained(Net(), tmp_path)


def test_two_models_of_one_configuration_have_one_base():
    config = FedParaConfig(r=3, base_weight="seeded", target_modules=["hidden"])
    one, two = (get_peft_model(Net(), config).base_model.model.hidden for _ in range(2))
    assert torch.equal(one.get_base_layer().weight, two.get_base_layer().weight)
    other = FedParaConfig(r=3, base_weight="seeded", target_modules=["hidden"], base_seed=1)
    three = get_peft_model(Net(), other).base_model.model.hidden
    assert not torch.equal(one.get_base_layer().weight, three.get_base_layer().weight)


def test_a_padding_row_stays_zero():
    layer = nn.Sequential(nn.Embedding(19, 6, padding_idx=4))
    model = get_peft_model(layer, FedParaConfig(r=1, base_weight="seeded", target_modules=["0"]))
    rows = model(torch.tensor([4, 3]))
    assert torch.equal(rows[0], torch.zeros(6))
    assert rows[1].abs().min() > 0


def test_half_precision_keeps_its_dtype_and_loads_again(tmp_path):
    model = adapted(Net().to(torch.bfloat16), base_weight="seeded")
    layer = model.base_model.model.hidden
    assert layer.get_base_layer().weight.dtype == torch.bfloat16
    assert layer.halves("default")[0].x.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), tmp_path)  # the digest is of the base, not its dtype
    assert again.base_model.model.hidden.get_base_layer().weight.dtype == torch.float32


def test_what_needs_a_pretrained_weight_is_refused():
    model = seeded()
    layer = model.base_model.model.hidden
    with pytest.raises(ReplacedWeightError, match="base_weight='seeded'"):
        model.disable_adapter_layers()
    with pytest.raises(ReplacedWeightError, match="base_weight='seeded'"):
        model.delete_adapter("default")
    with pytest.raises(ReplacedWeightError, match="base_weight='seeded'"):
        model.unload()
    with pytest.raises(ReplacedWeightError, match="base_weight='seeded'"):
        layer.set_scale("default", 2)
    with pytest.raises(ReplacedWeightError, match="has one adapter"):
        model.add_adapter("other", FedParaConfig(r=2, target_modules=["hidden"]))
    with pytest.raises(ConversionError, match="base_weight='seeded'"):
        save_as_lora(model, "never-written")
    with pytest.raises(MixedBatchError, match="trained from scratch"):
        layer(torch.randn(1, 32), adapter_names=["default"])
    mixed = PeftMixedModel(Net(), LoraConfig(r=2, target_modules=["hidden"]))
    with pytest.raises(ConfigError, match="base_weight='seeded' has none"):
        mixed.add_adapter("x", FedParaConfig(base_weight="seeded", target_modules=["hidden"]))


@pytest.mark.parametrize("base", ["frozen", "replaced", "seeded"])
def test_decay_of_the_product_is_that_of_the_dense_weight(base):
    more = {"alpha": 6} if base == "frozen" else {}
    model = randomize(adapted(Net(), base_weight=base, **more))
    penalty = composed_weight_decay(model, 0.2)
    total = 0.0
    for _, layer in model.base_model.model.named_modules():
        if isinstance(layer, FedParaLayer):
            for weight in layer.specs["default"].plans:
                halves = [h.to(torch.float64) for h in layer.halves("default", weight)]
                w = compose(halves).detach()
                if base == "frozen":
                    w = 2 * w
                if layer.zero_row is not None:
                    w[layer.zero_row] = 0
                if base == "seeded":
                    w = w + getattr(layer.get_base_layer(), weight).detach().reshape(w.shape)
                total += float(w.square().sum())
    assert float(penalty.detach()) == pytest.approx(0.1 * total, rel=1e-5)
    penalty.backward()
    assert all(f.grad is not None for _, f in model.base_model.model.hidden._factors())


def test_decay_needs_something_to_decay():
    with pytest.raises(ConfigError, match="no active FedPara weight to decay"):
        composed_weight_decay(nn.Linear(2, 2), 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", ["replaced", "seeded", "frozen"])
def test_the_composed_decay_of_half_precision(base, dtype):
    """Its sum of squares is beyond what float16 holds."""
    torch.manual_seed(0)
    config = FedParaConfig(
        r=2, base_weight=base, target_modules=["0"], init_weights=base != "frozen"
    )
    model = get_peft_model(nn.Sequential(nn.Embedding(2000, 128)), config).to(dtype)
    layer = model.base_model.model[0]
    weight = layer.effective_weight() if base == "seeded" else layer.get_delta_weight("default")
    expected = 0.5 * weight.double().square().sum().item()
    found = composed_weight_decay(model, 1.0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-3)
