"""A codec of one's own: one file, and what is said of codecs is tried by ``check_codec``."""

import json
from dataclasses import dataclass

import pytest
import torch
from tests.federation.test_trainer import arguments, toy
from tests.zoo import adapted, mlp

from fedpara_peft import (
    ArgumentsError,
    Codec,
    CodecError,
    FederatedArguments,
    FederatedTrainer,
    PayloadError,
    ResumeError,
    partition,
    plan,
)
from fedpara_peft.comm.codecs import (
    Cast,
    Chain,
    Quantize,
    TopK,
    codec_from_name,
    codec_names,
    named,
    register,
)
from fedpara_peft.comm.schema import TensorSchema
from fedpara_peft.testing import check_codec


@dataclass(frozen=True)
class Signs(Codec):
    """Signs and the mean magnitude (Bernstein et al., arXiv:1802.04434, scaled)."""

    def wire(self, name, entry):
        return {
            name: TensorSchema((-(-entry.numel // 8),), torch.uint8),
            f"{name}.mean": TensorSchema((), torch.float32),
        }

    def encode(self, name, tensor, generator):
        flat = tensor.reshape(-1).double()
        bits = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8)
        bits[: flat.numel()] = flat >= 0
        mean = flat.abs().sum() / max(1, flat.numel())
        weights = 2 ** torch.arange(8)
        packed = (bits.view(-1, 8) * weights).sum(1).to(torch.uint8)
        return {name: packed, f"{name}.mean": mean.float()}

    def decode(self, name, wire, entry):
        bits = wire[name][:, None].long() & 2 ** torch.arange(8)
        signs = (bits > 0).reshape(-1)[: entry.numel].double() * 2 - 1
        return (signs * wire[f"{name}.mean"].double()).to(entry.dtype).reshape(entry.shape)

    def __str__(self):
        return "signs"


BUILT_IN = [
    *(name.replace("FRACTION", "0.1") for name in codec_names()), "topk:0.01", "topk:1",
    "topk:0.1+int8", "topk:0.3+int4", "topk:0.2+float16", "bfloat16+int8", "identity+int4",
]  # fmt: skip


OWN = [Signs(), Chain(TopK(0.2), Signs())]


@pytest.mark.parametrize("codec", [*map(codec_from_name, BUILT_IN), *OWN], ids=str)
def test_codecs_keep_their_promises(codec):
    check_codec(codec)


def trainer(folder, codec, **changes):
    settings = {"num_rounds": 4, "save_every": 2, "learning_rate": 0.05, **changes}
    args = arguments(folder, uplink_codec=codec, **settings)
    return FederatedTrainer(adapted(mlp(norm=False)), args, partition(toy(), "iid", 5))


def test_a_codec_of_ones_own_runs_is_counted_and_told_from_others(tmp_path):
    run = trainer(tmp_path / "a", Signs(), error_feedback=True)
    foretold = plan(run.model, run.args, 5)
    history = run.train()
    assert history.total_bytes == foretold.total_bytes
    bare = trainer(tmp_path / "bare", "identity").train()
    assert history[0].uplink_bytes - history[0].header_bytes < bare[0].uplink_bytes / 8
    assert history[-1].train_loss < history[0].train_loss
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert settings["arguments"]["uplink_codec"] == "signs"
    for other in ("int8", Chain(TopK(0.2), Signs())):
        with pytest.raises(ResumeError, match="uplink_codec: 'signs' then"):
            trainer(tmp_path / "a", other, error_feedback=True).train(resume_from_checkpoint=True)
    again = trainer(tmp_path / "a", Signs(), error_feedback=True, num_rounds=6)
    again.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", Signs(), error_feedback=True, num_rounds=6)
    whole.train()
    state = whole.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.model.state_dict().items())


def test_a_codec_and_its_name_are_one_setting(tmp_path):
    named = trainer(tmp_path / "named", "topk:0.25+int8")
    given = trainer(tmp_path / "given", Chain(TopK(0.25), Quantize(8)))
    named.train()
    given.train()
    state = given.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in named.model.state_dict().items())
    described = [
        json.loads((tmp_path / n / "settings.json").read_text()) for n in ("named", "given")
    ]
    assert described[0]["arguments"] == described[1]["arguments"]
    assert given.train(resume_from_checkpoint=True) is not None


def test_both_ways_take_a_codec_and_nothing_else(tmp_path):
    FederatedArguments(str(tmp_path), downlink_codec=Cast(torch.bfloat16))
    with pytest.raises(
        ArgumentsError, match=r"uplink_codec must be of type str or a Codec, got <cl"
    ):
        FederatedArguments(str(tmp_path), uplink_codec=Signs)
    with pytest.raises(ArgumentsError, match="output_dir must be of type str"):
        FederatedArguments(Signs())
    with pytest.raises(CodecError, match=r"downlink_codec='topk:0\.5' drops entries"):
        trainer(tmp_path, "identity", downlink_codec=TopK(0.5))
    with pytest.raises(CodecError, match=r"topk:0\.5 cannot come after a codec that sends 'x\.i'"):
        codec_from_name("topk:0.3+float16+topk:0.5")
    codec_from_name("topk:0.3+int8+topk:0.5")  # of int8's scale alone
    with pytest.raises(CodecError, match=r"fraction in \(0, 1\], got 2"):
        TopK(2)


def test_a_codec_of_ones_own_may_have_a_name(monkeypatch):
    monkeypatch.setattr(named, "_PLAIN", dict(named._PLAIN))
    with pytest.raises(CodecError, match="unknown codec 'signs': use identity, float16"):
        codec_from_name("topk:0.2+signs")
    register("signs", Signs())
    assert str(codec_from_name("topk:0.2+signs")) == "topk:0.2+signs"
    assert "signs" in codec_names(dense=True)
    for name in ("sign", "signs+int8"):
        with pytest.raises(CodecError, match="a name is the codec's own text"):
            register(name, Signs())


# What check_codec finds.


class Longer(Signs):
    def encode(self, name, tensor, generator):
        found = super().encode(name, tensor, generator)
        return {**found, name: torch.cat([found[name], found[name][:1]])}


class Elsewhere(Signs):
    def wire(self, name, entry):
        return {
            "mean" if n.endswith("mean") else n: e for n, e in super().wire(name, entry).items()
        }


class Complex(Signs):
    def wire(self, name, entry):
        return {**super().wire(name, entry), f"{name}.z": TensorSchema((1,), torch.complex64)}


class InPlace(Signs):
    def encode(self, name, tensor, generator):
        return super().encode(name, tensor.mul_(0.5), generator)


class Careless(Signs):
    def encode(self, name, tensor, generator):
        return super().encode(name, tensor + 1e-3 * torch.randn(tensor.shape), generator)


class Reseeds(Signs):
    def encode(self, name, tensor, generator):
        torch.manual_seed(0)
        return super().encode(name, tensor, generator)


class Swallows(Signs):
    def encode(self, name, tensor, generator):
        return super().encode(name, tensor.nan_to_num(0, 0, 0), generator)


class Doubles(Signs):
    def decode(self, name, wire, entry):
        return 3 * super().decode(name, wire, entry)


class Boasts(Signs):
    lossless = True


class Widens(Signs):
    def decode(self, name, wire, entry):
        return super().decode(name, wire, entry).double()


class Trusts(Signs):
    def decode(self, name, wire, entry):
        if entry.numel == 7:
            torch.zeros(128)[wire[name].long()]  # the bit that no entry has is zero, is it not?
        return super().decode(name, wire, entry)


class Anonymous(Signs):
    def __str__(self):
        return object.__repr__(self)


class Impostor(Signs):
    def __str__(self):
        return "int8"


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        (Longer(), "but wire foretells"),
        (Elsewhere(), "names 'mean': all names are the tensor's own"),
        (Complex(), "torch.complex64, which no payload carries"),
        (InPlace(), r"encode changes a tensor of .* in place|other bytes by an equal generator"),
        (Careless(), "other bytes by an equal generator"),
        (Reseeds(), "moves torch's own generator"),
        (Swallows(), "nan among 1 entries comes back as a number"),
        (Doubles(), r"comes back with an error of .*, stated is"),
        (Boasts(), r"says lossless, but a tensor of \(7,\), torch.float32 comes back changed"),
        (Widens(), r"a tensor of \(\), torch.float32 comes back as .*float64"),
        (Trusts(), "damaged bytes raises IndexError"),
        (Anonymous(), "its text has an address"),
        (Impostor(), "its text is that of Quantize"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Codec) else "",
)
def test_a_broken_promise_is_named(codec, says):
    with pytest.raises(CodecError, match=says):
        check_codec(codec)


def test_a_codec_that_refuses_what_is_not_finite_is_as_good(tmp_path):
    class Strict(Signs):
        def encode(self, name, tensor, generator):
            if not tensor.isfinite().all():
                raise PayloadError("not_finite", f"{name} is not finite")
            return super().encode(name, tensor, generator)

    check_codec(Strict())
