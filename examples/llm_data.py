"""Texts as tokens for a causal language model: chats, prompts with completions, plain text.

A row's columns say what it is:

    messages                     a chat, [{"role": "user", "content": …}, …]; answers count
    prompt, completion           texts, or the messages of a chat; the completion counts
    instruction, (input,) output one question and its answer, which counts
    text                         counts as a whole, and is cut into pieces
"""

from __future__ import annotations

import itertools
import json
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

#: Labels that do not count.
IGNORED = -100
#: A chat, for tokenizers that have no template of their own.
PLAIN_CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' and eos_token %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_ANSWERS, _INPUTS = ("output", "response", "answer"), ("input", "context")
_CHARACTERS = 8  # of a token, at most on average
#: Of the standard library: no code of its own.
_NO_CLIENTS = ("test", "idlelib", "site-packages", "dist-packages", "ensurepip", "lib2to3")

Tokens = tuple[list[int], list[int]]


def load_rows(data: str, config: str | None, text_column: str) -> Dataset | dict[str, Dataset]:
    """The rows of a file or a Hub data set; ``stdlib``: the packages of Python, as clients."""
    if data == "stdlib":
        return {name: Dataset.from_dict({text_column: [t]}) for name, t in standard_library()}
    if data == "manual":
        return Dataset.from_dict({text_column: ["\n".join(topics.values())]})
    path = Path(data)
    if path.suffix in (".json", ".jsonl") and path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        return Dataset.from_list([json.loads(line) for line in lines if line.strip()])
    if path.is_file():
        return Dataset.from_dict({text_column: [path.read_text(encoding="utf-8")]})
    return load_dataset(data, config, split="train")


def standard_library() -> Iterator[tuple[str, str]]:
    """The sources of each module and package of this Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.iterdir()):
        if path.name in _NO_CLIENTS or path.name.startswith("__"):
            continue
        files = [path] if path.suffix == ".py" else sorted(path.glob("**/*.py"))
        own = [f for f in files if not {"test", "tests"} & set(f.relative_to(root).parts)]
        if own:
            yield path.stem, "\n".join(f.read_text("utf-8", errors="replace") for f in own)


def divided(rows: Dataset, num_clients: int, client_column: str | None) -> dict[str, Dataset]:
    """Rows by client: those of the largest groups of a column, or one passage after the other."""
    if client_column is None:
        parts = torch.arange(len(rows)).tensor_split(num_clients)
        return {str(i): rows.select(part.tolist()) for i, part in enumerate(parts)}
    groups: dict[str, list[int]] = defaultdict(list)
    for position, owner in enumerate(rows[client_column]):
        groups[str(owner)].append(position)
    largest = sorted(groups, key=lambda name: (-len(groups[name]), name))[:num_clients]
    return {name: rows.select(groups[name]) for name in largest}


def tokenized(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    most: int,
    text_column: str = "text",
    packing: bool = False,
) -> Dataset:
    """Rows as ``input_ids`` and ``labels``, of which only answers count.

    Args:
        rows: see the module.
        tokenizer: with a chat template, or :data:`PLAIN_CHAT` is used.
        max_length: tokens of an example; of a chat the rest is cut off, plain text goes on in the
            next example.
        most: examples, at most.
        text_column: the column of plain text.
        packing: put chats one after the other into examples of ``max_length``.
    """
    if not is_chat(rows):
        examples = _pieces(rows[text_column], tokenizer, max_length)
    else:
        pairs = (_answered(row, tokenizer) for row in rows)
        examples = _packed(pairs, max_length) if packing else _cut(pairs, max_length)
    found = list(itertools.islice(examples, most))
    return Dataset.from_dict(
        {"input_ids": [ids for ids, _ in found], "labels": [labels for _, labels in found]}
    )


def held_out(clients: Mapping[str, Dataset]) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Every client's examples, and every tenth of them (one at least) held out."""
    train, held = {}, {}
    for name, rows in clients.items():
        out = list(range(9, len(rows), 10)) or [len(rows) - 1]
        train[name] = rows.select([i for i in range(len(rows)) if i not in set(out)])
        held[name] = rows.select(out)
    return train, held


def together(parts: Iterable[Dataset]) -> Dataset:
    """The rows of all."""
    return concatenate_datasets(list(parts))


class Padded:
    """Makes a batch of examples of unequal length, padded on the right.

    Args:
        pad: the token; it is not attended to, and counts for nothing.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each (rows, longest)."""
        longest = max(len(row["input_ids"]) for row in rows)

        def column(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([r[name] + [fill] * (longest - len(r[name])) for r in rows])

        mask = [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
        return {
            "input_ids": column("input_ids", self.pad),
            "attention_mask": torch.tensor(mask),
            "labels": column("labels", IGNORED),
        }


def chat_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A question as the model is asked it."""
    return _templated([{"role": "user", "content": text}], tokenizer, asked=True)


def is_chat(rows: Dataset) -> bool:
    """Whether rows have questions and answers, not plain text."""
    columns = set(rows.column_names)
    return bool({"messages", "instruction"} & columns) or {"prompt", "completion"} <= columns


def _answered(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """A row's tokens, and labels of what is answered in it."""
    if row.get("messages"):
        return _chat(row["messages"], 0, tokenizer)
    if "prompt" in row and not isinstance(row["prompt"], str):
        return _chat([*row["prompt"], *row["completion"]], len(row["prompt"]), tokenizer)
    if "prompt" in row:
        asked = _ids(row["prompt"], tokenizer)
        whole = _ids(row["prompt"] + row["completion"], tokenizer)
        whole += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return whole, _counted(asked, whole)
    question = "\n\n".join([row["instruction"], *(row[n] for n in _INPUTS if row.get(n))])
    answer = next((row[n] for n in _ANSWERS if row.get(n)), None)
    if answer is None:
        raise ValueError(f"a row has an instruction and none of {_ANSWERS}: {sorted(row)}")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _chat(turns, 1, tokenizer)


def _chat(
    messages: Sequence[Mapping[str, str]], first: int, tokenizer: PreTrainedTokenizerBase
) -> Tokens:
    """A chat's tokens; what the assistant says from the ``first`` message on counts."""
    whole = _templated(messages, tokenizer)
    labels = [IGNORED] * len(whole)
    for i, message in enumerate(messages):
        if i >= first and message["role"] == "assistant":
            before = _templated(messages[:i], tokenizer, asked=True) if i else []
            start = _common(before, whole)
            end = _common(_templated(messages[: i + 1], tokenizer), whole)
            labels[start:end] = whole[start:end]
    return whole, labels


def _templated(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, asked: bool = False
) -> list[int]:
    return tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=asked, return_dict=False,
        chat_template=None if tokenizer.chat_template else PLAIN_CHAT,
    )  # fmt: skip


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _counted(asked: list[int], whole: list[int]) -> list[int]:
    start = _common(asked, whole)
    return [IGNORED] * start + whole[start:]


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with alike: where they meet, tokens may merge."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)


def _cut(pairs: Iterable[Tokens], max_length: int) -> Iterator[Tokens]:
    """Examples of at most so many tokens; those of which nothing counts are left out."""
    for ids, labels in pairs:
        if any(label != IGNORED for label in labels[1:max_length]):
            yield ids[:max_length], labels[:max_length]


def _packed(pairs: Iterable[Tokens], max_length: int) -> Iterator[Tokens]:
    """Examples one after the other, in pieces of so many tokens; the last one is left out."""
    ids: list[int] = []
    labels: list[int] = []
    for more, counted in pairs:
        ids += more
        labels += [IGNORED, *counted[1:]]  # what comes before a chat does not predict its start
        while len(ids) >= max_length:
            if any(label != IGNORED for label in labels[1:max_length]):
                yield ids[:max_length], labels[:max_length]
            ids, labels = ids[max_length:], labels[max_length:]


def _pieces(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[Tokens]:
    """Plain text in pieces of so many tokens; the last one is left out."""
    ids: list[int] = []
    step = _CHARACTERS * max_length * 64
    for text in texts:
        for start in range(0, len(text), step):
            ids += _ids(text[start : start + step], tokenizer)
            while len(ids) >= max_length:
                yield ids[:max_length], ids[:max_length]
                ids = ids[max_length:]
