"""Layers whose weight something else computes or keeps: refused by name, or left as they are."""

import copy
import functools

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from tests.zoo import randomize
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fedpara_peft import FedParaConfig, UnsupportedLayerError

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")


def pruned(layer, name="weight"):
    prune.l1_unstructured(layer, name, 0.4)
    return layer


def pruned_twice(layer):
    return prune.random_structured(pruned(layer), "weight", 0.2, 0)


def doubled_in_a_hook(layer):
    theta = nn.Parameter(layer.weight.detach().clone())
    del layer.weight
    layer.theta = theta
    layer.weight = 2 * theta.detach()
    layer.register_forward_pre_hook(lambda m, _: setattr(m, "weight", 2 * m.theta))
    return layer


class Property(nn.Linear):
    def __init__(self):
        super().__init__(16, 16)
        self.theta = self._parameters.pop("weight")

    @property
    def weight(self):
        return 2 * self.theta


COMPUTED = {
    "spectral_norm": (lambda: spectral_norm(nn.Linear(16, 16)), "SpectralNorm"),
    "spectral_norm, convolution": (lambda: spectral_norm(nn.Conv2d(16, 16, 3)), "SpectralNorm"),
    "spectral_norm, embedding": (lambda: spectral_norm(nn.Embedding(16, 16)), "SpectralNorm"),
    "weight_norm": (lambda: weight_norm(nn.Linear(16, 16)), "WeightNorm"),
    "weight_norm, LSTM": (lambda: weight_norm(nn.LSTM(16, 16), "weight_hh_l0"), "WeightNorm"),
    "prune": (lambda: pruned(nn.Linear(16, 16)), "L1Unstructured"),
    "prune, LSTM": (lambda: pruned(nn.LSTM(16, 16), "weight_ih_l0"), "L1Unstructured"),
    "prune twice": (lambda: pruned_twice(nn.Linear(16, 16)), "PruningContainer"),
    "a hook": (lambda: doubled_in_a_hook(nn.Linear(16, 16)), "function"),
    "a property": (Property, "its class"),
    "parametrization": (lambda: parametrizations.orthogonal(nn.Linear(16, 16)), "parametrization"),
    "lazy": (lambda: nn.LazyLinear(16), "run a batch through the model"),
}


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_base_that_computes_its_weight_is_refused_by_name(kind, base_weight):
    build, says = COMPUTED[kind]
    model = nn.Sequential(build(), nn.Linear(16, 16))
    config = FedParaConfig(r=2, base_weight=base_weight, target_modules=["0"])
    with pytest.raises(UnsupportedLayerError, match=rf"module 0 .*as it is \(.*{says}"):
        get_peft_model(model, config)
    config = FedParaConfig(r=2, base_weight=base_weight, target_modules="all-supported")
    get_peft_model(model, config)
    assert not hasattr(model[0], "specs")
    assert hasattr(model[1], "specs")


def test_what_is_pruned_for_good_is_a_plain_layer_again():
    net = nn.Sequential(pruned(nn.Linear(16, 24)), nn.ReLU(), nn.Linear(24, 4))
    prune.remove(net[0], "weight")
    model = randomize(get_peft_model(net, FedParaConfig(r=2, target_modules=["0"]))).eval()
    x = torch.randn(6, 16)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=1e-5, rtol=1e-5)


def test_a_pruned_bias_stays_pruned_and_is_refused_where_the_layer_is_not_called():
    net = nn.Sequential(pruned(nn.Linear(16, 16), "bias"))
    with pytest.raises(UnsupportedLayerError, match=r"0 cannot have its weight replaced: L1Uns"):
        get_peft_model(net, FedParaConfig(r=2, base_weight="replaced", target_modules=["0"]))
    x = torch.randn(5, 16)
    model = randomize(get_peft_model(net, FedParaConfig(r=2, target_modules=["0"])))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.bias_orig.add_(1)  # trained on
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    bias = layer.base_layer.bias_orig * layer.base_layer.bias_mask
    torch.testing.assert_close(model(x), x @ weight.T + bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["auto", "compose", "khatri_rao"])
def test_weights_that_are_offloaded_are_weights(path):
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    config = FedParaConfig(r=2, target_modules=["0"], compute_path=path)
    x = torch.randn(3, 16)
    model = randomize(get_peft_model(copy.deepcopy(net), config)).eval()
    expected = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.base_model.model[0].base_layer.weight.is_meta
    model.add_adapter("b", copy.deepcopy(config))
    assert "b" in model.base_model.model[0].specs
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    cpu_offload(net, execution_device=torch.device("cpu"))
    assert hasattr(get_peft_model(net, config).base_model.model[0], "specs")


def _plus_100(layer):
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 100


def _hooked(layer):
    layer.register_forward_hook(lambda module, args, out: out + 100)


LAYERS = {
    "linear": (lambda: nn.Linear(16, 16), (3, 16)),
    "convolution": (lambda: nn.Conv2d(16, 16, 3), (2, 16, 6, 6)),
    "embedding": (lambda: nn.Embedding(16, 16), None),
}


@pytest.mark.parametrize("path", ["auto", "compose", "khatri_rao"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("change", [_plus_100, _hooked])
@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_done_to_a_frozen_layers_call_is_done(kind, change, grad, path):
    """Caches and offloading hook into a layer before it is adapted, or afterwards."""
    build, shape = LAYERS[kind]
    x = torch.arange(6).view(2, 3) if shape is None else torch.randn(*shape)
    config = FedParaConfig(r=2, target_modules=["0"], compute_path=path, init_weights=False)
    model = get_peft_model(nn.Sequential(build()), config)
    with torch.set_grad_enabled(grad):
        expected = model(x) + 100
        change(model.base_model.model[0].base_layer)
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("where", ["layer, full", "layer, full, pre", "everywhere"])
@pytest.mark.parametrize("path", ["auto", "compose", "khatri_rao"])
def test_hooks_on_a_frozen_layer_are_called(path, where):
    config = FedParaConfig(r=2, target_modules=["0"], compute_path=path, init_weights=False)
    layer = nn.Linear(16, 16)
    model = get_peft_model(nn.Sequential(layer), config)
    called = []

    def hook(module, *_):
        if module is layer:
            called.append(module)

    register = {
        "layer, full": layer.register_full_backward_hook,
        "layer, full, pre": layer.register_full_backward_pre_hook,
        "everywhere": nn.modules.module.register_module_forward_hook,
    }[where]
    handle = register(hook)
    try:
        model(torch.randn(3, 16, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert called == [layer]


@pytest.mark.parametrize("base", ["replaced", "seeded"])
def test_a_forward_put_in_place_of_ones_own_is_not_gone_past(base):
    layer = nn.Linear(64, 64)
    _plus_100(layer)
    config = FedParaConfig(r=2, target_modules=["0"], base_weight=base)
    with pytest.raises(UnsupportedLayerError, match="a forward that was put in place"):
        get_peft_model(nn.Sequential(layer), config)


def _patched(named):
    """What libraries of quantizers and caches put in place of a class's forward."""
    plain = nn.Linear.forward

    def forward(self, x):
        return plain(self, x) + 100 * (self.out_features == 16)

    return functools.wraps(plain)(forward) if named else forward


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("path", ["auto", "compose", "khatri_rao"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_class_whose_forward_is_patched_is_called(monkeypatch, grad, path, named):
    config = FedParaConfig(r=2, target_modules=["0"], compute_path=path, init_weights=False)
    model, x = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config), torch.randn(300, 16)
    with torch.set_grad_enabled(grad):
        expected = model(x) + 100
        monkeypatch.setattr(nn.Linear, "forward", _patched(named))
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("base", ["replaced", "seeded"])
def test_a_class_whose_forward_is_patched_keeps_its_weight(monkeypatch, base, named):
    monkeypatch.setattr(nn.Linear, "forward", _patched(named))
    config = FedParaConfig(r=2, target_modules=["0"], base_weight=base)
    with pytest.raises(UnsupportedLayerError, match="with a forward of its own"):
        get_peft_model(nn.Sequential(nn.Linear(64, 64)), config)


def test_a_recurrent_layers_forward_is_called_anyway():
    layer = nn.LSTM(16, 16)
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: (plain(*args, **kwargs)[0] + 100, None)
    config = FedParaConfig(r=2, target_modules=["0"], base_weight="replaced")
    model = get_peft_model(nn.Sequential(layer), config)
    assert model(torch.randn(3, 2, 16))[0].min() > 90


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(0, 4), lambda: nn.Linear(4, 0), lambda: nn.Embedding(0, 4),
        lambda: nn.Conv2d(0, 3, 3),
    ],
)  # fmt: skip
def test_a_layer_without_entries_is_refused_by_name(build):
    with pytest.raises(UnsupportedLayerError, match=r"0 .*its weight has no entries"):
        get_peft_model(nn.Sequential(build()), FedParaConfig(r=2, target_modules=["0"]))
