"""Token ids of prompts against transformers' own tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdm_deploy.components.tokenizer import MAX_CHARACTERS, PromptTokenizer
from qdm_deploy.errors import BundleError, InputError
from qdm_export.text_encoder import load_text_encoder

CASES = (
    "", " ", "a red cat", "A RED CAT", "cat!", "!", "!!!", "wow!! a cat!", "1234 cats, 5 dogs", "٣ cats", "½ cat",
    "the cat's dog isn't", "cat " * 200, "x" * 400, "photo\tof\n\nthe\u00a0dog", "שלום עולם", "مرحبا بالعالم", "猫と犬",
    "🐱🐶", "👩‍👩‍👧‍👦 family", "e\u0301 and é", "ΟΔΟΣ", "İstanbul",
    "<|startoftext|>cat<|endoftext|>", "\x00\x1c cat \ufeff", "\ufffd",
)  # fmt: skip
FORMS = {"slow": ("<|endoftext|>", "slow"), "fast": ("<|endoftext|>", "fast"), "exclamation": ("!", "fast"),
         "slow-exclamation": ("!", "slow")}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(
    tmp_path_factory: pytest.TempPathFactory, write_diffusers_text: Callable[..., Path]
) -> dict[str, tuple[PromptTokenizer, Any]]:
    """Ours, read from the file of a bundle, and transformers', read from the folder of the model."""
    from transformers import CLIPTokenizer

    made = {}
    for name, (pad, files) in FORMS.items():
        folder = write_diffusers_text(tmp_path_factory.mktemp("tokenizer") / name, pad=pad, files=files)
        model = load_text_encoder(folder)
        path = folder / "bundled.json"
        path.write_text(model.tokenizer_json, encoding="utf-8")
        made[name] = PromptTokenizer(path, model.spec), CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return made


def assert_equal_ids(ours: PromptTokenizer, theirs: Any, text: str) -> None:
    wanted = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
    assert ours.rows(ours.tokens(text))[0].tolist() == wanted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", CASES)
def test_ids_are_those_of_transformers(tokenizers: dict[str, Any], form: str, text: str) -> None:
    assert_equal_ids(*tokenizers[form], text)


@given(text=st.text(max_size=120))
def test_ids_are_those_of_transformers_for_any_text(tokenizers: dict[str, Any], text: str) -> None:
    for form in ("slow", "exclamation"):
        assert_equal_ids(*tokenizers[form], text)


def test_the_vocabulary_has_words_and_both_ways_to_fill_a_row(tokenizers: dict[str, Any]) -> None:
    eos, exclamation = tokenizers["slow"][0], tokenizers["exclamation"][0]
    assert len(eos.tokens("red cat")) == 2
    assert eos.rows([5])[0, -1] == eos.rows([5])[0, 2]
    assert exclamation.rows([5])[0, 3:].tolist() == [0] * 74
    # As a token of its own it is the same id wherever it stands; otherwise it is the end of a word.
    assert exclamation.tokens("!") == [0]
    assert eos.tokens("!") == [256]


def test_rows_of_several_chunks_each_begin_and_end(tokenizers: dict[str, Any]) -> None:
    ours = tokenizers["slow"][0]
    rows = ours.rows(list(range(100)), chunks=3)
    bos, eos = rows[0, 0], rows[0, -1]
    assert rows[0].tolist() == [bos, *range(75), eos]
    assert rows[1].tolist() == [bos, *range(75, 100), eos, *[eos] * 50]
    assert rows[2].tolist() == [bos, *[eos] * 76]


def test_text_of_tokens(tokenizers: dict[str, Any]) -> None:
    ours = tokenizers["slow"][0]
    assert ours.text(ours.tokens("The red cat, 42")) == "the red cat , 4 2"


def test_what_is_no_text_is_refused(tokenizers: dict[str, Any]) -> None:
    ours = tokenizers["slow"][0]
    with pytest.raises(InputError, match="no Unicode text"):
        ours.tokens("cat \ud800")
    with pytest.raises(InputError, match=f"at most {MAX_CHARACTERS} are allowed"):
        ours.tokens("x" * (MAX_CHARACTERS + 1))


def test_a_broken_or_foreign_file_is_refused(tokenizers: dict[str, Any], source: Path, tmp_path: Path) -> None:
    model = load_text_encoder(source)
    with pytest.raises(BundleError, match="there is no tokenizer"):
        PromptTokenizer(tmp_path / "tokenizer.json", model.spec)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        PromptTokenizer(path, model.spec)
    path.write_text(model.tokenizer_json, encoding="utf-8")
    with pytest.raises(BundleError, match="has 530 tokens, and text_encoder knows 10"):
        PromptTokenizer(path, model.spec.model_copy(update={"vocabulary": 10}))
