"""Checks of flags that several commands share."""

from tessera_shared.errors import ParityError


def check_device(device: str) -> None:
    """Refuse a device that no half runs on; whether it is there, the framework says."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ParityError(f"device = {device!r}: expected cpu or cuda, because both halves run there; try --device cpu")
