"""Requests that arrive at about the same time, answered by one call."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class QueueFullError(Exception):
    """As many requests wait as are let to."""


class Batcher(Generic[Request, Answer]):
    """Collects requests and runs them in another thread, a batch at a time.

    What arrives during a run forms the next batch, so batches grow with the load by themselves.

    Args:
        run: gives the answers of a batch, in order.
        largest_batch: most requests of a call.
        patience_s: how long a first request waits for others.
        longest_queue: more waiting requests than this are refused.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Request]], Sequence[Answer]],
        largest_batch: int,
        patience_s: float,
        longest_queue: int,
    ) -> None:
        self._run = run
        self._largest_batch = largest_batch
        self._patience_s = patience_s
        self._waiting: asyncio.Queue[tuple[Request, asyncio.Future[Answer]]] = asyncio.Queue(longest_queue)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting.qsize()

    def require_room(self, requests: int) -> None:
        """Raise QueueFullError unless so many more may wait."""
        if self._waiting.maxsize - self.waiting < requests:
            raise QueueFullError

    async def submit(self, request: Request) -> Answer:
        """The answer to ``request``; raises QueueFullError, or what the batch's run raised."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((request, answer))
        except asyncio.QueueFull as error:
            raise QueueFullError from error
        return await answer

    @contextlib.asynccontextmanager
    async def running(self):
        """Inside, requests are answered; leaving waits for those in the queue."""
        worker = asyncio.create_task(self._work())
        try:
            yield self
            await self._waiting.join()
        finally:
            worker.cancel()

    async def _work(self) -> None:
        while True:
            batch = await self._collect()
            try:
                answers = await asyncio.to_thread(self._run, [request for request, _ in batch])
            except Exception as error:  # belongs to those who asked; the next batch has its own chance
                for _, future in batch:
                    _settle(future, error=error)
            else:
                for (_, future), answer in zip(batch, answers, strict=True):
                    _settle(future, answer)
            for _ in batch:
                self._waiting.task_done()

    async def _collect(self) -> list[tuple[Request, asyncio.Future[Answer]]]:
        batch = [await self._waiting.get()]
        if self._patience_s and 1 + self.waiting < self._largest_batch:
            await asyncio.sleep(self._patience_s)
        while len(batch) < self._largest_batch and not self._waiting.empty():
            batch.append(self._waiting.get_nowait())
        return batch


def _settle(future: asyncio.Future, answer: object = None, error: Exception | None = None) -> None:
    if future.done():  # the client went away
        return
    if error is None:
        future.set_result(answer)
    else:
        future.set_exception(error)
