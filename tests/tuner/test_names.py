"""Names that contain one another, or those of adapters: each layer is the one that is meant."""

import copy
import itertools
import re
from collections import OrderedDict

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tests.zoo import randomize
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fedpara_peft import (
    CheckpointError,
    ConfigError,
    ConversionError,
    FedParaConfig,
    FedParaLayer,
    TargetError,
    communicated_state,
    fedpara_summary,
    local_state,
    loha_to_fedpara,
    save_as_loha,
    save_as_lora,
)
from fedpara_peft.tuner.names import base_names, exact_pattern, value_for

X = torch.randn(4, 16)


class Nested(nn.Module):
    """``foo`` ends ``bar.foo``, which ends ``baz.bar.foo``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.foo = nn.Linear(16, 16)
        self.bar = nn.ModuleDict({"foo": nn.Linear(16, 16)})
        self.baz = nn.ModuleDict({"bar": nn.ModuleDict({"foo": nn.Linear(16, 16)})})

    def forward(self, x):
        x = self.bar["foo"](torch.relu(self.foo(x)))
        return self.baz["bar"]["foo"](torch.relu(x))


def orders(patterns):
    return [dict(items) for items in itertools.permutations(patterns.items())]


def layers_of(model):
    plain = base_names(model)
    return {plain[n]: m for n, m in model.named_modules() if isinstance(m, FedParaLayer)}


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
@pytest.mark.parametrize("patterns", orders({"foo": 3, "bar.foo": 1, r".*baz.*": 2}))
def test_overlapping_rank_patterns_saved_and_loaded(tmp_path, patterns, base_weight):
    config = FedParaConfig(
        r=4, base_weight=base_weight, target_modules=["foo"], rank_pattern=patterns
    )
    model = randomize(get_peft_model(Nested(), config)).eval()
    expected = {"foo": 3, "bar.foo": 1, "baz.bar.foo": 1}
    assert {name: layer.r["default"] for name, layer in layers_of(model).items()} == expected
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Nested(), tmp_path).eval()
    assert {name: layer.r["default"] for name, layer in layers_of(again).items()} == expected
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("patterns", orders({"foo": 8.0, "bar.foo": 1.0}))
def test_overlapping_alpha_patterns_saved_and_loaded(tmp_path, patterns):
    config = FedParaConfig(r=2, target_modules=["foo"], alpha_pattern=patterns)
    model = randomize(get_peft_model(Nested(), config)).eval()
    scales = {name: layer.scaling["default"] for name, layer in layers_of(model).items()}
    assert scales == {"foo": 4.0, "bar.foo": 0.5, "baz.bar.foo": 0.5}
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Nested(), tmp_path).eval()(X), model(X))


@pytest.mark.parametrize(
    ("patterns", "value"),
    [
        ({"foo": 1, "bar.foo": 2, "baz.bar.foo": 3}, 3),
        ({"foo": 1, "bar.foo": 2, ".*": 3}, 2),
        ({"foo": 1, "oo": 2, "ar.foo": 3}, 1),  # whole dotted parts
        ({"foo": 1, "^foo": 2, "^bar.foo": 3}, 1),  # ^: from the beginning of the name
        ({"foo": 1, exact_pattern("baz.bar.foo"): 2}, 2),
        ({"foo": 1, "^baz.bar.foo": 2}, 2),
        ({"foo": 1, r"(bar|qux)\.foo": 2}, 1),  # a name goes before any regex
        ({r"(bar|qux)\.foo": 2}, 2),
        ({r".*\.foo": 2, r"(bar|qux)\.foo": 2}, 2),  # as specific, and of one mind
        ({"b.r.foo": 2}, 2),  # a dot is a regex's where the name itself is none
        ({"nothing": 1}, None),
    ],
)
def test_the_most_specific_pattern_counts_in_any_order(patterns, value):
    for ordered in orders(patterns):
        assert value_for(ordered, "baz.bar.foo", "rank_pattern") == value


def test_patterns_that_contradict_each_other_are_refused_before_anything_is_changed():
    model = Nested()
    for field, patterns, layer in (
        ("rank_pattern", {".*foo": 3, "(bar.)?foo": 2}, "bar.foo"),
        ("alpha_pattern", {"foo": 8.0, "bar.foo": 1.0, "^bar.foo": 5.0}, "bar.foo"),
    ):
        config = FedParaConfig(target_modules=["bar.foo"], **{field: patterns})
        with pytest.raises(ConfigError, match=f"{field} says .*give '{layer}' in full"):
            get_peft_model(model, config)
        assert type(model.foo) is type(model.bar["foo"]) is nn.Linear


@pytest.mark.parametrize("save", [save_as_lora, save_as_loha])
def test_exports_of_nested_names_keep_their_ranks_under_pefts_own_rule(tmp_path, save):
    patterns = {"foo": 3, "bar.foo": 1, "baz.bar.foo": 2}
    config = FedParaConfig(
        r=2, target_modules=["foo"], rank_pattern=patterns,
        alpha_pattern={name: 2.0 * r for name, r in patterns.items()},
    )  # fmt: skip
    model = randomize(get_peft_model(Nested(), config)).eval()
    save(model, tmp_path)
    again = PeftModel.from_pretrained(Nested(), tmp_path).eval()
    torch.testing.assert_close(again(X), model(X), atol=1e-5, rtol=1e-5)


def test_a_loha_with_overlapping_patterns_becomes_what_peft_makes_of_its_file(tmp_path):
    def saved(folder, **patterns):
        config = LoHaConfig(r=2, target_modules=["foo"], init_weights=False, **patterns)
        get_peft_model(Nested(), config).save_pretrained(tmp_path / folder)
        return tmp_path / folder

    alphas = saved("alphas", alpha_pattern={"foo": 8, "bar.foo": 1})
    loha_to_fedpara(alphas, tmp_path / "ours")
    ours = PeftModel.from_pretrained(Nested(), tmp_path / "ours")
    theirs = PeftModel.from_pretrained(Nested(), alphas)
    torch.testing.assert_close(ours(X), theirs(X), atol=1e-5, rtol=1e-5)
    ranks = saved("ranks", rank_pattern={"foo": 3, "bar.foo": 1})
    with pytest.raises(ConversionError, match=r"bar\.foo has rank 3, but 1 by the first"):
        loha_to_fedpara(ranks, tmp_path / "none")
    assert not (tmp_path / "none").exists()


class Named(nn.Module):
    """Modules that are called as PEFT or we call things, or nearly so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"base_layer2": nn.Linear(16, 16)})
        self.body2 = nn.Linear(16, 16)
        self.base_layer = nn.Linear(16, 16)
        self.base_model = nn.ModuleDict({"model": nn.Linear(16, 16)})
        self.fedpara_head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.body2(torch.relu(self.body["base_layer2"](x)))
        x = self.base_model["model"](torch.relu(self.base_layer(x)))
        return self.fedpara_head(x)


NAMES = ["body.base_layer2", "body2", "base_layer", "base_model.model"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("save", [save_as_lora, save_as_loha])
def test_a_layer_whose_name_has_base_layer_in_it_is_exported_as_itself(tmp_path, name, save):
    config = FedParaConfig(
        r=2, target_modules=f"^{re.escape(name)}$", modules_to_save=["fedpara_head"]
    )
    model = randomize(get_peft_model(Named(), config)).eval()
    assert layers_of(model).keys() == {name}
    assert {row.name for row in fedpara_summary(model).rows if row.r} == {name}
    save(model, tmp_path)
    assert "base_model.model.fedpara_head.weight" in load_file(
        tmp_path / "adapter_model.safetensors"
    )
    again = PeftModel.from_pretrained(Named(), tmp_path).eval()
    torch.testing.assert_close(again(X), model(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
@pytest.mark.parametrize("name", [*NAMES, "fedpara_head"])
def test_local_modules_take_no_neighbours(tmp_path, name, base_weight):
    config = FedParaConfig(
        r=2, base_weight=base_weight, target_modules=NAMES, local_modules=[name]
    )  # fmt: skip
    model = randomize(get_peft_model(Named(), config)).eval()
    kept = local_state(model)
    plain = {base_names(model)[key.rpartition(".")[0].split(".fedpara_w")[0]] for key in kept}
    trained = name != "fedpara_head" or base_weight == "replaced"
    assert plain == ({name} if trained else set())
    total = sum(p.requires_grad for p in model.parameters())
    assert len(communicated_state(model)) == total - len(kept)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == total - len(kept)


def test_an_adapter_that_is_called_as_a_module_loses_no_other_adapters_tensors(tmp_path):
    config = FedParaConfig(r=2, target_modules=["foo"])
    model = get_peft_model(Nested(), config, "first")
    model.add_adapter("bar", copy.deepcopy(config))
    with pytest.raises(CheckpointError, match=r"bar\.foo out of adapter 'first'.*another name"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, selected_adapters=["bar"])
    assert len(load_file(tmp_path / "bar/adapter_model.safetensors")) == 12


def test_modules_to_save_that_would_catch_factors_are_refused():
    model = nn.Sequential(OrderedDict(foo=nn.Linear(16, 16), x=nn.Linear(16, 2)))
    with pytest.raises(ConfigError, match=r"modules_to_save has 'x'.*'parent.x'"):
        get_peft_model(model, FedParaConfig(target_modules=["foo"], modules_to_save=["x"]))
    assert type(model.foo) is nn.Linear


def test_a_local_module_that_shares_its_weight_is_not_sent_under_the_other_name():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(TargetError, match=r"1\.weight is local and shared with 0\.weight"):
        communicated_state(model, local_modules=["1"])
    assert list(local_state(model, local_modules=["0", "1"])) == ["0.weight"]
    assert communicated_state(model, local_modules=["0", "1"]) == {}


def test_wrappers_for_activation_checkpoints_do_not_uncover_the_local_half():
    config = FedParaConfig(
        r=2, base_weight="replaced", parameterization="pfedpara", target_modules=["foo"]
    )
    model = get_peft_model(Nested(), config)
    inner = model.base_model.model
    inner.bar["foo"] = checkpoint_wrapper(inner.bar["foo"])
    assert not any("_w2_" in key for key in get_peft_model_state_dict(model))
    assert len(local_state(model)) == 6


def test_a_lora_beside_a_module_named_as_its_prefix():
    """Other methods' layers are wrappers as well."""
    model = get_peft_model(Named(), LoraConfig(r=2, target_modules=["base_layer"]))
    names = base_names(model)
    assert names["base_model.model.base_layer.base_layer"] == "base_layer"
    assert names["base_model.model.base_model.model"] == "base_model.model"
