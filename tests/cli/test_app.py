import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from neuroexapt.cli.app import app, run_command
from neuroexapt.core.genotypes import DARTS_V2, Genotype
from neuroexapt.engine import checkpoint
from neuroexapt.engine.config import SearchConfig
from tests.engine.tiny import write_tiny_npz

TINY = [
    "--layers=3",
    "--init-channels=2",
    "--batch-size=8",
    "--epochs=1",
    "--train-epochs=1",
    "--backend=cpu",
]


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = run_command(app, [str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line with which these arguments are refused."""
    code, _, err = run(capsys, *arguments)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_npz(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture(scope="module")
def searched(data: Path) -> Path:
    out = data.parent / "run"
    assert run_command(app, ["search", f"--dataset=npz:{data}", f"--out={out}", "--quiet", *TINY]) == 0
    return out


def test_quiet_search_prints_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, err = run(capsys, "search", f"--dataset=npz:{data}", f"--out={tmp_path}/run", "--quiet", *TINY)
    assert (code, out, err) == (0, "", "")


def test_search_outside_a_terminal_prints_a_line_an_epoch(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, _, err = run(capsys, "search", f"--dataset=npz:{data}", f"--out={tmp_path}/run", *TINY)
    assert code == 0
    lines = err.splitlines()
    assert sum(line.startswith("search epoch 1/1  loss ") for line in lines) == 1
    assert sum(line.startswith(("inherit epoch", "scratch epoch")) for line in lines) == 2
    assert "\x1b" not in err
    assert "test accuracy" in lines[-1]


def test_derive_and_report(searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "derive", searched, "--out", tmp_path / "g.json")
    assert code == 0
    saved = json.loads((searched / "genotype.json").read_text())
    assert Genotype.from_text(out).to_dict() == json.loads((tmp_path / "g.json").read_text()) == saved
    code, out, _ = run(capsys, "report", searched, "--out", tmp_path / "page.html")
    assert code == 0
    assert "<html" in Path(out.strip()).read_text()


def test_evaluate_a_run(searched: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [a for a in TINY if not a.startswith("--train-epochs")]
    code, _, _ = run(
        capsys, "evaluate", f"--genotype={searched}", f"--dataset=npz:{data}", f"--out={tmp_path}/e",
        "--no-auxiliary", "--quiet", *arguments,
    )  # fmt: skip
    assert code == 0
    assert json.loads((tmp_path / "e" / "result.json").read_text())["test_accuracy"] >= 0


def test_config_file_and_overrides(
    data: Path, searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, _, _ = run(
        capsys, "search", "--config", searched / "config.json", "--out", tmp_path / "run", "--seed", 5
    )
    assert code == 0
    old, new = (json.loads((p / "config.json").read_text()) for p in (searched, tmp_path / "run"))
    assert {k for k in old if old[k] != new[k]} == {"seed"}


def test_original_options_keep_working(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, _, _ = run(
        capsys, "search", "--data", tmp_path, "--dataset", f"npz:{data}", "--batch_size", 8, "--epochs", 2,
        "--learning_rate", 0.03, "--arch_learning_rate", 0.002, "--init_channels", 2, "--layers", 3,
        "--warmup_epochs", 1, "--use_first_order", "--seed", 7, "--save_dir", tmp_path, "--exp_name", "mine",
        "--train_epochs", 0, "--quiet",
    )  # fmt: skip
    assert code == 0
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert config["data_root"] == str(tmp_path)
    assert (config["batch_size"], config["epochs"], config["learning_rate"]) == (8, 2, 0.03)
    assert (config["arch_learning_rate"], config["warmup_epochs"], config["seed"]) == (0.002, 1, 7)
    assert (config["strategy"], config["init_channels"], config["layers"]) == ("darts", 2, 3)


def test_every_setting_is_an_option(capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "search", "--help")
    assert code == 0
    for name in SearchConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in out
    assert "[]" not in run(capsys, "evaluate", "--help")[1]


def test_help_and_version_without_a_command(capsys: pytest.CaptureFixture) -> None:
    assert "Commands:" in run(capsys)[1]
    assert run(capsys, "--version")[:2] == (0, "0.1.0\n")
    code, out, err = run(capsys, "backend")
    assert (code, err) == (0, "")
    assert "optimize" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "--epochz", "3"], "--epochz"),
        (["search", "--epochs", "many"], "--epochs"),
        (["serch"], "serch"),
        (["search", "--epochs", "0"], "epochs=0: choose a value above 0"),
        (["search", "--space", "dart"], "unknown search space 'dart'; known are darts"),
        (["search", "--strategy", "drats"], "unknown strategy 'drats'; known are darts"),
        (["search", "--dataset", "cifar11"], "unknown data set 'cifar11'"),
        (["search", "--backend", "gpu"], "unknown backend 'gpu'"),
        (["search", "--execution", "magic"], "unknown execution 'magic'"),
        (["search", "--init_channels", "7"], "init_channels=7"),
        (["search", "--layers", "2"], "use at least 3"),
        (["search", "--batch-size", "5000"], "lower the batch size"),
        (["search", "--use_first_order", "--strategy", "darts-2nd"], "first order"),
        (["search", "--out", "x", "--save_dir", "y"], "give one of them"),
        (["search", "--dataset", "folder:/does/not/exist"], "/does/not/exist"),
        (["search", "--dataset", "npz:/does/not/exist"], "there is no file /does/not/exist; npz:PATH names"),
        (["search", "--config", "/does/not/exist.json"], "/does/not/exist.json'; give a JSON object"),
        (["search", "--resume", "/does/not/exist"], "name the folder that a search or an evaluation wrote"),
        (["evaluate", "--genotype", "DARTS_V9"], "no genotype 'DARTS_V9'"),
        (["evaluate", "--auxiliary"], "auxiliary head needs pictures of at least 21 pixels, these have 8"),
        (["evaluate", "--recipe", "slow"], "unknown recipe 'slow'; choose one of published, fast"),
        (["evaluate", "--control", "random,resnet"], "unknown control 'resnet'; choose of random, resnet18"),
        (["evaluate", "--seed", str(2**63 - 1), "--seeds", "2"], "choose one from 0 to 2**63 - 1"),
        (["search", "--grad-clip", "inf"], "grad_clip=inf: choose a finite number"),
        (["search", "--space", "mine"], "Register one of your own first"),
        (["derive", "/does/not/exist"], "holds no run"),
        (["report", "/does/not/exist"], "/does/not/exist"),
    ],
)
def test_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.glob("runs/*")), "a refused run leaves no folder"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "backend 'cuda' cannot run here" in refused(
        capsys, "search", "--backend", "cuda", "--out", tmp_path / "r"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_train": np.arange(48) % 3 - 1}, "label"),
        ({"y_train": np.zeros(48, int), "y_test": np.zeros(12, int)}, "class"),
        ({"x_train": np.full((48, 6, 6, 1), np.nan)}, "x_train"),
        (
            {"x_train": np.zeros((48, 2, 2, 1), np.uint8), "x_test": np.zeros((12, 2, 2, 1), np.uint8)},
            "too small",
        ),
    ],
)
def test_bad_arrays(
    change: dict, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    np.savez(tmp_path / "bad.npz", **{**np.load(data), **change})
    line = refused(capsys, "search", f"--dataset=npz:{tmp_path / 'bad.npz'}", f"--out={tmp_path}/run", *TINY)
    assert message in line


def test_bad_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(8):
                Image.fromarray(np.full((8, 8, 3), 30 * i, np.uint8)).save(
                    tmp_path / part / name / f"{i}.png"
                )
    arguments = ["search", f"--dataset=folder:{tmp_path}", f"--out={tmp_path / 'run'}", *TINY]
    (tmp_path / "train" / "dog" / "3.png").write_bytes(b"no picture")
    assert "3.png" in refused(capsys, *arguments)
    for file in (tmp_path / "train" / "dog").iterdir():
        file.unlink()
    assert "dog" in refused(capsys, *arguments)


def test_genotype_with_a_missing_node(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fields = DARTS_V2.to_dict()
    fields["reduce"][0] = ["max_pool_3x3", 7]
    (tmp_path / "g.json").write_text(json.dumps(fields))
    line = refused(capsys, "evaluate", f"--genotype={tmp_path / 'g.json'}", f"--dataset=npz:{data}")
    assert "takes max_pool_3x3 from state 7, which does not exist" in line


def test_disk_full_keeps_what_was_saved(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    write = checkpoint.write_atomically

    def fills_up(path: Path, content: bytes | str) -> None:
        if path.suffix == ".safetensors" and len(saved) == 2:
            raise checkpoint.cannot_write(path, OSError(28, "No space left on device"))
        write(path, content)
        if path.suffix == ".safetensors":
            saved.append(path)

    monkeypatch.setattr(checkpoint, "write_atomically", fills_up)
    line = refused(capsys, "search", f"--dataset=npz:{data}", f"--out={tmp_path}/run", "--quiet", *TINY)
    assert "No space left on device; make room or choose another place with --out" in line
    assert checkpoint.load_checkpoint(saved[-1])["position"]["epoch"] == 1


def test_out_of_memory_says_what_to_lower(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")

    monkeypatch.setattr("neuroexapt.engine.bilevel.BilevelStep.__call__", no_memory)
    line = refused(capsys, "search", f"--dataset=npz:{data}", f"--out={tmp_path}/run", "--quiet", *TINY)
    assert line == "out of memory; lower --batch-size, --init-channels or --layers"


def test_a_bug_is_not_hidden(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("neuroexapt.engine.bilevel.BilevelStep.__call__", bug)
    with pytest.raises(ZeroDivisionError):
        run_command(app, ["search", f"--dataset=npz:{data}", f"--out={tmp_path}/run", "--quiet", *TINY])


def test_python_m_and_import_are_light() -> None:
    """Importing takes a fifth of torch's own import at most, compiles nothing and loads no heavy library.

    Measured against torch's import in the same process, and the best of three: on shared cores CPU seconds
    double.
    """
    script = (
        "import sys, time; start = time.process_time(); import torch; loaded = time.process_time(); "
        "import neuroexapt; neuroexapt.search, neuroexapt.MixedOp; took = time.process_time() - loaded; "
        "heavy = {'matplotlib', 'sklearn', 'torchvision', 'tensorboard', 'triton', 'jinja2'}; "
        "print(took / (loaded - start), heavy & set(sys.modules))"
    )
    shares = []
    for _ in range(3):
        printed = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
        share, heavy = printed.split(maxsplit=1)
        assert heavy.strip() == "set()"
        shares.append(float(share))
    assert min(shares) < 0.2
