"""Checkpoints: nested states as one safetensors file, written atomically, verified when read.

Tensors keep their exact bits. Everything else of the state is JSON in the file's header, so reading a
checkpoint never runs code from it. A digest over both reveals damage.
"""

import contextlib
import errno
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from neuroexapt.errors import UserError

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (dicts, lists, JSON scalars and tensors, keys str or int) so that ``path`` is never
    half written.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_flatten(state, "", tensors))
    metadata = {"format": str(FORMAT), "tree": tree, "digest": _digest(tree, tensors)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote, tensors on the CPU. A damaged or foreign file is a UserError."""
    try:
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        (length,) = struct.unpack("<Q", content[:8])
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        tree, digest, file_format = metadata["tree"], metadata["digest"], int(metadata["format"])
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}") from error
    except Exception as error:  # the reader's errors on a damaged file are of many kinds
        raise UserError(
            f"{path} is no readable checkpoint ({_one_line(error)}); it may be damaged"
        ) from error
    if file_format != FORMAT:
        raise UserError(f"{path} has checkpoint format {file_format}, this version reads {FORMAT}")
    if digest != _digest(tree, tensors):
        raise UserError(f"{path} is damaged: its content does not match its digest")
    return _unflatten(json.loads(tree), tensors)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace ``path`` in one step: whoever reads it, and a crash at any moment, sees the old or the new
    content.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # as on a file system that is read-only
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    advice = "make room or choose" if error.errno == errno.ENOSPC else "choose"
    return UserError(
        f"cannot write {path}: {error.strerror or error}; {advice} another place with --out. "
        "What was saved before is intact"
    )


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON with every tensor moved to ``tensors`` and replaced by a reference."""
    if isinstance(value, Tensor):
        # Cloned, since safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        # As pairs, since the states of optimizers have integers for keys.
        return {"dict": [[k, _flatten(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_flatten(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
    assert value is None or isinstance(value, (str, int, float, bool)), f"{name}: {type(value)}"
    return value


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _unflatten(v, tensors) for k, v in content}
    items = [_unflatten(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def _digest(tree: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
