"""Refusing bodies that are too large before they are in memory."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: answers 413 as soon as a body exceeds ``largest`` bytes, whatever its header says."""

    def __init__(self, app: ASGIApp, largest: int) -> None:
        self._app, self._largest = app, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages, size = [await receive()], 0
        while True:
            size += len(messages[-1].get("body", b""))
            if size > self._largest:
                refusal = JSONResponse({"error": f"the body exceeds {self._largest} bytes"}, 413)
                await refusal(scope, receive, send)
                return
            if not messages[-1].get("more_body"):
                break
            messages.append(await receive())
        waiting = iter(messages)

        async def replay() -> Message:
            return next(waiting, None) or await receive()

        await self._app(scope, replay, send)
