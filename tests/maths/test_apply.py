"""Applying a factorized weight without composing it, against plain composition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpara_peft import RankError
from fedpara_peft.maths.apply import by_rows, form_rank, khatri_rao, linear, low_rank_form
from fedpara_peft.maths.compose import Half, add_composed_, compose
from fedpara_peft.maths.cost import ACCELERATOR, PROCESSOR, operations

NAMES = ["fedpara", "pfedpara", "lowrank"]


def halves(name, m=6, n=5, r=2, kernel=(), dtype=torch.float64):
    def make():
        t = torch.randn(r, r, *kernel, dtype=dtype) if kernel else None
        return Half(torch.randn(m, r, dtype=dtype), torch.randn(n, r, dtype=dtype), t)

    return [make() for _ in range(1 if name == "lowrank" else 2)]


def test_khatri_rao_by_rows():
    x, y = torch.randn(4, 2), torch.randn(4, 3)
    expected = torch.stack([torch.kron(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(khatri_rao(x, y), expected)


@pytest.mark.parametrize("kernel", [(), (3,), (3, 2), (1, 2, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_the_form_is_the_weight(name, kernel):
    parts = halves(name, kernel=kernel)
    a, b, core = low_rank_form(parts, name)
    assert a.shape[1] == b.shape[1] == form_rank(2, name)
    weight = a @ b.T if core is None else torch.einsum("oa,ab...,ib->oi...", a, core, b)
    torch.testing.assert_close(weight, compose(parts, name))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_once_and_twice(name, with_base, keep):
    factors = [f.requires_grad_() for h in halves(name) for f in h.tensors()]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    base = torch.randn(3, 6, dtype=torch.float64, requires_grad=True) if with_base else None

    def function(x, base, *factors):
        pairs = [Half(*factors[i : i + 2]) for i in range(0, len(factors), 2)]
        return linear(x, pairs, name, 1.7, base=base, keep_form=keep)

    pairs = [Half(*factors[i : i + 2]) for i in range(0, len(factors), 2)]
    expected = 1.7 * x @ compose(pairs, name).T + (0 if base is None else base)
    torch.testing.assert_close(function(x, base, *factors), expected)
    assert torch.autograd.gradcheck(function, (x, base, *factors))
    assert torch.autograd.gradgradcheck(function, (x, base, *factors))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_together_with_the_base_weight(name, with_bias):
    factors = [f.requires_grad_() for h in halves(name) for f in h.tensors()]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True) if with_bias else None

    def function(x, weight, bias, *factors):
        pairs = [Half(*factors[i : i + 2]) for i in range(0, len(factors), 2)]
        return linear(x, pairs, name, 1.7, weight=weight, bias=bias)

    pairs = [Half(*factors[i : i + 2]) for i in range(0, len(factors), 2)]
    expected = torch.nn.functional.linear(x, weight + 1.7 * compose(pairs, name), bias)
    torch.testing.assert_close(function(x, weight, bias, *factors), expected)
    assert torch.autograd.gradcheck(function, (x, weight, bias, *factors))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, *factors))


@pytest.mark.parametrize("name", NAMES)
def test_some_gradients_only(name):
    parts = halves(name)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    linear(x, parts, name).sum().backward()
    torch.testing.assert_close(x.grad, compose(parts, name).sum(0).expand(2, 3, 5))
    for half in parts:
        half.x.requires_grad_()
    linear(x.detach(), parts, name).sum().backward()
    assert all(half.x.grad is not None and half.y.grad is None for half in parts)


def test_little_is_kept_for_backward():
    """Beyond x and the factors: x B, and nothing of the size of A, B or the weight."""
    tokens, m, n, r = 32, 300, 200, 4
    parts = [Half(*(f.requires_grad_() for f in h.tensors())) for h in halves("fedpara", m, n, r)]
    x = torch.randn(tokens, n, dtype=torch.float64)
    known = {t.data_ptr() for t in (x, *(f for h in parts for f in h.tensors()))}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in known:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(x, parts)
    assert sum(kept) <= 1.1 * tokens * r * r


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_activations_stay_so(dtype):
    parts = [h.to(torch.float32) for h in halves("fedpara", 64, 48, 3)]
    parts = [Half(h.x.requires_grad_(), h.y.requires_grad_()) for h in parts]
    x = torch.randn(20, 48, dtype=dtype)
    out = linear(x, parts)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(f.grad.dtype == torch.float32 for h in parts for f in h.tensors())
    exact = x.double() @ compose([h.to(torch.float64) for h in parts]).T
    error = (out.double() - exact).norm() / exact.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("ranks", [(2, 2), (3, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_row_by_row_is_the_weight(name, ranks):
    parts = [halves("lowrank", r=r)[0] for r in ranks[: 1 if name == "lowrank" else 2]]
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(by_rows(x, parts, name), x @ compose(parts, name).T)
    narrow = by_rows(x.bfloat16(), [h.to(torch.float32) for h in parts], name)
    assert narrow.dtype == torch.float32


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2,), (3,), (1, 2), (2, 3)])
@pytest.mark.parametrize("extra", ["nothing", "base", "bias", "weight"])
@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_the_output_is_the_same(name, extra, tokens):
    parts, x = halves(name), torch.randn(*tokens, 5, dtype=torch.float64)
    options = {
        "base": {"base": torch.randn(*tokens, 6, dtype=torch.float64)},
        "bias": {"bias": torch.randn(6, dtype=torch.float64)},
        "weight": {"weight": torch.randn(6, 5, dtype=torch.float64)},
    }.get(extra, {})
    expected = 1.7 * x @ compose(parts, name).T
    for key, value in options.items():
        expected = expected + (x @ value.T if key == "weight" else value)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(linear(x, parts, name, 1.7, **options), expected)


@pytest.mark.parametrize("name", NAMES)
def test_one_token_writes_no_khatri_rao_product(name):
    """Nothing of r² columns is made for one row, where r columns do."""
    m, n, r = 600, 500, 16
    parts, x = halves(name, m, n, r, dtype=torch.float32), torch.randn(1, n)

    def largest(rows):
        found = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor):
                    found.append(out.numel())
                return out

        with torch.no_grad(), Watch():
            linear(x.expand(rows, n), parts, name)
        return max(found)

    assert largest(1) <= r * m
    assert largest(r) <= r * r * m
    if name != "lowrank":
        assert r * r * m <= largest(r + 1) <= (r * r + r) * m


def test_a_kernel_is_refused():
    with pytest.raises(RankError, match="convolution kernel"):
        linear(torch.zeros(1, 5), halves("fedpara", kernel=(3, 3), dtype=torch.float32))


@given(st.sampled_from(NAMES), st.sampled_from([(), (3,)]), st.integers(1, 40), st.booleans())
def test_adding_in_chunks_is_adding(name, kernel, chunk, tanh):
    parts = halves(name, kernel=kernel)
    nonlinearity = "tanh" if tanh and name != "lowrank" else None
    target = torch.randn(6, 5, *kernel, dtype=torch.float64)
    weight = compose(parts, name, nonlinearity)
    expected = target - 0.3 * weight
    expected[4] = target[4]
    base = compose(parts, name, nonlinearity, scale=-0.3, base=target)
    torch.testing.assert_close(base, target - 0.3 * weight)
    add_composed_(target, parts, name, nonlinearity, scale=-0.3, zero_row=4, chunk_entries=chunk)
    torch.testing.assert_close(target, expected)


def test_the_cost_rule_at_known_places():
    def rule(m, n, r, tokens, training=True, joined=True, costs=PROCESSOR):
        by_form, by_composing = operations(
            positions=tokens, dense=m * n, form=r * r * (m + n), features=m + n, r=r,
            training=training, joined=joined, costs=costs,
        )  # fmt: skip
        return by_form <= by_composing

    assert rule(4096, 4096, 8, 512)
    # an H100 composes that in less than it launches
    assert not rule(768, 768, 8, 64, costs=ACCELERATOR)
    assert not rule(64, 64, 4, 16)  # and so does a processor with a small layer
    assert not rule(2048, 2048, 32, 512)
    assert rule(4096, 4096, 32, 512)  # memory of that size is never at hand
    assert rule(768, 768, 8, 64)
    assert rule(4096, 4096, 8, 512, costs=ACCELERATOR)
    assert rule(4096, 4096, 32, 1, training=False)
    assert rule(4096, 4096, 8, 512, training=False)
    assert not rule(2048, 2048, 32, 512, training=False)  # 1,024 columns, made at every pass
    assert not rule(768, 768, 32, 512)
    assert rule(256, 784, 10, 10, joined=False)  # from scratch at a tiny batch
    assert not rule(256, 784, 32, 10, joined=False)  # building 1,024 columns costs more
    assert not rule(256, 512, 16, 500, joined=False)
