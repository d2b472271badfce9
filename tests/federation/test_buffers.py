"""Buffers are no parameters: they travel exact, and take their mean, whatever their kind."""

import pytest
import torch
from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    CodecError,
    FedAdam,
    FedAvgM,
    FedDyn,
    FederatedCallback,
    FederatedTrainer,
    Scaffold,
    communicated_state,
    partition,
)
from fedpara_peft.comm.codecs import codec_from_name
from fedpara_peft.comm.payload import Format
from fedpara_peft.comm.schema import schema_of
from fedpara_peft.federation.server.mean import TrimmedMean, WeightedMean

LOSSY = ("float16", "bfloat16", "int8", "int4", "topk:0.1", "topk:0.2+int4")


class Watch(FederatedCallback):
    """The global buffers after every round."""

    def __init__(self):
        self.rounds = []

    def on_round_end(self, server, report):
        self.rounds.append({n: server.params[n].clone() for n in server.buffers})


def trained(folder, strategy=None, model=None, clients=None, **changes):
    watch = Watch()
    run = FederatedTrainer(
        model or mlp(),
        arguments(folder, **{"eval_every": 0, **changes}),
        clients or partition(toy(), "iid", 5),
        strategy=strategy,
        callbacks=[watch],
    )
    history = run.train()
    return run, history, watch.rounds


@pytest.mark.parametrize("codec", LOSSY)
def test_batch_norm_with_a_lossy_codec(tmp_path, codec):
    """The first round's statistics are those of the run without a codec, to the bit."""
    _, _, exact = trained(tmp_path / "exact")
    for name, more in (("up", {}), ("feedback", {"error_feedback": True})):
        run, history, found = trained(tmp_path / name, uplink_codec=codec, **more)
        assert exact[0].keys() == found[0].keys()
        assert len(exact[0]) == 3
        assert all(torch.equal(found[0][n], t) for n, t in exact[0].items())
        assert all((r["1.running_var"] > 0).all() for r in found)
        assert not any(report.refused for report in history)
        kept = [run.client_state(i) for i in range(5)]
        names = {n for state in kept if state for n in state.residual}
        assert not names & found[0].keys()
        assert bool(names) == bool(more)


def test_unscaled_pixels_and_int4_down_and_up(tmp_path):
    """Some inputs never vary, their variances fade to nothing beside those of the others."""
    x, y = toy(200).tensors
    scales = torch.logspace(-4, 2, 16)
    data = TensorDataset(x * scales, y)
    torch.manual_seed(0)
    run, history, found = trained(
        tmp_path, None, nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4)),
        partition(data, "iid", 5), num_rounds=12, uplink_codec="int4", downlink_codec="int4",
    )  # fmt: skip
    assert not any(report.refused for report in history)
    variance = found[-1]["0.running_var"]
    expected = data.tensors[0].var(0)
    torch.testing.assert_close(variance, expected, atol=1e-3, rtol=0.3)  # as batches of 8 vary
    assert run.evaluate(data)["eval_loss"] < 2


def test_bytes_of_buffers_are_counted_as_they_travel(tmp_path):
    run, _, _ = trained(tmp_path, Scaffold(), uplink_codec="int4", downlink_codec="int8")
    state = communicated_state(run.model)
    trainable = [n for n, p in run.model.named_parameters() if p.requires_grad]
    buffers = frozenset(state) - set(trainable)
    for direction, codec in (("uplink", "int4"), ("downlink", "int8")):
        beside = {f"control/{n}": state[n] for n in trainable}
        form = Format(schema_of({**state, **beside}), codec_from_name(codec), buffers)
        payload = form.encode({**state, **beside}, 3, torch.Generator())
        sizes = {t.total_bytes for t in run.ledger.transfers(direction=direction)}
        assert sizes == {len(payload.data)} == {len(form.size)}
        bare = Format(schema_of(state), codec_from_name(codec)).size.tensor_bytes
        exact = Format(schema_of(state), codec_from_name(codec), buffers).size.tensor_bytes
        coded = sum(n * codec_from_name(codec).bits // 8 + 4 for n in (32, 32))
        assert exact - bare == 2 * 32 * 4 - coded  # mean and variance in full, not as codes


def test_a_norm_to_clip_to_is_of_parameters(tmp_path):
    """Counters and variances move by far more than 1, and count for nothing."""
    settings = {"num_rounds": 1, "clients_per_round": 5, "learning_rate": 0.2}
    start = {n: t.clone() for n, t in mlp().state_dict().items()}
    plain, _, exact = trained(tmp_path / "plain", **settings)
    clip, _, found = trained(tmp_path / "clip", **settings, clip_update_norm=0.05)
    assert all(torch.equal(found[0][n], t) for n, t in exact[0].items())
    assert found[0]["1.num_batches_tracked"] > 1
    names = [n for n, _ in clip.model.named_parameters()]
    moved = torch.cat([(clip.model.state_dict()[n] - start[n]).flatten() for n in names])
    free = torch.cat([(plain.model.state_dict()[n] - start[n]).flatten() for n in names])
    assert free.norm() > 0.05
    assert 0.03 < moved.norm() <= 0.05 * 1.0001


def test_a_norm_to_refuse_beyond_is_of_parameters(tmp_path):
    def moved(name, **more):
        norms = []
        run = FederatedTrainer(
            mlp(), arguments(tmp_path / name, num_rounds=1, **more), partition(toy(), "iid", 5)
        )
        train = run._local.train

        def watched(*args):
            trained = train(*args)
            norms.append(torch.cat([t.flatten() for t in trained.update.update.values()]).norm())
            return trained

        run._local.train = watched
        history = run.train()
        return max(map(float, norms)), history

    norm, _ = moved("free")
    assert not moved("above", max_update_norm=norm * 1.001)[1][0].refused
    assert len(moved("below", max_update_norm=norm * 0.999)[1][0].refused) == 1


def test_a_buffer_that_is_not_finite_is_refused(tmp_path, caplog):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 4)
            self.register_buffer("scale", torch.ones(2))

        def forward(self, x):
            self.scale.fill_(float("inf"))
            return self.linear(x)

    _, history, found = trained(tmp_path, None, Broken(), quorum=0)
    assert {reason for _, reason in history[0].refused} == {"not_finite"}
    assert "the state of the buffers is not finite, first scale" in caplog.text
    assert torch.equal(found[-1]["scale"], torch.ones(2))


class Odd(nn.Module):
    """Buffers of every kind, which follow the data."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 4)
        self.register_buffer("flag", torch.zeros(16, dtype=torch.bool))
        self.register_buffer("phase", torch.zeros(16, dtype=torch.complex64))
        self.register_buffer("wide", torch.zeros(16, dtype=torch.complex128))
        self.register_buffer("small", torch.full((2,), 250, dtype=torch.uint8))
        self.register_buffer("narrow", torch.ones(16, dtype=torch.bfloat16))

    def forward(self, x):
        if self.training:
            for name, value in self.values(x).items():
                getattr(self, name).copy_(value)
        return self.linear(x)

    @staticmethod
    def values(x):
        return {
            "flag": x.mean(0) > 0,
            "phase": torch.complex(x.mean(0), x.std(0)),
            "wide": torch.complex(x.mean(0).double(), x.std(0).double()),
            "small": torch.tensor([len(x), 200 - len(x)]).to(torch.uint8),
            "narrow": x.var(0).bfloat16(),
        }


@pytest.mark.parametrize("strategy", [None, Scaffold(), FedDyn(), FedAvgM(), FedAdam()])
@pytest.mark.parametrize("codec", ["identity", "int8"])
def test_odd_buffers_take_their_mean(tmp_path, strategy, codec):
    """By hand: clients see all their data in one step."""
    x, y = toy(90).tensors
    sizes = (10, 25, 55)
    rows = [TensorDataset(a, b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
    _, _, found = trained(
        tmp_path, strategy, Odd(), rows, num_rounds=2, clients_per_round=3, num_local_epochs=1,
        per_client_batch_size=64, uplink_codec=codec, downlink_codec=codec,
    )  # fmt: skip
    values = [Odd.values(data.tensors[0]) for data in rows]
    alike = isinstance(strategy, Scaffold | FedDyn)
    weights = torch.tensor([1, 1, 1] if alike else sizes).double() / (3 if alike else 90)

    def mean(name, dtype=torch.float64):
        return sum(p * v[name].to(dtype) for p, v in zip(weights, values, strict=True))

    for state in found:
        assert torch.equal(state["flag"], mean("flag") > 0.5)
        assert state["flag"].any()
        assert not state["flag"].all()
        expected = mean("phase", torch.complex128)
        torch.testing.assert_close(state["phase"].to(torch.complex128), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(state["wide"], mean("wide", torch.complex128))
        assert torch.equal(state["small"], mean("small").round().to(torch.uint8))
        torch.testing.assert_close(state["narrow"].double(), mean("narrow"), atol=0, rtol=2**-8)


@pytest.mark.parametrize("name", ["identity", "int8", "topk:0.5"])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16,
        torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    ],
)  # fmt: skip
def test_every_kind_of_buffer_travels_to_the_bit(name, dtype):
    torch.manual_seed(0)
    plain = torch.randn(4, 3, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    odd = (plain.abs() * 3 if not dtype.is_signed else plain).to(dtype)
    state = {"b": odd, "scalar": odd[0, 0], "row": odd[0].expand(5, 3), "w": torch.randn(50)}
    form = Format(schema_of(state), codec_from_name(name), frozenset({"b", "scalar", "row"}))
    payload = form.encode(state, 2, torch.Generator().manual_seed(0))
    assert payload.size == form.size
    back = form.decode(payload.data, 2)
    assert schema_of(back) == schema_of(state)
    for n in ("b", "scalar", "row"):
        same = back[n].contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(same, state[n].contiguous().reshape(-1).view(torch.uint8))
    mean = WeightedMean(state)
    mean.add(back, 3.0)
    mean.add(back, 4.0)
    if dtype != torch.uint64:  # beyond 2^53 a mean in float64 is no longer exact
        wide = torch.complex128 if dtype.is_complex else torch.float64
        torch.testing.assert_close(mean.result()["b"].to(wide), odd.to(wide), atol=0, rtol=1e-6)


def test_both_ends_must_know_the_same_buffers():
    state = {"w": torch.randn(8), "v": torch.rand(8)}
    ours = Format(schema_of(state), codec_from_name("identity"), frozenset({"v"}))
    theirs = Format(schema_of(state), codec_from_name("identity"))
    with pytest.raises(Exception, match="both ends must use the same model") as caught:
        theirs.decode(ours.encode(state).data)
    assert caught.value.reason == "schema"


def test_a_kind_that_no_payload_carries_is_refused_at_once(tmp_path):
    class Exotic(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 4)
            self.register_buffer("table", torch.ones(3).to(torch.float8_e4m3fnuz))

    with pytest.raises(
        CodecError, match=r"table is torch.float8_e4m3fnuz, which no payload.*persis"
    ):
        FederatedTrainer(Exotic(), arguments(tmp_path), partition(toy(), "iid", 5))


def test_hostile_truth_values_are_refused():
    state = {"b": torch.tensor([True, False, True])}
    form = Format(schema_of(state))
    data = bytearray(form.encode(state).data)
    data[-2] = 7
    with pytest.raises(Exception, match="no truth value") as caught:
        form.decode(bytes(data))
    assert caught.value.reason == "malformed"


def test_trimmed_means_of_odd_kinds_by_hand():
    torch.manual_seed(0)
    states = [
        {
            "flag": torch.rand(6) > 0.4,
            "phase": torch.randn(6, dtype=torch.complex128),
            "small": torch.randint(0, 255, (6,), dtype=torch.uint8),
        }
        for _ in range(5)
    ]
    median = TrimmedMean(states[0], 0.5)
    for state in states:
        median.add(state, 1.0)
    found = median.result()
    for i in range(6):
        assert bool(found["flag"][i]) == (sum(bool(s["flag"][i]) for s in states) >= 3)
        assert int(found["small"][i]) == sorted(int(s["small"][i]) for s in states)[2]
        for part in ("real", "imag"):
            values = sorted(float(getattr(s["phase"][i], part)) for s in states)
            assert float(getattr(found["phase"][i], part)) == values[2]


def test_adapters_with_replaced_weights_and_batch_norm(tmp_path):
    """Names of PEFT's wrapping are the buffers' names all the same."""
    run, _, found = trained(tmp_path, FedAvgM(), adapted(mlp()), uplink_codec="int4")
    assert len(found[-1]) == 3
    assert all(n in run._local.buffers for n in found[-1])
    (variance,) = (t for n, t in found[-1].items() if n.endswith("running_var"))
    assert (variance > 0).all()
