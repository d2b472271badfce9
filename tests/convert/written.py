"""Small models, files as their own writers make them, and the weights by the slow formula."""

import torch
from safetensors.torch import save_file
from torch import nn


class Block(nn.Module):
    """Names with underscores of their own, two text-like linears, and kernels of every size."""

    def __init__(self, dims=2):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.dims = dims
        self.proj_in = conv(6, 7, 1)
        self.down_blocks = nn.ModuleList(
            [nn.ModuleDict({"to_q": nn.Linear(8, 6), "conv_1": conv(7, 5, 3, padding=1)})]
        )

    def forward(self, x):
        x = self.down_blocks[0]["to_q"](x).movedim(-1, 1)
        return self.down_blocks[0]["conv_1"](self.proj_in(x))


NAMES = ("proj_in", "down_blocks.0.to_q", "down_blocks.0.conv_1")


def block(dims=2, seed=0):
    torch.manual_seed(seed)
    return Block(dims)


def batch(dims=2, seed=5):
    return torch.randn(2, *[4] * dims, 8, generator=torch.Generator().manual_seed(seed))


def dense(own, alpha):
    """ΔW in float64 by the definition: a product of two halves, entry by entry."""
    own = {name: factor.double() for name, factor in own.items()}
    parts = []
    for w in ("1", "2"):
        a, b, t = own[f"hada_w{w}_a"], own[f"hada_w{w}_b"], own.get(f"hada_t{w}")
        if t is None:
            parts.append(a @ b)
            continue
        total = torch.zeros(a.shape[1], b.shape[1], *t.shape[2:], dtype=torch.float64)
        for i in range(a.shape[0]):
            for j in range(b.shape[0]):
                outer = a[i].view(-1, 1) * b[j]
                total += outer.view(*outer.shape, *[1] * (t.dim() - 2)) * t[i, j]
        parts.append(total)
    return parts[0] * parts[1] * (alpha / own["hada_w1_b"].shape[0])


def loha_factors(m, n, r, kernel=(), *, generator, dtype=torch.float32, std=0.7):
    """Random factors as LyCORIS names and shapes them; a kernel is in Tucker form."""

    def draw(*shape):
        return (std * torch.randn(*shape, generator=generator)).to(dtype)

    own = {}
    for w in ("1", "2"):
        own[f"hada_w{w}_a"] = draw(r, m) if kernel else draw(m, r)
        own[f"hada_w{w}_b"] = draw(r, n)
        if kernel:
            own[f"hada_t{w}"] = draw(r, r, *kernel)
    return own


def write_loha(path, layers, alphas, metadata=None):
    """A file of factors by full key prefix; an alpha of None is left out."""
    state = {}
    for name, own in layers.items():
        state.update({f"{name}.{factor}": tensor for factor, tensor in own.items()})
        if alphas[name] is not None:
            state[f"{name}.alpha"] = torch.tensor(float(alphas[name]))
    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path, metadata)
    return state


def with_weights(model, deltas):
    """The model with ΔW added, in its own dtype, by dotted names."""
    for name, delta in deltas.items():
        weight = model.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_((weight.double() + delta.reshape(weight.shape)).to(weight.dtype))
    return model


def close(found, wanted, tolerance=1e-5):
    """Relative to the largest entry, as the tables say it."""
    found, wanted = found.detach().double(), wanted.detach().double()
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    assert difference <= tolerance, difference
