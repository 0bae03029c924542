"""Building the CUDA extension, without a GPU: a stand-in takes the compiler's place where one is needed."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch.utils.cpp_extension

from neuroexapt.cuda_ops import build


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_architecture", lambda: "sm_90")
    build.extension.cache_clear()
    yield tmp_path / "neuroexapt"
    build.extension.cache_clear()


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """Replace the compiler and the loader; one entry for each build."""
    builds: list[str] = []

    def compile_nothing(name, build_directory, **_):
        builds.append(name)
        (Path(build_directory) / f"{name}.so").write_text("")
        return ModuleType("built")

    monkeypatch.setattr(torch.utils.cpp_extension, "load", compile_nothing)
    monkeypatch.setattr(build, "_load", lambda library: ModuleType("loaded"))
    return builds


def test_importing_builds_nothing_and_needs_no_triton():
    code = "import sys, neuroexapt.functional, neuroexapt.cuda_ops.build as b\n"
    code += "assert b.extension.cache_info().currsize == 0\n"
    code += "assert not {'triton', 'torch._dynamo', 'torch.utils.cpp_extension'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_later_process_loads_what_an_earlier_one_built(cache, built):
    assert build.extension().__name__ == "built"
    build.extension.cache_clear()  # as in a new process
    assert build.extension().__name__ == "loaded"
    assert len(built) == 1


@pytest.mark.parametrize("what", ["architecture", "torch", "source"])
def test_another_gpu_version_or_source_is_built_anew(cache, built, monkeypatch, tmp_path, what):
    build.extension()
    build.extension.cache_clear()
    if what == "architecture":
        monkeypatch.setattr(build, "_architecture", lambda: "sm_80")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "99")
    else:
        changed = shutil.copytree(build.SOURCES, tmp_path / "csrc")
        (changed / "softmax_sum.h").write_text("// changed")
        monkeypatch.setattr(build, "SOURCES", changed)
    build.extension()
    assert len(built) == 2


def test_of_several_that_need_it_one_builds(cache, built):
    barrier = threading.Barrier(4)

    def build_now():
        barrier.wait()
        build.extension.__wrapped__()  # as another process, which does not share the cache of results

    threads = [threading.Thread(target=build_now) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_a_failing_compiler_leaves_its_output_and_no_library(cache, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Error building\nFAILED: cuda.o\nnvcc -c cuda.cu\ncuda.cu(7): no such thing\nmore")

    monkeypatch.setattr(torch.utils.cpp_extension, "load", fail)
    with pytest.raises(RuntimeError, match=r"^cuda.cu\(7\): no such thing \(all of it: .*\.log\)"):
        build.extension()
    (log,) = cache.glob("*.log")
    assert log.read_text().endswith("more")
    assert list(cache.glob("*.so")) == []
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_a_missing_compiler_is_named(cache, monkeypatch):
    def fail(*_, **__):
        raise OSError("CUDA_HOME environment variable is not set.")

    monkeypatch.setattr(torch.utils.cpp_extension, "load", fail)
    with pytest.raises(RuntimeError, match="CUDA_HOME environment variable is not set"):
        build.extension()


def test_without_a_writable_cache_it_is_built_in_a_folder_of_its_own(cache, built, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/not-writable")
    assert build.extension().__name__ == "built"
    assert "built anew in every process" in caplog.text
