"""Model, data and training of the app. Nothing here is of fedpara_peft but what ``CONFIG`` is."""

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

#: The one thing that a user changes: the config's class, and its options.
CONFIG = {"kind": LoraConfig, "options": {"r": 8, "lora_alpha": 8}}
VOCABULARY, LENGTH = 48, 24


def get_model():
    """The same base everywhere, with an adapter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "vocab_size": VOCABULARY, "initializer_range": 0.1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    config = CONFIG["kind"](
        task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        **CONFIG["options"],
    )  # fmt: skip
    return get_peft_model(base, config)


def get_parameters(model):
    """What travels."""
    return get_peft_model_state_dict(model)


def set_parameters(model, state):
    """Put what came into the model."""
    set_peft_model_state_dict(model, state)


def load_data(partition):
    """Texts that count upwards from anywhere, each client in steps of its own length."""
    generator = torch.Generator().manual_seed(partition)
    start = torch.randint(0, VOCABULARY, (24, 1), generator=generator)
    return (start + (1 + partition % 2) * torch.arange(LENGTH)) % VOCABULARY


def train(model, ids, epochs, rate):
    """AdamW, as apps of this kind have it; the mean loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    losses = []
    for _ in range(epochs):
        for batch in ids.split(8):
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def evaluate(model, ids):
    """The mean loss."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()
