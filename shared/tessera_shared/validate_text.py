"""Checks of text where it enters: bytes that are not UTF-8, strings that cannot become it, ids of another model."""

from tessera_shared.errors import DataError


def decode_utf8(data: bytes, name: str) -> str:
    """Return `data` as text, byte for byte (a byte-order mark stays). DataError names the file and the byte offset."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: byte {error.start} = 0x{data[error.start]:02x}: expected UTF-8, because text is read as it is "
            "and never guessed; try converting the file, or leaving it out"
        ) from None


def check_text(text: str, name: str) -> str:
    """Return `text`. DataError for a lone surrogate, which JSON and Python can hold and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}: character {error.start} = U+{ord(text[error.start]):04X}: expected text that UTF-8 can hold, "
            "because a surrogate alone is half a character; try removing it"
        ) from None
    return text


def check_vocabulary(num_ids: int, vocab_size: int, name: str) -> None:
    """Raise DataError unless every id of a tokenizer with `num_ids` ids is a row of a model's vocabulary.

    Fewer ids than rows are legal: many models pad their embedding.
    """
    if num_ids > vocab_size:
        raise DataError(
            f"{name}: {num_ids} ids: expected at most {vocab_size}, because the model's vocabulary has {vocab_size} "
            "rows; try the tokenizer.json that belongs to the model"
        )
