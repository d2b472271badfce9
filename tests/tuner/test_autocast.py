"""Half precision: every layer kind, mode and way, against the plain layer in float64."""

import itertools

import pytest
import torch
from peft import get_peft_model
from tests.layer_kinds import (
    FORMS,
    KINDS,
    MODES,
    PATHS,
    Holder,
    build,
    has_path,
    in_turn,
    inputs,
    twin,
)
from tests.zoo import randomize
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedpara_peft import FedParaConfig
from fedpara_peft.maths.apply import linear
from fedpara_peft.maths.compose import Half, compose

HALVES = (torch.float16, torch.bfloat16)
#: Relative error of a norm: a few roundings of the dtype.
CLOSE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}


def error(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def case(kind, mode, path, form):
    model = build(kind, mode, form, compute_path=path)
    return model, inputs(kind)


@pytest.mark.parametrize(
    ("kind", "path", "dtype", "mode"), in_turn(KINDS, PATHS, [*HALVES, None], by=MODES)
)
def test_trained_and_run_under_autocast(kind, mode, path, dtype):
    if kind == "lstm" and dtype == torch.float16:
        pytest.skip("torch's own LSTM has no float16 on a CPU")
    for form, backward_inside in itertools.product(FORMS, (False, True)):
        if not has_path(kind, form, path):
            continue
        model, x = case(kind, mode, path, form)
        factors = {n: p for n, p in model.named_parameters() if "fedpara_" in n}
        exact = twin(model, kind)(x.double() if x.is_floating_point() else x)
        direction = torch.randn_like(exact)
        wanted = torch.autograd.grad((exact * direction).sum(), list(factors.values()))
        close = CLOSE[dtype or torch.float32]
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            plain = Holder(kind)(x)
            with torch.no_grad():
                inference = model(x)
            out = model.train()(x)
            loss = (out * direction.to(out.dtype)).float().sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        assert out.dtype == inference.dtype == plain.dtype, form
        assert error(out, exact) < close, form
        assert error(inference, exact) < close, form
        for (name, factor), grad in zip(factors.items(), wanted, strict=True):
            assert factor.grad.dtype == factor.dtype
            assert error(factor.grad, grad) < 3 * close, (form, name)


@pytest.mark.parametrize(
    ("kind", "path", "dtype", "adapter_dtype"),
    in_turn(KINDS, PATHS, HALVES, by=[torch.float32, None]),
)
def test_a_half_precision_base_without_autocast(kind, path, dtype, adapter_dtype):
    if kind in ("lstm", "gru", "rnn") and dtype == torch.float16:
        pytest.skip("torch has no float16 recurrent layers on a CPU")
    for form in FORMS:
        if not has_path(kind, form, path):
            continue
        model = build(kind, "frozen", form, dtype, compute_path=path)
        if adapter_dtype is not None:
            for name, factor in model.named_parameters():
                if "fedpara_" in name:
                    factor.data = factor.data.to(adapter_dtype)
        x = inputs(kind, dtype)
        exact = twin(model, kind)(x.double() if x.is_floating_point() else x)
        factors = [p for n, p in model.named_parameters() if "fedpara_" in n]
        wanted = torch.autograd.grad(exact.sum(), factors)
        with torch.no_grad():
            inference = model(x)
        out = model.train()(x)
        out.float().sum().backward()
        assert out.dtype == inference.dtype == dtype
        assert max(error(out, exact), error(inference, exact)) < 2 * CLOSE[dtype], form
        for factor, grad in zip(factors, wanted, strict=True):
            assert error(factor.grad, grad) < 6 * CLOSE[dtype], form


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("path", PATHS)
def test_a_four_bit_base_under_autocast(path, dtype):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for quantized in (
        bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=dtype),
        bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    ):
        plain = nn.Sequential(quantized).to("cpu")
        config = FedParaConfig(r=3, target_modules=["0"], compute_path=path)
        model = randomize(get_peft_model(plain, config), 0.5).train()
        layer = model.base_model.model[0]
        x = torch.randn(9, 64)
        with torch.autocast("cpu", dtype=dtype):
            with torch.no_grad(), model.disable_adapter():
                base = model(x)
            out = model(x)
            with torch.no_grad():
                assert error(model(x), out) < CLOSE[dtype]
        out.float().square().sum().backward()
        exact = base.double() + x.double() @ layer.get_delta_weight("default").double().T
        assert out.dtype == base.dtype
        assert error(out, exact) < CLOSE[dtype]
        grads = [p.grad for n, p in model.named_parameters() if "fedpara_" in n]
        assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mode", MODES)
def test_a_llama_trains_under_autocast(mode, dtype):
    torch.manual_seed(0)
    net = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256,
            num_attention_heads=4,
        )
    )  # fmt: skip
    config = FedParaConfig(r=4, target_modules="all-supported", base_weight=mode)
    model = get_peft_model(net, config)
    ids = torch.randint(0, 256, (4, 16))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype=dtype):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_products_of_float16_activations_run_in_float32():
    """Their intermediate, x B, may leave float16's range although the output does not."""
    m, n, r = 8, 512, 2
    x1, y1, y2 = torch.randn(m, r) * 1e-4, torch.full((n, r), 8.0), torch.full((n, r), 8.0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(n, m, bias=False)),
        FedParaConfig(r=r, target_modules=["0"], compute_path="khatri_rao"),
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        for half, values in zip(layer.halves("default"), ((x1, y1), (x1 + 1, y2)), strict=True):
            half.x.copy_(values[0])
            half.y.copy_(values[1])
    x = torch.full((5, n), 4.0)  # x B = 512 · 4 · 64 = 131,072 > 65,504
    exact = (
        x.double()
        @ (layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double()).T
    )
    for context in (torch.no_grad(), torch.enable_grad()):
        with torch.autocast("cpu", dtype=torch.float16), context:
            for rows in (x, x[:1]):
                out = model(rows)
                assert out.dtype == torch.float16
                assert error(out, exact[: len(rows)]) < CLOSE[torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["fedpara", "pfedpara", "lowrank"])
def test_gradients_twice_do_not_notice_autocast(name, dtype):
    def factor(rows):
        return torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)

    factors = [factor(k) for k in ((6, 5) if name == "lowrank" else (6, 5, 6, 5))]
    x, base = torch.randn(3, 5).double().requires_grad_(), torch.randn(3, 6).double()

    def function(x, *factors):
        halves = [Half(*factors[i : i + 2]) for i in range(0, len(factors), 2)]
        return linear(x, halves, name, 1.7, base=base)

    with torch.autocast("cpu", dtype=dtype):
        assert torch.autograd.gradcheck(function, (x, *factors))
        assert torch.autograd.gradgradcheck(function, (x, *factors))


@pytest.mark.parametrize("dtype", HALVES)
def test_second_gradients_of_float32_under_autocast_are_float32s(dtype):
    model = build("linear", "frozen", ("fedpara", None), compute_path="khatri_rao")
    layer = model.base_model.model.layer
    halves, x = layer.halves("default"), torch.randn(40, 12)

    def first(double):
        parts = [half.to(torch.float64) if double else half for half in halves]
        inner = (x.double() if double else x).clone().requires_grad_()
        out = linear(inner, parts).square().sum()
        return torch.autograd.grad(out, inner, create_graph=True)[0]

    with torch.autocast("cpu", dtype=dtype):
        grad = first(False)
    factors = [f for half in halves for f in half.tensors()]
    exact = torch.autograd.grad(first(True).square().sum(), factors)
    found = torch.autograd.grad(grad.square().sum(), factors)
    assert all(error(a, b) < 1e-5 for a, b in zip(found, exact, strict=True))


def test_composing_float16_factors_does_not_underflow():
    half = Half(torch.full((3, 2), 1e-3).half(), torch.full((4, 2), 1e-2).half())
    other = Half(torch.full((3, 2), 50.0).half(), torch.full((4, 2), 50.0).half())
    weight = compose([half, other])  # 2e-5 · 5,000; 1e-5 has 8 bits left in float16
    exact = compose([half.to(torch.float64), other.to(torch.float64)])
    assert weight.dtype == torch.float16
    assert error(weight, exact) < 5e-4
    with torch.autocast("cpu", dtype=torch.float16):
        wide = compose([half.to(torch.float32), other.to(torch.float32)])
    assert wide.dtype == torch.float32
    assert error(wide, exact) < 1e-6
