"""One of each layer kind, its input, and a slow twin: the plain layer in float64."""

import itertools

import torch
from peft import get_peft_model
from tests.zoo import randomize
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpara_peft import FedParaConfig
from fedpara_peft.maths.compose import compose

#: name -> (builder of a layer, builder of its input)
KINDS = {
    "linear": (lambda: nn.Linear(12, 20), lambda: torch.randn(3, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 20, bias=False), lambda: torch.randn(3, 12)),
    "Conv1D": (lambda: Conv1D(20, 12), lambda: torch.randn(3, 12)),
    "conv1d": (lambda: nn.Conv1d(12, 10, 3, padding=1), lambda: torch.randn(2, 12, 9)),
    "conv2d": (lambda: nn.Conv2d(12, 10, 3), lambda: torch.randn(2, 12, 6, 6)),
    "conv2d 1x1": (lambda: nn.Conv2d(24, 20, 1), lambda: torch.randn(2, 24, 6, 6)),
    "conv2d groups": (lambda: nn.Conv2d(24, 20, 3, groups=2), lambda: torch.randn(2, 24, 6, 6)),
    "conv2d all options": (
        lambda: nn.Conv2d(
            12, 10, (3, 2), (2, 1), (2, 1), (1, 2), padding_mode="reflect", bias=False
        ),
        lambda: torch.randn(2, 12, 8, 8),
    ),
    "conv2d circular": (
        lambda: nn.Conv2d(12, 10, 3, padding="same", padding_mode="circular"),
        lambda: torch.randn(2, 12, 8, 8),
    ),
    "conv2d unbatched": (lambda: nn.Conv2d(12, 10, 3), lambda: torch.randn(12, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(12, 10, (1, 3, 2)), lambda: torch.randn(2, 12, 3, 4, 4)),
    "embedding": (lambda: nn.Embedding(30, 12), lambda: torch.randint(0, 30, (3, 4))),
    "embedding padded": (
        lambda: nn.Embedding(30, 12, padding_idx=2),
        lambda: torch.tensor([[2, 1], [4, 2]]),
    ),
    "lstm": (lambda: nn.LSTM(12, 10, 2), lambda: torch.randn(4, 2, 12)),
    "gru": (lambda: nn.GRU(12, 10, bidirectional=True), lambda: torch.randn(4, 2, 12)),
    "rnn": (lambda: nn.RNN(12, 16, nonlinearity="relu"), lambda: torch.randn(4, 2, 12)),
}
MODES = ("frozen", "replaced")
PATHS = ("auto", "compose", "khatri_rao")
FORMS = [
    ("fedpara", None),
    ("fedpara", "tanh"),
    ("pfedpara", None),
    ("pfedpara", "tanh"),
    ("lowrank", None),
]


def in_turn(*axes, by=MODES):
    """All combinations, each with one of a last axis, which takes its turns along every other."""
    found = []
    for placed in itertools.product(*map(enumerate, axes)):
        turn = sum(place for place, _ in placed) % len(by)
        found.append((*(value for _, value in placed), by[turn]))
    return found


class Holder(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = KINDS[kind][0]()

    def forward(self, x):
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


def build(kind, mode, form, dtype=torch.float32, seed=0, **config):
    torch.manual_seed(seed)
    config = {"r": 2, "target_modules": ["layer"], **config}
    if mode == "frozen":
        config.setdefault("alpha", 3.0)
    model = get_peft_model(
        Holder(kind).to(dtype),
        FedParaConfig(base_weight=mode, parameterization=form[0], nonlinearity=form[1], **config),
        autocast_adapter_dtype=False,
    )
    return randomize(model).eval()


def inputs(kind, dtype=torch.float32):
    x = KINDS[kind][1]()
    return x.to(dtype) if x.is_floating_point() else x


def has_path(kind, form, path):
    """What has no low-rank form is refused; see tests/tuner/test_peft.py."""
    return path != "khatri_rao" or (form[1] is None and kind != "conv2d groups")


def plain_state(model):
    return {
        k.removeprefix("base_model.model.").replace(".base_layer", ""): v
        for k, v in model.state_dict().items()
        if "fedpara_" not in k
    }


def twin(model, kind, adapters=("default",)):
    """The plain layer, called with W₀ + s·ΔW composed in the open, all in float64.

    Gradients go to the model's own factors.
    """
    layer = model.base_model.model.layer
    plain = Holder(kind).double()
    plain.load_state_dict({**plain.state_dict(), **plain_state(model)})
    values = {name: value.detach() for name, value in plain.named_parameters()}
    for adapter in adapters:
        spec = layer.specs[adapter]
        for name, plan in spec.plans.items():
            shape = plan.shape
            halves = [half.to(torch.float64) for half in layer.halves(adapter, name)]
            w = compose(halves, spec.parameterization, spec.nonlinearity)
            w = w.reshape(shape.out_features, shape.in_features, *shape.kernel)
            if kind == "Conv1D":
                w = w.T
            if kind == "embedding padded":
                w = w * (torch.arange(30) != 2).unsqueeze(1)
            key = f"layer.{name}"
            values[key] = w if spec.replaced else values[key] + layer.scaling[adapter] * w
    return lambda x: torch.func.functional_call(plain, values, (x,))
