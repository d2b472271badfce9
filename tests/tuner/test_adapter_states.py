"""Scaling, turning off and on, merging some of several adapters; batch norms; odd embeddings."""

import copy
import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.layer_kinds import KINDS, build, inputs, twin
from tests.zoo import Net, randomize
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

from fedpara_peft import ConfigError, FedParaConfig, ReplacedWeightError, UnsupportedLayerError


def two_adapters(kind, dtype=torch.float64):
    model = build(kind, "frozen", ("fedpara", None), dtype)
    model.add_adapter(
        "b", FedParaConfig(r=3, target_modules=["layer"], parameterization="lowrank"),
        autocast_adapter_dtype=False,
    )  # fmt: skip
    model.base_model.set_adapter(["default", "b"])
    return randomize(model).eval()


@pytest.mark.parametrize("merged", ["default", "b"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_two_active_adapters_one_is_merged(kind, merged):
    model, x = two_adapters(kind), inputs(kind, torch.float64)
    expected = twin(model, kind, ("default", "b"))(x)
    torch.testing.assert_close(model(x), expected)
    model.base_model.merge_adapter(adapter_names=[merged])
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    out = model.train()(x)
    out.square().sum().backward()
    (other,) = {"default", "b"} - {merged}
    for name, p in model.named_parameters():
        if f".{other}." in name:
            assert p.grad.abs().sum() > 0, name
        elif f".{merged}." in name:
            assert p.grad is None, name
    with pytest.warns(UserWarning, match="additionally merging"):  # PEFT's
        model.eval().base_model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_disabling_takes_every_merged_adapter_out():
    model, x = two_adapters("linear"), inputs("linear", torch.float64)
    plain = copy.deepcopy(model.base_model.model.layer.get_base_layer())
    model.base_model.merge_adapter(adapter_names=["b"])
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model(x), twin(model, "linear", ("default", "b"))(x))


def test_scaling_by_zero_and_back():
    model, x = build("linear", "frozen", ("fedpara", None)), inputs("linear")
    layer, expected = model.base_model.model.layer, model(x)
    with model.disable_adapter():
        base = model(x)
    layer.scale_layer(0)
    torch.testing.assert_close(model(x), base)
    layer.unscale_layer(0)
    assert layer.scaling["default"] == 1.5
    torch.testing.assert_close(model(x), expected)
    # in any order, and twice
    for steps in (
        ((2, 0), (2, 0)), ((2, 0), (0, 2)), ((0, 0, 4), (4, 0, 0)), ((0, 2, 0), (0, 0, 2)),
    ):  # fmt: skip
        for scale in steps[0]:
            layer.scale_layer(scale)
        assert layer.scaling["default"] == 0
        for scale in steps[1][:-1]:
            layer.unscale_layer(scale)
        assert (layer.scaling["default"] == 0) is (steps[1][-1] == 0)
        layer.unscale_layer(steps[1][-1])
        assert layer.scaling["default"] == 1.5
    layer.scale_layer(0)
    layer.unscale_layer()
    assert layer.scaling["default"] == 1.5
    layer.scale_layer(0)
    layer.set_scale("default", 2.0)  # and what was before zero is forgotten
    assert layer.scaling["default"] == 3.0
    with pytest.raises(ConfigError, match="has not been scaled by 0"):
        layer.unscale_layer(0)
    assert layer.scaling["default"] == 3.0


def test_a_scale_set_while_merged_counts_from_the_unmerging_on():
    model, x = build("linear", "frozen", ("fedpara", None), torch.float64), torch.randn(3, 12)
    x, layer = x.double(), model.base_model.model.layer
    base, merged = layer.get_base_layer().weight.clone(), model(x)
    model.merge_adapter()
    layer.set_scale("default", 3.0)
    torch.testing.assert_close(model(x), merged)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight, base)
    torch.testing.assert_close(model(x), twin(model, "linear")(x))


def test_a_replaced_weight_is_scaled_neither_up_nor_back():
    layer = build("linear", "replaced", ("fedpara", None)).base_model.model.layer
    for call in (layer.scale_layer, layer.unscale_layer):
        with pytest.raises(ReplacedWeightError):
            call(2.0)
        call(1)
    layer.unscale_layer()
    assert layer.scaling["default"] == 1


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def net_config():
    targets = ["conv", "embed", "rnn", "hidden"]
    return FedParaConfig(r=2, target_modules=targets, modules_to_save=["head"])


@pytest.mark.parametrize("trainable", [False, True])
def test_turned_off_and_on_an_adapter_trains_as_it_did(tmp_path, trainable):
    randomize(get_peft_model(Net(), net_config())).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=trainable)
    before = trained(model)
    assert bool(before) is trainable
    with model.disable_adapter():
        assert not trained(model)
        with model.disable_adapter():
            pass
    model.base_model.enable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert trained(model) == before
    model.set_adapter("default")  # this is how PEFT's users make it train
    after = trained(model)
    assert after
    with model.disable_adapter():
        pass
    assert trained(model) == after


def test_some_factors_kept_from_training_stay_so():
    model = get_peft_model(Net(), net_config())
    for name, p in model.named_parameters():
        if "fedpara_w2" in name:
            p.requires_grad_(False)
    before = trained(model)
    with model.disable_adapter():
        pass
    assert trained(model) == before


def test_choosing_another_adapter_while_all_are_off():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), FedParaConfig(r=1, target_modules=["0"]))
    model.add_adapter("b", FedParaConfig(r=1, target_modules=["0"]))
    with model.disable_adapter():
        model.set_adapter("b")
    assert trained(model) == {n for n, _ in model.named_parameters() if n.endswith(".b.weight")}


def test_batch_norms_under_a_frozen_base_are_told_of_once(caplog):
    def said(**config):
        caplog.clear()
        settings = {"r": 2, "target_modules": ["conv"], **config}
        with caplog.at_level(logging.WARNING, "fedpara_peft"):
            get_peft_model(Net(), FedParaConfig(**settings))
        return caplog.messages

    (message,) = said()
    assert "1 batch norms, first norm, go on moving" in message
    assert "modules_to_save" in message
    assert not said(modules_to_save=["norm"])
    assert not said(base_weight="replaced")
    assert not said(inference_mode=True)


def test_and_modules_to_save_does_hold_them(tmp_path):
    config = FedParaConfig(r=2, target_modules=["conv"], modules_to_save=["norm"])
    torch.manual_seed(0)
    model = get_peft_model(Net(), config).train()
    images, ids = torch.randn(5, 3, 6, 6), torch.zeros(5, 7, dtype=torch.long)
    model(images, ids)
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path).eval()
    assert torch.equal(again(images, ids), model(images, ids))


@pytest.mark.parametrize("mode", ["frozen", "replaced"])
def test_an_embedding_that_rewrites_its_rows_is_refused_by_name(mode):
    net = nn.Sequential(nn.Embedding(40, 16, max_norm=1.0), nn.Linear(16, 16))
    config = FedParaConfig(r=2, base_weight=mode, target_modules=["0"])
    with pytest.raises(UnsupportedLayerError, match=r"0 \(Embedding\).*has max_norm=1.0"):
        get_peft_model(net, config)
    config = FedParaConfig(r=2, base_weight=mode, target_modules="all-supported")
    assert type(get_peft_model(net, config).base_model.model[0]) is nn.Embedding


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("mode", ["frozen", "replaced"])
def test_options_of_an_embedding_hold_for_its_factors(mode, padding, options):
    ids = torch.tensor([[2, 1, 1, 7], [1, 2, 7, 5]])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(30, 12, padding_idx=padding, **options)).double()
    table = net[0].weight.detach().clone()
    config = FedParaConfig(r=2, base_weight=mode, target_modules=["0"], alpha=None)
    model = randomize(get_peft_model(net, config, autocast_adapter_dtype=False))
    layer = model.base_model.model[0]
    direction = torch.randn(2, 4, 12, dtype=torch.float64)
    delta = layer.get_delta_weight("default")
    # the plain layer's own gradient of its table, carried on to the factors by hand
    values = (delta if mode == "replaced" else table + delta).detach().requires_grad_()
    dense = {name: value for name, value in options.items() if name != "sparse"}
    exact = nn.functional.embedding(ids, values, padding_idx=padding, **dense)
    (grad,) = torch.autograd.grad((exact * direction).sum(), values)
    if padding is not None:
        grad[padding] = 0
    factors = [p for n, p in layer.named_parameters() if "fedpara_" in n]
    wanted = torch.autograd.grad((delta * grad).sum(), factors)
    out = model(ids)
    torch.testing.assert_close(out, exact)
    assert out.sum().isfinite()
    (out * direction).sum().backward()
    for factor, expected in zip(factors, wanted, strict=True):
        assert not factor.grad.is_sparse
        torch.testing.assert_close(factor.grad, expected)


@pytest.mark.parametrize("mode", ["frozen", "replaced"])
def test_an_embedding_scaled_by_a_number(mode):
    torch.manual_seed(0)
    net = nn.Sequential(BartScaledWordEmbedding(30, 12, padding_idx=1, embed_scale=3.5))
    config = FedParaConfig(r=2, base_weight=mode, target_modules=["0"])
    model, ids = randomize(get_peft_model(net, config)).eval(), torch.tensor([[1, 4, 29]])
    out = model(ids)
    torch.testing.assert_close(out, 3.5 * model.base_model.model[0].weight[ids])
    torch.testing.assert_close(model.merge_and_unload()(ids), out)
