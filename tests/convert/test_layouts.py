"""Files of other programs, each against that program's own forward pass, at random factors."""

import contextlib
import copy
import io
import logging

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.convert.written import (
    NAMES,
    batch,
    block,
    close,
    dense,
    loha_factors,
    with_weights,
    write_loha,
)
from torch import nn

from fedpara_peft import ConversionError, LayoutError, convert_adapter
from fedpara_peft.maths.compose import Half, compose


def lycoris_of(model, **options):
    """LyCORIS's own network on the model, at random factors; the model runs through it."""
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    for name in ("LyCORIS", "lycoris"):
        logging.getLogger(name).setLevel(logging.ERROR)
    kinds = ["Linear", "Conv1d", "Conv2d", "Conv3d"]
    lycoris.LycorisNetwork.apply_preset({"target_module": kinds, "lora_prefix": "lycoris"})
    options = {"linear_dim": 3, "linear_alpha": 5, "conv_dim": 2, "conv_alpha": 3, **options}
    network = lycoris.create_lycoris(model, 1.0, warn_on_unmatched=False, **options)
    network.apply_to()
    torch.manual_seed(11)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.6)
    return network.eval()


def from_lycoris(path, dims=2, **options):
    """A file that LyCORIS saved, and what its own forward pass gives."""
    model = block(dims)
    network = lycoris_of(model, **{"algo": "loha", **options})
    network.save_weights(str(path), options.pop("dtype", None), {"ss_output_name": "a style"})
    return model(batch(dims))


def from_keys(prefix, underscored, *, alpha=5.0, dtype=torch.float32, tucker=True):
    """A file by a layout's published formula, and the model with ΔW added in float64."""

    def write(path, dims=2):
        generator, layers, alphas, deltas = torch.Generator().manual_seed(3), {}, {}, {}
        for name in NAMES:
            weight = block(dims).get_submodule(name).weight
            m, n, *kernel = weight.shape
            if set(kernel) == {1} or not tucker:
                n, kernel = n * weight[0, 0].numel(), ()
            own = loha_factors(m, n, 3, tuple(kernel), generator=generator, dtype=dtype)
            key = prefix + (name.replace(".", "_") if underscored else name)
            layers[key], alphas[key] = own, alpha
            deltas[name] = dense(own, 3.0 if alpha is None else alpha)
        write_loha(path, layers, alphas, {"ss_output_name": "a style"})
        return with_weights(block(dims), deltas)(batch(dims))

    return write


def from_peft(path, dims=2):
    """PEFT's own LoHa; its alphas are in the configuration."""
    config = LoHaConfig(
        r=3, alpha=5, rank_pattern={"conv_1": 2}, alpha_pattern={"to_q": 1}, init_weights=False,
        use_effective_conv2d=True, target_modules=list(NAMES),
    )  # fmt: skip
    torch.manual_seed(4)
    model = get_peft_model(block(dims), config).eval()
    for name, parameter in model.named_parameters():
        if "hada" in name:
            nn.init.normal_(parameter, std=0.6)
    model.save_pretrained(path.parent / "loha")
    return model(batch(dims))


#: layout: (who writes it, dimensions of the convolutions, where the adapter is)
LAYOUTS = {
    "LyCORIS linear and Tucker": (lambda p: from_lycoris(p, use_tucker=True), 2),
    "LyCORIS kernels as matrices": (from_lycoris, 2),
    "LyCORIS Conv1d, Tucker": (lambda p: from_lycoris(p, 1, use_tucker=True), 1),
    "LyCORIS Conv1d as matrices": (lambda p: from_lycoris(p, 1), 1),
    "LyCORIS Conv3d, Tucker": (lambda p: from_lycoris(p, 3, use_tucker=True), 3),
    "LyCORIS rank-stabilized": (lambda p: from_lycoris(p, rs_lora=True), 2),
    "LyCORIS with a scalar": (lambda p: from_lycoris(p, use_scalar=True), 2),
    "LyCORIS LoCon": (lambda p: from_lycoris(p, algo="locon"), 2),
    "LyCORIS LoCon, Tucker": (lambda p: from_lycoris(p, algo="locon", use_tucker=True), 2),
    "kohya lora_unet_": (from_keys("lora_unet_", True), 2),
    "kohya lora_te_": (from_keys("lora_te_", True, tucker=False), 2),
    "kohya lora_te1_": (from_keys("lora_te1_", True), 2),
    "kohya lora_te2_": (from_keys("lora_te2_", True), 2),
    "ComfyUI diffusion_model.": (from_keys("diffusion_model.", False), 2),
    "diffusers unet.": (from_keys("unet.", False), 2),
    "module paths": (from_keys("", False), 2),
    "module paths without alpha": (from_keys("", False, alpha=None), 2),
    "PEFT's keys alone": (from_keys("base_model.model.", False, alpha=None), 2),
    "PEFT's folder": (from_peft, 2),
    "PEFT's folder, Conv1d": (lambda p: from_peft(p, 1), 1),
    "float16": (from_keys("lora_unet_", True, dtype=torch.float16), 2),
    "bfloat16": (from_keys("lora_unet_", True, dtype=torch.bfloat16), 2),
}


def written(layout, tmp_path):
    write, dims = LAYOUTS[layout]
    torch.manual_seed(0)
    path = tmp_path / "x.bin.safetensors"  # the file's name says nothing
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        wanted = write(path)
    return (tmp_path / "loha" if layout.startswith("PEFT's folder") else path), dims, wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_as_lora_is_what_its_writer_computes(tmp_path, layout):
    source, dims, wanted = written(layout, tmp_path)
    done = convert_adapter(source, tmp_path / "lora", "lora", base=block(dims))
    assert {layer.name for layer in done.layers} == set(NAMES)
    again = PeftModel.from_pretrained(block(dims), tmp_path / "lora").eval()
    # The factors of a half-precision file are rounded once more where they are multiplied.
    half = {"float16": 2e-3, "bfloat16": 2e-2}.get(layout, 1e-5)
    close(again(batch(dims)), wanted, half)
    if dims < 3:  # PEFT does not merge a LoRA of a 1x1x1 convolution
        close(again.merge_and_unload()(batch(dims)), wanted, half)
    assert done.error < half


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_as_fedpara_is_what_its_writer_computes(tmp_path, layout):
    source, dims, wanted = written(layout, tmp_path)
    done = convert_adapter(source, tmp_path / "ours", "fedpara", base=block(dims))
    assert done.error == 0
    assert done.config.parameterization == ("lowrank" if "LoCon" in layout else "fedpara")
    again = PeftModel.from_pretrained(block(dims), tmp_path / "ours").eval()
    close(again(batch(dims)), wanted)
    close(again.merge_and_unload()(batch(dims)), wanted)


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if "LoCon" not in n and "Conv3d" not in n])
def test_a_layout_as_pefts_loha_is_what_its_writer_computes(tmp_path, layout):
    source, dims, wanted = written(layout, tmp_path)
    convert_adapter(source, tmp_path / "peft", "loha", base=block(dims))
    again = PeftModel.from_pretrained(block(dims), tmp_path / "peft").eval()
    half = 1e-5 if "16" not in layout else 2e-2
    close(again(batch(dims)), wanted, half)


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if "LoCon" not in n])
def test_a_layout_as_lycoris_is_loaded_by_lycoris(tmp_path, layout):
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    source, dims, wanted = written(layout, tmp_path)
    target = tmp_path / "ours.safetensors"
    convert_adapter(source, target, "lycoris", base=block(dims), prefix="lycoris_")
    model = block(dims)
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(target), model)
        network.apply_to()
        assert len(network.loras) == len(NAMES)
        close(model(batch(dims)), wanted, 1e-5 if "16" not in layout else 2e-2)


@pytest.mark.parametrize("through", ["fedpara", "loha", "bare"])
@pytest.mark.parametrize(
    "layout", ["LyCORIS linear and Tucker", "LyCORIS Conv1d, Tucker", "kohya lora_te2_", "bfloat16"]
)
def test_there_and_back_is_bit_exact(tmp_path, layout, through):
    """Factors keep every bit; so does alpha, whose value a configuration has."""
    source, dims, _ = written(layout, tmp_path)
    before = load_file(source)
    prefix = next(iter(before)).partition("_down")[0].partition("_proj")[0] + "_"
    middle = tmp_path / ("middle.safetensors" if through == "bare" else "middle")
    to = "loha" if through == "bare" else through
    options = {"prefix": ""} if through == "bare" else {}
    convert_adapter(source, middle, to, base=block(dims), **options)
    if through == "fedpara":
        model = PeftModel.from_pretrained(block(dims), middle, autocast_adapter_dtype=False)
        middle = tmp_path / "again"
        convert_adapter(model, middle, "loha")
    back = tmp_path / "back.safetensors"
    convert_adapter(middle, back, "lycoris", base=block(dims), prefix=prefix)
    after = load_file(back)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        if through != "fedpara":  # a model that is loaded has its factors in float32
            assert key.endswith(".alpha") or after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key].to(tensor.dtype), tensor), key


def test_metadata_goes_along_and_says_what_was_done(tmp_path):
    written("kohya lora_unet_", tmp_path)
    path = tmp_path / "x.safetensors"
    metadata = {
        "ss_output_name": "a style", "ss_network_module": "lycoris.kohya", "ss_network_dim": "3",
        "ss_network_args": '{"algo": "loha"}', "modelspec.title": "Style", "format": "pt",
        "sshs_model_hash": "of other bytes", "modelspec.hash_sha256": "0x0",
    }  # fmt: skip
    save_file(load_file(tmp_path / "x.bin.safetensors"), path, metadata)

    def of(name, to, **options):
        convert_adapter(path, tmp_path / name, to, base=block(), **options)
        file = tmp_path / name
        with safe_open(file if file.is_file() else file / "adapter_model.safetensors", "pt") as f:
            return f.metadata()

    same = of("a.safetensors", "lycoris")
    assert {k: v for k, v in same.items() if k.startswith("ss_")} == {
        k: v for k, v in metadata.items() if k.startswith("ss_")
    }
    assert same["modelspec.title"] == "Style"
    lora = of("b.safetensors", "kohya", rank=4)
    assert lora["ss_network_module"] == "networks.lora"
    assert lora["ss_network_dim"] == lora["ss_network_alpha"] == "4"
    assert "ss_network_args" not in lora
    assert '"ss_network_module": "lycoris.kohya"' in lora["fedpara.conversion"]
    assert '"lora_unet_proj_in": 0.' in lora["fedpara.conversion"]
    folder = of("c", "fedpara")
    assert folder["ss_network_module"] == "lycoris.kohya"
    assert folder["format"] == "pt"
    assert "sshs_model_hash" not in folder


@pytest.mark.parametrize(
    "notes", [{}, {"ss_name": 'ä "quoted"\n\x1f'}, {"ss_a": "1", "other": "2"}]
)
@pytest.mark.parametrize("width", [5, 700])
def test_hashes_are_those_by_which_web_interfaces_know_a_file(tmp_path, width, notes):
    """kohya's: of the tensors' bytes, and of 64 KiB after the first MiB with ss_ notes alone."""
    import hashlib

    import safetensors.torch

    own = loha_factors(width, width, 4, (3, 3), generator=torch.Generator().manual_seed(0))
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_loha(
        source, {"lora_unet_a": own, "lora_unet_b": own}, {"lora_unet_a": 2, "lora_unet_b": 1}
    )
    source.write_bytes(
        safetensors.torch.save(load_file(source), {**notes, "modelspec.hash_sha256": ""})
    )
    convert_adapter(source, target, "kohya")
    data = target.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    with safe_open(target, "pt") as file:
        found = file.metadata()
    assert found["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]
    training = {k: v for k, v in found.items() if k.startswith("ss_")}
    plain = safetensors.torch.save(load_file(target), training)
    assert plain.endswith(body)  # in safetensors' own order
    old = hashlib.sha256(plain[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert found["sshs_legacy_hash"] == old


def test_a_weight_decomposed_adapter_is_kept_or_refused(tmp_path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        wanted = from_lycoris(source, dora_wd=True)
    convert_adapter(source, target, "lycoris")
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert any(key.endswith("dora_scale") for key in after)
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    model = block()
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(target), model)
        network.apply_to()
        close(model(batch()), wanted)
    for to in ("kohya", "lora", "fedpara", "loha"):
        new = tmp_path / ("new.safetensors" if to == "kohya" else "new")
        options = {"prefix": "x_"} if to == "kohya" else {}
        with pytest.raises(ConversionError, match="has a dora_scale"):
            convert_adapter(source, new, to, base=block(), **options)
        assert not new.exists()


def test_lycoris_merges_with_its_scale_twice_and_the_formula_decides(tmp_path):
    """4.1.3: get_diff_weight multiplies by alpha / r what get_weight has multiplied already."""
    source = tmp_path / "a.safetensors"
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        model = block()
        network = lycoris_of(model, algo="loha")
        network.save_weights(str(source), None, None)
        own = {k.rpartition(".")[2]: t for k, t in load_file(source).items() if "to_q" in k}
        layer = next(lora for lora in network.loras if "to_q" in lora.lora_name)
        slow = dense({k: t for k, t in own.items() if k.startswith("hada")}, 5.0)
        close(layer.get_weight(None), slow)
        close(layer.get_diff_weight()[0], slow * 5 / 3)  # what it merges
    convert_adapter(source, tmp_path / "ours", "fedpara", base=block())
    ours = PeftModel.from_pretrained(block(), tmp_path / "ours")
    found = ours.base_model.model.down_blocks[0]["to_q"].get_delta_weight("default")
    close(found, slow)


def test_pefts_gradient_of_a_tucker_kernel_is_another_functions_and_the_formula_decides():
    """0.21: of the first half. Ours is float64 autograd's of the composed weight."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 5, 3), torch.randn(2, 4, 6, 6)
    config = LoHaConfig(r=2, alpha=2, init_weights=False, use_effective_conv2d=True,
                        target_modules=["0"])  # fmt: skip
    model = get_peft_model(nn.Sequential(copy.deepcopy(conv)), config)
    layer = model.base_model.model[0]
    own = {n: getattr(layer, n)["default"] for n in layer.adapter_layer_names}
    exact = {n: p.detach().double().requires_grad_() for n, p in own.items()}
    wide = copy.deepcopy(conv).double()
    (
        wide(x.double()) + nn.functional.conv2d(x.double(), dense(exact, 2.0))
    ).square().sum().backward()
    model(x).square().sum().backward()
    off = {n: float((own[n].grad - exact[n].grad).norm() / exact[n].grad.norm()) for n in own}
    assert max(off.values()) > 0.1, "PEFT has mended it: the note in docs/convert.md can go"
    halves = [
        Half(exact[f"hada_w{w}_a"].T, exact[f"hada_w{w}_b"].T, exact[f"hada_t{w}"]) for w in "12"
    ]
    close(compose(halves), dense(exact, 2.0), 1e-12)


# Names.


def pipeline(path):
    """Layers of a UNet and of two text encoders in one file."""
    generator, layers = torch.Generator().manual_seed(0), {}
    for prefix in ("lora_unet_", "lora_te1_", "lora_te2_"):
        layers[f"{prefix}proj_q"] = loha_factors(4, 5, 2, generator=generator)
    write_loha(path, layers, dict.fromkeys(layers, 1.5))
    return layers


def test_parts_of_a_pipeline(tmp_path):
    layers = pipeline(tmp_path / "a.safetensors")
    base = nn.ModuleDict({"proj_q": nn.Linear(5, 4)})
    with pytest.raises(
        ConversionError, match=r"\['text_encoder', 'text_encoder_2', 'unet'\].*comp"
    ):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "x", "lora")
    with pytest.raises(ConversionError, match=r"the base is one model.*component="):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "x", "lora", base=base)
    with pytest.raises(ConversionError, match="nothing for component='vae'"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "x", "lora", component="vae")
    done = convert_adapter(
        tmp_path / "a.safetensors", tmp_path / "te2", "lora", base=base, component="text_encoder_2"
    )
    assert done.left_out == ("lora_te1_proj_q", "lora_unet_proj_q")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "te2")
    delta = again.base_model.model["proj_q"].get_delta_weight("default")
    close(delta, dense(layers["lora_te2_proj_q"], 1.5))
    with pytest.raises(ConversionError, match=r"prefix='x_' is for one part.*component="):
        convert_adapter(
            tmp_path / "a.safetensors", tmp_path / "x.safetensors", "kohya", prefix="x_"
        )
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "all.safetensors", "kohya")
    names = {key.partition(".")[0] for key in load_file(tmp_path / "all.safetensors")}
    assert names == layers.keys()


def test_underscores_are_resolved_against_the_base_or_refused(tmp_path):
    source = tmp_path / "a.safetensors"
    own = loha_factors(4, 5, 2, generator=torch.Generator().manual_seed(0))
    write_loha(source, {"lora_unet_a_b_c": own}, {"lora_unet_a_b_c": 2})

    def names(base, **options):
        done = convert_adapter(source, tmp_path / "x", "lora", base=base, **options)
        return [layer.name for layer in done.layers]

    assert names({"a.b_c": (4, 5), "other": (4, 5)}) == ["a.b_c"]
    assert names({"a_b.c": (4, 5)}) == ["a_b.c"]
    assert names({"model.diffusion_model.a.b.c": (4, 5)}) == ["model.diffusion_model.a.b.c"]
    save_file({"a.b.c.weight": torch.zeros(4, 5)}, tmp_path / "base.safetensors")
    assert names(tmp_path / "base.safetensors") == ["a.b.c"]
    for base, says in (
        ({"a.b_c": (4, 5), "a_b.c": (4, 5)}, "lora_unet_a_b_c may be any of a.b_c, a_b.c"),
        ({"p.a.b.c": (4, 5), "q.a.b.c": (4, 5)}, "lora_unet_a_b_c and the rest may be those of p"),
        ({"b.c": (4, 5)}, "lora_unet_a_b_c: no module of the base model is called so"),
        ({"a.b.c": (5, 4)}, r"a_b_c adds a \(4, 5\) to a.b.c .* is \(5, 4\): name the model"),
        ({"a.b.c": (4, 5, 3)}, "name the model"),
        (None, "lora_unet_a_b_c has underscores for dots, and lora needs .* give base="),
        (tmp_path, "several|no weights"),
    ):
        if base == tmp_path:
            (tmp_path / "empty").mkdir()
            base = tmp_path / "empty"
        with pytest.raises(ConversionError, match=says):
            convert_adapter(source, tmp_path / "new", "lora", base=base)
        assert not (tmp_path / "new").exists()


def test_a_component_is_no_module_of_a_plain_model(tmp_path):
    """GPT-2's trunk is called "transformer" as a part of a pipeline is."""
    own = loha_factors(4, 5, 2, generator=torch.Generator().manual_seed(0))
    for name, layout in (
        ("transformer.h.0.attn", "module paths"),
        ("transformer.transformer_blocks.0.attn", "diffusers"),
        ("unet.conv_in", "diffusers"),
    ):
        source = tmp_path / f"{name}.safetensors"
        write_loha(source, {name: own}, {name: 2})
        done = convert_adapter(source, tmp_path / name, "lora")
        assert done.source.startswith(layout)
        wanted = name if layout == "module paths" else name.partition(".")[2]
        assert [layer.name for layer in done.layers] == [wanted]
    source = tmp_path / "dit.safetensors"
    write_loha(source, {"transformer.blocks.0.attn": own}, {"transformer.blocks.0.attn": 2})
    for base, wanted in (
        ({"blocks.0.attn": (4, 5)}, "blocks.0.attn"),
        ({"transformer.blocks.0.attn": (4, 5)}, "transformer.blocks.0.attn"),
    ):
        done = convert_adapter(source, tmp_path / wanted, "lora", base=base)
        assert [layer.name for layer in done.layers] == [wanted]
    both = tmp_path / "both.safetensors"
    write_loha(both, {"unet.a": own, "head.b": own}, {"unet.a": 1, "head.b": 1})
    done = convert_adapter(both, tmp_path / "both", "lora")
    assert [layer.name for layer in done.layers] == ["head.b", "unet.a"]


# Layers of other methods.


def test_layers_of_other_methods_are_named_and_refused_or_passed_on(tmp_path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    own = loha_factors(4, 5, 2, generator=torch.Generator().manual_seed(0))
    others = {
        "lora_unet_kr.lokr_w1": torch.randn(2, 2), "lora_unet_kr.lokr_w2": torch.randn(3, 2),
        "lora_unet_kr.alpha": torch.tensor(1.0), "lora_unet_full.diff": torch.randn(4, 4),
        "lora_unet_full.diff_b": torch.randn(4), "lora_unet_norm.w_norm": torch.randn(4),
        "lora_unet_lo.lora_up.weight": torch.randn(4, 2), "lora_unet_lo.alpha": torch.tensor(3.0),
        "lora_unet_lo.lora_down.weight": torch.randn(2, 5), "emb_params": torch.randn(3),
    }  # fmt: skip
    state = write_loha(source, {"lora_unet_ha": own}, {"lora_unet_ha": 2})
    save_file({**state, **others}, source)
    with pytest.raises(
        LayoutError, match=r"lora_unet_full is a full diff \(diff, diff_b\).*3 layers"
    ):
        convert_adapter(source, target, "kohya")
    with pytest.raises(LayoutError, match=r"lora_unet_full .*4 layers"):
        convert_adapter(source, target, "lycoris")  # a LoRA is no LoHa
    assert not target.exists()
    done = convert_adapter(source, target, "kohya", others="keep")
    assert set(done.passed_on) == {"lora_unet_kr", "lora_unet_full", "lora_unet_norm"}
    after = load_file(target)
    for key, tensor in others.items():
        if "lora_unet_lo" not in key:
            assert torch.equal(after[key], tensor), key
    up, down = after["lora_unet_lo.lora_up.weight"], after["lora_unet_lo.lora_down.weight"]
    close(
        up @ down,
        1.5 * others["lora_unet_lo.lora_up.weight"] @ others["lora_unet_lo.lora_down.weight"],
    )
    done = convert_adapter(source, tmp_path / "c.safetensors", "lycoris", others="keep")
    assert "lora_unet_lo" in done.passed_on
    after = load_file(tmp_path / "c.safetensors")
    assert all(torch.equal(after[key], tensor) for key, tensor in {**state, **others}.items())
    with pytest.raises(LayoutError, match="emb_params belongs to no layer"):
        convert_adapter(source, tmp_path / "d", "lora", others="keep", base={"ha": (4, 5)})
    save_file({k: t for k, t in {**state, **others}.items() if k != "emb_params"}, source)
    with pytest.raises(ConversionError, match="one method"):
        convert_adapter(source, tmp_path / "d", "lora", others="keep", base={
            "ha": (4, 5), "lo": (4, 5)})  # fmt: skip
    assert not (tmp_path / "d").exists()


def test_a_file_of_other_methods_alone(tmp_path):
    source = tmp_path / "a.safetensors"
    save_file(
        {"lora_unet_a.lokr_w1": torch.randn(2, 2), "lora_unet_a.lokr_w2": torch.randn(2, 2)}, source
    )
    for others in ("refuse", "keep"):
        with pytest.raises(LayoutError, match="lora_unet_a is a LoKr"):
            convert_adapter(source, tmp_path / "b.safetensors", "kohya", others=others)
    save_file({"model.weight": torch.randn(2, 2)}, source)
    with pytest.raises(LayoutError, match=r"has no LoHa factors in it.*it has model.weight"):
        convert_adapter(source, tmp_path / "b.safetensors", "kohya", others="keep")


def test_factors_of_several_dtypes(tmp_path):
    """They are brought to the widest; eight bits are refused."""
    source = tmp_path / "a.safetensors"
    own = loha_factors(4, 5, 2, (3,), generator=torch.Generator().manual_seed(0))
    own["hada_w1_a"], own["hada_t2"] = own["hada_w1_a"].half(), own["hada_t2"].bfloat16()
    write_loha(source, {"lora_unet_a": own}, {"lora_unet_a": 3})
    convert_adapter(source, tmp_path / "b.safetensors", "kohya")
    state = load_file(tmp_path / "b.safetensors")
    up, down = state["lora_unet_a.lora_up.weight"], state["lora_unet_a.lora_down.weight"]
    close(torch.einsum("mr,rnk->mnk", up[..., 0], down), dense(own, 3.0))
    own["hada_w1_a"] = own["hada_w1_a"].to(torch.float8_e4m3fn)
    write_loha(source, {"lora_unet_a": own}, {"lora_unet_a": 3})
    with pytest.raises(LayoutError, match=r"lora_unet_a.hada_w1_a is torch.float8_e4m3fn: save"):
        convert_adapter(source, tmp_path / "c.safetensors", "kohya")


def test_what_peft_saves_beside_a_loha(tmp_path):
    """A folder of PEFT's has a place for it; a file has none, and no folder for alien keys."""
    plain = block()
    config = LoHaConfig(
        r=2, target_modules=["to_q"], modules_to_save=["proj_in"], init_weights=False
    )
    loha = get_peft_model(copy.deepcopy(plain), config).eval()
    with torch.no_grad():
        loha.base_model.model.proj_in.modules_to_save["default"].weight.add_(1)
    loha.save_pretrained(tmp_path / "loha")
    for to in ("fedpara", "lora"):
        convert_adapter(tmp_path / "loha", tmp_path / to, to)
        close(
            PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / to).eval()(batch()),
            loha(batch()),
        )
    with pytest.raises(LayoutError, match=r"proj_in.* belongs to no layer"):
        convert_adapter(tmp_path / "loha", tmp_path / "a.safetensors", "lora", prefix="unet.")
    # Another file in that folder is not PEFT's.
    own = loha_factors(4, 5, 2, generator=torch.Generator().manual_seed(0))
    write_loha(tmp_path / "loha" / "b.safetensors", {"x": own}, {"x": 1})
    done = convert_adapter(tmp_path / "loha" / "b.safetensors", tmp_path / "c", "lora")
    assert done.source == "module paths"
    save_file({**load_file(tmp_path / "loha" / "b.safetensors"), "alien": torch.ones(1)},
              tmp_path / "d.safetensors")  # fmt: skip
    with pytest.raises(LayoutError, match="alien belongs to no layer"):
        convert_adapter(tmp_path / "d.safetensors", tmp_path / "d", "lora", others="keep")


def test_a_choice_that_is_none(tmp_path):
    source = tmp_path / "a.safetensors"
    own = loha_factors(4, 5, 2, generator=torch.Generator().manual_seed(0))
    write_loha(source, {"a": own}, {"a": 2})
    for target, to, options, says in (
        ("b", "dora", {}, "to must be one of"),
        ("b", "kohya", {}, r"kohya is a file, named \*.safetensors"),
        ("b.safetensors", "fedpara", {}, "fedpara is a folder"),
        ("b.safetensors", "kohya", {}, "which part of a pipeline.*prefix='lora_unet_'"),
        ("b.safetensors", "lora", {}, "which part of a pipeline.*'unet.' or 'transformer.'"),
        ("b.safetensors", "lycoris", {"rank": 4}, "rank and tolerance are for LoRA"),
        ("b", "lora", {"rank": 0}, "rank must be an integer from 1"),
        ("b", "lora", {"rank": 2.5}, "rank must be an integer from 1"),
        ("b", "lora", {"tolerance": 1.0}, r"tolerance must be in \[0, 1\)"),
        ("b", "lora", {"rank": 3, "tolerance": 0.1}, "not both"),
        ("b", "lora", {"prefix": "x"}, "prefix= is for files"),
        ("b", "lora", {"others": "drop"}, "others must be 'refuse' or 'keep'"),
    ):
        with pytest.raises(ConversionError, match=says):
            convert_adapter(source, tmp_path / target, to, **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]
