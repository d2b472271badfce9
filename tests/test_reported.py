"""What users met, as they met it, with the value that is right; kinds are tested elsewhere."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune, spectral_norm, vector_to_parameters
from torch.utils.data import Subset, TensorDataset, default_collate
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from fedpara_peft import (
    ClientDataError,
    FederatedArguments,
    FederatedCallback,
    FederatedTrainer,
    FedParaConfig,
    ResumeError,
    Scaffold,
    UnsupportedLayerError,
    accuracy,
    partition,
    save_as_lora,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def randomized(model, std=0.6):
    for name, parameter in model.named_parameters():
        if "fedpara_" in name:
            parameter.data.normal_(0, std)
    return model.eval()


def federated(net, folder, clients, evaluated=None, trainer=None, **args):
    settings = {"num_rounds": 1, "disable_tqdm": True, "overwrite_output_dir": True, **args}
    run = FederatedTrainer(
        net, FederatedArguments(folder, **settings), clients, evaluated, **(trainer or {})
    )
    run.train()
    return run


def toy(n=80):
    x = torch.randn(n, 8)
    return TensorDataset(x, (x[:, 0] > 0).long())


def digits(scale=16.0):
    found = load_digits()
    return TensorDataset(torch.tensor(found.data / scale).float(), torch.tensor(found.target))


def llama():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=50,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_adapter_names_are_heard():
    config = FedParaConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False
    )
    model = get_peft_model(llama(), config)
    model.add_adapter("b", config)
    ids = torch.randint(1, 50, (1, 6))
    model.eval()
    mixed = model(input_ids=ids.repeat(3, 1), adapter_names=["default", "b", "__base__"]).logits
    alone = [model(ids).logits[0]]
    model.set_adapter("b")
    alone.append(model(ids).logits[0])
    with model.disable_adapter():
        alone.append(model(ids).logits[0])
    torch.testing.assert_close(mixed, torch.stack(alone))
    assert not torch.allclose(mixed[0], mixed[1])


def test_the_engine_that_chooses_trains_what_the_other_trains(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.b(F.dropout(F.relu(self.a(x)), 0.5, self.training))

    clients, states = partition(toy(), "iid", 8), []
    for engine in ("sequential", "auto"):
        torch.manual_seed(0)
        run = federated(Net(), tmp_path / engine, clients, engine=engine)
        states.append(run.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


class Layers(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.last = nn.ModuleDict({first: nn.Linear(16, 16)}), second
        setattr(self, second, nn.Linear(16, 16))

    def forward(self, x):
        return getattr(self, self.last)(torch.relu(next(iter(self.body.values()))(x)))


def test_a_layer_called_base_layer2_is_exported_as_itself(tmp_path):
    def net():
        return Layers("base_layer2", "body2")

    x = torch.randn(4, 16)
    config = FedParaConfig(r=2, target_modules=["body.base_layer2"], init_weights=False)
    model = randomized(get_peft_model(net(), config))
    assert save_as_lora(model, tmp_path).target_modules == {"body.base_layer2"}
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path)(x), model(x))


def test_a_collator_is_heard_by_every_engine(tmp_path):
    def zeros(rows):
        x, y = default_collate(rows)
        return torch.zeros_like(x), y

    for engine in ("sequential", "auto"):
        net = nn.Linear(8, 2)
        before = net.weight.detach().clone()
        federated(
            net, tmp_path / engine, partition(toy(), "iid", 8), engine=engine,
            trainer={"data_collator": zeros},
        )  # fmt: skip
        assert torch.equal(net.weight, before)


def test_float16_autocast_has_a_backward():
    model = get_peft_model(
        nn.Sequential(nn.Linear(64, 64)), FedParaConfig(r=4, target_modules=["0"])
    )
    x = torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(x).float().square().mean()
    loss.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    for parameter in model.parameters():
        parameter.grad = None
    model.double()(x.double()).square().mean().backward()
    right = [p.grad for p in model.parameters() if p.requires_grad]
    for a, b in zip(found, right, strict=True):
        assert (a - b).norm() <= 0.01 * b.norm() + 1e-9


def test_the_stop_button_leaves_the_history(tmp_path):
    class Interrupt(FederatedCallback):
        def on_round_end(self, server, report):
            if report.round == 5:
                raise KeyboardInterrupt

    args = FederatedArguments(tmp_path, num_rounds=10, disable_tqdm=True)
    run = FederatedTrainer(nn.Linear(8, 2), args, [toy()], callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert len(run.history) == 5
    assert (tmp_path / "history.json").exists()


def test_a_last_batch_of_one_row_trains_with_batch_norm(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    run = federated(net, tmp_path, [toy(64), toy(33)])
    assert not run.history[0].refused
    with pytest.raises(ClientDataError, match=r"client 'ann'.*batch norm cannot train"):
        federated(net, tmp_path, {"ann": toy(1)})


def test_mamba_merges_to_what_it_ran_as():
    config = MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=1, vocab_size=50)
    ids = torch.randint(0, 50, (2, 9))
    model = get_peft_model(
        MambaForCausalLM(config), FedParaConfig(r=2, target_modules="all-supported")
    )
    randomized(model, 0.7).train()
    model(ids, labels=ids).loss.backward()
    factors = [p for n, p in model.named_parameters() if "fedpara_" in n]
    assert all(p.grad is not None for p in factors)
    with torch.no_grad():
        out = model.eval()(ids).logits
        merged = model.merge_and_unload().eval()(ids).logits
    torch.testing.assert_close(merged, out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "patterns",
    [{"alpha_pattern": {"foo": 8.0, "bar.foo": 1.0}}, {"rank_pattern": {"foo": 5, "bar.foo": 3}}],
)
def test_nested_patterns_mean_the_same_after_saving(tmp_path, patterns):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.foo, self.bar = nn.Linear(16, 16), nn.ModuleDict({"foo": nn.Linear(16, 16)})

        def forward(self, x):
            return self.bar["foo"](torch.relu(self.foo(x)))

    config = FedParaConfig(r=2, target_modules=["foo"], init_weights=False, **patterns)
    model = randomized(get_peft_model(Net(), config))
    layer = model.base_model.model.bar["foo"]
    assert (layer.scaling["default"], layer.r["default"]) == (
        (0.5, 2) if "alpha_pattern" in patterns else (1.0, 3)
    )
    model.save_pretrained(tmp_path)
    x = torch.randn(4, 16)
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(x), model(x))


@pytest.mark.parametrize(
    ("buffer", "right"),
    [
        (torch.ones(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)),
        (torch.full((8,), 1 + 2j), torch.full((8,), 1 + 2j)),
        (torch.ones(1).expand(8), torch.ones(8)),
    ],
    ids=["bool", "complex", "expanded"],
)
def test_odd_buffers_travel(tmp_path, buffer, right):
    net = nn.Sequential(nn.Linear(8, 2))
    net.register_buffer("odd", buffer)
    federated(net, tmp_path, [toy(), toy()])
    assert torch.equal(net.odd, right)


def test_a_buffer_of_two_modules_and_a_second_trainers_precision(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    shared = torch.ones(1)
    net[0].register_buffer("t", shared)
    net[1].register_buffer("t", shared)
    federated(net, tmp_path, [toy()])
    assert net[0].t is net[1].t
    assert federated(net, tmp_path, [toy()], mixed_precision="bf16").history[0].train_loss > 0


@pytest.mark.parametrize("codec", ["int8", "int4", "topk:0.1"])
def test_variances_are_none_of_a_codecs_business(tmp_path, codec):
    """Lossy codecs once made batch norm's variances negative; now the loss is the plain run's."""
    data, losses = digits(1.0), []
    for name in ("identity", codec):
        torch.manual_seed(0)
        net = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 10))
        run = federated(
            net, tmp_path / name, partition(data, "iid", 9), data, num_rounds=5,
            uplink_codec=name, error_feedback=name != "identity", per_client_batch_size=25,
            trainer={"compute_metrics": accuracy},
        )  # fmt: skip
        assert float(net[0].running_var.min()) >= 0
        losses.append(run.history[-1].metrics["eval_loss"])
    assert abs(losses[1] - losses[0]) < 0.3


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
@pytest.mark.parametrize(
    "hook", [spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.4)]
)
def test_a_weight_that_a_hook_computes_is_refused_by_name(hook, base_weight):
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    hook(net[0])
    config = FedParaConfig(r=2, base_weight=base_weight, target_modules=["0"])
    with pytest.raises(UnsupportedLayerError, match=r"Target module 0 \(Linear\).*anew"):
        get_peft_model(net, config)


def test_resuming_with_clients_in_another_order_is_refused(tmp_path):
    clients = {"alice": toy(20), "bob": toy(20)}
    settings = {"num_rounds": 2, "save_every": 2, "local_modules": ["1"], "disable_tqdm": True}

    def trainer(clients):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        return FederatedTrainer(net, FederatedArguments(tmp_path, **settings), clients)

    first = trainer(clients)
    first.train()
    swapped = trainer({name: clients[name] for name in ("bob", "alice")})
    with pytest.raises(ResumeError, match=r"clients' names: .'alice', 'bob'"):
        swapped.train(resume_from_checkpoint=True)
    again = trainer(clients)
    again.train(resume_from_checkpoint=True)
    for name in clients:
        ours, theirs = (r.client_model(name)[1].weight for r in (first, again))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("extra", [{"uplink_codec": "int4"}, {"clip_update_norm": 0.5}], ids=str)
def test_scaffolds_controls_meet_the_servers(tmp_path, extra):
    """c is the mean of the c_i, whatever a codec or clipping did to what was sent."""

    class Last(FederatedCallback):
        def on_round_end(self, server, report):
            self.control = server.optimizer["control"]["weight"]

    last, data = Last(), digits()
    clients = partition(data, "dirichlet", 10, concentration=0.1)
    run = federated(
        nn.Linear(64, 10), tmp_path, clients, num_rounds=12, clients_per_round=5,
        per_client_batch_size=64, trainer={"strategy": Scaffold(), "callbacks": [last]}, **extra,
    )  # fmt: skip
    kept = [run.client_state(client) for client in range(10)]
    own = sum(s.strategy["control"]["weight"].double() for s in kept if s is not None) / 10
    assert (own - last.control.double()).norm() < 1e-5 * own.norm()


def test_scaffold_with_momentum_learns(tmp_path):
    data = digits()
    clients = partition(data, "dirichlet", 10, concentration=0.1)
    losses = []
    for strategy in ("fedavg", "scaffold"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        run = federated(
            net, tmp_path / strategy, clients, data, num_rounds=10, momentum=0.9,
            learning_rate=0.05, num_local_epochs=2, per_client_batch_size=16, eval_every=10,
            trainer={"strategy": strategy},
        )  # fmt: skip
        losses.append(run.history[-1].metrics["eval_loss"])
    assert losses[1] < losses[0]  # 1e28 before


def test_no_output_is_of_older_factors():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    config = FedParaConfig(r=2, target_modules=["0", "2"], compute_path="khatri_rao")
    model = get_peft_model(net, config).eval()
    params = [p for p in model.parameters() if p.requires_grad]
    count, x = sum(p.numel() for p in params), torch.randn(8, 64)
    for _ in range(10):
        for _ in range(2):
            vector_to_parameters(torch.randn(count) * 0.3, params)
        with torch.no_grad():
            found = model(x)
        torch.testing.assert_close(found, model(x).detach(), atol=1e-4, rtol=1e-4)


def test_a_subsets_own_getitem_is_used(tmp_path):
    class Masked(Subset):
        def __getitem__(self, i):
            x, y = self.dataset[self.indices[i]]
            return torch.zeros_like(x), y

        def __getitems__(self, indices):
            return [self[i] for i in indices]

    net = nn.Linear(8, 2)
    before = net.weight.detach().clone()
    federated(net, tmp_path, [Masked(toy(50), range(50))])
    assert torch.equal(net.weight, before)


def test_accumulated_batches_count_tokens(tmp_path):
    texts = [torch.randint(1, 50, (n,)).tolist() for n in [4] * 8 + [40] * 8]

    def collate(rows):
        longest = max(map(len, rows))
        ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
        mask = (ids > 0).long()
        labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def step(batch, accumulated):
        torch.manual_seed(0)
        net = llama()
        start = torch.cat([p.detach().flatten() for p in net.parameters()])
        federated(
            net, tmp_path / str(batch), [texts], per_client_batch_size=batch, learning_rate=1.0,
            gradient_accumulation_steps=accumulated, trainer={"data_collator": collate},
        )  # fmt: skip
        return torch.cat([p.detach().flatten() for p in net.parameters()]) - start

    whole = step(16, 1)
    for batch in (8, 1):
        assert (step(batch, 16 // batch) - whole).norm() < 1e-5 * whole.norm()


def test_the_encoders_fast_path_has_the_adapter():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    x = torch.randn(3, 7, 32)
    model = get_peft_model(net, FedParaConfig(r=3, target_modules=["linear1", "linear2"]))
    randomized(model, 0.5)
    with torch.no_grad():
        out = model(x)
        merged = model.merge_and_unload().eval()(x)
    torch.testing.assert_close(out, merged, atol=1e-4, rtol=1e-4)
