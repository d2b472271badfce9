"""diffusers: our adapter in its models, our LoRA in its pipelines; images are the same."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tests.convert.written import close
from torch import nn

from fedpara_peft import FedParaConfig, FedParaLayer, convert_adapter, inspect_adapter

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


def seeded(build):
    torch.manual_seed(0)
    return build().eval()


def unet():
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip


def dit():
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=[16, 16], down_block_types=["DownEncoderBlock2D"] * 2, sample_size=16,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=8,
        shift_factor=0.0,
    )  # fmt: skip


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(hidden_size=16, intermediate_size=20, num_attention_heads=2,
                       num_hidden_layers=1, vocab_size=50, bos_token_id=0, eos_token_id=2,
                       pad_token_id=1)
    )  # fmt: skip


def unet_pipeline(model):
    pipe = diffusers.StableDiffusionPipeline(
        unet=model, vae=seeded(vae), text_encoder=seeded(text_encoder), tokenizer=None,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit_pipeline(model):
    empty = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2",
         "tokenizer_3")
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=model, vae=seeded(vae), **empty,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe):
    g = torch.Generator().manual_seed(7)
    options = {"prompt_embeds": torch.randn(1, 5, 16, generator=g)}
    options["negative_prompt_embeds"] = -options["prompt_embeds"]
    if isinstance(pipe, diffusers.StableDiffusion3Pipeline):
        options["pooled_prompt_embeds"] = torch.randn(1, 16, generator=g)
        options["negative_pooled_prompt_embeds"] = -options["pooled_prompt_embeds"]
    found = pipe(
        **options, num_inference_steps=3, height=16, width=16, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return torch.as_tensor(np.asarray(found))


MODELS = {
    "unet": (unet, unet_pipeline, "unet", ["to_q", "to_v", "conv1", "proj_in", "conv_shortcut"]),
    "dit": (dit, dit_pipeline, "transformer", ["to_q", "to_k", "add_v_proj", "proj_out"]),
}


def trained(build, targets, ranks=(("to_q", 2),)):
    """Injected, trained a step, at factors that are far from the start."""
    model = seeded(build)
    model.requires_grad_(False)
    model.add_adapter(
        FedParaConfig(r=3, alpha=2, target_modules=targets, rank_pattern=dict(ranks),
                      init_weights=False)
    )  # fmt: skip
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.1)
    g = torch.Generator().manual_seed(3)
    sample, prompt = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 16, generator=g)
    options = {"timestep": torch.tensor([3, 5]), "encoder_hidden_states": prompt}
    if build is dit:
        options["pooled_projections"] = torch.randn(2, 16, generator=g)
    before = [p.detach().clone() for p in own]
    model.train()
    model(sample, **options).sample.square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(own, before, strict=True))
    for p in own:
        nn.init.normal_(p, std=0.4, generator=g)
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_is_trained_saved_and_loaded_and_its_lora_makes_the_same_image(tmp_path, kind):
    build, pipeline, component, targets = MODELS[kind]
    model = trained(build, targets)
    plain, wanted = image(pipeline(seeded(build))), image(pipeline(model))
    assert (plain - wanted).abs().max() > 0.01
    # Saved and loaded as an adapter of this package.
    save_file(get_peft_model_state_dict(model), tmp_path / "ours.safetensors")
    again = seeded(build)
    again.add_adapter(copy.deepcopy(model.peft_config["default"]))
    found = set_peft_model_state_dict(again, load_file(tmp_path / "ours.safetensors"))
    assert not found.unexpected_keys
    assert torch.equal(image(pipeline(again)), wanted)
    # As a LoRA, by the pipeline's own loader: neither this package nor its factors.
    done = convert_adapter(model, tmp_path / "lora.safetensors", "lora", prefix=f"{component}.")
    assert done.error == 0
    pipe = pipeline(seeded(build))
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    assert not any(isinstance(m, FedParaLayer) for m in getattr(pipe, component).modules())
    close(image(pipe), wanted)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    close(image(pipe), wanted)
    for layer in model.modules():
        if isinstance(layer, FedParaLayer):
            layer.merge()
    close(image(pipeline(model)), wanted)


def test_a_lora_of_a_rank_and_its_error(tmp_path):
    """The error that is reported is that of the weights the pipeline ends with."""
    build, pipeline, component, targets = MODELS["unet"]
    model = trained(build, targets)
    done = convert_adapter(model, tmp_path / "a.safetensors", "lora", prefix="unet.", rank=4)
    assert 0 < done.error < 0.9
    pipe = pipeline(seeded(build))
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    lora, errors = getattr(pipe, component), {x.name: x.error for x in done.layers}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FedParaLayer)}
    assert errors.keys() == {f"unet.{name}" for name in layers}
    total = lost = 0.0
    for name, layer in layers.items():
        weight = layer.get_delta_weight("default").double()
        difference = weight - lora.get_submodule(name).get_delta_weight("default_0").double()
        assert float(difference.norm() / weight.norm()) == pytest.approx(
            errors[f"unet.{name}"], abs=1e-6
        )
        total, lost = total + float(weight.norm() ** 2), lost + float(difference.norm() ** 2)
    assert done.error == pytest.approx((lost / total) ** 0.5, abs=1e-6)
    exact = {x.name: x.exact_rank for x in done.layers}
    assert all(rank in (4, 9) for rank in exact.values())
    assert all(errors[name] == 0 for name, rank in exact.items() if rank == 4)


def test_kohyas_file_is_loaded_by_the_pipeline(tmp_path):
    """Of one rank: diffusers 0.42 loses the alphas of attention layers that are not as the rest."""
    build, pipeline, _, _ = MODELS["unet"]
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2"]
    model = trained(build, targets, ranks=())
    wanted = image(pipeline(model))
    convert_adapter(model, tmp_path / "a.safetensors", "kohya", prefix="lora_unet_")
    pipe = pipeline(seeded(build))
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    close(image(pipe), wanted)


def test_a_loha_file_of_the_unet_by_names_from_its_saved_weights(tmp_path):
    """Underscored names and kernels, resolved by the header of the base's file alone."""
    build, pipeline, _, targets = MODELS["unet"]
    model = trained(build, targets)
    wanted = image(pipeline(model))
    convert_adapter(model, tmp_path / "a.safetensors", "lycoris", prefix="lora_unet_")
    seeded(build).save_pretrained(tmp_path / "unet")
    done = convert_adapter(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", "lora", base=tmp_path / "unet"
    )
    assert done.source == "kohya (lora_unet_)"
    pipe = pipeline(seeded(build))
    pipe.load_lora_weights(tmp_path / "b.safetensors")
    close(image(pipe), wanted)
    from safetensors import safe_open

    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        note = json.loads(file.metadata()["fedpara.conversion"])
    assert note == {"from": "kohya (lora_unet_)", "to": "lora", "rank": 9}


def test_a_network_that_lycoris_trains_for_kohyas_scripts(tmp_path):
    """UNet and text encoder in one file, of LyCORIS's own making; each as its forward pass."""
    kohya = pytest.importorskip("lycoris.kohya", reason="lycoris-lora is not installed")
    model, text = seeded(unet), seeded(text_encoder)
    kohya.LycorisNetworkKohya.apply_preset({
        "unet_target_module": ["Transformer2DModel", "ResnetBlock2D"],
        "text_encoder_target_module": ["CLIPAttention", "CLIPMLP"],
    })  # fmt: skip
    network = kohya.LycorisNetworkKohya(
        text, model, lora_dim=3, alpha=2, conv_lora_dim=2, conv_alpha=1, use_tucker=True,
        network_module="loha",
    )  # fmt: skip
    network.apply_to(text, model, True, True)
    torch.manual_seed(5)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {"ss_output_name": "a style"})
    g = torch.Generator().manual_seed(3)
    sample, prompt = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 16, generator=g)
    ids = torch.randint(3, 50, (2, 6), generator=g)
    with torch.no_grad():
        wanted = model(sample, 3, prompt).sample, text(ids).last_hidden_state
    found = inspect_adapter(tmp_path / "a.safetensors")
    assert found.layout == "kohya (lora_te_, lora_unet_)"
    assert {x.method for x in found.layers} == {"LoHa"}
    assert any(x.has_core for x in found.layers)
    for to in ("fedpara", "lora"):
        for component, plain in (("unet", seeded(unet)), ("text_encoder", seeded(text_encoder))):
            folder = tmp_path / f"{to}-{component}"
            convert_adapter(tmp_path / "a.safetensors", folder, to, base=plain, component=component)
            again = PeftModel.from_pretrained(plain, folder).eval()
            with torch.no_grad():
                if component == "unet":
                    close(again(sample, 3, prompt).sample, wanted[0])
                else:
                    close(again(ids).last_hidden_state, wanted[1])
