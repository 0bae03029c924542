"""One step of the search, both batches and both optimizers: every way to run it, side by side.

``python benchmarks/search_step.py [--implementations ext-graph plan ...] [--precisions tf32] [--batch 64]
[--order 1]`` takes minutes, most of them in torch.compile; each line is written as soon as it is measured.

Every implementation and precision has a process of its own, so that none outlives another's crash. Before it
is timed, its loss and its gradients in α and w, captured where the step will be, are held to the
module-by-module network in fp64, at the very batch that is timed; one that fails is reported, not timed, and
makes the exit code 1. All of them, the baselines too, compute no weight gradients in the step of α and none
of α in the step of w, and share optimizers and loss.

``step_ms`` is the time from the end of a step to the end of the next, the steps launched as in a search;
``device_ms`` and ``launches`` are those of all kernels, copies and fills of one step; ``peak_bytes`` is
everything allocated, parameters and graphs included; ``gbps`` are the bytes that must move (``visit_bytes``)
over ``device_ms``. The floor is those bytes over the bandwidth of a copy measured in the same run.
``group_ms`` says where the device time of the captured kernels goes.
"""

import argparse
import collections
import copy
import functools
import gc
import itertools
import multiprocessing
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _harness import Results, Spread, Work, copy_gbps, device_work, open_results, paced_ms, results_parser
from _search import IMPLEMENTATIONS, NETWORKS, PRECISIONS, Network, make_step, take_step
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neuroexapt.backend import dispatch_report
from neuroexapt.core.cells import SearchCell
from neuroexapt.core.plan import ConvTerm
from neuroexapt.core.residual import ResidualBlock
from neuroexapt.core.supernet import Supernet
from neuroexapt.engine.bilevel import Batch, BilevelStep
from neuroexapt.engine.captured import CapturedStep, capture
from neuroexapt.engine.config import SearchConfig

CONFIGS = {1: SearchConfig(strategy="darts"), 2: SearchConfig(strategy="darts-2nd")}
"""The published settings by the order of the step."""
PARTS = ("loss", "alphas", "weights")
# Relative, of the parts in that order; of gradients in the Euclidean norm. A single relu that opens in one
# precision and not in the other moves gradients by some thousandths, in PyTorch's own network too.
TOLERANCES = {
    "float32": (1e-5, 1e-2, 1e-2),
    "tf32": (2e-3, 2e-1, 2e-1),
    "bfloat16": (2e-2, 5e-1, 5e-1),
}
VISITS = {1: 2, 2: 5}
"""Forward and backward passes of a step by its order."""
GROUPS = {
    "convolutions of cells, forward": r"cell_conv::.*\bforward_kernel|^cell_conv_fwd",
    "first convolutions, backward": r"\bbackward_first_kernel",
    "second convolutions, backward": r"\bbackward_second_kernel",
    "pointwise convolutions, backward": r"^cell_conv_bwd_pointwise",
    "depthwise convolutions, backward": r"^cell_conv_bwd_depthwise",
    "their weight gradients, summed": r"partial_sums::",
    "strided convolutions": r"(cell_strided|sepconv)::",
    "1x1 convolutions": r"pointwise::",
    "dense convolutions, forward": r"dense_conv::.*\bfwd_kernel",
    "dense convolutions, backward": r"dense_conv::.*\bdx_kernel",
    "their weights' gradients": r"dense_conv::.*\bdw_kernel",
    "pools": r"node::.*\bpool_kernel|^node_pool",
    "node sums": r"node::.*\bsum_kernel|^node_sum",
    "node dots": r"node::.*\bdots_kernel|^node_dots",
    "gradients of states": r"node::.*\b(state|affine)_kernel|^node_(state|window)",
    "statistics and coefficients": r"(\b|^node_)(moments|finalize|statistics|(first_)?coefficients)_kernel",
    "optimizers": r"multi_tensor_apply|adam|sgd",
    "PyTorch's BatchNorms": r"batch_norm|bn_(fw|bw)",
    "PyTorch's convolutions and products": r"conv|gemm|gemv|cudnn|cutlass|xmma|wgrad|dgrad|nchw|nhwc|splitK",
    "copies and fills": r"^Mem(cpy|set)",
}
"""Kernels by name, the first that fits; stem, preprocessing and classifier are PyTorch's."""
REST = "rest"


@dataclass(frozen=True)
class Case:
    """One implementation and precision at one batch size, to be measured for the orders asked for."""

    network_name: str
    device: torch.device
    batch: int
    implementation: str
    precision: str

    @property
    def network(self) -> Network:
        return NETWORKS[self.network_name]

    def name(self, order: int) -> str:
        return case_name(self.network_name, self.batch, order)


class Skipped(Exception):
    """This implementation does not exist here."""


class Failed(Exception):
    """This implementation must not be timed."""


def case_name(network_name: str, batch: int, order: int) -> str:
    return f"{network_name}-b{batch}-order{order}"


def measure(case: Case, orders: list[int], results: Results, exact_file: str, seconds: float) -> None:
    """Everything about a case; what goes wrong becomes its status and the exit code."""
    done: list[int] = []
    try:
        implementation = IMPLEMENTATIONS[case.implementation]
        if case.device.type == "cpu" and (implementation.captured or implementation.tier == "ext"):
            raise Skipped("needs a GPU")
        with implementation.in_force(case.precision, case.device):
            error = check(case, results, torch.load(exact_file))
            for order in orders:
                measure_step(case, order, results, seconds, error)
                done.append(order)
    except Exception as problem:  # whatever a compiler, a kernel or the device raises
        status = "skipped" if isinstance(problem, Skipped) else "failed"
        if not isinstance(problem, Skipped | Failed):
            traceback.print_exc()
        for order in set(orders) - set(done):
            line = " ".join(str(problem).split())[:300] or type(problem).__name__
            results.add_status(case.name(order), case.implementation, case.precision, f"{status}: {line}")
        sys.exit(int(status == "failed"))


def check(case: Case, results: Results, exact: Tensor) -> float:
    """The worst relative error of loss and gradients, which is below its tolerance."""
    supernet, batch = network_and_batch(case)
    step = make_step(supernet, CONFIGS[1])
    run = find_gradients(step)
    if IMPLEMENTATIONS[case.implementation].captured:
        run = capture(run, case.device)
    for _ in range(3):  # as it is, captured, replayed
        found = run(*batch)
    require_what_was_asked_for(case, run)
    errors = relative_errors(step, found.double(), exact)
    for part, error in errors.items():
        name, spread = f"{case.network_name}-b{case.batch}", Spread.exactly(error)
        results.add(name, case.implementation, case.precision, f"{part}_error", "relative", spread)
    bounds = dict(zip(PARTS, TOLERANCES[case.precision], strict=True))
    wrong = [f"{part} {error:.1e}" for part, error in errors.items() if not error <= bounds[part]]
    if wrong:
        raise Failed(f"errors of {', '.join(wrong)} against fp64")
    return max(errors.values())


def network_and_batch(case: Case) -> tuple[Supernet, Batch]:
    """The same of every implementation."""
    torch.manual_seed(0)
    supernet = case.network.supernet(case.device)
    batch = case.network.batch(case.batch, case.device)
    IMPLEMENTATIONS[case.implementation].set_up(supernet, case.precision)
    return supernet, batch


def find_gradients(step: BilevelStep) -> Callable[..., Tensor]:
    """A function of a batch: its loss, the gradients in α and those in w, in one tensor."""

    def find(images: Tensor, labels: Tensor) -> Tensor:
        batch = Batch(images, labels)
        of_alphas, of_weights = (step.gradients(batch, wanted) for wanted in (step.alphas, step.weights))
        gradients = (*of_alphas.gradients, *of_weights.gradients)
        return torch.cat([of_alphas.loss.view(1), *(gradient.flatten() for gradient in gradients)])

    return find


def exact_gradients(network_name: str, batch_size: int, device: torch.device) -> Tensor:
    """What ``find_gradients`` finds in fp64, module by module, keeping one cell's tensors at a time."""
    case = Case(network_name, device, batch_size, "eager", "float32")
    with IMPLEMENTATIONS[case.implementation].in_force(case.precision, device):
        supernet, batch = network_and_batch(case)
        exact = copy.deepcopy(supernet).double()
        for cell in exact.cells:
            cell.forward = functools.partial(
                checkpoint, cell.forward, use_reentrant=False, preserve_rng_state=False
            )
        step = make_step(exact, CONFIGS[1])
        return find_gradients(step)(batch.inputs.double(), batch.labels)


def relative_errors(step: BilevelStep, found: Tensor, exact: Tensor) -> dict[str, float]:
    """Of each part: ‖found − exact‖ / ‖exact‖."""
    sizes = [1, *(sum(p.numel() for p in parameters) for parameters in (step.alphas, step.weights))]
    pairs = zip(found.split(sizes), exact.split(sizes), strict=True)
    errors = [(torch.linalg.norm(a - b) / torch.linalg.norm(b)).item() for a, b in pairs]
    return dict(zip(PARTS, errors, strict=True))


def require_what_was_asked_for(case: Case, run: Callable[..., Tensor]) -> None:
    """No fallback may pass for the implementation that it replaces."""
    if isinstance(run, CapturedStep) and run.reason:
        raise Failed(f"not captured: {run.reason}")
    implementation = IMPLEMENTATIONS[case.implementation]
    cells = [taken for taken in dispatch_report() if taken.op == "cell"]
    if implementation.execution != "fused" and cells:
        raise Failed("cells ran by their plan")
    for taken in cells:
        if taken.impl != implementation.tier:
            raise Skipped(f"cells ran on {taken.impl}, {taken.reason}")


def measure_step(case: Case, order: int, results: Results, seconds: float, error: float) -> None:
    """Time, device time, launches, memory and bandwidth of a step."""
    release_memory(case.device)
    supernet, train = network_and_batch(case)
    step, valid = make_step(supernet, CONFIGS[order]), case.network.batch(case.batch, case.device)
    take = take_step(step)
    if IMPLEMENTATIONS[case.implementation].captured:
        take = capture(take, case.device)
    call = functools.partial(take, *train, *valid)

    def add(metric: str, unit: str, spread: Spread) -> None:
        results.add(case.name(order), case.implementation, case.precision, metric, unit, spread, error)

    times = paced_ms(call, seconds, case.device)
    require_what_was_asked_for(case, take)
    add("step_ms", "ms", times)
    if case.device.type != "cuda":
        return
    add("peak_bytes", "bytes", Spread.exactly(torch.cuda.max_memory_allocated()))
    works = device_work(call)
    device_ms = sum(work.ms for work in works)
    add("device_ms", "ms", Spread.exactly(device_ms))
    add("launches", "launches", Spread.exactly(len(works)))
    moved = VISITS[order] * visit_bytes(supernet, case.network, case.batch, case.precision)
    add("gbps", "GB/s", Spread.exactly(moved / device_ms / 1e6))
    if case.implementation in ("ext-graph", "triton-graph"):
        for group, ms in by_group(works):
            name = f"{case.name(order)}/{group}"
            results.add(name, case.implementation, case.precision, "group_ms", "ms", Spread.exactly(ms))


def release_memory(device: torch.device) -> None:
    """Forget what was measured before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def by_group(works: list[Work]) -> list[tuple[str, float]]:
    """Milliseconds of every group of kernels, the longest first."""
    total: collections.Counter[str] = collections.Counter()
    for work in works:
        total[next((g for g, name in GROUPS.items() if re.search(name, work.name, re.I)), REST)] += work.ms
    return total.most_common()


def visit_bytes(supernet: Supernet, network: Network, batch: int, precision: str) -> int:
    """Bytes that must move through memory for one forward and backward pass.

    Every stage of the fused design reads each tensor that it needs once and writes its results once. Nothing
    survives in a cache between two stages, and what follows from tensors that a stage reads is not stored:
    relu, BatchNorm's output, pools. Parameters, and the classifier from its pool on, are left out.

    A convolution with BatchNorm outside of the cells (stem, preprocessing) takes x to z. Forward: x read, z
    written. Backward: the gradient g of its normalised output and z read for their sums; then g, z, x read,
    the gradient of x written. So do those of a residual block; its shortcut's convolution is part of their
    sum, for which y is written and g read twice. Cells: see ``cell_planes``.
    """
    element = 2 if precision == "bfloat16" else 4
    side = side_before = network.side
    stem = supernet.stem[0].out_channels
    total = (5 * stem + 2 * network.in_channels) * side**2
    channels, channels_before = stem, stem
    for cell in supernet.cells:
        if isinstance(cell, ResidualBlock):
            total += 2 * 3 * channels * side**2
            channels, side = 2 * channels, -(-side // 2)
            total += (3 + 2 * 5 + 3) * channels * side**2
            continue
        width = cell.channels_out // len(cell.topology.concat)
        if cell.topology.inputs == 2:
            total += 3 * channels_before * side_before**2 + 3 * channels * side**2  # both inputs' x, x and dx
            total += 2 * 5 * width * side**2
        after = -(-side // cell.stride(0))
        in_planes, out_planes = cell_planes(cell)
        total += width * (in_planes * side**2 + out_planes * after**2)
        channels_before, side_before, channels, side = channels, side, cell.channels_out, after
    return element * batch * total


def cell_planes(cell: SearchCell) -> tuple[int, int]:
    """How many tensors of the size of a cell's inputs, and of its nodes, it reads and writes.

    Of a state x with gradient dx, for every candidate a tensor z (pools and identities have none), for both
    halves of a separable convolution z1 and z2, of a node y with gradient g::

        stage        forward                          backward
        leave x      read x; write each z, z1         read x, each z, z1, dz1, g once an edge; write dx
        second half  read each z1; write each z2      read each z1, z2, g once an edge; write each dz1
        enter y      read each z, z2, x for pools     read the same and g
                     once an edge; write y
    """
    inputs = nodes = 0
    for group in cell.plan.states:
        halves = sum(len(term.blocks) == 2 for term in group.convs)
        singles = len(group.convs) + len(group.modules) - halves
        pooling = len({term.edge for term in (*group.pools, *group.identities)})
        edges = len({term.edge for term in (*group.convs, *group.pools, *group.identities, *group.modules)})
        with_halves = len({term.edge for term in group.convs if _has_halves(term)})
        states = 3 + 2 * pooling
        inputs += states if group.state < cell.topology.inputs else 0
        nodes += states if group.state >= cell.topology.inputs else 0
        nodes += 4 * singles + 10 * halves + edges + with_halves
    return inputs, nodes + 2 * len(cell.plan.nodes)


def _has_halves(term: ConvTerm) -> bool:
    return len(term.blocks) == 2


def add_floors(results: Results, arguments: argparse.Namespace) -> None:
    """The floor of every case, from a copy's bandwidth."""
    bandwidth = copy_gbps()
    results.add("copy-1gib", "copy_", "float32", "gbps", "GB/s", bandwidth)
    network = NETWORKS[arguments.network]
    supernet = network.supernet(torch.device("cpu"))
    for batch, order, precision in itertools.product(arguments.batch, arguments.order, arguments.precisions):
        moved = VISITS[order] * visit_bytes(supernet, network, batch, precision)
        floor = Spread.exactly(moved / bandwidth.median / 1e6)
        for metric in ("step_ms", "device_ms"):
            results.add(case_name(arguments.network, batch, order), "floor", precision, metric, "ms", floor)


def measure_apart(case: Case, results: Results, exact_file: str, arguments: argparse.Namespace) -> bool:
    """Measure a case in a process of its own; whether nothing failed."""
    work = (case, arguments.order, results, exact_file, arguments.seconds)
    process = multiprocessing.get_context("spawn").Process(target=measure, args=work)
    process.start()
    process.join(arguments.limit)
    if process.exitcode in (0, 1):
        return process.exitcode == 0
    ended = f"exit code {process.exitcode}" if process.exitcode else f"stopped after {arguments.limit:.0f} s"
    process.kill()
    process.join()
    results.add_status(
        case.name(arguments.order[-1]), case.implementation, case.precision, f"failed: {ended}"
    )
    return False


def arguments_from_command_line(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = results_parser("search_step", __doc__)
    parser.add_argument("--network", default="cifar10", choices=NETWORKS, help="search network")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS
    )
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 256], help="batch sizes")
    parser.add_argument("--order", nargs="+", type=int, default=[1, 2], choices=CONFIGS)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each step is timed")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that one process may take")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = arguments_from_command_line()
    device = torch.device(arguments.device)
    results = open_results("search_step", arguments, arguments.device)
    if device.type == "cuda":
        add_floors(results, arguments)
    right = True
    with tempfile.TemporaryDirectory() as folder:
        for batch in arguments.batch:
            exact_file = str(Path(folder) / f"{batch}.pt")
            torch.save(exact_gradients(arguments.network, batch, device), exact_file)
            release_memory(device)
            for name, precision in itertools.product(arguments.implementations, arguments.precisions):
                case = Case(arguments.network, device, batch, name, precision)
                right &= measure_apart(case, results, exact_file, arguments)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
