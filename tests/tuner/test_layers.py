"""Every layer kind: merge is forward, saving is exact, gradients are the composed weight's."""

import copy
import itertools
import warnings

import pytest
import torch
from benchmarks.measure import peak_bytes
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from tests.layer_kinds import (
    FORMS,
    KINDS,
    MODES,
    PATHS,
    Holder,
    build,
    has_path,
    in_turn,
    inputs,
    plain_state,
    twin,
)
from tests.zoo import randomize
from torch import nn

from fedpara_peft import FedParaConfig, FedParaLayer, UnsupportedLayerError, fedpara_summary
from fedpara_peft.maths.compose import compose

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.06}
CASES = st.tuples(
    st.sampled_from(list(KINDS)), st.sampled_from(MODES), st.sampled_from(FORMS),
    st.sampled_from(list(TOLERANCE)), st.integers(0, 3), st.booleans(),
    st.sampled_from(PATHS),
)  # fmt: skip


def close(a, b, dtype):
    scale = b.double().abs().max().clamp(min=1)
    assert ((a - b).double().abs().max() / scale) < TOLERANCE[dtype]


@given(CASES)
def test_merge_is_forward_and_unmerge_undoes_it(case):
    kind, mode, form, dtype, seed, effective, path = case
    assume(has_path(kind, form, path))
    model = build(kind, mode, form, dtype, seed, use_effective_conv2d=effective, compute_path=path)
    x = inputs(kind, dtype)
    expected = model(x)
    weights = copy.deepcopy(model.state_dict())
    model.merge_adapter(safe_merge=bool(seed % 2))
    close(model(x), expected, dtype)
    model.unmerge_adapter()
    close(model(x), expected, dtype)
    assert model.state_dict().keys() == weights.keys()
    merged = model.merge_and_unload()
    assert type(merged.layer) is type(Holder(kind).layer)
    assert merged.state_dict().keys() == Holder(kind).state_dict().keys()
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in Holder(kind).state_dict().items()
    }
    close(merged(x), expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_into_another_seed_is_exact(kind, mode, dtype, tmp_path):
    for form in FORMS:
        if form[0] == "pfedpara":
            continue  # only half of it is saved; see tests/comm/test_state.py
        model = build(kind, mode, form, dtype)
        x = inputs(kind, dtype)
        model.save_pretrained(tmp_path)
        torch.manual_seed(99)
        plain = Holder(kind).to(dtype)
        if mode == "frozen":
            plain.load_state_dict(plain_state(model))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for low in (False, True):
                again = PeftModel.from_pretrained(
                    copy.deepcopy(plain),
                    tmp_path,
                    low_cpu_mem_usage=low,
                    autocast_adapter_dtype=False,
                )
                assert torch.equal(again.eval()(x), model(x)), (form, low)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_starts_as_the_identity(kind):
    for form in FORMS:
        torch.manual_seed(0)
        plain = Holder(kind)
        x = inputs(kind)
        expected = plain(x)
        config = FedParaConfig(
            r=2, target_modules=["layer"], parameterization=form[0], nonlinearity=form[1]
        )
        model = get_peft_model(plain, config)
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=0)
        model(x).square().sum().backward()
        moving = [
            n for n, p in model.named_parameters() if p.requires_grad and p.grad.abs().sum() > 0
        ]
        assert moving, form
        random = FedParaConfig(
            r=2, target_modules=["layer"], parameterization=form[0], init_weights=False
        )
        other = get_peft_model(Holder(kind), random)
        assert not torch.allclose(other(x), expected)


@pytest.mark.parametrize(
    ("kind", "path", "effective", "mode"), in_turn(KINDS, PATHS, [True, False])
)
def test_gradients_are_the_composed_weights(kind, mode, path, effective):
    """float64 autograd of the plain layer with W composed in the open gives the same gradients."""
    for form in FORMS:
        if not has_path(kind, form, path):
            continue
        extra = {"use_effective_conv2d": effective, "compute_path": path}
        model = build(kind, mode, form, torch.float64, **extra)
        x = inputs(kind, torch.float64)
        seen = x.clone().requires_grad_(x.is_floating_point())
        model(seen).square().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if "fedpara_" in n}
        model.zero_grad()
        x = x.clone().requires_grad_(x.is_floating_point())
        expected = twin(model, kind)(x)
        torch.testing.assert_close(model(x), expected)
        expected.square().sum().backward()
        for n, p in model.named_parameters():
            if "fedpara_" in n:
                torch.testing.assert_close(grads[n], p.grad, msg=f"{form} {n}")
        torch.testing.assert_close(seen.grad, x.grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["fedpara", "pfedpara", "lowrank"])
@pytest.mark.parametrize("effective", [True, False])
def test_the_convolutions_low_rank_form_is_differentiable_twice(name, mode, effective):
    config = FedParaConfig(
        r=2, base_weight=mode, parameterization=name, target_modules=["0"],
        use_effective_conv2d=effective, compute_path="khatri_rao",
    )  # fmt: skip
    plain = nn.Sequential(nn.Conv2d(6, 7, (2, 1), padding=(1, 0), padding_mode="circular")).double()
    model = randomize(get_peft_model(plain, config, autocast_adapter_dtype=False))
    layer = model.base_model.model[0]
    factors = {n: p for n, p in layer.named_parameters() if "fedpara_" in n}
    x = torch.randn(1, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert layer._takes_form(x, "default", joined=False)

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(factors, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *factors.values()))
    assert torch.autograd.gradgradcheck(function, (x, *factors.values()))


def test_which_way_convolutions_go():
    """The core of the form has r⁴ entries a kernel position, whatever the channels."""

    def takes_form(channels, r, size=32, batch=1, kernel=3, **options):
        config = FedParaConfig(r=r, target_modules=["0"])
        layer = nn.Sequential(nn.Conv2d(channels, channels, kernel, padding="same", **options))
        layer = get_peft_model(layer, config).base_model.model[0]
        x = torch.empty(batch, channels, size, size)
        return layer._takes_form(x, "default", joined=True)

    assert not takes_form(64, r=8)  # 45,056 entries for a weight of 36,864
    assert takes_form(320, r=8)  # 77,824 for 921,600
    assert takes_form(64, r=2)
    assert not takes_form(320, r=16)  # 753,664: six products with it outweigh two with the weight
    assert takes_form(320, r=4, kernel=1)
    assert not takes_form(320, r=8, groups=2)


@pytest.mark.parametrize("mode", MODES)
def test_merging_makes_no_temporary_of_the_weights_size(mode):
    config = FedParaConfig(r=2, base_weight=mode, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(4096, 8192, bias=False)), config)
    layer = model.base_model.model[0]
    own = 4 * 4096 * 8192
    made = own if mode == "replaced" else 0  # the weight itself
    factors = list(model.parameters())
    assert peak_bytes(layer.merge, factors) < made + own / 4
    assert peak_bytes(layer.unmerge, factors) < own / 4


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_weights_start_with_the_documented_variance(kind):
    for form in FORMS:
        squares = []
        for seed in range(60):
            torch.manual_seed(seed)
            config = FedParaConfig(
                r=2, target_modules=["layer"], base_weight="replaced",
                parameterization=form[0], nonlinearity=form[1],
            )  # fmt: skip
            layer = get_peft_model(Holder(kind), config).base_model.model.layer
            name = next(iter(layer.specs["default"].plans))
            weight = layer.get_delta_weight("default", name).detach()
            if kind == "embedding padded":
                weight = weight[3:]
            squares.append(float(weight.square().mean()))
        target = {
            "linear": 2 / 12, "linear without bias": 2 / 12, "Conv1D": 2 / 12, "conv1d": 2 / 36,
            "conv2d": 2 / 108, "conv2d 1x1": 2 / 24, "conv2d groups": 2 / 108,
            "conv2d all options": 2 / 72, "conv2d circular": 2 / 108, "conv2d unbatched": 2 / 108,
            "conv3d": 2 / 72, "embedding": 1.0, "embedding padded": 1.0, "lstm": 1 / 30,
            "gru": 1 / 30, "rnn": 1 / 48,
        }[kind]  # fmt: skip
        if form[1] == "tanh":
            target = min(target, 0.25)
        mean = torch.tensor(squares)
        error = 4 * mean.std() / len(squares) ** 0.5
        assert abs(mean.mean() - target) < error + 0.02 * target, form


RNN_OPTIONS = [
    (
        cls,
        dict(
            zip(("num_layers", "bidirectional", "batch_first", "bias"), flags, strict=True), **extra
        ),
    )
    for cls in (nn.LSTM, nn.GRU, nn.RNN)
    for flags in itertools.product((1, 2), (False, True), (False, True), (False, True))
    for extra in ([{}, {"proj_size": 5}] if cls is nn.LSTM else [{}])
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["padded", "packed", "unbatched", "with state"])
@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's own choice of kernel
def test_recurrent_layers_equal_the_stock_module_bit_for_bit(how, mode):
    for cls, options in RNN_OPTIONS:
        torch.manual_seed(0)
        plain = nn.Sequential(cls(9, 12, **options))
        config = FedParaConfig(r=2, target_modules=["0"], base_weight=mode)
        model = randomize(get_peft_model(plain, config)).eval()
        x = torch.randn(4, 4, 9)
        args = ()
        if how == "packed":
            x = nn.utils.rnn.pack_padded_sequence(
                x, torch.tensor([4, 3, 1, 1]), batch_first=options["batch_first"]
            )
        elif how == "unbatched":
            x = x[0]
        layer = model.base_model.model[0]
        if how == "with state":
            hidden = layer(x)[1]
            args = (hidden,)
        ours = layer(x, *args)
        # Torch picks another kernel where no gradient is needed.
        stock = model.merge_and_unload()[0].requires_grad_()
        assert type(stock) is cls
        for a, b in zip(flat(ours), flat(stock(x, *args)), strict=True):
            assert torch.equal(a, b), (cls, options)


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in (flat(part) if part is not None else [])]


def test_recurrent_layers_keep_what_models_ask_of_them():
    model = build("lstm", "frozen", ("fedpara", None))
    layer = model.base_model.model.layer
    layer.flatten_parameters()
    assert (layer.hidden_size, layer.bias, layer.num_layers) == (10, True, 2)
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing
    x = inputs("lstm")
    model.train()
    model(x).sum().backward()
    base = layer.get_base_layer()  # its list of weights is as it was
    for name, weight in zip(base._flat_weights_names, base._flat_weights, strict=True):
        assert weight is getattr(base, name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_answers_for_what_models_read_of_the_plain_one(kind, mode):
    """Whisper asks its convolutions for their stride, others an embedding for its padding row."""
    plain = KINDS[kind][0]()
    layer = build(kind, mode, ("fedpara", None)).base_model.model.layer
    for name in getattr(plain, "__constants__", ()):
        assert getattr(layer, name) == getattr(plain, name)


@pytest.mark.parametrize("mixed", [{}, {"adapter_names": ["default"] * 3}])
def test_a_layer_that_returns_no_tensor_is_refused(mixed):
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).topk(2)

    config = FedParaConfig(r=2, target_modules=["0"])
    model = get_peft_model(nn.Sequential(Router(12, 20)), config).eval()
    with pytest.raises(UnsupportedLayerError, match="Router returns a topk, to which no ΔW"):
        model(torch.randn(3, 12), **mixed)


def test_a_recurrent_layer_composes_once_a_forward(monkeypatch):
    import fedpara_peft.tuner.layer.base as module

    calls = []
    monkeypatch.setattr(module, "compose", lambda *a, **k: calls.append(1) or compose(*a, **k))
    model = build("lstm", "replaced", ("fedpara", None))
    model(torch.randn(50, 2, 12))
    assert len(calls) == 4  # two layers, input and hidden


@pytest.mark.parametrize("mode", MODES)
def test_rank_pattern_alpha_pattern_and_gamma(mode):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    extra = {"alpha": 6.0, "alpha_pattern": {"1": 10.0}} if mode == "frozen" else {}
    config = FedParaConfig(
        gamma=0.25, rank_pattern={"1": 5}, target_modules=["0", "1", "2"], base_weight=mode, **extra
    )
    layers = get_peft_model(model, config).base_model.model
    assert layers[0].r == {"default": 10}  # ⌈0.75 · 8 + 0.25 · 16⌉
    assert layers[1].r == {"default": 5}
    if mode == "frozen":
        assert layers[0].scaling["default"] == 0.6
        assert layers[1].scaling["default"] == 2.0
        assert layers[2].r == {"default": 1}
    else:
        assert type(layers[2]) is nn.Linear  # r_max = 0 < r_min = 2: stays dense


def test_a_layer_that_saves_nothing_stays_dense_and_shows():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    adapted = get_peft_model(
        model, FedParaConfig(gamma=0.0, base_weight="replaced", target_modules="all-supported")
    )
    text = str(fedpara_summary(adapted))
    assert "Linear, dense" in text
    assert adapted.get_nb_trainable_parameters() == (64 + 2 * 8 * 128 + 130,) * 2
    assert fedpara_summary(adapted).parameters == 64 + 2 * 8 * 128 + 130


def test_summary_shows_both_unfoldings():
    model = nn.Sequential(nn.Conv2d(64, 128, 3))
    adapted = get_peft_model(
        model, FedParaConfig(gamma=0.0, base_weight="replaced", target_modules=["0"])
    )
    row = fedpara_summary(adapted).rows[0]
    assert (row.r, row.reachable) == (8, "64/128, 64/64")


def test_dropouts_are_right_in_the_mean_and_when_all_rows_drop():
    for kind in ("linear", "conv2d", "embedding", "lstm"):
        plain = build(kind, "frozen", ("fedpara", None))
        x = inputs(kind)
        expected = plain(x)
        for name in ("rank_dropout", "module_dropout"):
            dropping = build(kind, "frozen", ("fedpara", None), **{name: 1.0})
            dropping.train()
            with dropping.disable_adapter():
                base = dropping(x)
            assert torch.equal(dropping(x), base)  # all rows dropped: no NaN
            assert torch.allclose(dropping.eval()(x), expected, atol=1e-6)
    model = build("linear", "frozen", ("fedpara", None), rank_dropout=0.4).train()
    x = inputs("linear")
    mean = torch.stack([model(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, model.eval()(x), atol=0.3, rtol=0.1)


def test_replaced_mode_frees_the_dense_weight():
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])
    before = sum(p.numel() for p in model.parameters())
    names = ["0", "1", "2", "3"]
    config = FedParaConfig(gamma=0.0, base_weight="replaced", target_modules=names)
    adapted = get_peft_model(model, config)
    after = sum(p.numel() for p in adapted.parameters())
    assert after == 4 * (2 * 23 * 1024 + 512) < 0.19 * before
    assert all(m.get_base_layer()._parameters["weight"] is None for m in adapted.base_model.model)
    assert adapted.base_model.model[0].weight.shape == (512, 512)  # composed on demand


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_says_whose_it_is(name):
    build, _ = KINDS[name]
    model = get_peft_model(nn.Sequential(build()), FedParaConfig(r=2, target_modules=["0"]))
    (status,) = model.get_layer_status()
    layer = model.base_model.model[0]
    assert status.module_type == f"fedpara.{type(layer).__name__}"
    assert repr(layer).startswith("fedpara.")


def test_nothing_of_ours_is_hidden_by_torchs_module():
    """The parts of a layer stand behind ``nn.Module``, whose methods go before theirs."""
    classes = FedParaLayer.__mro__
    behind = [c for c in classes[classes.index(nn.Module) + 1 :] if c.__module__.startswith("fedp")]
    assert behind
    for part in behind:
        hidden = {n for n in vars(part) if callable(getattr(part, n)) and n in vars(nn.Module)}
        assert not hidden - {"__init__", "__getattr__"}, (part, hidden)


@pytest.mark.parametrize("base", ["frozen", "replaced"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize(
    "build", [lambda: nn.Embedding(9, 4), lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 1)]
)
def test_nothing_in_is_nothing_out(build, shape, grad, base):
    """An empty shard, or a prompt without a token."""
    net = build()
    config = FedParaConfig(r=1, target_modules=["0"], base_weight=base, init_weights=True)
    model = get_peft_model(nn.Sequential(copy.deepcopy(net)), config)
    if isinstance(net, nn.Embedding):
        x = torch.zeros(shape, dtype=torch.long)
    else:
        x = torch.zeros(*shape, 4) if isinstance(net, nn.Linear) else torch.zeros(0, 4, 5)
    with torch.set_grad_enabled(grad):
        assert model(x).shape == net(x).shape
