"""Tokenizers: byte-level BPE trained here, or any `tokenizer.json`. The work is done by the `tokenizers` library."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tessera_shared.atomic import replace_file
from tessera_shared.checksums import checksum_bytes
from tessera_shared.errors import DataError, FormatError
from tessera_shared.validate_text import check_text

END_OF_TEXT = "<|endoftext|>"
"""The one special token of a tokenizer that is trained here, id 0: it ends a document."""

END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")
"""What ends a document, in tokenizers made elsewhere; the first that is there counts."""

SMALLEST_VOCABULARY = 257
"""The 256 bytes and the end of text."""

_BATCH = 1000


class Tokenizer:
    """Text to token ids and back, exactly: `decode(encode(text)) == text` for every tokenizer trained here."""

    def __init__(self, text: str, name: str = "tokenizer.json") -> None:
        """Take over the text of a `tokenizer.json`. FormatError where the library does not understand it."""
        try:
            self._plain = tokenizers.Tokenizer.from_str(text)
            self._marked = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a file it cannot read
            raise FormatError(
                f"{name}: not a tokenizer ({str(error)[:80]}): expected Hugging Face's tokenizer.json; try another file"
            ) from None
        for inner in (self._plain, self._marked):
            inner.no_padding()  # a file may ask for a fixed length; a document has its own
            inner.no_truncation()
        self._plain.encode_special_tokens = True
        self.text = text
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have gaps
        self.end_id = next((vocabulary[name] for name in END_NAMES if name in vocabulary), None)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a `tokenizer.json`. FormatError names the file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise FormatError(
                f"{path}: cannot be read ({error.strerror}): expected a tokenizer.json; try a path that exists"
            ) from None
        except UnicodeDecodeError:
            raise FormatError(f"{path}: not UTF-8: expected a tokenizer.json; try fetching it again") from None
        return cls(text, str(path))

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train byte-level BPE (Sennrich et al. 2016 on bytes, with GPT-2's pre-split). Same texts, same tokenizer.

        Id 0 is `END_OF_TEXT`, then the 256 bytes, then merges. A short text may not have enough pairs for `vocab_size`;
        the tokenizer is then smaller. DataError below 257 ids or without text.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise DataError(
                f"vocab_size = {vocab_size}: expected >= {SMALLEST_VOCABULARY}, because every byte needs an id; try 512"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        counted = _Counted(texts)
        inner.train_from_iterator(counted.batches(), trainer)
        if not counted.characters:
            raise DataError("texts: empty: expected some text, because merges are counted in it; try another corpus")
        return cls(inner.to_str())

    def encode(self, text: str) -> list[int]:
        """Return the ids of a document's text. The name of a special token in it is text like any other."""
        return list(self._plain.encode(check_text(text, "text"), add_special_tokens=False).ids)

    def encode_documents(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield `encode(text)` for each text, in order, many at a time."""
        remaining = iter(texts)
        while batch := [check_text(text, "text") for text in islice(remaining, _BATCH)]:
            for encoding in self._plain.encode_batch(batch, add_special_tokens=False):
                yield list(encoding.ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt: names of special tokens are special, and the file's own template is applied."""
        return list(self._marked.encode(check_text(text, "prompt"), add_special_tokens=True).ids)

    def decode(self, ids: Iterable[int], *, keep_special: bool = True) -> str:
        """Return the text of token ids; bytes that are not UTF-8 together become U+FFFD."""
        text: str = self._plain.decode([int(token) for token in ids], skip_special_tokens=not keep_special)
        return text

    def save(self, path: Path | str) -> None:
        """Write a `tokenizer.json`, whole or not at all; a loaded one is written as it was read."""
        replace_file(Path(path), self.text.encode())

    @property
    def checksum(self) -> str:
        """XXH3-128 of the file's bytes."""
        return checksum_bytes(self.text.encode())


class _Counted:
    """Texts in batches for the trainer, with the number of characters that went by."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.characters = 0
        self._texts = iter(texts)

    def batches(self) -> Iterator[list[str]]:
        while batch := [check_text(text, "text") for text in islice(self._texts, _BATCH)]:
            self.characters += sum(len(text) for text in batch)
            yield batch
