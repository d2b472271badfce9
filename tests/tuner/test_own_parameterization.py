"""A parameterization of one's own through everything, with no other change."""

import inspect

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests import own_parameterizations
from tests.federation.test_trainer import arguments, toy
from tests.layer_kinds import KINDS, build, inputs
from tests.own_parameterizations import OWN, by_hand
from tests.zoo import Net, adapted, mlp, net_inputs, randomize
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fedpara_peft import (
    ConfigError,
    ConversionError,
    FederatedTrainer,
    FedParaConfig,
    communicated_state,
    fedpara_summary,
    load_local,
    local_state,
    partition,
    save_as_loha,
    save_as_lora,
    save_local,
)
from fedpara_peft.maths.parameterizations import PARAMETERIZATIONS


@pytest.fixture
def registered(monkeypatch):
    for name, own in OWN.items():
        monkeypatch.setitem(PARAMETERIZATIONS, name, own)


def test_three_of_them_are_short():
    assert len(inspect.getsource(own_parameterizations).splitlines()) <= 40


def test_before_it_is_registered_the_name_is_refused(tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"one of \('fedpara', 'pfedpara', 'lowrank'.* got 'three'"
    ):
        FedParaConfig(parameterization="three")
    with monkeypatch.context() as patch:
        patch.setitem(PARAMETERIZATIONS, "three", OWN["three"])
        FedParaConfig(parameterization="three", target_modules=["0"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="got 'three'"):
        FedParaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("path", ["auto", "compose"])
@pytest.mark.parametrize("mode", ["frozen", "replaced"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OWN)
@pytest.mark.usefixtures("registered")
def test_every_layer_kind_applies_and_merges_it(name, kind, mode, path):
    model = build(kind, mode, (name, None), torch.float64, compute_path=path)
    layer, x = model.base_model.model.layer, inputs(kind, torch.float64)
    out = model(x)
    for weight, plan in layer.specs["default"].plans.items():
        parts = [
            h.x @ h.y.T if h.t is None else torch.einsum("oa,ab...,ib->oi...", h.x, h.t, h.y)
            for h in layer.halves("default", weight)
        ]
        shape = plan.shape
        w = by_hand(name, parts).reshape(shape.out_features, shape.in_features, *shape.kernel)
        if kind == "embedding padded":
            w = w.index_fill(0, torch.tensor([2]), 0)
        w = layer.scale_of("default") * (w.T if kind == "Conv1D" else w)
        torch.testing.assert_close(layer.get_delta_weight("default", weight), w)
    torch.testing.assert_close(model.merge_and_unload()(x), out)


@pytest.mark.parametrize("mode", ["frozen", "replaced"])
@pytest.mark.parametrize("name", OWN)
@pytest.mark.usefixtures("registered")
def test_it_trains_saves_and_loads(tmp_path, name, mode):
    torch.manual_seed(0)
    model = adapted(Net(), parameterization=name, base_weight=mode)
    batch, labels = net_inputs(12), torch.randint(0, 2, (12,))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(*batch), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path / "adapter", is_trainable=True)
    if mode == "frozen":  # whose batch norm moved, and is not in the adapter
        again.base_model.model.norm.load_state_dict(model.base_model.model.norm.state_dict())
    if OWN[name].local_halves:
        assert not torch.equal(again.eval()(*batch), model(*batch))
        load_local(again, save_local(model, tmp_path / "local"))
    torch.testing.assert_close(again.eval()(*batch), model(*batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.usefixtures("registered")
def test_it_is_counted_and_summarized(name):
    model = adapted(mlp(norm=False), parameterization=name)
    summary = fedpara_summary(model)
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    rank = {"three": 27, "square": 9, "personal three": 32}[name]
    assert summary.rows[1].reachable == f"{rank}/32"
    assert summary.rows[1].parameters == OWN[name].num_halves * 3 * (32 + 32)
    local = local_state(model)
    assert all(".fedpara_w3_" in key for key in local)
    assert len(local) == (4 if name == "personal three" else 0)  # the head stays dense
    assert not local.keys() & communicated_state(model).keys()


@pytest.mark.parametrize("name", OWN)
@pytest.mark.usefixtures("registered")
def test_a_frozen_model_starts_as_itself_and_moves(name):
    plain = mlp(norm=False)
    x = torch.randn(5, 16)
    expected = plain(x)
    model = adapted(plain, parameterization=name, base_weight="frozen")
    torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
    model(x).square().sum().backward()
    for layer in (model.base_model.model[i] for i in (0, 2, 4)):
        grads = [f.grad for half in layer.halves("default") for f in half.tensors()]
        assert any(bool(g.any()) for g in grads)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.usefixtures("registered")
def test_it_is_a_lora_and_no_loha(tmp_path, name):
    model = randomize(adapted(mlp(norm=False), parameterization=name, base_weight="frozen"))
    lora = save_as_lora(model, tmp_path / "lora")
    assert lora.r == {"three": 27, "square": 12, "personal three": 36}[name]
    x = torch.randn(5, 16)
    again = PeftModel.from_pretrained(mlp(norm=False), tmp_path / "lora")
    torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=1e-4)
    with pytest.raises(ConversionError, match=f"LoHa has no {name!r}"):
        save_as_loha(model, tmp_path / "loha")


@pytest.mark.usefixtures("registered")
def test_adapters_of_different_forms_stand_side_by_side(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(mlp(norm=False), FedParaConfig(r=2, target_modules=["0", "2"]))
    model.add_adapter("other", FedParaConfig(r=3, target_modules=["0"], parameterization="three"))
    model.base_model.set_adapter(["default", "other"])
    randomize(model)
    layer, x = model.base_model.model[0], torch.randn(4, 16)
    w = layer.get_base_layer().weight + sum(map(layer.get_delta_weight, ("default", "other")))
    torch.testing.assert_close(layer(x), x @ w.T + layer.get_base_layer().bias)
    model.set_adapter("other")
    out = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(mlp(norm=False), tmp_path / "other")
    torch.testing.assert_close(again(x), out)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert layer.specs.keys() == {"default"}
    assert not any("other" in name for name, _ in model.named_parameters())


@pytest.mark.usefixtures("registered")
def test_tanh_goes_with_products_and_factors_are_not_saved_whole():
    model = randomize(adapted(mlp(norm=False), parameterization="three", nonlinearity="tanh"))
    x = torch.randn(5, 16)
    out = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), out, atol=1e-6, rtol=1e-5)
    model = mlp()
    model.add_module("w3_x", nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="'fedpara_w3_x'"):
        adapted(model, parameterization="three", base_weight="frozen", modules_to_save=["w3_x"])


@pytest.mark.parametrize("schedule", ["all", "one_block"])
@pytest.mark.parametrize("name", OWN)
@pytest.mark.usefixtures("registered")
def test_a_federation_trains_it(tmp_path, caplog, name, schedule):
    """What is personal stays, and one block at a time is exact where the weight is multilinear."""
    model = randomize(adapted(mlp(norm=False), parameterization=name)).double()
    args = arguments(
        tmp_path, report_averaging_bias=True, factor_schedule=schedule, learning_rate=0.1
    )
    x, y = toy().tensors
    clients = partition(TensorDataset(x.double(), y), "dirichlet", 4, concentration=1.0)
    trainer = FederatedTrainer(model, args, clients)
    history = trainer.train()
    exact = schedule == "one_block" and OWN[name].is_multilinear
    biases = [r.averaging_bias for r in history]
    assert [bias < 1e-9 for bias in biases] == [exact] * 3, biases
    assert ("multiplies a half with itself" in caplog.text) is (
        schedule == "one_block" and name == "square"
    )
    own = trainer.client_model(history[-1].cohort[0])
    kept, world = local_state(own), local_state(model)
    assert kept.keys() == world.keys()
    assert bool(kept) is (name == "personal three")
    assert all(not torch.equal(kept[key], world[key]) for key in kept)
