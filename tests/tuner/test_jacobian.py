"""The Jacobian correction against its formula, finite differences, and what it is for."""

import copy

import pytest
import torch
from tests.zoo import Net, adapted, mlp, net_inputs, randomize
from torch import nn

from fedpara_peft import (
    ConfigError,
    FederatedArguments,
    FederatedTrainer,
    composed_weights,
    jacobian_correction,
)
from fedpara_peft.maths.compose import Half, compose
from fedpara_peft.maths.jacobian import jacobian_penalty


def random_halves(kernel=()):
    def factor(*shape):
        return (0.7 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()

    return [
        Half(factor(4, 2), factor(3, 2), factor(2, 2, *kernel) if kernel else None) for _ in "12"
    ]


def by_hand(halves, gradient, eta, target):
    """R with the factors' gradients written out for W = (X₁Y₁ᵀ) ⊙ (X₂Y₂ᵀ)."""
    (x1, y1, _), (x2, y2, _) = halves
    w1, w2 = x1 @ y1.T, x2 @ y2.T
    g1, g2 = gradient * w2, gradient * w1
    new1 = (x1 - eta * g1 @ y1) @ (y1 - eta * g1.T @ x1).T
    new2 = (x2 - eta * g2 @ y2) @ (y2 - eta * g2.T @ x2).T
    return (new1 * new2 - target).square().sum() / 2


def test_value_and_gradient_by_hand_and_by_finite_differences():
    eta = 0.3
    halves = random_halves()
    gradient = torch.randn(4, 3, dtype=torch.float64)
    target = (compose(halves) - eta * gradient).detach()
    penalty = jacobian_penalty(compose, halves, gradient, eta)
    torch.testing.assert_close(penalty, by_hand(halves, gradient, eta, target))
    factors = [f for h in halves for f in h.tensors()]
    grads = torch.autograd.grad(penalty, factors)
    for factor, grad in zip(factors, grads, strict=True):
        for index in range(factor.numel()):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    factor.view(-1)[index] += sign * 1e-5
                    values.append(by_hand(halves, gradient, eta, target))
                    factor.view(-1)[index] -= sign * 1e-5
            slope = (values[0] - values[1]) / 2e-5
            assert slope.item() == pytest.approx(grad.view(-1)[index].item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("tanh", [None, "tanh"])
def test_a_step_on_it_lowers_it(kernel, tanh):
    halves = random_halves(kernel)
    gradient = torch.randn(4, 3, *kernel, dtype=torch.float64)

    def recompose(parts):
        return compose(parts, "pfedpara", tanh)

    eta = 0.1
    target = (recompose(halves) - eta * gradient).detach()

    def value(parts):
        factors = [f for h in parts for f in h.tensors()]
        steps = torch.autograd.grad(recompose(parts), factors, gradient)
        moved = iter([f - eta * s for f, s in zip(factors, steps, strict=True)])
        after = [Half(*(None if f is None else next(moved) for f in h)) for h in parts]
        return (recompose(after) - target).square().sum() / 2

    penalty = jacobian_penalty(recompose, halves, gradient, eta)
    assert penalty.item() == pytest.approx(value(halves).item())
    factors = [f for h in halves for f in h.tensors()]
    grads = iter(torch.autograd.grad(penalty, factors))
    stepped = [
        Half(
            *(None if f is None else (f - 1e-3 * next(grads)).detach().requires_grad_() for f in h)
        )
        for h in halves
    ]
    assert value(stepped) < penalty


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_on_a_model_with_every_layer_kind(base_weight):
    model = randomize(adapted(Net(), base_weight=base_weight)).double()
    images, ids = net_inputs()
    with composed_weights(model) as composed:
        loss = model(images.double(), ids).square().sum()
        regularizer = jacobian_correction(loss, composed, learning_rate=0.05, strength=3.0)
        (loss + regularizer).backward()
    names = {name.removeprefix("base_model.model.").rsplit(".default.")[0] for name in composed}
    assert {"conv", "embed", "rnn", "hidden"} <= names
    weights = [c.weight for c in composed.values()]
    # the same sum from the composed weights' gradients, obtained again
    again = copy.deepcopy(model)
    with composed_weights(again) as fresh:
        loss = again(images.double(), ids).square().sum()
        grads = torch.autograd.grad(loss, [c.weight for c in fresh.values()], retain_graph=True)
        total = sum(
            jacobian_penalty(c.recompose, c.halves, g, 0.05)
            for c, g in zip(fresh.values(), grads, strict=True)
        )
    assert len(weights) == len(grads)
    torch.testing.assert_close(regularizer, 3.0 * total)
    assert all(p.grad is not None for n, p in model.named_parameters() if "fedpara_" in n)
    # nothing is recorded any more, and the model runs as before
    assert torch.equal(model(images.double(), ids), again(images.double(), ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_under_autocast_it_is_computed_in_float32(base_weight, dtype):
    model = randomize(adapted(mlp(norm=False), base_weight=base_weight))
    x = torch.randn(8, 16)
    with torch.autocast("cpu", dtype=dtype), composed_weights(model) as composed:
        loss = model(x).float().square().mean()
        regularizer = jacobian_correction(loss, composed, learning_rate=1e-3)
        used = list(composed.values())
        assert all(c.weight.dtype == torch.float32 for c in used)
        gradients = torch.autograd.grad(loss, [c.weight for c in used], retain_graph=True)
    (regularizer + loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    wide = [tuple(half.to(torch.float64) for half in c.halves) for c in used]
    exact = sum(
        jacobian_penalty(c.recompose, halves, g.double(), 1e-3)
        for c, halves, g in zip(used, wide, gradients, strict=True)
    )
    assert regularizer.item() == pytest.approx(exact.item(), rel=5e-3)


def test_a_layer_called_twice_has_one_weight():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    model = adapted(Twice(), target_modules=["layer"], r=1)
    with composed_weights(model) as composed:
        loss = model(torch.randn(3, 6)).square().sum()
        assert len(composed) == 1
        assert jacobian_correction(loss, composed, 0.1) > 0


def test_no_composed_weight_is_an_error():
    model = adapted(mlp())
    loss = model(torch.randn(3, 16)).sum()
    with pytest.raises(ConfigError, match="with composed_weights"):
        jacobian_correction(loss, {}, 0.1)


def test_the_trainer_uses_it(tmp_path):
    data = torch.utils.data.TensorDataset(torch.randn(40, 16), torch.randint(0, 4, (40,)))

    def run(folder, strength):
        model = adapted(mlp())
        args = FederatedArguments(
            str(tmp_path / folder), num_rounds=2, disable_tqdm=True, jacobian_correction=strength
        )
        return FederatedTrainer(model, args, [data, data]).train()[-1].train_loss

    assert run("a", 0.0) == run("b", 0.0) != run("c", 1.0)
