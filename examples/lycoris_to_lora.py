"""A LoHa that LyCORIS trained, as our adapter, and as a LoRA that diffusers loads by itself.

    python examples/lycoris_to_lora.py --output_dir outputs/lycoris [--rank 32] [--steps 20]

Four programs in a row, each knowing the one before by its file alone: LyCORIS trains a LoHa on a
tiny UNet and saves it; it becomes a FedPara adapter, which trains on; that becomes the best LoRA of
a rank, with its error; a pipeline of diffusers loads it, and its images are compared with those of
the adapter. Needs `pip install diffusers lycoris-lora`. The UNet is random: nothing is fetched.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from lycoris import LycorisNetwork, create_lycoris
from peft import PeftModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from fedpara_peft import convert_adapter

TARGETS = ["Transformer2DModel", "ResnetBlock2D"]


def unet() -> UNet2DConditionModel:
    """The base model; with pretrained weights, ``from_pretrained(…, subfolder="unet")``."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip


def pipeline(model: Any) -> StableDiffusionPipeline:
    """A pipeline around a UNet."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=[16, 16], down_block_types=["DownEncoderBlock2D"] * 2, sample_size=16,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=1,
        vocab_size=100, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        unet=model, vae=vae, text_encoder=CLIPTextModel(text), tokenizer=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: StableDiffusionPipeline) -> torch.Tensor:
    """An image of a fixed prompt and noise."""
    prompt = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    made = pipe(
        prompt_embeds=prompt, negative_prompt_embeds=0 * prompt, num_inference_steps=4,
        output_type="np", generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    return torch.as_tensor(made.images)


def train(model: nn.Module, parameters: list[nn.Parameter], steps: int, lr: float) -> float:
    """Fit the noise of one batch; returns the last loss."""
    generator = torch.Generator().manual_seed(4)
    sample, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    prompt = torch.randn(4, 5, 32, generator=generator)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(sample, 10, prompt).sample, noise)
        loss.backward()
        optimizer.step()
    return loss.item()


def train_with_lycoris(path: Path, steps: int) -> None:
    """LyCORIS alone: a LoHa of rank 8, kernels in Tucker form."""
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    base = unet().requires_grad_(False)
    LycorisNetwork.apply_preset({"target_module": TARGETS})
    network = create_lycoris(
        base, linear_dim=8, linear_alpha=4, conv_dim=4, conv_alpha=4, algo="loha", use_tucker=True
    )
    network.apply_to()
    loss = train(base, list(network.parameters()), steps, 1e-2)
    print(f"LyCORIS trained {len(network.loras)} layers, loss {loss:.3f}")
    network.save_weights(str(path), torch.float32, {"ss_output_name": "example"})


def main() -> None:
    """Train, convert, train on, convert, load, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    loha, lora = folder / "loha.safetensors", folder / "lora.safetensors"

    train_with_lycoris(loha, options.steps)

    done = convert_adapter(loha, folder / "adapter", "fedpara", base=unet())
    print(f"{done.source}: {len(done.layers)} layers of rank up to {done.rank}, exactly")
    model = PeftModel.from_pretrained(unet(), folder / "adapter", is_trainable=True)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"trained on as FedPara, loss {train(model, own, options.steps, 3e-3):.3f}")

    done = convert_adapter(model, lora, "lora", prefix="unet.", rank=options.rank)
    exact = max(layer.exact_rank for layer in done.layers)
    print(f"LoRA of rank {done.rank} (exact: {exact}), relative error {done.error:.2e}")
    for layer in sorted(done.layers, key=lambda layer: -layer.error)[:3]:
        print(f"  {layer.name}: {layer.error:.2e}")

    pipe = pipeline(unet())
    plain = image(pipe)
    pipe.load_lora_weights(lora)
    found, wanted = image(pipe), image(pipeline(model.base_model.model))
    change = (wanted - plain).abs().mean()
    print(f"images: {(found - wanted).abs().mean() / change:.2%} of the change is missed")


if __name__ == "__main__":
    main()
