"""The one legend of shape letters. An array's name ends in its shape: `x_BTD`, `logits_BTV`, `keys_BSKH`.

Digits are literal sizes (`mean_BT1`). `docs/dims.md` is this table for people; `tests/house` holds the two together.
"""

import re

LEGEND: dict[str, str] = {
    "B": "rows of a batch",
    "T": "query positions",
    "S": "key positions",
    "X": "packed positions of many requests",
    "D": "model width",
    "F": "feed-forward width",
    "N": "query heads",
    "K": "key/value heads",
    "G": "query heads per key/value head (N / K)",
    "H": "head width",
    "V": "vocabulary",
    "L": "layers",
    "P": "pages",
    "Z": "positions in a page",
    "R": "ranks",
    "E": "experts",
}

_SUFFIX = re.compile(r"_([A-Z0-9]+)$")


def suffix_of(name: str) -> str | None:
    """Return the shape suffix of an array's name, or None: `x_BTD` -> `"BTD"`, `eps` -> None."""
    match = _SUFFIX.search(name)
    if match is None or not all(letter.isdigit() or letter in LEGEND for letter in match[1]):
        return None
    return match[1]


def shape_of(name: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Return the shape that an array's name promises under `sizes`: `shape_of("x_BTD", {"B": 2, ...})`."""
    suffix = suffix_of(name)
    if suffix is None:
        raise ValueError(f"name = {name!r}: expected a shape suffix from the legend, such as x_BTD")
    return tuple(int(letter) if letter.isdigit() else sizes[letter] for letter in suffix)
