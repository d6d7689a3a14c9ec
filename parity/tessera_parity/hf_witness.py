"""Hugging Face transformers as a third witness, run in float64.

Its modeling code asks for `torch.float32` by name (norms, softmax, rotary tables). Inside `everything_in_float64` those
names mean float64, so the witness's own arithmetic runs at full precision and can be held to 1e-10; nothing of its
formulas is replaced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from tessera_shared.errors import MissingDependency
from tessera_shared.hf_config import config_from_spec
from tessera_shared.spec import ModelSpec


def require_transformers() -> Any:
    """Return the transformers module, or say in one line that it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency(
            "transformers = not installed: expected it for --against hf, because it is the third witness; "
            "try pip install 'tessera-testbed[hf,torch]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextmanager
def everything_in_float64() -> Iterator[None]:
    """Let `torch.float32`, `torch.float` and `Tensor.float` mean float64, for the witness's code alone."""
    import torch

    with (
        patch.object(torch, "float32", torch.float64),
        patch.object(torch, "float", torch.float64),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def build(spec: ModelSpec, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    """Return transformers' own model for `spec`, in float64, holding `arrays`."""
    transformers = require_transformers()
    import torch

    fields = config_from_spec(spec)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    config._attn_implementation = "eager"
    with everything_in_float64():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    state = {name: torch.from_numpy(np.array(value, dtype=np.float64)) for name, value in arrays.items()}
    if spec.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def open_directory(directory: Path) -> Any:
    """Open a model directory with `AutoModelForCausalLM.from_pretrained`, in float64."""
    transformers = require_transformers()
    import torch

    stored = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", attn_implementation="eager", local_files_only=True
    )
    with everything_in_float64():  # rebuilt, so that rotary tables are computed in float64 and not rounded before
        model = transformers.AutoModelForCausalLM.from_config(stored.config, dtype=torch.float64)
    model.load_state_dict({name: value.to(torch.float64) for name, value in stored.state_dict().items()})
    return model.eval()


def logits(model: Any, token_ids_BT: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return `logits_BTV` (float64) of the witness for `token_ids_BT`."""
    import torch

    with everything_in_float64(), torch.no_grad():
        out = model(input_ids=torch.from_numpy(token_ids_BT.astype(np.int64)), use_cache=False).logits
    return np.asarray(out.numpy(), dtype=np.float64)
