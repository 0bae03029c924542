"""The plan in plain PyTorch against the cell module by module: one step of the search on the CPU.

``python benchmarks/plan_cpu.py [--network digits] [--batch 64] [--steps 30]`` takes a minute. Both networks
start from the same weights; before they are timed, the losses and all gradients of one pass are compared in
fp64. Their steps alternate, so that whatever else the machine does meets both alike.

``step_ms`` is the wall time of a step with both optimizers. ``ops`` are the PyTorch operations that compute
something, not views, in one forward and backward pass for the weights, counted on tensors without data as a
GPU would run them: about the kernels that eager CUDA launches.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Spread, open_results, results_parser
from _search import IMPLEMENTATIONS, NETWORKS, Network, make_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neuroexapt.core.supernet import Supernet
from neuroexapt.engine.config import SearchConfig

COMPARED = {name: IMPLEMENTATIONS[name] for name in ("eager", "plan")}
CPU = torch.device("cpu")
TOLERANCE = 1e-10
WARM_UP_STEPS = 2


def make_supernet(network: Network, implementation: str) -> Supernet:
    torch.manual_seed(0)
    supernet = network.supernet(CPU)
    COMPARED[implementation].set_up(supernet, "float32")
    return supernet


def loss_and_gradients(supernet: Supernet, images: Tensor, labels: Tensor) -> list[Tensor]:
    loss = F.cross_entropy(supernet(images), labels)
    return [loss.detach(), *torch.autograd.grad(loss, list(supernet.parameters()))]


def largest_error(network: Network, batch: int) -> float:
    """Relative, of loss and gradients, in fp64."""
    images, labels = network.batch(batch, CPU)
    expected, actual = (
        loss_and_gradients(make_supernet(network, name).double(), images.double(), labels)
        for name in COMPARED
    )
    return max(
        float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(actual, expected, strict=True)
    )


def alternating_step_ms(network: Network, batch: int, steps: int) -> dict[str, Spread]:
    train, valid = network.batch(batch, CPU), network.batch(batch, CPU)
    taken = {name: make_step(make_supernet(network, name), SearchConfig()) for name in COMPARED}
    times: dict[str, list[float]] = {name: [] for name in COMPARED}
    for _ in range(WARM_UP_STEPS + steps):
        for name, step in taken.items():
            start = time.perf_counter()
            step(train, valid)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: Spread.of(all_times[WARM_UP_STEPS:]) for name, all_times in times.items()}


class CountOps(TorchDispatchMode):
    """Counts the operations that return something new or write to something."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        self.ops += isinstance(result, Tensor | tuple | list) and not is_view and "empty" not in func.name()
        return result


def count_ops(network: Network, batch: int, implementation: str) -> int:
    supernet = make_supernet(network, implementation).to("meta", memory_format=torch.contiguous_format)
    supernet.requires_grad_(True)
    images, labels = (tensor.to("meta") for tensor in network.batch(batch, CPU))
    for alpha in supernet.arch_parameters():
        alpha.requires_grad_(False)
    loss = F.cross_entropy(supernet(images), labels)
    torch.autograd.grad(loss, supernet.weights())  # whatever is made once is made now
    with CountOps() as counter:
        loss = F.cross_entropy(supernet(images), labels)
        torch.autograd.grad(loss, supernet.weights())
    return counter.ops


def measure(network: Network, batch: int, steps: int) -> Iterator[tuple[str, str, str, Spread]]:
    """Implementation, metric, unit and figure."""
    for name, spread in alternating_step_ms(network, batch, steps).items():
        yield name, "step_ms", "ms", spread
    for name in COMPARED:
        yield name, "ops", "", Spread.exactly(count_ops(network, batch, name))


def main() -> int:
    parser = results_parser("plan_cpu", __doc__)
    parser.add_argument("--network", choices=NETWORKS, default="digits")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="steps of each to time")
    arguments = parser.parse_args()
    network = NETWORKS[arguments.network]
    case = f"{arguments.network}-b{arguments.batch}-first/{torch.get_num_threads()}-threads"

    error = largest_error(network, arguments.batch)
    if not error <= TOLERANCE:
        print(f"the plan is off by {error:.1e}, so it is not timed", file=sys.stderr)
        return 1
    results = open_results("plan_cpu", arguments, device="cpu")
    for name, metric, unit, spread in measure(network, arguments.batch, arguments.steps):
        results.add(case, name, "float32", metric, unit, spread, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
