"""Builds the CUDA C++ extension on first use and keeps it for later processes.

The library is cached under the hash of its sources and of everything its binary interface depends on,
so a new PyTorch, CUDA, Python or GPU never meets an old build. A file lock lets one of several
processes build while the others wait.
"""

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
_NAME = "neuroexapt_cuda"


@functools.cache
def extension() -> ModuleType:
    """The compiled extension, built now if no earlier process has done so.

    Raises:
        RuntimeError: the compiler is missing or fails; the message names the log that holds its output.
    """
    from filelock import FileLock

    library = _cache_directory() / f"{_NAME}-{_fingerprint()}.so"
    with FileLock(library.with_suffix(".lock")):
        if library.exists():
            return _load(library)
        logger.warning("building the CUDA kernels; this takes a minute or so, once per machine")
        return _build(library)


def _cache_directory() -> Path:
    """The user's cache, or a folder of this process where that cannot be written."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neuroexapt"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        logger.warning("the CUDA kernels are built anew in every process: %s", error)
        return Path(tempfile.mkdtemp(prefix="neuroexapt-"))
    return directory


def _fingerprint() -> str:
    parts = [path.read_text() for path in sorted(SOURCES.iterdir())]
    parts += [torch.__version__, str(torch.version.cuda), _architecture()]
    parts.append(str(sysconfig.get_config_var("EXT_SUFFIX")))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _build(library: Path) -> ModuleType:
    """Compile in a scratch folder and move the result into place, so no half-built library is loaded."""
    from torch.utils.cpp_extension import load

    with tempfile.TemporaryDirectory(dir=library.parent) as scratch, _ninja_on_path():
        try:
            module = load(
                _NAME,
                # Side by side. None includes PyTorch's headers, which would take longer than all the rest.
                sources=[str(path) for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".cu")],
                extra_cuda_cflags=[f"-arch={_architecture()}"],
                build_directory=scratch,
            )
        except Exception as error:  # a missing compiler and a failing one raise different types
            raise RuntimeError(_keep_log(library.with_suffix(".log"), str(error))) from error
        shutil.move(Path(scratch) / f"{_NAME}.so", library)
    return module


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """PyTorch looks for ``ninja`` on PATH, where an environment that isn't activated does not put it."""
    import ninja

    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, path])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _keep_log(log: Path, output: str) -> str:
    """Write the build's output to ``log``; return the line of it that says most."""
    log.write_text(output)
    lines = output.splitlines()
    failed = next((i for i, line in enumerate(lines) if line.startswith("FAILED:")), None)
    # ninja prints the target that failed, its command, then what that command said.
    line = lines[0] if failed is None else lines[failed + 2]
    return f"{line.strip()} (all of it: {log})"


def _load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
