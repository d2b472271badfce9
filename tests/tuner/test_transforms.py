"""Adapted layers under torch's own transformations: export, forward-mode derivatives."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from peft import get_peft_model
from tests.zoo import randomize
from torch import nn

from fedpara_peft import FedParaConfig

LAYERS = {
    "linear, small": (lambda: nn.Linear(64, 64), (64,)),
    "linear": (lambda: nn.Linear(128, 128), (128,)),
    "convolution": (lambda: nn.Conv2d(16, 16, 3), (16, 8, 8)),
    "embedding": (lambda: nn.Embedding(30, 16), None),
}
PATHS = ["auto", "compose", "khatri_rao"]


def adapted(kind, base, path):
    torch.manual_seed(0)
    build, _ = LAYERS[kind]
    config = FedParaConfig(r=2, target_modules=["0"], base_weight=base, compute_path=path)
    return randomize(get_peft_model(nn.Sequential(build()), config)).eval().base_model.model


def batch(kind, rows):
    shape = LAYERS[kind][1]
    return torch.randint(30, (rows, 5)) if shape is None else torch.randn(rows, *shape)


@pytest.mark.parametrize("base", ["frozen", "replaced", "seeded"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_exported_layer_takes_any_batch(kind, path, base):
    model = adapted(kind, base, path)
    rows = torch.export.Dim("rows", max=4096)
    with torch.no_grad():
        found = torch.export.export(model, (batch(kind, 4),), dynamic_shapes=({0: rows},))
        for n in (3, 7, 300):
            x = batch(kind, n)
            torch.testing.assert_close(found.module()(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("base", ["frozen", "replaced", "seeded"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_traced_layer_takes_any_batch_and_has_gradients(kind, path, base):
    model = adapted(kind, base, path)
    traced = torch.jit.trace(model, (batch(kind, 4),))
    factors = [p for p in model.parameters() if p.requires_grad]
    for n in (3, 300):
        x = batch(kind, n)
        found, expected = traced(x), model(x)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        own = torch.autograd.grad(found.square().sum(), factors)
        right = torch.autograd.grad(expected.square().sum(), factors)
        for one, other in zip(own, right, strict=True):
            torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("base", ["frozen", "replaced", "seeded"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [kind for kind, (_, shape) in LAYERS.items() if shape])
def test_forward_mode_is_the_derivative_of_the_dense_layer(kind, path, base):
    model = adapted(kind, base, path).double()
    plain = copy.deepcopy(LAYERS[kind][0]()).double()
    with torch.no_grad():
        plain.weight.copy_(model[0].effective_weight())
        plain.bias.copy_(model[0].base_layer.bias)
    x, direction = batch(kind, 3).double(), batch(kind, 3).double()
    found = []
    for function in (model, plain):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))))
    (value, tangent), (expected, of_dense) = found
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(tangent, of_dense)
