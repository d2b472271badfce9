"""The product in oneDNN against the plain one."""

import pytest
import torch
from torch.autograd import forward_ad

from fedpara_peft.maths import matmul as module
from fedpara_peft.maths.matmul import matmul


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    monkeypatch.setattr(module, "_LEAST_WORK", 1)


def factors(dtype=torch.float32):
    return torch.randn(7, 3, dtype=dtype), torch.randn(5, 3, dtype=dtype).T


def goes_to_onednn(a, b):
    return type(matmul(a.requires_grad_(), b).grad_fn).__name__ == "_MatmulBackward"


onednn = pytest.mark.skipif(not module._in_onednn(*factors()), reason="torch without oneDNN")


@onednn
def test_values_and_both_orders_of_gradients():
    a, b = (t.requires_grad_() for t in factors())
    assert goes_to_onednn(a, b)

    def all_of(product):
        out = product(a, b)
        first = torch.autograd.grad(out.sin().sum(), (a, b), create_graph=True)
        return out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))

    for actual, expected in zip(all_of(matmul), all_of(torch.matmul), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert matmul(a, b).is_contiguous()


@onednn
def test_a_gradient_of_repeated_entries_and_a_constant_factor():
    a, b = factors()
    (grad,) = torch.autograd.grad(matmul(a.requires_grad_(), b).sum(), a)
    torch.testing.assert_close(grad, b.sum(1).expand(7, 3))


@onednn
def test_what_onednn_cannot_do_stays_plain():
    assert not goes_to_onednn(*factors(torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = factors()
        assert matmul(a, b).dtype == torch.bfloat16
    stacked = torch.randn(4, 7, 3)
    torch.testing.assert_close(torch.vmap(matmul, (0, None))(stacked, b), stacked @ b)
    with forward_ad.dual_level():
        out = matmul(forward_ad.make_dual(a, torch.ones_like(a)), b)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, torch.ones_like(a) @ b)


def test_a_torch_without_onednn(monkeypatch):
    monkeypatch.setattr(module, "_LINEAR", None)
    assert not goes_to_onednn(*factors())
