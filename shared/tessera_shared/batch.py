"""`Batch`: the integers of one micro-batch, as the data side hands them to either half."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Token ids with what the model must know about each position. Arrays are int32; halves convert them.

    `labels_BT[b, t]` is the token after `token_ids_BT[b, t]` in the same document, or `objectives.IGNORE_INDEX` where
    there is none. `positions_BT` counts from 0 in each document. `segments_BT` numbers the documents of a row from 0;
    a negative segment is padding: nothing attends to it and its label is ignored.
    """

    token_ids_BT: np.ndarray
    labels_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray
