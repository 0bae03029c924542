"""Checkpoints: nested states as one safetensors file, written atomically, verified when read.

Tensors keep their exact bits. Those of a dtype and device lie end to end in one, since a search network has
thousands, and to fetch and write them one by one takes longer than some epochs. Everything else of the state
is JSON in the file's header, so reading a checkpoint never runs code from it. A digest over both reveals
damage.
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

FORMAT = 2


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (dicts, lists, JSON scalars and tensors, keys str or int) so that ``path`` is never
    half written.
    """
    tensors: dict[str, list[Tensor]] = {}
    flat = _flatten(state, tensors)
    tree = json.dumps([flat, {kind: [part.numel() for part in parts] for kind, parts in tensors.items()}])
    packed = {kind: torch.cat(parts).cpu() for kind, parts in tensors.items()}
    metadata = {"format": str(FORMAT), "tree": tree, "digest": _digest(tree, packed)}
    write_atomically(path, safetensors.torch.save(packed, metadata))


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
        raise UserError(
            f"{path} has checkpoint format {file_format}, this version reads {FORMAT}; start anew"
        )
    if digest != _digest(tree, tensors):
        raise UserError(f"{path} is damaged: its content does not match its digest")
    flat, lengths = json.loads(tree)
    return _unflatten(flat, {kind: packed.split(lengths[kind]) for kind, packed in tensors.items()})


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


def _flatten(value: Any, tensors: dict[str, list[Tensor]]) -> Any:
    """JSON with every tensor moved to those alike, flattened, and replaced by which of them it is."""
    if isinstance(value, Tensor):
        kind = f"{value.dtype} {value.device}"
        alike = tensors.setdefault(kind, [])
        alike.append(value.detach().flatten())
        return {"tensor": [kind, len(alike) - 1, list(value.shape)]}
    if isinstance(value, dict):
        # As pairs, since the states of optimizers have integers for keys.
        return {"dict": [[k, _flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_flatten(v, tensors) for v in value]}
    assert value is None or isinstance(value, (str, int, float, bool)), f"{type(value)} in a checkpoint"
    return value


def _unflatten(value: Any, tensors: dict[str, tuple[Tensor, ...]]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        of_kind, index, shape = content
        return tensors[of_kind][index].reshape(shape).clone()  # what is left does not keep all others
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
