"""Beside a frozen weight the first step goes as far as LoRA's; named starts are as named."""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from fedpara_peft import ConfigError, FedParaConfig
from fedpara_peft.maths.starts.variances import identity_start_stds

RANKS = (2, 4, 8, 16, 32, 64)
RATES = {torch.optim.SGD: 3e-3, torch.optim.Adam: 1e-3}


def wrapped(config, layer):
    return get_peft_model(nn.Sequential(layer), config).base_model.model[0]


def first_step(layer, optimizer, gradient):
    """ΔW after one step, for a loss <G, ΔW>, in units of the learning rate."""
    factors = [p for p in layer.parameters() if p.requires_grad]
    (layer.get_delta_weight("default") * gradient).sum().backward()
    rate = 1e-4
    optimizer(factors, lr=rate).step()
    with torch.no_grad():
        return layer.get_delta_weight("default") / rate


def reach(delta, gradient, optimizer):
    """How far ΔW went: along the gradient for SGD, in root mean square for Adam."""
    if optimizer is torch.optim.SGD:
        return float(-(delta * gradient).sum() / gradient.square().sum())
    return float(delta.square().mean().sqrt())


def ratio_to_lora(fedpara, layer, r, optimizer, draws=1):
    """Mean reach of FedPara of rank r in that of PEFT's LoRA of rank 2r."""
    found = {}
    for name, config in (
        ("fedpara", fedpara),
        ("lora", LoraConfig(r=2 * r, lora_alpha=2 * r, target_modules=["0"])),
    ):
        torch.manual_seed(0)
        total = 0.0
        for _ in range(draws):
            one = wrapped(config, layer())
            gradient = torch.randn_like(one.get_base_layer().weight)
            total += reach(first_step(one, optimizer, gradient), gradient, optimizer)
        found[name] = total / draws
    return found["fedpara"] / found["lora"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("n", [256, 1024, 4096])
@pytest.mark.parametrize("r", RANKS)
def test_a_matrix_starts_as_far_as_lora(r, n, optimizer):
    config = FedParaConfig(r=r, target_modules=["0"])
    ratio = ratio_to_lora(config, lambda: nn.Linear(n, 128, bias=False), r, optimizer, draws=3)
    assert 0.5 < ratio < 2


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("r", RANKS[:5])
def test_a_kernel_starts_as_far_as_lora(r, optimizer):
    config = FedParaConfig(r=r, target_modules=["0"])
    layer = lambda: nn.Conv2d(64, 64, 3, bias=False)  # noqa: E731
    assert 0.5 < ratio_to_lora(config, layer, r, optimizer, draws=6) < 2


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("r", [2, 8, 32])
def test_abba_starts_as_far_as_lora(r, optimizer):
    config = FedParaConfig(r=r, target_modules=["0"], init_weights="abba")
    ratio = ratio_to_lora(config, lambda: nn.Linear(512, 128, bias=False), r, optimizer, draws=3)
    assert 0.5 < ratio < 2


@pytest.mark.parametrize(("optimizer", "times"), [(torch.optim.SGD, 290), (torch.optim.Adam, 17)])
def test_pefts_loha_starts_as_far_as_the_pages_say(optimizer, times):
    loha = LoHaConfig(r=16, alpha=16, target_modules=["0"])
    layer = lambda: nn.Linear(1024, 128, bias=False)  # noqa: E731
    assert 1 / ratio_to_lora(loha, layer, 16, optimizer, draws=3) == pytest.approx(times, rel=0.1)


@pytest.mark.parametrize("start", [True, "loha", "lycoris", "abba"])
@pytest.mark.parametrize("layer", [nn.Linear(24, 30), nn.Conv2d(6, 9, 3), nn.Embedding(20, 12)])
def test_every_named_start_is_the_identity_and_leaves_it(start, layer):
    matrix = {"use_effective_conv2d": False} if start == "abba" else {}
    one = wrapped(FedParaConfig(r=3, target_modules=["0"], init_weights=start, **matrix), layer)
    delta = one.get_delta_weight("default")
    assert torch.equal(delta, torch.zeros_like(delta))
    gradient = torch.randn_like(delta)
    assert first_step(one, torch.optim.SGD, gradient).abs().max() > 0


@pytest.mark.parametrize("layer", [lambda: nn.Linear(300, 200), lambda: nn.Conv2d(30, 40, 3)])
def test_loha_draws_factors_as_peft_does(layer):
    r = 16
    ours = wrapped(FedParaConfig(r=r, target_modules=["0"], init_weights="loha"), layer())
    convolves = isinstance(layer(), nn.Conv2d)
    theirs = wrapped(LoHaConfig(r=r, target_modules=["0"], use_effective_conv2d=convolves), layer())
    (x1, y1, t1), (x2, y2, t2) = ours.halves("default")
    pairs = [(x1, theirs.hada_w1_a), (y1, theirs.hada_w1_b), (x2, theirs.hada_w2_a)]
    pairs += [(t1, theirs.hada_t1), (t2, theirs.hada_t2)] if convolves else []
    for own, their in pairs:
        assert float(own.detach().std()) == pytest.approx(
            float(their["default"].detach().std()), rel=0.15
        )
    assert torch.equal(y2, torch.zeros_like(y2))
    assert torch.equal(theirs.hada_w2_b["default"], torch.zeros_like(y2.T))


def test_abba_takes_the_best_approximation_of_the_base():
    layer = nn.Linear(20, 30)
    one = wrapped(FedParaConfig(r=4, target_modules=["0"], init_weights="abba"), layer)
    (x, y, _), _ = one.halves("default")
    u, s, vt = torch.linalg.svd(layer.weight.detach().double())
    best = u[:, :4] * s[:4] @ vt[:4]
    torch.testing.assert_close((x @ y.T).double(), best, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(x.norm(dim=0), y.norm(dim=0))


def test_abba_says_what_it_cannot_start():
    config = FedParaConfig(r=3, target_modules=["0"], init_weights="abba")
    with pytest.raises(ConfigError, match="set use_effective_conv2d=False"):
        wrapped(config, nn.Conv2d(6, 9, 3))
    with pytest.raises(ConfigError, match="rank 9 is more than the 8 singular values"):
        wrapped(FedParaConfig(r=9, target_modules=["0"], init_weights="abba"), nn.Linear(8, 30))


def test_the_scale_is_rank_stabilized_where_asked_for():
    config = FedParaConfig(r=16, alpha=8, use_rslora=True, target_modules=["0"])
    one = wrapped(config, nn.Linear(20, 30))
    assert one.scaling["default"] == 8 / 4
    one.set_scale("default", 3)
    assert one.scaling["default"] == 3 * 8 / 4
    one.unscale_layer()
    assert one.scaling["default"] == 8 / 4
    assert (
        wrapped(FedParaConfig(r=16, alpha=8, target_modules=["0"]), nn.Linear(20, 30)).scaling[
            "default"
        ]
        == 8 / 16
    )


def test_the_rule_by_numbers():
    """W₁ of variance 2, as LoRA has twice the rank; X₂ = 0 and Y₂ as LoRA's A."""
    (x1, y1, _), (_, y2, _) = identity_start_stds(16, 1024, "fedpara")
    assert 16 * x1**2 * y1**2 == pytest.approx(2)
    assert y2**2 == pytest.approx(1 / (3 * 1024))
    (x1, y1, t1), (_, y2, t2) = identity_start_stds(16, 9 * 128, "fedpara", kernel=True)
    assert 16**2 * (x1 * y1 * t1) ** 2 == pytest.approx(2)
    assert 16 * y2**2 == pytest.approx(1)
    assert t2**2 == pytest.approx(1 / (3 * 9 * 128))
    ((_, y, _),) = identity_start_stds(16, 1024, "lowrank")
    assert y**2 == pytest.approx(1 / (3 * 1024))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    ("layer", "r"),
    [
        (lambda: nn.Linear(256, 128), 4),
        (lambda: nn.Linear(256, 128), 16),
        (lambda: nn.Conv2d(32, 32, 3), 16),
    ],
)
def test_later_steps_go_as_far_as_loras_too(layer, r, optimizer):
    """Toward one ΔW at one learning rate: what is left of the way after many steps."""
    left = {}
    for name, config in (
        ("fedpara", FedParaConfig(r=r, target_modules=["0"])),
        ("lora", LoraConfig(r=2 * r, lora_alpha=2 * r, target_modules=["0"])),
    ):
        torch.manual_seed(0)
        one = wrapped(config, layer())
        shape = one.get_base_layer().weight.shape
        # As large as a fine-tuned ΔW is, and of a rank that both can reach.
        wanted = torch.randn(shape[0], 2) @ torch.randn(2, shape[1:].numel()) * 0.02
        sizes = []
        step = optimizer([p for p in one.parameters() if p.requires_grad], lr=RATES[optimizer])
        for _ in range(60):
            step.zero_grad()
            delta = one.get_delta_weight("default").reshape(wanted.shape)
            (delta - wanted).square().sum().backward()
            sizes.append(float(delta.detach().norm()))
            step.step()
        left[name] = sizes
    for at in (5, 20, 59):
        assert 0.4 < left["fedpara"][at] / left["lora"][at] < 2.5
