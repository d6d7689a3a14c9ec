"""Text of token ids that come one at a time: what can be said already, and never half a character."""

from collections.abc import Iterable, Iterator, Sequence

from tessera_shared.tokens import Tokenizer

UNFINISHED = "\ufffd"
"""What a tokenizer decodes bytes to that are no character, or not yet one."""


def stream_text(
    codec: Tokenizer, ids: Iterable[int], *, context: Sequence[int] = (), keep_special: bool = True
) -> Iterator[str]:
    """Yield the text of `ids` in pieces, after `context`, whose own text is not repeated. No piece is empty.

    A character may be spread over several tokens: its piece comes with the last of them. Bytes that never become one
    come as U+FFFD with the next character, or at the end. The context decides about a space at the seam, which some
    tokenizers leave out where a text begins. Each token is decoded with the piece before it, not with the whole text.
    """
    window, num_said = list(context), len(context)
    said = text = codec.decode(window, keep_special=keep_special)
    for token in ids:
        window.append(token)
        text = codec.decode(window, keep_special=keep_special)
        if len(text) > len(said) and not text.endswith(UNFINISHED):
            yield text[len(said) :]
            window = window[num_said:]  # the piece just said is context enough for the next
            num_said = len(window)
            said = text = codec.decode(window, keep_special=keep_special)
    if len(text) > len(said):
        yield text[len(said) :]
