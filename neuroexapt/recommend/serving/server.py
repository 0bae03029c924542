"""Running the application on a socket until the process is told to stop."""

import contextlib
import gc
import signal
import socket
import sys

import uvicorn

from neuroexapt.errors import UserError
from neuroexapt.recommend.controller import IntegratedController
from neuroexapt.recommend.serving.app import create_app
from neuroexapt.recommend.serving.schemas import Limits

_SECONDS_TO_FINISH = 10


def serve(
    controller: IntegratedController, host: str, port: int, limits: Limits, patience_ms: float = 0.0
) -> None:
    """Serve until SIGINT or SIGTERM; calls under way are still answered.

    ``port`` 0 takes a free one; the address is printed once requests are answered.

    Raises:
        UserError: the address cannot be listened on.
    """
    try:
        listener = socket.create_server((host, port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error
    print("preparing and timing what can answer, which may take a minute", file=sys.stderr, flush=True)
    controller.warm_up()
    for name, reason in controller.get_comprehensive_stats()["unavailable_strategies"].items():
        print(f"without strategy {name}: {reason}", file=sys.stderr, flush=True)
    # What is there now stays; without it in the way, no collection holds requests up for long.
    gc.collect()
    gc.freeze()
    config = uvicorn.Config(
        create_app(controller, limits, patience_ms),
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
    )
    # uvicorn sends the signal again once it has finished, when it has been obeyed.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with listener, contextlib.suppress(KeyboardInterrupt):
        print(f"serving on http://{host}:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(config).run(sockets=[listener])
    gc.unfreeze()
