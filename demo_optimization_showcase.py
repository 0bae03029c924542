"""A short tour of the backends on whatever machine it runs: ``python demo_optimization_showcase.py``.

Shows which backends there are and why others are missing, what runs a call and why, that every
implementation gives the same numbers, and how fast one edge of a search is on each.
"""

import argparse

import torch

from neuroexapt import backend, functional
from neuroexapt.errors import BackendUnavailableError


def show_backends() -> None:
    print("Backends")
    backend.BackendOptimizer().print_system_info()


def show_dispatch(device: torch.device) -> None:
    print("\nWhat runs a sum of K candidates, and why")
    backend.reset_dispatch_report()
    for operands, elements in ((2, 2**20), (8, 64), (8, 2**20)):
        xs = [torch.randn(elements, device=device) for _ in range(operands)]
        functional.softmax_sum(xs, torch.zeros(operands, device=device))
    for decision, calls in backend.dispatch_report().items():
        print(f"  {calls} × {decision.op} on {decision.impl}: {decision.reason}")


def show_explicit_choice() -> None:
    print("\nA choice by name is followed or refused, never replaced in silence")
    try:
        with backend.use_backend("cuda:ext") as chosen:
            print(f"  cuda:ext runs here: {chosen.value}")
    except BackendUnavailableError as error:
        print(f"  {error}")


def show_checks(device: torch.device) -> None:
    print("\nLargest error of each op against fp64, forward and every gradient")
    for check in backend.check_backend(backend.resolve(device.type)):
        if check.dtype == "float32":
            verdict = "ok" if check.ok else f"FAILED: {check.reason}"
            print(f"  {check.op:16} on {check.impl:7} {check.max_error:.1e} {verdict}")


def show_speed(seconds: float) -> None:
    print("\nOne edge of a search, forward and backward")
    for result in backend.benchmark_backends(seconds):
        time = f"{result.timing.median_ms:.2f} ms" if result.timing else result.status
        print(f"  {result.backend:12} {time}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="how long to time, about")
    seconds = parser.parse_args().seconds
    device = backend.get_backend().torch_device
    show_backends()
    show_dispatch(device)
    show_explicit_choice()
    show_checks(device)
    show_speed(seconds)


if __name__ == "__main__":
    main()
