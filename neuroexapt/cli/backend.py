"""``neuroexapt backend info | benchmark | set | test | optimize``."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

backend_app = typer.Typer(help="Show, choose, check and tune where the operations run.")

Json = Annotated[bool, typer.Option("--json", help="print JSON for other programs")]
BackendName = Annotated[str, typer.Argument(help="auto, cpu, cuda, cuda:torch, cuda:triton, cuda:ext or mps")]


@backend_app.callback(invoke_without_command=True)
def _no_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@backend_app.command()
def info(as_json: Json = False) -> None:
    """List every backend, with the reason for those that cannot run here."""
    from neuroexapt.backend import get_backend, get_memory_info, list_backends
    from neuroexapt.backend.config import config_path

    backends = [{"backend": b.value, "available": b.available, "reason": b.reason} for b in list_backends()]
    chosen, memory = get_backend().value, asdict(get_memory_info())
    if as_json:
        _print_json({"chosen": chosen, "backends": backends, "memory": memory, "config": str(config_path())})
        return
    for row in backends:
        mark = "*" if row["backend"] == chosen else " "
        print(f"{mark} {row['backend']:12} {'available' if row['available'] else row['reason']}")
    if memory["free"] is not None:
        print(f"  {memory['free'] / 2**30:.1f} of {memory['total'] / 2**30:.1f} GiB free")


@backend_app.command()
def benchmark(
    duration: Annotated[float, typer.Option(min=0.1, help="seconds in all, about")] = 10,
    workload: Annotated[
        str, typer.Option(help="mixed_op (one edge of a search) or an op's name")
    ] = "mixed_op",
    as_json: Json = False,
) -> None:
    """Time forward and backward on every available backend."""
    from neuroexapt.backend import benchmark_backends

    results = benchmark_backends(duration, workload)
    if as_json:
        _print_json([asdict(result) for result in results])
        return
    for result in results:
        if result.timing is None:
            print(f"{result.backend:12} {result.status}")
        else:
            timing = result.timing
            spread = f"({timing.p20_ms:.3f} to {timing.p80_ms:.3f})"
            error = f"largest error {result.max_error:.1e}"
            print(f"{result.backend:12} {timing.median_ms:9.3f} ms {spread}, {error}")


@backend_app.command(name="set")
def set_(backend: BackendName, as_json: Json = False) -> None:
    """Save the backend to use from now on; refuses one that cannot run here."""
    from neuroexapt.backend import resolve
    from neuroexapt.backend.config import save_config

    resolve(backend)
    path = save_config({"backend": backend})
    if as_json:
        _print_json({"backend": backend, "config": str(path)})
    else:
        print(f"{backend} is saved in {path}")


@backend_app.command(name="test")
def check(backend: BackendName = "auto", as_json: Json = False) -> None:
    """Hold every op of a backend against the fp64 reference; the exit code is 1 where one fails."""
    from neuroexapt.backend import check_backend, resolve

    checks = check_backend(resolve(backend))
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            error = "" if check.max_error is None else f"largest error {check.max_error:.1e}"
            verdict = "ok    " if check.ok else "FAILED"
            print(f"{verdict} {check.op:16} {check.dtype:9} {check.impl:7} {error} {check.reason}".rstrip())
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@backend_app.command()
def optimize(
    backend: Annotated[str, typer.Option(help="which kernels to measure against PyTorch")] = "auto",
    apply: Annotated[bool, typer.Option("--apply", help="save the result and use it from now on")] = False,
    as_json: Json = False,
) -> None:
    """Measure from which sizes on each kernel beats PyTorch on this machine."""
    from neuroexapt.backend import BackendOptimizer
    from neuroexapt.backend.tuning import NEVER, apply_tuning

    config = BackendOptimizer().optimize(backend)
    if apply:
        apply_tuning(config)
    if as_json:
        _print_json(asdict(config))
        return
    for c in config.crossovers:
        size = "never" if c.min_elements == NEVER else f"from {c.min_elements:,} elements"
        print(f"{c.op:16} {c.tier:7} {c.dtype:9} {c.operands:2} operands: {size}")
    if not config.crossovers:
        print("no kernel can run here, so there is nothing to measure")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
