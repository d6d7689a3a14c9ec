"""What `parity run` looks at, in order: cheap and local first, so that the first red line is the nearest to its
cause."""

from tessera_parity.subjects import (
    block,
    decode,
    files,
    forward,
    gradients,
    kernels,
    laws,
    losses,
    model,
    native,
    ops,
    optimizer,
    rounding,
    streams,
    text,
    trajectory,
    witness,
)
from tessera_parity.subjects.context import Subject

SUBJECTS: tuple[Subject, ...] = (
    files.SUBJECT,
    streams.SUBJECT,
    text.SUBJECT,
    ops.SUBJECT,
    block.SUBJECT,
    forward.SUBJECT,
    losses.SUBJECT,
    gradients.SUBJECT,
    optimizer.SUBJECT,
    rounding.SUBJECT,
    decode.SUBJECT,
    laws.SUBJECT,
    native.SUBJECT,
    kernels.SUBJECT,
    trajectory.SUBJECT,
    model.SUBJECT,
    witness.SUBJECT,
)
