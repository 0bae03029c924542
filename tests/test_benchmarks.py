import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from neuroexapt.backend import use_backend
from neuroexapt.core.genotypes import load_genotype
from neuroexapt.data import DATASETS, load_dataset
from neuroexapt.spaces.nas_bench_201 import genotype_of_id
from tests.engine.tiny import write_tiny_npz

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import _processes
import _sequences
import darts_cells
import full_search
import nas_bench_201
import search_fidelity
import search_step
from _harness import Spread, Work
from _search import NETWORKS, Network
from _sequences import Comparison, Sequences

BENCHMARKS = Path(search_step.__file__).parent


def run_benchmark(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), "--commit=abc", *map(str, arguments)]
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


def test_the_bytes_that_must_move_are_those_of_the_design():
    """3.81 GB forward and 5.47 GB backward at batch 64, stem and preprocessing counted less closely."""
    network = NETWORKS["cifar10"]
    supernet = network.supernet(torch.device("cpu"))
    moved = search_step.visit_bytes(supernet, network, 64, "float32")
    assert moved == pytest.approx(3.81e9 + 5.47e9, rel=0.03)
    assert search_step.visit_bytes(supernet, network, 128, "bfloat16") == moved
    # 5 states, 4 nodes and 14 edges of two single and two halved convolutions, at stride 1 all of one size.
    forward, backward = 14 * (2 * 2 + 2 * 4 + 1) + 5 + 4, 14 * (2 * 2 + 2 * 6 + 2 + 1) + 2 * 5 + 4
    assert sum(search_step.cell_planes(supernet.cells[0])) == forward + backward


def test_every_kernel_of_a_cell_has_a_group():
    folder = BENCHMARKS.parent / "neuroexapt" / "cuda_ops" / "csrc"
    sources = [source.read_text() for source in folder.glob("*.cu") if source.stem != "softmax_sum"]
    assert sources
    for source in sources:
        (space,) = re.findall(r"^namespace (\w+) {", source, re.M)
        names = re.findall(r"__global__[^;{]*?(\w+_kernel)\(", source)
        assert names
        for name in names:
            kernel = f"void {space}::(anonymous namespace)::{name}<16>()"
            ((group, _),) = search_step.by_group([Work(kernel, 1.0)])
            assert group != search_step.REST, kernel
            assert "PyTorch" not in group, kernel


def test_groups_add_up_and_the_longest_comes_first():
    works = [Work("Memcpy DtoD", 1.0), Work("void at::native::copy", 3.0), Work("Memset (Device)", 1.0)]
    assert search_step.by_group(works) == [("rest", 3.0), ("copies and fills", 2.0)]


def test_gradients_are_held_to_those_of_fp64(monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", Network(layers=3, channels=2, in_channels=1, side=8))
    device = torch.device("cpu")
    exact = search_step.exact_gradients("tiny", 2, device)
    case = search_step.Case("tiny", device, 2, "plan", "float32")
    with use_backend("cpu"):
        supernet, batch = search_step.network_and_batch(case)
        step = search_step.make_step(supernet, search_step.CONFIGS[1])
        found = search_step.find_gradients(step)(*batch).double()
    assert max(search_step.relative_errors(step, found, exact).values()) < 1e-2
    found[1 : 1 + len(found) // 2] *= 1.1
    errors = search_step.relative_errors(step, found, exact)
    assert errors["alphas"] > 5e-2
    assert errors["loss"] < 1e-5


def test_a_result_that_is_off_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setitem(NETWORKS, "tiny", Network(layers=3, channels=2, in_channels=1, side=8))
    device = torch.device("cpu")
    torch.save(1.5 * search_step.exact_gradients("tiny", 2, device), tmp_path / "exact.pt")
    results = search_step.Results("search_step", tmp_path / "results.jsonl", "abc", "cpu")
    case = search_step.Case("tiny", device, 2, "plan", "float32")
    with pytest.raises(SystemExit, match="1"):
        search_step.measure(case, [1], results, str(tmp_path / "exact.pt"), 0.0)
    lines = [json.loads(line) for line in results.path.read_text().splitlines()]
    assert [line["metric"] for line in lines] == ["loss_error", "alphas_error", "weights_error", "status"]
    assert lines[-1]["status"].startswith("failed: errors of loss 3.3e-01, alphas 3.3e-01")


@pytest.mark.slow
def test_search_step_measures_what_runs_here_and_says_why_the_rest_does_not(tmp_path):
    out = tmp_path / "results.jsonl"
    done = run_benchmark(
        "search_step.py", "--device=cpu", "--network=digits", "--batch=4", "--order=1", "--seconds=0",
        "--precisions=float32", "--implementations", "plan", "ext-graph", f"--out={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    plan = next(line for line in lines if line["metric"] == "step_ms")
    assert (plan["case"], plan["implementation"]) == ("digits-b4-order1", "plan")
    assert 0 < plan["p20"] <= plan["median"] <= plan["p80"]
    assert 0 < plan["max_error"] < 1e-2
    assert lines[-1]["status"] == "skipped: needs a GPU"


def test_a_counted_figure_has_no_spread():
    assert Spread.exactly(3.0) == Spread(3.0, 3.0, 3.0, 1)


def test_choices_of_two_searches_are_compared_by_edge_and_by_operation():
    first, second = load_genotype("DARTS_V1"), load_genotype("DARTS_V2")
    assert search_fidelity.same_edges([first], [first]) == 1.0
    assert search_fidelity.same_edges([first, first], [first, second]) == pytest.approx(
        (1 + search_fidelity.same_edges([first], [second])) / 2
    )
    chosen = search_fidelity.chosen_operations([first, second])
    assert sum(chosen.values()) == pytest.approx(1.0)
    assert search_fidelity.distance({"a": 0.5, "b": 0.5}, {"b": 0.25, "c": 0.75}) == pytest.approx(0.75)


@pytest.mark.slow
def test_search_fidelity_compares_runs_with_the_reference_and_draws_them(tmp_path):
    out, figure = tmp_path / "results.jsonl", tmp_path / "figure.png"
    done = run_benchmark(
        "search_fidelity.py", "--device=cpu", "--seeds=1", "--epochs=1", "--channels=2", "--side=8",
        "--batch=256", "--runs", "plan", "ext", f"--out={out}", f"--figure={figure}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    curves = {
        line["implementation"]: line["values"] for line in lines if line["metric"] == "alpha_difference_curve"
    }
    assert set(curves) == {"reference", "plan"}
    assert curves["plan"][0] < 1e-2 * curves["reference"][0]
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_full_search_times_the_command_line(tmp_path):
    out = tmp_path / "results.jsonl"
    done = run_benchmark(
        "full_search.py", "--device=cpu", "--pictures=100", "--epochs=1", "--batch=8", f"--out={out}",
        "--options", "layers=3", "init-channels=2", "image-size=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = {line["metric"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert figures["wall_s"]["case"] == "noise-100-b8-1epochs"
    assert 0 < figures["first_epoch_s"]["median"] < figures["wall_s"]["median"]


def test_the_page_on_spaces_holds_what_the_results_say():
    lines = nas_bench_201.read_records(BENCHMARKS / "results" / "nas_bench_201.jsonl")
    document = nas_bench_201.DOCUMENT.read_text()
    assert nas_bench_201.write_table(document, lines) == document, "run benchmarks/nas_bench_201.py --draw"


def write_finished_search(folder: Path, seconds: float, device: str) -> None:
    """What a search of 100 epochs leaves that ended with the first cell of nas-bench-201."""
    folder.mkdir(parents=True)
    cell, versions = genotype_of_id(0), {"torch": "2.11", "cuda": "13.0"}
    files = {
        "config.json": {"dataset": "npz:somewhere/pictures.npz", "batch_size": 64, "epochs": 100},
        "result.json": {"device": device, "versions": versions, nas_bench_201.METRIC: 0.9},
        "genotype.json": cell.to_dict(),
        "timing.jsonl": {"phase": "search", "seconds": seconds},
        "metrics.jsonl": {nas_bench_201.METRIC: 0.5},  # of the last epoch, before a selection
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content) + "\n")


@pytest.mark.slow
def test_searches_from_elsewhere_are_collected_with_where_they_ran_and_what_ran_beside_them(tmp_path):
    out, figure, document = (tmp_path / name for name in ("results.jsonl", "figure.png", "page.md"))
    document.write_text(f"before\n{nas_bench_201.MARKER}\nold\n<!-- end -->\nafter\n")
    collect = (
        "nas_bench_201.py", "--collect", f"--runs={tmp_path}", f"--out={out}", f"--figure={figure}",
        f"--document={document}", "--strategies", "drnas", "gdas",
    )  # fmt: skip
    for seed, seconds, per_device in ((0, 800.0, 2), (1, 450.0, 1)):
        write_finished_search(tmp_path / f"drnas-{seed}", seconds, "Some GPU")
        ran = {"commit": f"c{seed}", "per_device": per_device}
        (tmp_path / f"drnas-{seed}.processes.jsonl").write_text(json.dumps(ran) + "\n")
    done = run_benchmark(*collect)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["device"] for line in lines} == {"Some GPU"}
    assert {line["metric"] for line in lines} == {"accuracy", "search_s", "genotypes", "accuracy_curve"}
    assert [line["searches_per_device"] for line in lines if line["metric"] == "search_s"] == [[2, 1]]
    row = "| `drnas` | 90.00 % | 90.00, 90.00 | 100 | 800†, 450 | 94.36 % | Some GPU | c0, c1 |"
    assert row in document.read_text().splitlines()
    assert "old" not in document.read_text()
    assert figure.read_bytes().startswith(b"\x89PNG")

    write_finished_search(tmp_path / "gdas-0", 700.0, "Some GPU")
    refused = run_benchmark(*collect)
    assert refused.returncode == 1
    assert "gdas-0.processes.jsonl" in refused.stderr


@pytest.mark.slow
def test_nas_bench_201_compares_strategies_by_a_table_and_draws_them(tmp_path):
    table, out, figure = (tmp_path / name for name in ("table.csv", "results.jsonl", "figure.png"))
    document = tmp_path / "page.md"
    document.write_text(f"{nas_bench_201.MARKER}\n<!-- end -->\n")
    rows = (f"{genotype_of_id(number)},{number / 200},{number / 200}\n" for number in range(15_625))
    table.write_text("arch,c10_test_200,c10_valid_12\n" + "".join(rows))
    data = write_tiny_npz(tmp_path / "tiny.npz")
    done = run_benchmark(
        "nas_bench_201.py", f"--table={table}", f"--dataset=npz:{data}", f"--out={out}", f"--figure={figure}",
        "--strategies", "darts", "gdas", "--seeds=1", "--epochs=2", "--batch-size=8", "--jobs=2",
        f"--document={document}", "--options", "layers=3", "init-channels=2", "backend=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for strategy in ("darts", "gdas"):
        of_strategy = {line["metric"]: line for line in lines if line["implementation"] == strategy}
        (number,), (accuracy,) = of_strategy["genotypes"]["values"], of_strategy["accuracy"]["values"]
        assert accuracy == pytest.approx(number / 20_000)
        assert of_strategy["accuracy_curve"]["values"][0][-1] == accuracy
        assert of_strategy["search_s"]["mean"] < of_strategy["wall_s"]["mean"]
        assert of_strategy["search_s"]["searches_per_device"] == [2]
        assert f"| `{strategy}` | {accuracy:.2%}".replace("%", " %") in document.read_text()
    queries = {
        line["implementation"]: line["values"] for line in lines if line["metric"] == "accuracy_by_queries"
    }
    assert queries["random search"] == sorted(queries["random search"])
    assert queries["regularised evolution"][0] < queries["regularised evolution"][-1] <= 15_624 / 20_000
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_nas_bench_201_records_what_its_limit_cuts_short(tmp_path):
    table, out, figure = (tmp_path / name for name in ("table.csv", "results.jsonl", "figure.png"))
    rows = (f"{genotype_of_id(number)},1,1\n" for number in range(15_625))
    table.write_text("arch,c10_test_200,c10_valid_12\n" + "".join(rows))
    document = tmp_path / "page.md"
    document.write_text("no table here\n")
    done = run_benchmark(
        "nas_bench_201.py", f"--table={table}", "--dataset=digits", f"--out={out}", f"--figure={figure}",
        "--strategies", "darts", "gdas", "--seeds=1", "--epochs=1000", "--jobs=1", "--limit=1",
        f"--document={document}", "--options", "backend=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    status = {
        line["implementation"]: line["status"]
        for line in map(json.loads, out.read_text().splitlines())
        if line["metric"] == "status"
    }
    assert status == dict.fromkeys(("darts", "gdas"), "seed 0: cut short by the limit, no epoch done")


def test_a_run_that_was_refused_may_be_given_other_options(tmp_path):
    folder, data = tmp_path / "train", write_tiny_npz(tmp_path / "tiny.npz")
    options = "--genotype=DARTS_V2", "--backend=cpu", f"--dataset=npz:{data}"
    with pytest.raises(SystemExit, match="do not fill a batch of 96"):
        _processes.Run("evaluate", folder, options).carry_out(None, math.inf, commit="a", per_device=1)
    _processes.Run("evaluate", folder, (*options, "--batch-size=8")).check()
    folder.mkdir()
    (folder / "result.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds a run with other options"):
        _processes.Run("evaluate", folder, (*options, "--batch-size=8")).check()


@pytest.mark.slow
def test_darts_cells_go_on_where_the_limit_stopped_them(tmp_path):
    out, figure = tmp_path / "results.jsonl", tmp_path / "figure.png"
    small = ["init-channels=2", "layers=3", "batch-size=8", "epochs=1", "backend=cpu"]
    data, runs = write_tiny_npz(tmp_path / "tiny.npz"), tmp_path / "runs"
    arguments = [
        "darts_cells.py", f"--dataset=npz:{data}", f"--runs={runs}", f"--out={out}",
        f"--figure={figure}", "--strategies", "gdas", "--seeds=1", "--jobs=2",
        "--search-options", *small, "--training-options", "no-auxiliary", *small,
    ]  # fmt: skip
    stopped = run_benchmark(*arguments, "--limit=0")
    assert stopped.returncode == 1
    assert "start again" in stopped.stderr
    done = run_benchmark(*arguments)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = {line["implementation"] for line in lines if line["metric"] == "accuracy"}
    assert names == {"gdas", "random", "resnet18"}
    (found,) = (line for line in lines if (line["implementation"], line["metric"]) == ("gdas", "genotypes"))
    assert found["values"] == [json.loads((runs / "search-gdas-0/genotype.json").read_text())]
    assert found["commits"] == [[found["commit"]]]
    assert found["training_options"] == ["no-auxiliary", *small]
    (timed,) = (line for line in lines if (line["implementation"], line["metric"]) == ("random", "train_s"))
    assert timed["runs_per_device"] == [2]
    assert found["case"] == "-".join(["tiny-l3-c2-1epochs", *(f"search-{option}" for option in small)])
    assert figure.read_bytes().startswith(b"\x89PNG")
    refused = run_benchmark(*arguments, "label-smoothing=0.2")
    assert refused.returncode == 1
    assert "train-gdas-0 holds a run with other options" in refused.stderr


def test_cells_trained_by_two_protocols_are_drawn_apart(tmp_path):
    line = {"metric": "accuracy", "implementation": "darts", "values": [0.9, 0.92], "mean": 0.91}
    heights = []
    for count in (1, 2):
        out, figure = tmp_path / f"{count}.jsonl", tmp_path / f"{count}.png"
        lines = (json.dumps(line | {"case": f"cifar10-l8-c24-{epochs}epochs"}) for epochs in range(count))
        out.write_text("\n".join(lines))
        darts_cells.draw(out, figure)
        heights.append(imread(figure).shape[0])
    assert heights[1] == 2 * heights[0]


TRAIN_STEPS = ("eager", "eager-nhwc", "eager-graph", "eager-nhwc-graph", "graph", "nhwc-graph")
"""All but what is compiled, which would take minutes."""


@pytest.mark.slow
def test_train_step_times_a_derived_network_in_every_way(tmp_path):
    out = tmp_path / "results.jsonl"
    done = run_benchmark(
        "train_step.py", "--device=cpu", "--batch=8", "--layers=3", "--channels=2", "--side=8", "--seconds=0",
        "--precisions", "float32", "bfloat16", f"--out={out}",
        "--implementations", *TRAIN_STEPS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    times = {(line["implementation"], line["dtype"]): line for line in lines if line["metric"] == "step_ms"}
    assert len(times) == len(TRAIN_STEPS) * 2
    assert all(line["median"] > 0 for line in times.values())
    assert times["eager", "float32"]["max_error"] == 0 < times["eager", "bfloat16"]["max_error"]


def test_plain_pytorch_runs_jagged_sequences_by_way_of_padded_ones():
    """Each of its own length, and rows of padding see nothing of others."""

    def sums_so_far(x, scale, lengths):
        valid = torch.arange(x.shape[1]) < lengths[:, None]
        return (scale * x * valid[..., None]).cumsum(1)

    sequences = Sequences(3, 7, "cpu")
    assert sequences.lengths.tolist() == [1, 4, 7]
    x, scale = torch.randn(12, 2, dtype=torch.float64, requires_grad=True), torch.tensor(2.0)
    y = sequences.padded(sums_so_far, 1)(x, scale)
    expected = torch.cat([2 * part.cumsum(0) for part in x.split([1, 4, 7])])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), x) for z in (y, expected)))


def test_only_what_is_compiled_is_compiled_ahead(monkeypatch):
    asked = []
    monkeypatch.setattr(_sequences, "compile_in_parallel", lambda call, arguments: asked.extend(arguments))
    padded = dict.fromkeys(("eager", "cumsum", "cumsum-compile", "fused"), torch.neg)
    pair = [Comparison(name, padded, torch.neg, list) for name in ("padded", "jagged")]
    _sequences.compile_comparisons(print, {(2, 3, 4): pair})
    assert asked == [((2, 3, 4), number, name) for number in (0, 1) for name in ("cumsum-compile", "fused")]


def test_noise_has_the_form_of_cifar10(tmp_path):
    full_search.write_noise(tmp_path / "noise.npz", 20, 10)
    data = load_dataset(f"npz:{tmp_path / 'noise.npz'}")
    assert (data.train.shape, data.num_classes) == ((3, 32, 32), 10)
    assert (len(data.train), len(data.test)) == (20, 10)
    assert data.augmentation == DATASETS["cifar10"].augmentation
