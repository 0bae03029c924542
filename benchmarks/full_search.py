"""The CIFAR-10 search from the command line, wall time, all included.

``python benchmarks/full_search.py --data DATA [--epochs 50]`` runs ``neuroexapt search`` as a user would, in
a process of its own: start of Python, building the CUDA extension (into an empty cache; ``--built`` takes one
that is there), reading the data, capture, validation and checkpoint after every epoch, test and report. The
derived network is not trained. Without ``--data`` the pictures are noise in the number and shapes of
CIFAR-10's, which cost the same and teach nothing.

``wall_s`` is all of it, ``epoch_s`` an epoch with its validation from the second on, ``first_epoch_s`` the
one that captures. The case's name tells the number of epochs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _harness import Results, Spread, open_results, results_parser

TRAINING, TEST = 50_000, 10_000


def write_noise(path: Path, training: int, test: int) -> None:
    """Pictures and labels in CIFAR-10's format; every class occurs."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", training), ("test", test)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(count) % 10
    np.savez(path, **arrays)


def run_search(options: list[str], folder: Path, built: bool) -> float:
    """Seconds that ``neuroexapt search`` took."""
    command = [sys.executable, "-m", "neuroexapt", "search", *options, "--train-epochs=0"]
    environment = {**os.environ, "NEUROEXAPT_CONFIG": str(folder / "config.json")}
    if not built:
        environment["XDG_CACHE_HOME"] = str(folder / "cache")
    start = time.perf_counter()
    subprocess.run([*command, f"--out={folder / 'run'}"], check=True, env=environment)
    return time.perf_counter() - start


def record(results: Results, case: str, execution: str, wall_seconds: float, run: Path) -> None:
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    epochs = [line["seconds"] for line in timing if line["phase"] == "search"]
    result: dict[str, Any] = json.loads((run / "result.json").read_text())

    def add(metric: str, unit: str, spread: Spread) -> None:
        results.add(case, execution, "as shipped", metric, unit, spread)

    add("wall_s", "s", Spread.exactly(wall_seconds))
    add("first_epoch_s", "s", Spread.exactly(epochs[0]))
    if len(epochs) > 2:
        add("epoch_s", "s", Spread.of(epochs[1:]))
    add("steps_per_s", "1/s", Spread.exactly(result["steps_per_second"]))
    add("peak_bytes", "bytes", Spread.exactly(result["peak_memory_bytes"]))
    add("valid_accuracy", "share", Spread.exactly(result["valid_accuracy"]))


def arguments_from_command_line() -> argparse.Namespace:
    parser = results_parser("full_search", __doc__)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10, or .npz file (default: noise)")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch", type=int, default=64, help="batch size")
    parser.add_argument("--execution", default="fused", help="of the search network")
    parser.add_argument("--built", action="store_true", help="use the extension that was built before")
    parser.add_argument("--pictures", type=int, default=TRAINING, help="of noise, for training")
    parser.add_argument("--options", nargs="+", default=[], help="more of neuroexapt search, without dashes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return parser.parse_args()


def main() -> int:
    arguments = arguments_from_command_line()
    results = open_results("full_search", arguments, arguments.device)
    options = [f"--{option}" for option in arguments.options]
    options += [f"--epochs={arguments.epochs}", f"--batch-size={arguments.batch}"]
    options += [f"--execution={arguments.execution}", f"--backend={arguments.device}"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.data is None:
            write_noise(folder / "noise.npz", arguments.pictures, arguments.pictures * TEST // TRAINING)
            options.append(f"--dataset=npz:{folder / 'noise.npz'}")
            data = "noise" if arguments.pictures == TRAINING else f"noise-{arguments.pictures}"
        elif arguments.data.suffix == ".npz":
            options.append(f"--dataset=npz:{arguments.data}")
            data = arguments.data.stem
        else:
            options += ["--dataset=cifar10", f"--data-root={arguments.data}"]
            data = "cifar10"
        wall_seconds = run_search(options, folder, arguments.built)
        built = "-built" if arguments.built else ""
        case = f"{data}-b{arguments.batch}-{arguments.epochs}epochs{built}"
        record(results, case, arguments.execution, wall_seconds, folder / "run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
