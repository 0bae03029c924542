import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neuroexapt
from neuroexapt import UserError
from neuroexapt.cli.app import app, run_command
from neuroexapt.core.genotypes import Genotype
from neuroexapt.data.augment import normalise
from neuroexapt.engine.checkpoint import load_checkpoint, save_checkpoint
from neuroexapt.engine.result import RunResult
from neuroexapt.engine.run import RunFolder
from neuroexapt.engine.trained import load_trained
from neuroexapt.engine.training import TrainPhase
from neuroexapt.exporting.formats import FORMATS, trace
from neuroexapt.exporting.networks import Classifier
from neuroexapt.recommend.model import SequenceRecommender
from neuroexapt.spaces import get_space
from tests.engine.test_search_sequences import tiny_settings as tiny_histories

SIZE = 24  # large enough for an auxiliary head
CLASSES = ("red", "green", "blue")
CELL = (("sep_conv_3x3", 0), ("max_pool_3x3", 1)), (2,)
SMALL = Genotype(*CELL, *CELL)


def write_pictures(path: Path) -> Path:
    """Noise that is brighter in the channel of its class; 48 to train on and 12 to test."""
    rng = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        noise = rng.integers(0, 200, (count, SIZE, SIZE, 3))
        return (noise + 50 * np.eye(3, dtype=int)[labels][:, None, None]).astype(np.uint8), labels

    (x_train, y_train), (x_test, y_test) = part(48), part(12)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, classes=CLASSES)
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Trained with all that a file must do without, and tested with an average of the weights."""
    folder = tmp_path_factory.mktemp("classifier")
    genotype = folder / "genotype.json"
    genotype.write_text(json.dumps(SMALL.to_dict()))
    return neuroexapt.evaluate(
        dataset=f"npz:{write_pictures(folder / 'pictures.npz')}",
        genotype=str(genotype),
        layers=3,
        init_channels=4,
        batch_size=8,
        epochs=2,
        learning_rate=0.1,
        auxiliary=True,
        ema=0.5,
        seeds=2,
        out=folder / "run",
        backend="cpu",
        quiet=True,
    )


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("recommender")
    return neuroexapt.evaluate(**tiny_histories(folder, genotype="SASRec", epochs=2, learning_rate=0.05))


@pytest.fixture(scope="module")
def onnx_file(classifier: RunResult) -> Any:
    return neuroexapt.export(classifier.run_dir)


def pictures_of(run: RunResult) -> tuple[np.ndarray, np.ndarray]:
    data = np.load(run.run_dir.parent / "pictures.npz")
    return data["x_test"].transpose(0, 3, 1, 2), data["y_test"]


def test_the_printed_lines_label_raw_pictures_without_neuroexapt(
    classifier: RunResult, onnx_file: Any, tmp_path: Path
) -> None:
    images, labels = pictures_of(classifier)
    np.save(tmp_path / "images.npy", images)
    code = (
        f"import numpy, sys\nimages = numpy.load({str(tmp_path / 'images.npy')!r})\n{onnx_file.usage}\n"
        "assert not {'torch', 'neuroexapt'} & set(sys.modules)\nprint(json.dumps(labels))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = json.loads(done.stdout)
    correct = [label == CLASSES[number] for label, number in zip(given, labels, strict=True)]
    assert np.mean(correct) == classifier.result["test_accuracies"][0] == onnx_file.metadata["test_accuracy"]


def test_a_file_computes_what_the_trained_network_does(classifier: RunResult, onnx_file: Any) -> None:
    images = torch.from_numpy(pictures_of(classifier)[0])
    data = json.loads((classifier.run_dir / "data.json").read_text())
    expected = classifier.model(normalise(images, torch.tensor(data["mean"]), torch.tensor(data["std"])))
    computed = FORMATS["onnx"].load(onnx_file.path.read_bytes(), ["images"])(images)
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-5)


def test_weights_are_those_that_were_tested(classifier: RunResult) -> None:
    state = load_checkpoint(classifier.run_dir / "checkpoints" / "evaluate.safetensors")["phase"]
    loaded = load_trained(classifier.run_dir).network.state_dict()["classifier.weight"]
    assert torch.equal(loaded, state["average"]["classifier.weight"])
    assert not torch.equal(loaded, state["network"]["classifier.weight"])
    best = {**state, "best": {"network": {"of": "the best epoch"}}}
    assert TrainPhase.trained_weights(best) == {"of": "the best epoch"}


def test_a_file_tells_what_goes_in_and_nothing_of_this_machine(onnx_file: Any) -> None:
    import onnx

    model = onnx.load(onnx_file.path)
    (image,) = model.graph.input
    dims = [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim]
    assert dims == ["batch", 3, SIZE, SIZE]
    assert [opset.version for opset in model.opset_import] == [18]
    kept = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(kept["classes"]) == list(CLASSES)
    assert json.loads(kept["inputs"])["images"].startswith(f"uint8 [batch, 3, {SIZE}, {SIZE}], 0 to 255")
    assert str(Path(neuroexapt.__file__).parent).encode() not in onnx_file.path.read_bytes()
    assert not any("auxiliary" in tensor.name for tensor in model.graph.initializer)


def test_a_pt2_file_is_plain_pytorch(classifier: RunResult, onnx_file: Any, tmp_path: Path) -> None:
    exported = neuroexapt.export(classifier.run_dir, out=tmp_path / "net.pt2")
    program = torch.export.load(exported.path, extra_files=(files := {"metadata.json": ""}))
    assert json.loads(files["metadata.json"]) == exported.metadata == onnx_file.metadata
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(target.startswith("aten.") for target in called), called
    images = torch.from_numpy(pictures_of(classifier)[0])
    for batch in (images[:1], images):
        expected = FORMATS["onnx"].load(onnx_file.path.read_bytes(), ["images"])(batch)
        torch.testing.assert_close(program.module()(batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", ["nas-bench-201", "mobile"])
def test_networks_of_other_spaces_can_be_written(space: str) -> None:
    """Pictures of odd sizes, in grey."""
    genotype = get_space(space).random_genotype(torch.Generator().manual_seed(1), 3)
    network = get_space(space).network(genotype, in_channels=1, num_classes=2, channels=4, layers=3)
    data = {"shape": [1, 9, 7], "classes": ["a", "b"], "mean": [0.4], "std": [0.2]}
    module = Classifier(network, data).eval()
    pt2 = FORMATS["pt2"]
    run = pt2.load(pt2.write(trace(module, module.made_up(1)), ("images",), "logits", {}), ("images",))
    images = module.made_up(3)[0]
    torch.testing.assert_close(run(images), module(images), rtol=1e-5, atol=1e-5)


def test_a_recommender_scores_the_catalogue(recommender: RunResult) -> None:
    exported = neuroexapt.export(recommender.run_dir, format="pt2")
    names = exported.metadata["item_names"]
    history = [names.index(name) for name in ("1", "4", "13", "0")]
    items = torch.tensor([history + [0] * 4, [0] * 8])
    given, popular = FORMATS["pt2"].load(exported.path.read_bytes(), ["items"])(items)
    inputs = items[:1, None]
    queries, vectors = recommender.model.eval().last_query(inputs)  # type: ignore[operator]
    torch.testing.assert_close(given[1:], (queries @ vectors.T)[0, 1:], rtol=1e-5, atol=1e-5)
    assert given[0] == popular[0] == -torch.inf
    assert popular[1:].sum() == pytest.approx(1)
    text = (recommender.run_dir.parent / "made.txt").read_text()
    trained_on = [name for line in text.splitlines() for name in line.split()[1:-2]]
    shares = [trained_on.count(name) / len(trained_on) for name in names[1:]]
    torch.testing.assert_close(popular[1:], torch.tensor(shares))


def test_the_folder_of_a_run_is_a_recommender_to_serve(recommender: RunResult, classifier: RunResult) -> None:
    loaded = SequenceRecommender.load(recommender.run_dir)
    items, lengths = torch.tensor([[3, 1, 0, 0, 0, 0, 0, 0]]), torch.tensor([2])
    trained = SequenceRecommender(recommender.model).eval()  # type: ignore[arg-type]
    assert torch.equal(loaded(items, lengths), trained(items, lengths))
    assert loaded.item_counts[0] == 0 < loaded.item_counts.max()
    with pytest.raises(UserError, match="a network for pictures, which is no recommender; name a run"):
        SequenceRecommender.load(classifier.run_dir)


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line with which an export is refused."""
    assert run_command(app, ["export", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line.removeprefix("error: ")


def test_what_cannot_be_exported_is_said_in_one_line(
    classifier: RunResult, onnx_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = classifier.run_dir
    assert "exists; replace it with --overwrite" in refused(capsys, run)
    assert refused(capsys, run, "--format=tflite") == "unknown format 'tflite'; choose onnx or pt2"
    assert "holds no run" in refused(capsys, tmp_path)
    stopped = tmp_path / "was stopped"
    shutil.copytree(run, stopped)
    checkpoint = stopped / "checkpoints" / "evaluate.safetensors"
    state = load_checkpoint(checkpoint)
    save_checkpoint(checkpoint, {**state, "position": {**state["position"], "finished": False}})
    go_on = f"neuroexapt evaluate --resume '{stopped}'"
    assert refused(capsys, stopped, "--out=x.pt2").endswith(go_on)
    checkpoint.unlink()
    assert refused(capsys, stopped, "--out=x.pt2").endswith(go_on)


def test_a_search_that_trained_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = {"strategy": "darts", "dataset": "digits", "train_epochs": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"evaluate --genotype {tmp_path} --dataset digits --space darts" in refused(capsys, tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime.*pip install 'neuroexapt\[export\]'"):
        neuroexapt.export(tmp_path)


def test_a_file_that_computes_something_else_is_not_written(
    recommender: RunResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kind = FORMATS["pt2"]
    load = kind.load

    def load_wrong(content: bytes, names: Any) -> Any:
        run = load(content, names)
        return lambda *inputs: run(*inputs) * 1.001

    monkeypatch.setattr(type(kind), "load", lambda self, content, names: load_wrong(content, names))
    with pytest.raises(UserError, match=r"differ from PyTorch's by .* no file was written"):
        neuroexapt.export(recommender.run_dir, out=tmp_path / "net.pt2")
    assert not (tmp_path / "net.pt2").exists()


def test_without_the_data_random_histories_are_compared(recommender: RunResult, tmp_path: Path) -> None:
    shutil.copytree(recommender.run_dir, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    moved = {**config, "dataset": f"seq:{tmp_path / 'moved.txt'}"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(moved))
    exported = neuroexapt.export(tmp_path / "run", out=tmp_path / "net.pt2")
    assert exported.examples.startswith("256 random histories (")
    assert "moved.txt does not exist" in exported.examples


def test_a_run_with_exported_files_can_be_replaced(onnx_file: Any) -> None:
    RunFolder(onnx_file.path.parent)._check_replaceable(overwrite=True)
