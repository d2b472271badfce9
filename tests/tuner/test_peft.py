"""What a PEFT user does: the public ways in and out, on real transformers classes."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from tests.layer_kinds import MODES, PATHS, in_turn
from tests.zoo import Net, adapted, mlp, net_inputs, randomize
from torch import nn
from torch.nn.utils import vector_to_parameters
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from fedpara_peft import (
    CheckpointError,
    ConfigError,
    FedParaConfig,
    FedParaLayer,
    ReplacedWeightError,
    TargetError,
    UnsupportedLayerError,
    UnsupportedMethodError,
    communicated_state,
    fedpara_summary,
    load_local_state,
    local_state,
)
from fedpara_peft.integrations.transformers import LocalStateCallback

IDS = torch.arange(24).reshape(2, 12) % 17


def llama(**changes):
    torch.manual_seed(0)
    config = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, **changes,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_several_adapters():
    base = llama()
    plain = logits(base)
    model = get_peft_model(base, FedParaConfig(r=2, target_modules="all-linear"), "one")
    model.add_adapter(
        "two", FedParaConfig(r=3, target_modules=["q_proj"], parameterization="lowrank")
    )
    randomize(model)
    for p in model.parameters():
        if p.dim() == 2 and not p.requires_grad and p.shape[1] == 3:
            p.data.normal_(0, 0.3)
    one = logits(model)
    model.set_adapter("two")
    two = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    assert all(not torch.allclose(a, b) for a in (one, two) for b in (plain, both))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    torch.testing.assert_close(logits(model), two, atol=1e-5, rtol=1e-4)
    assert get_model_status(model).available_adapters == ["two"]


def test_transformers_own_integration(tmp_path):
    base = llama()
    base.add_adapter(FedParaConfig(r=2, target_modules=["q_proj", "v_proj"]), "mine")
    randomize(base)
    expected = logits(base)
    base.save_pretrained(tmp_path)
    other = llama()
    other.load_adapter(str(tmp_path), "mine")
    torch.testing.assert_close(logits(other), expected, atol=0, rtol=0)
    other.disable_adapters()
    torch.testing.assert_close(logits(other), logits(llama()))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_replaced_transformers_save_load_and_stay_tied(tmp_path, build, low):
    config = FedParaConfig(
        gamma=0.1, base_weight="replaced", target_modules="all-supported", task_type="CAUSAL_LM"
    )
    model = get_peft_model(build(), config)
    assert not any("lm_head" in r.name and r.r for r in fedpara_summary(model).rows)
    randomize(model, 0.1).eval()
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT's own remarks on the embedding and on transformers
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        model.save_pretrained(tmp_path)
        fresh = build()
        fresh.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
        again = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low).eval()
    assert torch.equal(logits(again), expected)
    inner = again.get_base_model()
    tied = inner.config.tie_word_embeddings
    assert (inner.get_input_embeddings().weight is inner.get_output_embeddings().weight) == tied
    merged = again.merge_and_unload()
    assert merged.state_dict().keys() == build().state_dict().keys()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)


def test_a_tied_weight_cannot_be_replaced_by_name():
    with pytest.raises(TargetError, match="shares its weight"):
        get_peft_model(gpt2(), FedParaConfig(base_weight="replaced", target_modules=["wte"]))


def test_auto_model_generates(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    config = FedParaConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = randomize(get_peft_model(base, config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(auto), logits(model), atol=0, rtol=0)
    made = auto.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    merged = auto.merge_and_unload()
    assert torch.equal(
        made, merged.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    )


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_injection_and_state_dicts(base_weight):
    images, ids = net_inputs()
    config = FedParaConfig(r=2, target_modules="all-supported", base_weight=base_weight)
    first = randomize(inject_adapter_in_model(config, Net()).eval())
    second = Net().eval()
    if base_weight == "frozen":
        second.load_state_dict(
            {
                k.replace(".base_layer", ""): v
                for k, v in first.state_dict().items()
                if "fedpara" not in k
            }
        )
    second = inject_adapter_in_model(copy.deepcopy(config), second)
    result = set_peft_model_state_dict(second, get_peft_model_state_dict(first))
    assert not result.unexpected_keys
    assert torch.equal(second(images, ids), first(images, ids))


@pytest.mark.parametrize("bias", ["none", "all", "fedpara_only"])
def test_bias_settings(bias, tmp_path):
    plain = Net()
    images, ids = net_inputs()
    config = FedParaConfig(r=2, target_modules=["rnn", "hidden", "conv"], bias=bias)
    model = get_peft_model(copy.deepcopy(plain), config)
    biases = {n for n, p in model.named_parameters() if p.requires_grad and "fedpara" not in n}
    names = {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in biases}
    only = {
        "hidden.bias",
        "conv.bias",
        *(n for n, _ in plain.named_parameters() if "rnn.bias" in n),
    }
    assert (
        names
        == {"none": set(), "fedpara_only": only, "all": only | {"head.bias", "norm.bias"}}[bias]
    )
    randomize(model).eval()
    model.save_pretrained(tmp_path)
    plain.norm.load_state_dict(model.base_model.model.norm.state_dict())
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(again(images, ids), model(images, ids))


def test_modules_to_save_and_layers_to_transform(tmp_path):
    base = llama()
    config = FedParaConfig(
        r=2, target_modules=["q_proj"], layers_to_transform=[1], modules_to_save=["lm_head"]
    )
    model = randomize(get_peft_model(base, config))
    layers = [n for n, m in model.named_modules() if isinstance(m, FedParaLayer)]
    assert layers == ["base_model.model.model.layers.1.self_attn.q_proj"]
    assert len(communicated_state(model)) == 5
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model.eval()), atol=0, rtol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = llama()
        config = FedParaConfig(r=2, target_modules="all-linear", compute_path="khatri_rao")
        model = randomize(get_peft_model(model, config))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", ["compose", "khatri_rao"])
def test_bfloat16_base_and_autocast(path):
    plain = llama().to(torch.bfloat16)
    config = FedParaConfig(r=3, target_modules="all-linear", compute_path=path)
    model = randomize(get_peft_model(copy.deepcopy(plain), config), 0.4).eval()
    factors = [p for n, p in model.named_parameters() if "fedpara_" in n]
    assert {p.dtype for p in factors} == {torch.float32}
    exact = copy.deepcopy(model).double()
    difference = (logits(model).double() - logits(exact)).norm() / logits(exact).norm()
    assert logits(model).dtype == torch.bfloat16
    assert difference < 0.03
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in factors)
    single = copy.deepcopy(exact).float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = single(input_ids=IDS, labels=IDS)
    mixed.loss.backward()
    difference = (mixed.logits.double() - logits(exact)).norm() / logits(exact).norm()
    assert difference < 0.03


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_copy_pickle_and_dtype(base_weight):
    images, ids = net_inputs()
    model = randomize(adapted(Net(), base_weight=base_weight)).eval()
    with torch.no_grad():
        expected = model(images, ids)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images, ids), expected)
        wide = copy.deepcopy(model).double()
        torch.testing.assert_close(
            wide(images.double(), ids).float(), expected, atol=1e-4, rtol=1e-4
        )
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(model(images, ids), expected)


@pytest.mark.parametrize(
    ("kind", "path", "base_weight"), in_turn(["linear", "conv"], PATHS, by=MODES)
)
def test_compile_without_graph_breaks(base_weight, path, kind):
    torch.compiler.reset()
    if kind == "linear":
        model, x = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24)), (5, 16)
    else:
        first = nn.Conv2d(16, 24, 3, padding=1, padding_mode="reflect")
        model, x = nn.Sequential(first, nn.ReLU(), nn.Conv2d(24, 24, 1)), (2, 16, 6, 6)
    config = FedParaConfig(
        r=2, target_modules=["0", "2"], base_weight=base_weight, compute_path=path
    )
    model = randomize(get_peft_model(model, config))
    x = torch.randn(x)
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(x).sum().backward()
    for a, p in zip(grads, (p for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(a, p.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_mixed_with_lora():
    x = torch.randn(3, 16)
    plain = mlp(norm=False)
    model = get_peft_model(
        copy.deepcopy(plain), LoraConfig(r=2, target_modules=["0", "2"]), "first", mixed=True
    )
    assert isinstance(model, PeftMixedModel)
    model.add_adapter("ours", FedParaConfig(r=2, target_modules=["0", "4"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora" in n or "fedpara" in n:
                p.normal_(0, 0.3)
    model.set_adapter(["first", "ours"])
    both = model(x)
    model.set_adapter("ours")
    ours = model(x)
    assert not torch.allclose(both, ours)
    model.set_adapter(["first", "ours"])
    torch.testing.assert_close(model.merge_and_unload()(x), both, atol=1e-5, rtol=1e-4)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids = (torch.arange(10) * (i + 1)) % 61
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_transformers_trainer_resumes_exactly(tmp_path, base_weight):
    def train(folder, steps, resume=None):
        torch.manual_seed(3)
        config = FedParaConfig(
            r=2, target_modules="all-linear", base_weight=base_weight, task_type="CAUSAL_LM"
        )
        model = get_peft_model(llama(), config)
        args = TrainingArguments(
            str(folder), max_steps=steps, save_steps=3, per_device_train_batch_size=4, seed=1,
            learning_rate=0.01, report_to="none", use_cpu=True, disable_tqdm=True,
            logging_strategy="no", lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=Rows())
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(tmp_path / "a", 6)
    resumed = train(tmp_path / "b", 6, str(tmp_path / "a" / "checkpoint-3"))
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_inference_follows_every_change_of_the_factors():
    config = FedParaConfig(r=2, target_modules=["0"], compute_path="khatri_rao")
    model = randomize(get_peft_model(nn.Sequential(nn.Linear(12, 9)), config)).eval()
    layer = model.base_model.model[0]

    def check():
        weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
        for x in (torch.randn(2, 12), torch.randn(40, 12)):
            expected = nn.functional.linear(x, weight, layer.get_base_layer().bias)
            with torch.no_grad():
                torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)

    check()
    layer.fedpara_w2_y["default"]["weight"].data.add_(0.5)
    check()
    layer.set_scale("default", 3.0)
    check()
    state = {k: v + 0.25 for k, v in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)
    check()
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):  # between two forward passes
        vector_to_parameters(torch.randn(sum(p.numel() for p in trained)) * 0.3, trained)
    check()
    layer.fedpara_w1_x["default"]["weight"] = nn.Parameter(torch.randn(9, 2))
    check()
    model.merge_adapter()
    model.unmerge_adapter()
    check()


def personal(**config):
    return adapted(mlp(norm=False), parameterization="pfedpara", **config)


@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_loading_a_shared_half_keeps_a_trained_personal_one(tmp_path, base_weight):
    model = personal(base_weight=base_weight)
    model.save_pretrained(tmp_path / "fresh")
    model(torch.randn(3, 16)).sum().backward()  # it has been trained
    randomize(model)
    kept = {k: v.clone() for k, v in local_state(model).items()}
    model.load_adapter(tmp_path / "fresh", "default")
    set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    assert kept
    assert all(torch.equal(v, kept[k]) for k, v in local_state(model).items())
    again = personal(base_weight=base_weight)
    load_local_state(again, kept)
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert all(torch.equal(v, kept[k]) for k, v in local_state(again).items())


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_half_a_model_loads_without_a_warning_and_is_neutral(tmp_path, base_weight, low):
    plain = mlp(norm=False)
    config = FedParaConfig(
        r=3, base_weight=base_weight, parameterization="pfedpara", target_modules=["0", "2"]
    )
    model = randomize(get_peft_model(copy.deepcopy(plain), config))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = PeftModel.from_pretrained(
            copy.deepcopy(plain), tmp_path, is_trainable=True, low_cpu_mem_usage=low
        )
    with torch.no_grad():
        for name, tensor in local_state(model).items():
            tensor.zero_()
            assert name in local_state(half)
    x = torch.randn(4, 16)
    torch.testing.assert_close(half(x), model(x))
    half(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in half.named_parameters() if "w2_x" in n)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_local_state_callback_makes_resuming_exact(tmp_path):
    def train(folder, resume=None):
        torch.manual_seed(3)
        config = FedParaConfig(r=2, parameterization="pfedpara", target_modules="all-linear")
        model = get_peft_model(llama(), config)
        args = TrainingArguments(
            str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, seed=1,
            learning_rate=0.01, report_to="none", use_cpu=True, disable_tqdm=True,
            logging_strategy="no", lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=Rows(), callbacks=[LocalStateCallback()])
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-2").rename(tmp_path / "b" / "checkpoint-2")
    resumed = train(tmp_path / "b", str(tmp_path / "b" / "checkpoint-2"))
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def bert(labels=3):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=64, num_labels=labels,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("local", [None, ["classifier"]])
@pytest.mark.parametrize("base_weight", ["frozen", "replaced"])
def test_classification_heads_save_load_and_may_stay_local(tmp_path, base_weight, local):
    config = FedParaConfig(
        r=2, base_weight=base_weight, target_modules=["query", "value"], task_type="SEQ_CLS",
        local_modules=local,
    )  # fmt: skip
    model = randomize(get_peft_model(bert(), config)).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    written = (tmp_path / "adapter_model.safetensors").read_bytes()
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    assert (head.detach().numpy().tobytes() in written) == (local is None)
    again = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True).eval()
    assert torch.allclose(logits(again), expected) == (local is None)
    if local:
        load_local_state(again, local_state(model))
        torch.testing.assert_close(logits(again), expected, atol=0, rtol=0)


def test_a_module_of_the_adapters_name_and_other_adapter_names(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.default = nn.Linear(16, 16)
            self.fedpara_x = nn.Linear(16, 4)

        def forward(self, x):
            return self.fedpara_x(self.default(x))

    x = torch.randn(2, 16)
    config = FedParaConfig(r=2, base_weight="replaced", target_modules=["default"])
    model = randomize(get_peft_model(Odd(), config, "default"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Odd(), tmp_path, "other")
    assert torch.equal(again(x), model(x))


def test_half_precision_models_train_with_replaced_weights():
    for dtype in (torch.bfloat16, torch.float16):
        model = adapted(Net().to(dtype), target_modules=["conv", "embed", "hidden"])
        assert {p.dtype for p in model.parameters()} == {dtype}
        images, ids = net_inputs()
        assert model(images.to(dtype), ids).dtype == dtype
    model = adapted(mlp(norm=False), compute_path="khatri_rao")
    with torch.autocast("cpu", torch.float16):
        assert model(torch.randn(2, 16)).dtype == torch.float16


def test_per_sample_gradients():
    config = FedParaConfig(r=2, target_modules=["0"], compute_path="khatri_rao")
    model = randomize(get_peft_model(nn.Sequential(nn.Linear(6, 5)), config))
    x = torch.randn(3, 6)
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(values, row):
        return torch.func.functional_call(model, values, (row[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    model(x).square().sum().backward()
    for name, p in values.items():
        torch.testing.assert_close(per_sample[name].sum(0), p.grad)


# What is refused.


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_layers_that_do_not_use_their_weight_as_it_is():
    class Positions(nn.Embedding):
        def forward(self, ids):
            return super().forward(torch.arange(ids.shape[1]))

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    old = nn.utils.weight_norm(nn.Linear(16, 16))
    for module in (Positions(9, 16), normed, old):
        with pytest.raises(UnsupportedLayerError, match="does not use its weight as it is"):
            get_peft_model(nn.Sequential(module), FedParaConfig(target_modules=["0"]))
    model = nn.Sequential(Doubled(16, 16))
    with pytest.raises(UnsupportedLayerError, match="a forward of its own"):
        get_peft_model(model, FedParaConfig(base_weight="replaced", r=2, target_modules=["0"]))
    x = torch.randn(2, 16)
    expected = model(x)
    frozen = get_peft_model(model, FedParaConfig(target_modules=["0"]))
    torch.testing.assert_close(frozen(x), expected)
    with pytest.raises(ConfigError, match="PeftMixedModel"):
        get_peft_model(
            mlp(), FedParaConfig(base_weight="replaced", target_modules=["0"]), mixed=True
        )


def test_refusals_of_targets_leave_the_model_untouched():
    model = nn.Sequential(
        nn.Linear(16, 16), nn.ConvTranspose1d(4, 4, 3), nn.MultiheadAttention(8, 2)
    )
    before = [type(m) for m in model.modules()]
    for targets, error, says in (
        (["nothing"], TargetError, r"not found in the base model.*can be factorized: 0"),
        (["0", "1"], UnsupportedLayerError, "transposed convolutions"),
        (["0", "2"], UnsupportedLayerError, "FedPara has no form for it"),
        (["0", "2.out_proj"], UnsupportedLayerError, "MultiheadAttention reads the weight"),
    ):
        with pytest.raises(error, match=says):
            get_peft_model(model, FedParaConfig(r=2, target_modules=targets))
        assert [type(m) for m in model.modules()] == before
    with pytest.raises(TargetError, match="lower r, or set gamma"):
        get_peft_model(model, FedParaConfig(r=16, base_weight="replaced", target_modules=["0"]))
    with pytest.raises(TargetError, match="found no layer that can be factorized"):
        get_peft_model(nn.Sequential(nn.ReLU()), FedParaConfig(target_modules="all-supported"))
    bounded = nn.Sequential(nn.Embedding(40, 16, max_norm=1.0))
    with pytest.raises(UnsupportedLayerError, match="build the embedding without max_norm"):
        get_peft_model(bounded, FedParaConfig(base_weight="replaced", target_modules=["0"]))


@pytest.mark.parametrize("parameterization", ["fedpara", "lowrank"])
def test_a_low_rank_form_that_a_grouped_convolution_has_not(parameterization):
    config = FedParaConfig(
        r=2, parameterization=parameterization, target_modules=["0", "1"], compute_path="khatri_rao"
    )
    for build in (get_peft_model, lambda *a: get_peft_model(*a, mixed=True)):
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
        with pytest.raises(ConfigError, match=r"1 has groups=2.*compute_path='auto'"):
            build(model, config)
        assert type(model[1]) is nn.Conv2d
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ConfigError):
        get_peft_model(model, config)
    assert type(model[0]) is nn.Conv2d  # nothing was changed


def test_refusals_of_replaced_mode_name_the_alternative():
    images, ids = net_inputs()
    model = randomize(adapted(Net())).eval()
    expected = model(images, ids)
    layer = model.base_model.model.hidden
    for call, says in (
        (lambda: model.add_adapter("b", FedParaConfig(target_modules=["hidden"])), "one adapter"),
        (lambda: model.unload(), r"use merge_and_unload\(\)"),
        (lambda: model.base_model.disable_adapter_layers(), "build the plain model"),
        (lambda: model.delete_adapter("default"), r"use merge_and_unload\(\)"),
        (lambda: layer.set_scale("default", 2.0), "no W₀"),
    ):
        with pytest.raises(ReplacedWeightError, match=says):
            call()
    assert torch.equal(model(images, ids), expected)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    config = FedParaConfig(r=3, base_weight="replaced", target_modules=["0"])
    get_peft_model(nn.Sequential(nn.Linear(16, 16)), config).save_pretrained(tmp_path)
    other = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    with pytest.raises(CheckpointError, match=r"lacks 5 of the model's tensors.*1.weight"):
        PeftModel.from_pretrained(other, tmp_path)


def test_unmerging_twice_warns_and_safe_merge_refuses_nan():
    model = randomize(adapted(mlp(), base_weight="frozen"))
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.base_model.model[0].unmerge()
    with torch.no_grad():
        model.base_model.model[0].fedpara_w1_x["default"]["weight"][0, 0] = float("nan")
    before = model.base_model.model[0].get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model[0].get_base_layer().weight, before)


def test_what_only_lora_has_in_peft_is_said_of_fedpara(tmp_path):
    config = FedParaConfig(r=2, target_modules=["0"])
    model = get_peft_model(mlp(norm=False), config)
    model.save_pretrained(tmp_path)
    for call, says in (
        (
            lambda: model.add_weighted_adapter(["default"], [1.0], "c"),
            "FedPara has no add_weighted",
        ),
        (lambda: hotswap_adapter(model, tmp_path, "default"), r"not hot-swapped.*load_adapter"),
    ):
        with pytest.raises(UnsupportedMethodError, match=says):
            call()
    assert not hasattr(model, "add_weighted_adapter")
    with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'nothing'"):
        _ = model.nothing
    status = get_layer_status(model)
    assert [layer.available_adapters for layer in status] == [["default"]]
    # What the errors advise instead of merging and swapping:
    randomize(model)
    model.add_adapter("other", copy.deepcopy(config))
    model.base_model.set_adapter(["default", "other"])
    model.load_adapter(tmp_path, "default")
    x = torch.randn(3, 16)
    torch.testing.assert_close(model(x), mlp(norm=False)(x))


def test_rescale_adapter_scale():
    x = torch.randn(3, 16)
    model = randomize(get_peft_model(mlp(norm=False), FedParaConfig(r=2, target_modules=["0"])))
    layer = model.base_model.model[0]
    base, whole = layer.base_layer(x), layer(x)
    with rescale_adapter_scale(model, 0.25):
        torch.testing.assert_close(layer(x), base + 0.25 * (whole - base), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer(x), whole)
    replaced = adapted(mlp(norm=False))
    with (
        pytest.raises(ReplacedWeightError, match="no W₀ to scale against"),
        rescale_adapter_scale(replaced, 0.5),
    ):
        pass
    lora = get_peft_model(mlp(norm=False), LoraConfig(target_modules=["0"]))
    with rescale_adapter_scale(lora, 0.5):
        assert lora.base_model.model[0].scaling == {"default": 0.5}
