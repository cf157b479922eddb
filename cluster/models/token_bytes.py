"""Says which bytes each token of a tokenizer stands for, and writes bytes in its tokens.

Bytes and not strings: a token may hold part of a character, and a string shows such parts as the same sign. Two
families of tokenizers spell their bytes out: byte-level ones (GPT-2, Llama 3, Qwen), whose letters are bytes, and those
in the manner of SentencePiece (Llama 2, Gemma, Mistral), with "▁" for a space and "<0xE2>" for bytes without a token.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cluster.contracts.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What stands before a text, so that a tokenizer which begins every text with a space puts it there.
ANCHORS = ("", "\n", "a")
THINK_TAGS = (b"<think>", b"</think>")  # read in a text even where a tokenizer calls them special


class TokenBytes:
    """Translates between the ids of one tokenizer and bytes."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", model: str) -> None:
        """Read the tokenizer of a model; raise ModelError if its tokens do not say their bytes."""
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(f"model '{model}': {_REFUSAL}; it has no tokenizer.json")
        described = backend.to_str()
        self._writer = Tokenizer.from_str(described)
        self._writer.no_truncation()
        self._writer.no_padding()
        self._writer.encode_special_tokens = True  # the text "</s>" is no end
        added = self._writer.get_added_tokens_decoder()
        spell = _speller(model, json.loads(described))
        self.of_id: dict[int, bytes] = {
            token_id: spell(token) for token, token_id in self._writer.get_vocab(with_added_tokens=False).items()
        }
        self.of_id |= {
            token_id: token.content.encode()
            for token_id, token in added.items()
            if not BYTE_TOKEN.fullmatch(token.content)
        }
        special = {
            token_id: token.content
            for token_id, token in added.items()
            if token.special and not BYTE_TOKEN.fullmatch(token.content)
        }
        self._tags = {text.encode(): token_id for token_id, text in special.items() if text.encode() in THINK_TAGS}
        # Tokens that no text holds, by what they are called.
        self.special = {token_id: text for token_id, text in special.items() if text.encode() not in THINK_TAGS}
        self.roles: Mapping[str, int] = _roles(tokenizer)

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """Return the ordinary token of each byte string; of several, one that is no single byte's fallback."""
        vocabulary = self._writer.get_vocab(with_added_tokens=True)
        fallbacks = {token_id for token, token_id in vocabulary.items() if BYTE_TOKEN.fullmatch(token)}
        ordinary = sorted(self.of_id.keys() - self.special.keys(), key=lambda one: (one not in fallbacks, -one))
        return {self.of_id[token_id]: token_id for token_id in ordinary if self.of_id[token_id]}

    def read(self, token_ids: list[int]) -> list[bytes] | None:
        """Return the bytes of each token; None if one is none of the tokenizer's."""
        spelled = [self.of_id.get(token_id) for token_id in token_ids]
        return None if None in spelled else spelled  # type: ignore[return-value]

    def write(self, text: bytes) -> list[int] | None:
        """Return tokens that stand for exactly these bytes; None if the tokenizer would change or lacks some."""
        token_ids: list[int] = []
        for part in self._parts(text):
            written = self._write_text(part) if isinstance(part, str) else self._write_bytes(part)
            if written is None:
                return None
            token_ids += written
        return token_ids

    def _parts(self, text: bytes) -> Iterator[str | bytes]:
        """Cut the bytes into texts and what is none: think tags, and bytes that are no UTF-8."""
        if not self._tags:
            yield from _decodable(text)
            return
        for piece in re.split(b"(" + b"|".join(map(re.escape, self._tags)) + b")", text):
            yield from [piece] if piece in self._tags else _decodable(piece)

    def _write_text(self, text: str) -> list[int] | None:
        expected = text.encode()
        for anchor in ANCHORS:
            token_ids = self._writer.encode(anchor + text, add_special_tokens=False).ids
            spelled = [self.of_id[token_id] for token_id in token_ids]
            # From the end, for a space may stand before the anchor.
            length, first = 0, len(token_ids)
            while first and length < len(expected):
                first -= 1
                length += len(spelled[first])
            if b"".join(spelled[first:]) == expected and (anchor or not first):
                return list(token_ids[first:])
        return None

    def _write_bytes(self, part: bytes) -> list[int] | None:
        if part in self._tags:
            return [self._tags[part]]
        token_ids = [self.ids.get(bytes([byte])) for byte in part]
        return None if None in token_ids else token_ids  # type: ignore[return-value]


_REFUSAL = "the bytes of its tokens are not known, so that they cannot be compared with another tokenizer's"


def _speller(model: str, described: Mapping[str, Any]) -> Any:
    """Return a function from a token's text to its bytes, by the decoder that the tokenizer has."""
    decoders = list(_flat(described.get("decoder")))
    kinds = {decoder["type"] for decoder in decoders}
    if "ByteLevel" in kinds:
        letters = _byte_letters()
        return lambda token: b"".join(letters.get(letter, letter.encode()) for letter in token)
    spaces = [
        decoder.get("replacement") or decoder["pattern"]["String"]
        for decoder in decoders
        if decoder["type"] == "Metaspace" or (decoder["type"] == "Replace" and decoder.get("content") == " ")
    ]
    if not spaces or described["model"]["type"] not in ("BPE", "Unigram"):
        kind = described["model"]["type"] + (f", decoded by {', '.join(sorted(kinds))}" if kinds else "")
        raise ModelError(
            f"model '{model}': {_REFUSAL}; its tokenizer is {kind}; expected a byte-level one, or BPE or Unigram in "
            "the manner of SentencePiece"
        )
    space = spaces[0]

    def spell(token: str) -> bytes:
        byte = BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(space, " ").encode()

    return spell


def _flat(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flat(part)
    else:
        yield decoder


def _byte_letters() -> dict[str, bytes]:
    """Return the byte of each letter of byte-level tokenizers: printable bytes are themselves (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): bytes([byte]) for byte in printable} | {
        chr(256 + number): bytes([byte]) for number, byte in enumerate(others)
    }


def _decodable(text: bytes) -> Iterator[str | bytes]:
    while text:
        try:
            yield text.decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield text[: error.start].decode()
            yield text[error.start : error.end]
            text = text[error.end :]


def _roles(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    roles = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "pad", "unk")}
    return {name: token_id for name, token_id in roles.items() if token_id is not None}
