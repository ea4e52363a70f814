"""Prompts as the token ids that a text encoder was trained with, read from the bundle's ``tokenizer.json``.

The ids are those of transformers' ``CLIPTokenizer(padding="max_length", truncation=True)``.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.pipeline_spec import TextEncoder
from qdm_deploy.errors import BundleError, EnvironmentProblem, InputError

__all__ = ["MAX_CHARACTERS", "PromptTokenizer"]

# Far more than any text encoder reads; what a server may be sent is bounded by it.
MAX_CHARACTERS = 20_000
_AGAIN = "verify the bundle, or build it again"


class PromptTokenizer:
    """The tokenizer of one text encoder.

    Args:
        path: its ``tokenizer.json``.
        spec: the text encoder.

    Raises:
        BundleError: the file is missing or broken, or is that of another text encoder.
        EnvironmentProblem: the tokenizers package cannot be imported.
    """

    def __init__(self, path: Path, spec: TextEncoder) -> None:
        try:
            # Here, so that models without prompts do not wait for it.
            from tokenizers import Tokenizer
        except ImportError as error:
            raise EnvironmentProblem(
                f"prompts need the tokenizers package, which cannot be imported ({error}): "
                "pip install --force-reinstall tokenizers"
            ) from error
        if not path.is_file():
            raise BundleError(f"there is no tokenizer {path}; {_AGAIN}")
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise BundleError(f"{path} cannot be read as a tokenizer ({error}); {_AGAIN}") from error
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if size > spec.vocabulary:
            raise BundleError(f"{path} has {size} tokens, and {spec.name} knows {spec.vocabulary}; {_AGAIN}")
        # Rows are begun, cut, ended and filled up here, whatever the file says.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._spec = spec

    @property
    def room(self) -> int:
        """Tokens of text in a row, without the first and the last one."""
        return self._spec.max_length - 2

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, as many as it has, without those that begin and end a row.

        Raises:
            InputError: the text is too long, or is no Unicode text.
        """
        if len(text) > MAX_CHARACTERS:
            raise InputError(f"a prompt has {len(text)} characters; at most {MAX_CHARACTERS} are allowed: shorten it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt {text[:60]!a} is no Unicode text ({error.reason}); remove that") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def rows(self, tokens: list[int], chunks: int = 1) -> NDArray[np.int64]:
        """Tokens as rows of ``input_ids``, [chunks, max_length] int64; what has no room is left out."""
        spec, room = self._spec, self.room
        rows = np.full((chunks, spec.max_length), spec.pad_id, np.int64)
        for i, row in enumerate(rows):
            part = tokens[i * room : (i + 1) * room]
            row[0], row[1 + len(part)] = spec.bos_id, spec.eos_id
            row[1 : 1 + len(part)] = part
        return rows

    def text(self, tokens: list[int]) -> str:
        """Tokens for people to read."""
        decoded: str = self._tokenizer.decode(tokens)
        return decoded.replace("</w>", " ").strip()
