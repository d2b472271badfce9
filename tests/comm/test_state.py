"""Scopes: every trained tensor is global or local, never both, and stays where it belongs."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, load_model
from tests.zoo import Net, adapted, mlp, net_inputs, randomize
from torch import nn
from torch.utils.data import TensorDataset

from fedpara_peft import (
    FederatedArguments,
    FederatedTrainer,
    StateError,
    TargetError,
    communicated_state,
    load_communicated_state,
    load_local,
    load_local_state,
    local_state,
    save_local,
)
from fedpara_peft.comm.state import save_tensors
from fedpara_peft.federation.folder.store import DiskStore
from fedpara_peft.federation.state import ClientState


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


class Buffers(nn.Module):
    """Buffers of every kind, one of them in two modules and one in none's state."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        shared = torch.rand(3)
        self.a.register_buffer("shared", shared, persistent=False)
        self.b.register_buffer("shared", shared)
        self.b.register_buffer("again", shared)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("phase", torch.randn(3, dtype=torch.cfloat))
        self.register_buffer("count", torch.tensor(2**40 + 1))
        self.register_buffer("wide", torch.rand(1).expand(5))
        self.register_buffer("grid", torch.rand(2, 1, 3).expand(2, 4, 3))
        self.register_buffer("turned", torch.rand(3, 2).T)
        self.register_buffer("part", self.turned[:, :2])

    def forward(self, x):
        return self.b(self.a(x))


BUFFERS = ["mask", "phase", "count", "wide", "grid", "turned", "part", "b.shared"]


def test_buffers_of_every_kind_are_listed_once_and_move_exactly():
    source, target = Buffers(), Buffers()
    state = communicated_state(source)
    assert list(state) == [n for n, _ in source.named_parameters()] + BUFFERS
    assert state["mask"].dtype == torch.bool
    sent = {name: tensor.clone() for name, tensor in state.items()}
    sent["wide"] += torch.arange(5)  # as a mean of several clients may be
    load_communicated_state(target, sent)
    arrived = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    for name in BUFFERS[:5]:
        assert torch.equal(arrived[name], sent[name]), name
    assert torch.equal(target.b.shared, source.b.shared)
    assert target.a.shared is target.b.shared is target.b.again
    target.wide[0] = 9  # it has memory of its own now
    assert target.wide[1] == sent["wide"][1]
    assert set(local_state(source, ["b"])) == {"b.weight", "b.bias", "b.shared"}


def test_a_local_half_of_expanded_shared_and_turned_tensors_is_saved(tmp_path):
    source, target = Buffers(), Buffers()
    names = ["a", "b"]
    source.a.register_buffer("view", source.turned[:1])
    target.a.register_buffer("view", torch.zeros(1, 3))
    source.a.weight.data = source.a.weight.data.T
    source.b.register_buffer("wide", torch.rand(1).expand(5))
    target.b.register_buffer("wide", torch.zeros(5))
    path = save_local(source, tmp_path, names)
    load_local(target, path, names)
    for name, tensor in local_state(source, names).items():
        assert torch.equal(local_state(target, names)[name], tensor), name


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_a_clients_own_files_are_read_as_a_local_half(tmp_path, base_weight):
    model = randomize(adapted(mlp(), parameterization="pfedpara", base_weight=base_weight))
    mine = {name: tensor.clone() for name, tensor in local_state(model).items()}
    store = DiskStore(tmp_path)
    for version in (2, 10, 9):
        moved = {name: tensor + version for name, tensor in mine.items()}
        half = {name: 0.5 * tensor for name, tensor in mine.items()}
        store.put(
            3, version, ClientState(moved, {"control": mine}, {"base": torch.ones(1)}, {"m": half})
        )
    for path, version in (
        (tmp_path, 10),  # the newest, by number
        (tmp_path / "client-3.round-2.safetensors", 2),
    ):
        load_local(model, path)
        assert all(torch.equal(t, mine[n] + version) for n, t in local_state(model).items())
    (tmp_path / "client-3.round-9.safetensors").rename(tmp_path / "mine.safetensors")
    load_local(model, tmp_path / "mine.safetensors")
    assert all(torch.equal(t, mine[n] + 9) for n, t in local_state(model).items())
    store.put(4, 1, ClientState({}, {}, {}))
    with pytest.raises(StateError, match=r"states of 2 clients, \[3, 4\].*one's file"):
        load_local(model, tmp_path)
    with pytest.raises(StateError, match="a client's state without a local half"):
        load_local(model, tmp_path / "client-4.round-1.safetensors")
    (tmp_path / "bad").write_bytes(b"none")
    with pytest.raises(StateError, match="bad is no safetensors file"):
        load_local(model, tmp_path / "bad")


def test_a_model_of_shared_expanded_and_overlapping_tensors_is_written_whole(tmp_path):
    source = Buffers()
    source.b.weight.data = source.b.weight.data.T.contiguous().T
    save_tensors(source, tmp_path / "model.safetensors")
    saved, state = load_file(tmp_path / "model.safetensors"), source.state_dict()
    assert state.keys() - saved.keys() == {"b.again"}
    assert all(torch.equal(saved[name], state[name]) for name in saved)


def test_a_model_of_tied_weights_is_read_by_safetensors_own_load_model(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
        model[1].weight = model[0].weight
        return model

    source, target = tied(0), tied(1)
    save_tensors(source, tmp_path / "model.safetensors")
    load_model(target, tmp_path / "model.safetensors")
    assert target[1].weight is target[0].weight
    assert all(torch.equal(b, target.state_dict()[a]) for a, b in source.state_dict().items())


def test_a_run_of_a_model_with_buffers_of_every_layout_is_saved(tmp_path):
    """Bool and complex buffers apart: those need payloads that hold them."""
    model = Buffers()
    for name in ("mask", "phase"):
        delattr(model, name)
    data = TensorDataset(torch.randn(8, 4), torch.arange(8) % 2)
    args = FederatedArguments(str(tmp_path), num_rounds=1, save_every=1, disable_tqdm=True)
    trainer = FederatedTrainer(model, args, [data, data])
    trainer.train()
    trainer.save_model(str(tmp_path / "plain"))
    saved = load_file(tmp_path / "plain/model.safetensors")
    assert all(torch.equal(saved[name], model.state_dict()[name]) for name in saved)
