"""Scopes: every trained tensor is global or local, never both, and stays where it belongs."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.zoo import Net, adapted, mlp, net_inputs, randomize
from torch import nn

from fedpara_peft import (
    StateError,
    TargetError,
    communicated_state,
    load_communicated_state,
    load_local,
    load_local_state,
    local_state,
    save_local,
)


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
@pytest.mark.parametrize("name", ["fedpara", "pfedpara", "lowrank"])
@pytest.mark.parametrize("local", [None, ["head"], ["norm", "hidden"], r".*rnn"])
def test_global_and_local_are_disjoint_and_complete(name, base_weight, local):
    model = adapted(Net(), parameterization=name, base_weight=base_weight, local_modules=local)
    sent, kept = communicated_state(model), local_state(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not sent.keys() & kept.keys()
    buffers = {n for n, _ in model.named_buffers()}
    assert trainable <= sent.keys() | kept.keys() <= trainable | buffers
    # The buffers of a frozen base are no one's business; those of a trained model are.
    assert (buffers <= sent.keys() | kept.keys()) == (base_weight == "replaced")
    assert bool(kept) == (name == "pfedpara" or local is not None)
    if name == "pfedpara":
        assert all(n in kept for n in trainable if ".fedpara_w2_" in n)
        assert all(n in sent or local for n in trainable if ".fedpara_w1_" in n)


def test_plain_models_and_other_adapters():
    model = mlp()
    assert communicated_state(model).keys() == model.state_dict().keys()
    assert local_state(model) == {}
    personal = local_state(model, local_modules=["5"])
    assert personal.keys() == {"5.weight", "5.bias"}
    lora = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"]))
    assert all("lora_" in name for name in communicated_state(lora))
    assert len(communicated_state(lora)) == 2


def test_a_tied_weight_is_sent_once():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model[1].weight = model[0].weight
    assert list(communicated_state(model)) == ["0.weight"]


def test_state_moves_between_models_of_other_seeds():
    images, ids = net_inputs()
    source, target = (randomize(adapted(Net(), parameterization="pfedpara")) for _ in "12")
    load_communicated_state(target, communicated_state(source))
    assert not torch.equal(target.eval()(images, ids), source.eval()(images, ids))
    load_local_state(target, local_state(source))
    assert torch.equal(target(images, ids), source(images, ids))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop(next(iter(s))), "1 missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected"),
        (lambda s: s.update({next(iter(s)): torch.zeros(1, 1)}), r"is \(1, 1\)"),
        (lambda s: s.update({k: v.double() for k, v in s.items()}), "float64"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, says):
    model = randomize(adapted(Net()))
    before = copy.deepcopy(model.state_dict())
    state = {k: v + 1 for k, v in communicated_state(model).items()}
    change(state)
    with pytest.raises(StateError, match=says):
        load_communicated_state(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_local_half_round_trip(tmp_path):
    images, ids = net_inputs()
    model = randomize(adapted(Net(), parameterization="pfedpara", local_modules=["head"])).eval()
    model.save_pretrained(tmp_path / "pushed")
    path = save_local(model, tmp_path / "kept")
    assert load_file(path).keys() == local_state(model).keys()
    other = PeftModel.from_pretrained(Net(), tmp_path / "pushed", is_trainable=True).eval()
    assert not torch.equal(other(images, ids), model(images, ids))
    load_local(other, tmp_path / "kept")
    assert torch.equal(other(images, ids), model(images, ids))


def test_errors_name_the_remedy(tmp_path):
    with pytest.raises(StateError, match=r"no local tensors.*pfedpara"):
        save_local(adapted(Net()), tmp_path)
    with pytest.raises(StateError, match=r"no local_model.safetensors.*save_local"):
        load_local(adapted(Net(), parameterization="pfedpara"), tmp_path)
    with pytest.raises(TargetError, match="matches no module"):
        communicated_state(mlp(), local_modules=["nowhere"])


def test_a_half_for_a_model_that_does_not_train_is_refused_with_the_way_out(tmp_path):
    model = adapted(mlp(), parameterization="pfedpara")
    model.save_pretrained(tmp_path / "shared")
    save_local(model, tmp_path / "mine")
    with pytest.raises(StateError, match="is_trainable=True"):
        load_local(PeftModel.from_pretrained(mlp(), tmp_path / "shared"), tmp_path / "mine")
    again = PeftModel.from_pretrained(mlp(), tmp_path / "shared", is_trainable=True)
    load_local(again, tmp_path / "mine")


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_nothing_local_in_the_bytes_that_are_saved(tmp_path, base_weight):
    """Every file that save_pretrained writes is searched for every local tensor's bytes."""
    model = randomize(
        adapted(
            Net(),
            parameterization="pfedpara",
            base_weight=base_weight,
            local_modules=["head"] if base_weight == "replaced" else None,
        )
    )
    model.save_pretrained(tmp_path)
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    private = local_state(model)
    assert len(private) > 8
    for name, tensor in private.items():
        row = tensor.reshape(-1)[:8].numpy().tobytes()
        assert row not in written, name
        assert name.encode() not in written
    for tensor in communicated_state(model).values():
        assert tensor.contiguous().numpy().tobytes() in written
