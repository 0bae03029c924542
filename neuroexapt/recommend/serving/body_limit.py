"""Refusing bodies that are too large before they are in memory, and those that never end."""

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: answers 413 as soon as a body exceeds ``largest`` bytes, whatever its header says.

    One that is not there after ``seconds`` gets 408, so that nobody who sends slowly holds the server up.
    """

    def __init__(self, app: ASGIApp, largest: int, seconds: float = 5.0) -> None:
        self._app, self._largest, self._seconds = app, largest, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            messages = await asyncio.wait_for(self._body(receive), self._seconds)
        except asyncio.TimeoutError:
            reason = f"the body did not arrive within {self._seconds:g} s"
            refusal = JSONResponse({"error": reason}, 408, headers={"connection": "close"})
            await refusal(scope, receive, send)
            return
        if messages is None:
            refusal = JSONResponse({"error": f"the body exceeds {self._largest} bytes"}, 413)
            await refusal(scope, receive, send)
            return
        waiting = iter(messages)

        async def replay() -> Message:
            return next(waiting, None) or await receive()

        await self._app(scope, replay, send)

    async def _body(self, receive: Receive) -> list[Message] | None:
        """The messages of a body; None for too large a one."""
        messages, size = [], 0
        while True:
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            if size > self._largest:
                return None
            if not messages[-1].get("more_body"):
                return messages
