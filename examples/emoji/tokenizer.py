"""CLIP's byte-pair tokenizer, cut down to the merges that the captions need.

Captions give the same pieces as with all 49,408 tokens; any other text still splits, into smaller pieces. The token
embedding shrinks from 12.6 to about 1.6 million parameters.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer

MARKS = ("<|startoftext|>", "<|endoftext|>")
MAX_TOKENS = 77
_FULL_MERGES = 49152 - 256 - 2

Merge = tuple[str, str]


def read_merges(text: str) -> list[Merge]:
    """The merges of CLIP's ``bpe_simple_vocab_16e6.txt``, first to apply first; the file holds more than CLIP uses."""
    lines = text.split("\n")[1 : _FULL_MERGES + 1]
    return [(left, right) for left, right in (line.split() for line in lines)]


def byte_symbols() -> list[str]:
    """One printable character for each of the 256 bytes, in CLIP's order (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def build_tokenizer(merges: list[Merge]) -> CLIPTokenizer:
    """A tokenizer of the 256 byte symbols, the same at a word's end, one token per merge and the two marks."""
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(merge) for merge in merges), *MARKS]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, bos_token=MARKS[0], eos_token=MARKS[1], unk_token=MARKS[1],
        pad_token=MARKS[1], model_max_length=MAX_TOKENS,
    )  # fmt: skip


def prune_merges(merges: list[Merge], texts: Iterable[str]) -> list[Merge]:
    """The merges behind the tokens of ``texts``, in their order: each token's own, and those of its two parts."""
    parts = {"".join(merge): merge for merge in merges}
    full = build_tokenizer(merges)
    open_tokens = {token for text in texts for token in full.tokenize(text)}
    needed: set[str] = set()
    while open_tokens:
        token = open_tokens.pop()
        if token in parts and token not in needed:
            needed.add(token)
            open_tokens.update(parts[token])
    return [merge for merge in merges if "".join(merge) in needed]


def save_tokenizer(merges: list[Merge], folder: Path) -> None:
    """``folder`` as Stable Diffusion's pipelines have it: vocab.json and merges.txt beside tokenizer.json."""
    tokenizer = build_tokenizer(merges)
    tokenizer.save_pretrained(folder)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.json").write_text(json.dumps(dict(vocabulary), ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
