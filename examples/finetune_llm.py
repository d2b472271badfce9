r"""Fine-tune a language model in a federation: the base is frozen, only adapters travel.

    python examples/finetune_llm.py --output_dir outputs/llm --smoke True
    python examples/finetune_llm.py --output_dir outputs/llm --data notes.txt
    python examples/finetune_llm.py --output_dir outputs/llm --model Qwen/Qwen2.5-0.5B \
        --data Salesforce/wikitext --data_config wikitext-2-raw-v1 --r 8

Every client holds a passage of its own; a tenth of all passages is held out. ``--model tiny``
(a small Llama that knows nothing yet, and bytes for tokens) needs no network.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig


@dataclass
class LanguageArguments:
    """Model, data and adapter."""

    model: str = field(
        default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "A Hub id, a folder, or tiny."}
    )
    data: str = field(
        default="stanfordnlp/imdb", metadata={"help": "A text file or a Hub data set."}
    )
    data_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set."}
    )
    text_column: str = field(default="text", metadata={"help": "Its column of text."})
    block_size: int = field(default=128, metadata={"help": "Tokens an example has."})
    examples: int = field(default=2000, metadata={"help": "At most so many examples."})
    num_clients: int = field(default=10, metadata={"help": "Clients."})
    r: int = field(default=4, metadata={"help": "Inner rank of every adapter."})
    prompt: str = field(default="The ", metadata={"help": "What the generated line begins with."})
    smoke: bool = field(default=False, metadata={"help": "--model tiny on Python's manual."})


def load_model(name: str) -> PreTrainedModel:
    """The frozen base; loaded twice it is the same."""
    if name != "tiny":
        return AutoModelForCausalLM.from_pretrained(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; tiny's has a token for each byte."""
    if name != "tiny":
        return AutoTokenizer.from_pretrained(name)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    codes = {byte: i for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=codes, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def load_text(language: LanguageArguments) -> str:
    """All text, as one."""
    if language.smoke:
        return "\n".join(topics.values())
    if Path(language.data).is_file():
        return Path(language.data).read_text(encoding="utf-8")
    rows = load_dataset(language.data, language.data_config, split="train")
    return "\n".join(rows[language.text_column])


def in_blocks(
    text: str, tokenizer: PreTrainedTokenizerBase, language: LanguageArguments
) -> tuple[list[Dataset], Dataset]:
    """Every client's own passage, and the held-out examples."""
    size, characters = language.block_size, 8 * language.block_size * language.examples
    ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
    blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)][: language.examples]
    if len(blocks) < 2 * language.num_clients:
        raise SystemExit(f"the text has {len(blocks)} examples: give more --data or fewer clients")
    rows = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    order = np.arange(len(rows))
    passages = np.array_split(order[order % 10 != 9], language.num_clients)
    return [rows.select(part) for part in passages], rows.select(order[order % 10 == 9])


def main() -> None:
    """Fine-tune, save, reload, merge and generate."""
    parser = HfArgumentParser((LanguageArguments, FederatedArguments))
    parser.set_defaults(
        num_rounds=10, per_client_batch_size=4, learning_rate=0.5, momentum=0.9,
        max_grad_norm=1.0, eval_batch_size=8,
    )  # fmt: skip
    language, args = parser.parse_args_into_dataclasses()
    if language.smoke:
        language = replace(language, model="tiny", block_size=64, examples=400, num_clients=4)
        args = replace(args, num_rounds=3)
    try:
        base, tokenizer = load_model(language.model), load_tokenizer(language.model)
        text = load_text(language)
    except Exception as error:
        raise SystemExit(
            f"cannot load {language.model!r} or {language.data!r} ({error}): give a folder with "
            "--model (or --model tiny) and a text file with --data, or try --smoke True"
        ) from None
    clients, held_out = in_blocks(text, tokenizer, language)
    config = FedParaConfig(r=language.r, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(args.seed)
    model = get_peft_model(base, config)
    trainer = FederatedTrainer(model, args, clients, held_out)
    say = trainer.accelerator.print  # once, not from every process
    trained, total = model.get_nb_trainable_parameters()
    say(f"{trained:,} of {total:,} parameters are trained and sent")
    before = trainer.evaluate()["eval_loss"]
    history = trainer.train(resume_from_checkpoint=args.save_every > 0)
    after, sent = trainer.evaluate()["eval_loss"], history.total_bytes / 1e6
    say(f"loss {before:.3f} before, {after:.3f} after {len(history)} rounds; {sent:.1f} MB sent")
    if not trainer.accelerator.is_main_process:
        return
    folder = f"{args.output_dir}/adapter"
    trainer.save_model(folder)
    merged = PeftModel.from_pretrained(load_model(language.model), folder).merge_and_unload()
    prompt = tokenizer(language.prompt, return_tensors="pt", return_token_type_ids=False)
    line = merged.eval().generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    print(f"reloaded and merged, it goes on: {tokenizer.decode(line)!r}")


if __name__ == "__main__":
    main()
