"""Strided, channels-last and meta tensors, every layer kind, against the plain one in float64."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
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
from torch import nn

from fedpara_peft import FedParaConfig

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def strided(t):
    """The same values with every other entry of memory between them, dimensions the other way."""
    back = tuple(reversed(range(t.dim())))
    wide = torch.empty(*reversed(t.shape), 2, dtype=t.dtype)[..., 0].permute(back)
    return wide.copy_(t)


def last(t):
    return t.to(memory_format=LAST[t.dim()]) if t.dim() in LAST else t


def expanded(t):
    return t[:1].expand_as(t)


@pytest.mark.parametrize(
    ("kind", "path", "change", "mode"), in_turn(KINDS, PATHS, [strided, last, expanded])
)
def test_inputs_that_are_not_contiguous(kind, mode, path, change):
    for form in FORMS:
        if not has_path(kind, form, path):
            continue
        model = build(kind, mode, form, torch.float64, compute_path=path)
        x = change(inputs(kind, torch.float64))
        factors = [p for n, p in model.named_parameters() if "fedpara_" in n]
        expected = twin(model, kind)(x.contiguous())
        out = model(x)
        torch.testing.assert_close(out, expected)
        with torch.no_grad():
            again = model(x)
            torch.testing.assert_close(again, expected)
            plain = Holder(kind).double()(x)
        if plain.is_contiguous() and change is not last:
            assert out.view(-1) is not None  # what reads the output may take a view of it
            assert again.view(-1) is not None
        direction = strided(torch.randn_like(expected))
        wanted = torch.autograd.grad((expected * direction).sum(), factors)
        out.backward(direction)
        for factor, grad in zip(factors, wanted, strict=True):
            torch.testing.assert_close(factor.grad, grad)


@pytest.mark.parametrize("change", [strided, last])
@pytest.mark.parametrize("kind", KINDS)
def test_base_weights_and_factors_that_are_not_contiguous(kind, change):
    for form in FORMS:
        model = build(kind, "frozen", form, torch.float64)
        x = inputs(kind, torch.float64)
        expected = twin(model, kind)(x)
        layer = model.base_model.model.layer
        for name, p in model.named_parameters():
            if kind not in ("lstm", "gru", "rnn") or "fedpara_" in name:
                p.data = change(p.data)
        torch.testing.assert_close(model(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
        strides = {n: p.stride() for n, p in layer.get_base_layer().named_parameters()}
        for safe in (False, True):
            model.merge_adapter(safe_merge=safe)
            torch.testing.assert_close(model(x), expected)
            if change is last:
                now = {n: p.stride() for n, p in layer.get_base_layer().named_parameters()}
                assert now == strides
            model.unmerge_adapter()
            torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_a_model_in_channels_last_stays_in_it():
    for mode in MODES:
        for path in PATHS:
            config = FedParaConfig(
                r=2, base_weight=mode, target_modules=["0", "1"], compute_path=path
            )
            net = nn.Sequential(nn.Conv2d(12, 16, 3), nn.Conv2d(16, 20, 1))
            model = get_peft_model(net, config).to(memory_format=torch.channels_last)
            x = torch.randn(2, 12, 6, 6).to(memory_format=torch.channels_last)
            assert model(x).is_contiguous(memory_format=torch.channels_last), (mode, path)


@pytest.mark.parametrize(("kind", "path", "mode"), in_turn(KINDS, PATHS))
def test_built_and_run_on_the_meta_device(kind, mode, path):
    for form in FORMS if path == "auto" else FORMS[:1]:
        if not has_path(kind, form, path):
            continue
        config = FedParaConfig(
            r=2, target_modules=["layer"], base_weight=mode, compute_path=path,
            parameterization=form[0], nonlinearity=form[1],
        )  # fmt: skip
        real = build(kind, mode, form, compute_path=path, alpha=None)
        plain = Holder(kind)(inputs(kind))
        with torch.device("meta"):
            model = get_peft_model(Holder(kind), copy.deepcopy(config))
        assert all(p.is_meta for p in model.parameters())
        x = inputs(kind).to("meta")
        for training in (True, False):
            out = model.train(training)(x)
            assert out.is_meta
            assert out.shape == plain.shape
            with torch.no_grad():
                assert model(x).shape == plain.shape
        out.sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "fedpara_" in n)
        # filled afterwards it is the real one
        filled = model.to_empty(device="cpu")
        filled.load_state_dict(real.state_dict())
        x = inputs(kind)
        assert torch.equal(filled.eval()(x), real(x)), form
        with torch.device("meta"):
            model = get_peft_model(Holder(kind), copy.deepcopy(config))
        for safe in (False, True):
            model.merge_adapter(safe_merge=safe)
            model.unmerge_adapter()
        merged = model.merge_and_unload()
        assert {k: v.shape for k, v in merged.state_dict().items()} == {
            k: v.shape for k, v in Holder(kind).state_dict().items()
        }


@pytest.mark.parametrize("kind", KINDS)
def test_loading_with_low_memory_onto_a_strided_base(kind, tmp_path):
    torch.manual_seed(0)
    model = build(kind, "frozen", ("fedpara", None), alpha=None)
    model.save_pretrained(tmp_path)
    x = inputs(kind)
    expected = model(x).detach()
    plain = model.unload()
    if kind not in ("lstm", "gru", "rnn"):
        for p in plain.parameters():
            p.data = strided(p.data)
    again = PeftModel.from_pretrained(plain, tmp_path, low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(again(x), expected, atol=1e-5, rtol=1e-5)
