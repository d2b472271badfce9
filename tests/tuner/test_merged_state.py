"""A model in the state of being merged: what it saves, sends, trains, and shares."""

import copy

import pytest
import torch
import transformers
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from fedpara_peft import ArgumentsError, FederatedArguments, FederatedTrainer, FedParaConfig
from fedpara_peft.tuner.scope import tensor_scopes

pytestmark = [  # PEFT's
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),
]
IDS = torch.arange(12).view(2, 6)
PLAIN, PERSONAL = "fedpara", "pfedpara"


def llama(**more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=80, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def adapted(net, base, parameterization, targets, **more):
    torch.manual_seed(1)
    config = FedParaConfig(
        r=2, parameterization=parameterization, base_weight=base, target_modules=targets,
        init_weights=base != "frozen",
    )  # fmt: skip
    model = get_peft_model(net, config, **more).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fedpara_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("parameterization", [PLAIN, PERSONAL])
@pytest.mark.parametrize("base", ["replaced", "seeded", "frozen"])
def test_a_file_has_no_more_for_being_merged(tmp_path, base, parameterization, merged):
    model = adapted(
        nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)), base, parameterization, ["0"]
    )
    if merged:
        model.merge_adapter()
    file = saved(model, tmp_path)
    assert not [name for name in file if name.endswith("0.base_layer.weight")]
    model.unmerge_adapter() if merged else None
    again = saved(model, tmp_path / "again")
    assert file.keys() == again.keys()
    assert all(torch.equal(file[name], again[name]) for name in file)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("parameterization", [PLAIN, PERSONAL])
@pytest.mark.parametrize("base", ["replaced", "seeded", "frozen"])
def test_an_embedding_is_saved_without_its_adapter(tmp_path, base, parameterization, merged):
    """PEFT saves tables of embeddings that are adapted: the pretrained one, or none."""
    model = adapted(llama(), base, parameterization, ["embed_tokens"])
    table = llama().get_input_embeddings().weight
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    if merged:
        model.merge_adapter()
    file = saved(model, tmp_path)
    found = [tensor for name, tensor in file.items() if "embed_tokens.base_layer" in name]
    assert len(found) == (base == "frozen" and not (merged and parameterization == PERSONAL))
    for tensor in found:
        torch.testing.assert_close(tensor, table.data)
    if parameterization == PLAIN:
        again = PeftModel.from_pretrained(llama(), tmp_path).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("base", ["replaced", "seeded", "frozen"])
def test_the_scopes_of_a_merged_model(base):
    model = adapted(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)), base, PERSONAL, ["0"])
    before = tensor_scopes(model)
    assert "local" in before.values()
    model.merge_adapter()
    assert tensor_scopes(model) == before


@pytest.mark.parametrize("base", ["replaced", "seeded", "frozen"])
def test_a_merged_weight_does_not_train(base):
    """Unmerging would lose what it learns."""
    model = adapted(nn.Sequential(nn.Linear(32, 32)), base, PLAIN, ["0"])
    before = model.get_nb_trainable_parameters()[0]
    model.merge_adapter()
    assert model.get_nb_trainable_parameters()[0] == before
    weight = model.base_model.model[0].base_layer.weight
    x = torch.randn(3, 32).requires_grad_()
    model(x).square().sum().backward()
    assert weight.grad is None
    model.unmerge_adapter()
    model(x).square().sum().backward()
    trained = [n for n, p in model.named_parameters() if "fedpara_" in n and p.grad is not None]
    assert len(trained) == 4
    plain = model.merge_and_unload()
    assert plain[0].weight.requires_grad is (base != "frozen")


LORA = LoraConfig(r=2, target_modules=["0"])
LOHA = LoHaConfig(r=2, target_modules=["0"])


@pytest.mark.parametrize("adapter", [LORA, LOHA, "replaced", "seeded", "frozen"])
def test_a_federation_of_a_merged_model_is_refused(adapter, tmp_path):
    """It would send factors that never change."""
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 2))
    ours = isinstance(adapter, str)
    model = adapted(net, adapter, PLAIN, ["0"]) if ours else get_peft_model(net, adapter)
    data = [[(torch.randn(32), 0), (torch.randn(32), 1)]]
    args = FederatedArguments(tmp_path, num_rounds=1, disable_tqdm=True)
    trainer = FederatedTrainer(model, args, data)
    model.merge_adapter()
    with pytest.raises(ArgumentsError, match=r"base_model.model.0.* is merged into its weight"):
        trainer.train()
    model.unmerge_adapter()
    assert len(trainer.train()) == 1


def test_an_adapter_trains_over_another_that_is_merged(tmp_path):
    model = adapted(nn.Sequential(nn.Linear(32, 2)), "frozen", PLAIN, ["0"]).float()
    model.add_adapter("other", FedParaConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    model.set_requires_grad("default", False)
    model.merge_adapter(["default"])
    args = FederatedArguments(tmp_path, num_rounds=1, disable_tqdm=True)
    trainer = FederatedTrainer(model, args, [[(torch.randn(32), 0), (torch.randn(32), 1)]])
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".other." in name for name in changed)


@pytest.mark.parametrize("base", ["replaced", "seeded", "frozen"])
def test_it_trains_on_after_an_evaluation_in_inference_mode(base):
    model = adapted(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)), base, PLAIN, ["0"])
    x = torch.randn(3, 32)
    before = model(x).detach()
    with torch.inference_mode():
        model.merge_adapter()
        merged = model(x)
    torch.testing.assert_close(merged.clone(), before)
    model(x.clone().requires_grad_()).sum().backward()
    with torch.inference_mode():
        model.unmerge_adapter()
    out = model(x)
    torch.testing.assert_close(out.detach(), before)
    out.sum().backward()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_a_tied_head_stays_as_it_was(mixed, way):
    model = adapted(llama(tie_word_embeddings=True), "frozen", PLAIN, ["embed_tokens"], mixed=mixed)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        if way == "merge_adapter":
            model.base_model.merge_adapter()
        else:
            model = model.merge_and_unload()
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)


class Twice(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.one, self.other = module, module

    def forward(self, x):
        def ran(module, x):
            found = module(x)
            return found[0] if isinstance(found, tuple) else found

        return ran(self.other, torch.tanh(ran(self.one, x)))


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(6, 6), lambda: nn.LSTM(6, 6)], ids=["linear", "recurrent"]
)
def test_a_module_that_stands_elsewhere_too_stays_as_it_was_there(build, way):
    net = Twice(build().double())
    untouched = copy.deepcopy(net.other)
    model = adapted(net, "frozen", PLAIN, ["one"])
    x = torch.randn(4, 6).double()
    expected = model(x).detach()
    if way == "merge_adapter":
        model.merge_adapter()
        whole = model
        other = model.base_model.model.other
    else:
        whole = model.merge_and_unload()
        other = whole.other
    torch.testing.assert_close(whole(x).detach(), expected)
    for name, tensor in untouched.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    if way == "merge_adapter":
        model.unmerge_adapter()
        torch.testing.assert_close(model(x).detach(), expected)
