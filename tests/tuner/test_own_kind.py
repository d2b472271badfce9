"""A layer kind of one's own: one file (tests/bilinear.py) and one line, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests import bilinear
from tests.bilinear import Bilinear
from tests.federation.test_trainer import arguments
from tests.zoo import randomize
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fedpara_peft import (
    ConversionError,
    FederatedTrainer,
    FedParaConfig,
    MixedBatchError,
    UnsupportedLayerError,
    communicated_state,
    fedpara_summary,
    partition,
    save_as_loha,
    save_as_lora,
)
from fedpara_peft.maths.compose import compose
from fedpara_peft.tuner.kinds import LAYER_KINDS, Linear


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = nn.Bilinear(12, 9, 10)

    def forward(self, x):
        return self.pair(x, x[:, :9].tanh())


@pytest.fixture
def registered():
    before = LAYER_KINDS[:]
    LAYER_KINDS.append(Bilinear)
    yield
    LAYER_KINDS[:] = before


def build(mode="frozen", seed=0, **config):
    torch.manual_seed(seed)
    config = {"r": 2, "target_modules": ["pair"], "base_weight": mode, **config}
    return get_peft_model(Pair(), FedParaConfig(**config))


def test_it_is_short():
    assert len(Path(bilinear.__file__).read_text().splitlines()) <= 40


def test_before_it_is_registered_the_layer_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"pair \(Bilinear\).*no form for it"):
        build()


@pytest.mark.parametrize("effective", [True, False])
@pytest.mark.parametrize("mode", ["frozen", "replaced"])
@pytest.mark.usefixtures("registered")
def test_it_computes_trains_saves_loads_and_merges(tmp_path, mode, effective):
    model = build(mode, use_effective_conv2d=effective)
    torch.manual_seed(1)
    x, y = torch.randn(40, 12), torch.randn(40, 10)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.03)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), y)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]

    layer = model.base_model.model.pair
    spec = layer.specs["default"]
    halves = [half.to(torch.float64) for half in layer.halves("default")]
    weight = compose(halves, "fedpara").reshape(10, 12, 9)
    if mode == "frozen":
        weight = weight + layer.get_base_layer().weight.double()
    assert bool(spec.plans["weight"].kernel) is effective
    bias = layer.get_base_layer().bias.double()
    second = x[:, :9].tanh().double()
    expected = torch.einsum("bi,oij,bj->bo", x.double(), weight, second) + bias
    torch.testing.assert_close(model(x).double(), expected, atol=1e-4, rtol=1e-4)

    model.save_pretrained(tmp_path)
    torch.manual_seed(0 if mode == "frozen" else 7)
    again = PeftModel.from_pretrained(Pair(), tmp_path)
    torch.testing.assert_close(again(x), model(x), atol=0, rtol=0)
    merged = again.merge_and_unload()
    assert type(merged.pair) is nn.Bilinear
    assert merged.state_dict().keys() == Pair().state_dict().keys()
    torch.testing.assert_close(merged(x).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("registered")
def test_it_is_summarized_and_sent():
    model = build("replaced", target_modules="all-supported")
    row = fedpara_summary(model).rows[0]
    count = 2 * (2 * (10 + 12) + 2 * 2 * 9)
    assert (row.kind, row.shape, row.parameters, row.r) == ("bilinear", (10, 12, 9), count, 2)
    assert sum(t.numel() for t in communicated_state(model).values()) == count + 10


@pytest.mark.usefixtures("registered")
def test_a_federation_trains_it(tmp_path):
    torch.manual_seed(3)
    x = torch.randn(80, 12)
    data = TensorDataset(x, x[:, :10].argmax(1))
    args = arguments(tmp_path, num_rounds=8, learning_rate=0.3)
    trainer = FederatedTrainer(build("replaced"), args, partition(data, "iid", 3))
    history = trainer.train()
    assert history[-1].train_loss < 0.8 * history[0].train_loss


@pytest.mark.parametrize("save", [save_as_lora, save_as_loha])
@pytest.mark.usefixtures("registered")
def test_the_exports_refuse_it(tmp_path, save):
    model = randomize(build())
    with pytest.raises(
        ConversionError, match=r"pair: Lo[RH][Aa] has no form for [Bb]ilinear layers"
    ):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("registered")
def test_peft_may_not_approximate_it_and_a_mixed_batch_is_refused():
    model = build().eval()
    assert not model.supports_lora_conversion()
    with pytest.raises(MixedBatchError, match="pair reads its weight"):
        model(torch.randn(2, 12), adapter_names=["default", "__base__"])


@pytest.mark.usefixtures("registered")
def test_a_kind_for_a_subclass_goes_before_the_package_s(tmp_path):
    """Its forward is its own, so what Linear says of Linear's is not said of it."""

    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    class HalvedKind(Linear):
        kind = "halved"
        base_classes = (Halved,)

        def forward(self, x):
            return F.linear(x, self.weight, self.get_base_layer().bias) / 2

    LAYER_KINDS.append(HalvedKind)
    plain = nn.Sequential(Halved(12, 10), nn.Linear(10, 4))
    config = FedParaConfig(r=2, target_modules=["0", "1"])
    model = randomize(get_peft_model(copy.deepcopy(plain), config))
    assert [row.kind for row in fedpara_summary(model).rows] == ["halved", "linear"]
    x = torch.randn(3, 12)
    layer = model.base_model.model[0]
    weight = plain[0].weight + layer.get_delta_weight("default")
    torch.testing.assert_close(layer(x), (x @ weight.T + plain[0].bias) / 2)
    for save in (save_as_lora, save_as_loha):
        with pytest.raises(ConversionError, match=r"^0: Lo(RA|Ha) has no form for [hH]alved"):
            save(model, tmp_path)
    assert not layer.supports_lora_conversion()
    assert model.base_model.model[1].supports_lora_conversion()
    with pytest.raises(MixedBatchError, match="0 reads its weight"):
        model.eval()(x, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(model.merge_and_unload()[0](x), (x @ weight.T + plain[0].bias) / 2)
