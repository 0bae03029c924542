"""``neuroexapt serve-recommender``."""

from pathlib import Path
from typing import Annotated

import typer

from neuroexapt.errors import UserError


def serve_recommender(
    model: Annotated[Path, typer.Argument(help="file of a trained recommender, or folder of a run")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    device: Annotated[str, typer.Option(help="auto or a backend's name, such as cpu")] = "auto",
    strategies: Annotated[
        str, typer.Option(help="to choose from by measurement, separated by commas")
    ] = "eager,captured,onnxruntime",
    threads: Annotated[int, typer.Option(min=1, help="of a computation on the CPU")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="most requests that are computed together")] = 32,
    patience_ms: Annotated[float, typer.Option(min=0, help="how long a request waits for others")] = 0.0,
    queue: Annotated[int, typer.Option(min=1, help="waiting requests before more are refused")] = 256,
    max_history: Annotated[int, typer.Option(min=1, help="items of a history")] = 1000,
    max_recommendations: Annotated[int, typer.Option(min=1, help="recommendations of a request")] = 100,
    max_body_kib: Annotated[int, typer.Option(min=1, help="size of a request")] = 1024,
) -> None:
    """Serve a trained recommender over HTTP: /recommend, /recommend_batch, /health, /metrics, /docs."""
    import torch

    from neuroexapt.recommend.controller import create_integrated_controller

    try:
        from neuroexapt.recommend.serving.schemas import Limits
        from neuroexapt.recommend.serving.server import serve
    except ImportError as error:
        raise UserError(f"{error}; serving needs pip install 'neuroexapt[serve]'") from error

    torch.set_num_threads(threads)
    names = [name.strip() for name in strategies.split(",")]
    serving = {"strategies": names, "max_batch_size": max_batch}
    controller = create_integrated_controller({"model": model, "device": device, "serving": serving})
    limits = Limits(
        history=max_history,
        recommendations=max_recommendations,
        body_bytes=max_body_kib * 1024,
        queue=queue,
    )
    serve(controller, host, port, limits, patience_ms)
