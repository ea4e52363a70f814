"""A small CLIP-like vocabulary and text encoder, made here, in the layout of a diffusers folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = ("cat", "red", "photo", "of", "the", "dog", "blue")
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_characters() -> list[str]:
    """The characters that stand for bytes in CLIP's vocabulary, in its order: "!" is the first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(rest)))]


def merges() -> list[tuple[str, str]]:
    """Pairs that build the words up, letter by letter."""
    found: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], 1):
            right = letter if i < len(word) - 1 else f"{letter}</w>"
            if (left, right) not in found:
                found.append((left, right))
            left += letter
    return found


def write_tokenizer(folder: Path, *, pad: str = EOS, files: str = "slow") -> None:
    folder.mkdir(parents=True)
    characters = byte_characters()
    tokens = [*characters, *(f"{one}</w>" for one in characters), *("".join(pair) for pair in merges()), BOS, EOS]
    options = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": BOS, "eos_token": EOS,
        "unk_token": EOS, "pad_token": pad,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if files == "fast":
        from transformers import CLIPTokenizer

        reader = CLIPTokenizer.from_pretrained(folder)
        for path in list(folder.iterdir()):
            path.unlink()
        reader.save_pretrained(folder)


def write_text_encoder(folder: Path, *, eos_token_id: int, vocabulary: int, width: int = 32) -> None:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, eos_token_id=eos_token_id, bos_token_id=vocabulary - 2, hidden_act="quick_gelu",
        initializer_factor=4.0,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def vocabulary_size() -> int:
    return 512 + len(merges()) + 2


@pytest.fixture(scope="session")
def write_diffusers_text(vocabulary_size: int) -> Callable[..., Path]:
    """Writes ``text_encoder/`` and ``tokenizer/`` into a folder."""

    def write(folder: Path, *, pad: str = EOS, files: str = "slow", old: bool = False) -> Path:
        write_tokenizer(folder / "tokenizer", pad=pad, files=files)
        eos = 2 if old else vocabulary_size - 1
        write_text_encoder(folder / "text_encoder", eos_token_id=eos, vocabulary=vocabulary_size)
        return folder

    return write


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, write_diffusers_text: Callable[..., Path]) -> Path:
    """A diffusers folder with a tiny text encoder."""
    return write_diffusers_text(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, source: Path) -> tuple[Path, Any]:
    """The folder of a bundle with the exported encoder, and its component."""
    from qdm_export.text_encoder import export_text_encoder, load_text_encoder

    root = tmp_path_factory.mktemp("bundle")
    return root, export_text_encoder(load_text_encoder(source), root)
