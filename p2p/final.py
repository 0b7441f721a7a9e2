"""The final weights, as a file that the plain model loads in one line."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

FINAL_NAME = "final.safetensors"


def write_final(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `folder`/final.safetensors, whole or not at all; names as in `state_dict()`."""
    from safetensors.torch import save

    draft = folder / f".{FINAL_NAME}.{os.getpid()}"
    try:
        with draft.open("wb") as file:
            file.write(save(tensors))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / FINAL_NAME)
    finally:
        draft.unlink(missing_ok=True)
