"""The configuration: what it accepts, what it refuses and how it says so."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_model
from tests.zoo import mlp
from torch import nn

from fedpara_peft import ConfigError, FedParaConfig, FedParaError


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"gamma": 1.2}, r"gamma must be in \[0, 1\], got 1.2"),
        ({"r": 0}, "positive integer value but the value passed is 0"),
        ({"rank_pattern": {"a": -1}}, "value passed is -1"),
        ({"base_weight": "dropped"}, r"base_weight must be one of .*'frozen', 'replaced'"),
        ({"parameterization": "lora"}, "parameterization must be one of"),
        ({"nonlinearity": "relu"}, "nonlinearity must be one of"),
        ({"parameterization": "lowrank", "nonlinearity": "tanh"}, "needs two halves"),
        ({"compute_path": "khatri_rao", "nonlinearity": "tanh"}, "'tanh'.*compute_path='auto'"),
        ({"bias": "lora_only"}, "bias must be one of"),
        ({"rank_dropout": 1.5}, r"rank_dropout must be in \[0, 1\]"),
        ({"init_weights": "gaussian"}, "init_weights must be True, False or one of"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "target_modules as a list"),
        ({"layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
        ({"gamma": "0.1"}, "gamma must be a finite number, got '0.1'"),
        ({"gamma": float("nan")}, "gamma must be a finite number, got nan"),
        ({"r": "8"}, "r must be an integer, got '8'"),
        ({"r": True}, "r must be an integer, got True"),
        ({"r": 8.0}, "r must be an integer, got 8.0"),
        ({"r": None}, "r must be an integer, got None"),
        ({"r": np.array([3])}, "r must be an integer"),
        ({"alpha": "16"}, "alpha must be a finite number, got '16'"),
        ({"alpha": float("inf")}, "alpha must be a finite number, got inf"),
        ({"alpha": True}, "alpha must be a finite number, got True"),
        ({"rank_dropout": "0.1"}, "rank_dropout must be a finite number"),
        ({"module_dropout": float("nan")}, "module_dropout must be a finite number"),
        ({"use_effective_conv2d": "no"}, "use_effective_conv2d must be True or False"),
        ({"base_weight": ["frozen"]}, "base_weight must be one of"),
        ({"rank_pattern": {"a": "3"}}, r"rank_pattern\['a'\] must be an integer, got '3'"),
        ({"rank_pattern": {"a": 2.5}}, r"rank_pattern\['a'\] must be an integer, got 2.5"),
        ({"rank_pattern": ["a"]}, "rank_pattern must map"),
        ({"rank_pattern": {"a[": 3}}, r"rank_pattern has 'a\[', which is neither"),
        ({"alpha_pattern": {"a": float("nan")}}, r"alpha_pattern\['a'\] must be a finite"),
        ({"alpha_pattern": {"a": None}}, r"alpha_pattern\['a'\] must be a finite"),
        ({"target_modules": 5}, "target_modules must be names or a text, got 5"),
        ({"exclude_modules": ["a", 3]}, "exclude_modules must be names"),
        ({"local_modules": [None]}, "local_modules must be names"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names, got 'head'"),
        ({"layers_to_transform": [1, "2"]}, "layers_to_transform must be an integer, got '2'"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be an integer, got '1'"),
        ({"base_weight": "replaced", "alpha": 4}, "alpha=4 has no meaning.*leave alpha out"),
        ({"base_weight": "replaced", "alpha_pattern": {"a": 2}}, "alpha_pattern=.* no meaning"),
        ({"base_weight": "replaced", "modules_to_save": ["a"]}, "trained and saved already"),
        ({"base_weight": "replaced", "bias": "all"}, "every bias is trained"),
        ({"base_weight": "replaced", "rank_dropout": 0.1}, "put nn.Dropout in the model"),
        ({"base_weight": "replaced", "init_weights": False}, "no identity to start from"),
        (
            {"base_weight": "seeded", "alpha": 4},
            "no meaning with base_weight='seeded'.*leave alpha",
        ),
        ({"base_weight": "seeded", "nonlinearity": "tanh"}, "same base on every machine"),
        ({"base_weight": "seeded", "response": 0}, "response must be positive, got 0"),
        ({"base_seed": 1.5}, "base_seed must be an integer"),
        ({"init_weights": "abba", "parameterization": "lowrank"}, "is a start of W₁ ⊙ W₂"),
        ({"init_weights": "loha", "nonlinearity": "tanh"}, "is a start of W₁ ⊙ W₂"),
        ({"use_rslora": True}, "use_rslora=True scales by alpha"),
        ({"use_rslora": 1, "alpha": 2}, "use_rslora must be True or False"),
    ],
)
def test_refusals(fields, says):
    with pytest.raises(ConfigError, match=says) as caught:
        FedParaConfig(**fields)
    assert isinstance(caught.value, FedParaError)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_numbers_and_collections_of_other_libraries_are_saved_as_pythons(tmp_path):
    config = FedParaConfig(
        r=np.int64(4), gamma=np.float32(0.25), alpha=np.float64(3), rank_pattern={"a": np.int32(2)},
        alpha_pattern={"a": np.float32(0.5)}, target_modules=("a", "b"),
        layers_to_transform=range(2),
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = FedParaConfig.from_pretrained(tmp_path)
    assert again == config
    assert (again.r, again.gamma, again.alpha) == (4, 0.25, 3.0)
    assert again.target_modules == {"a", "b"}
    assert again.layers_to_transform == [0, 1]


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("target_modules", ["0", "typo"]),
        ("exclude_modules", ["2", "typo"]),
        ("modules_to_save", ["2", "typo"]),
        ("modules_to_save", ["typo"]),
        ("local_modules", ["2", "typo"]),
    ],
)
def test_a_name_that_matches_nothing_is_named_once(field, names):
    config = FedParaConfig(**{"r": 2, "target_modules": ["0"], field: names})
    with pytest.warns(UserWarning, match=f"{field} has names that match no module: 'typo'") as seen:
        get_peft_model(mlp(norm=False), config)
    assert len(seen) == 1


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_named_once(field):
    config = FedParaConfig(r=2, target_modules=["0"], **{field: {"0": 3, "typo": 3}})
    with pytest.warns(RuntimeWarning, match=f"{field} keys did not match.*'typo'") as seen:
        get_peft_model(mlp(norm=False), config)
    assert len(seen) == 1


def test_save_and_load(tmp_path):
    config = FedParaConfig(
        gamma=0.3, base_weight="replaced", parameterization="pfedpara", nonlinearity="tanh",
        target_modules=["a", "b"], rank_pattern={"a": 5}, local_modules=["head"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "FEDPARA"
    assert FedParaConfig.from_pretrained(tmp_path) == config
    assert isinstance(PeftConfig.from_pretrained(tmp_path), FedParaConfig)


def test_the_enum_member_is_a_real_one():
    member = PeftType("FEDPARA")
    assert member is PeftType.FEDPARA
    assert member in list(PeftType)
    assert "FEDPARA" in PeftType.__members__
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert json.dumps(member) == '"FEDPARA"'
    assert {member: 1}[PeftType.FEDPARA] == 1


def test_peft_and_torch_offer_what_we_reach_into():
    """If a new version breaks one, tuner/_peft.py and tuner/kinds/recurrent.py need a look."""
    import peft.tuners.tuners_utils as utils
    from peft.tuners.mixed import model as mixed

    for name in ("_ExcludedModule", "_find_minimal_target_modules", "_is_key_under_prefixes"):
        assert hasattr(utils, name)
    assert PeftType.FEDPARA in mixed.COMPATIBLE_TUNER_TYPES
    assert "fedpara_" in mixed.PREFIXES
    rnn = nn.LSTM(2, 3)
    assert rnn._flat_weights_names[0] == "weight_ih_l0"
    assert hasattr(nn.Conv2d(1, 1, 1), "_conv_forward")


def test_abbas_start_needs_values():
    with torch.device("meta"):
        net = torch.nn.Sequential(torch.nn.Linear(16, 16))
    config = FedParaConfig(r=2, target_modules=["0"], init_weights="abba")
    with pytest.raises(ConfigError, match="the weight is on the meta device"):
        get_peft_model(net, config)
    get_peft_model(net, config, low_cpu_mem_usage=True)
