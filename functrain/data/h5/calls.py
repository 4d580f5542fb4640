"""Calls of fsspec's file systems: answered by its own thread, or by none that could wait for HDF5."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from functrain.core.errors import ArgumentError, MissingExtraError

TIMEOUT = 60.0


class Calls:
    """The methods of the file system behind a URL, by name, for many threads at once.

    Raises `MissingExtraError` without fsspec, or the package that it needs for this kind of URL, and `ArgumentError` for a
    kind of URL, or options, that it has not.
    """

    def __init__(self, url: str, options: Mapping[str, Any], **more: Any) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise MissingExtraError.of("fsspec", "remote", f"reading {url!r}") from error
        try:
            # An instance of our own, which nobody else changes or closes.
            self.system, self.path = url_to_fs(url, skip_instance_cache=True, **options, **more)
        except ImportError as error:
            raise MissingExtraError(f"reading {url!r} needs a package that is not installed: {error}") from error
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"{url!r} cannot be opened with storage={dict(options)!r}: {error}") from error
        protocol = self.system.protocol
        self.http = "http" in ((protocol,) if isinstance(protocol, str) else protocol)

    def __call__(self, name: str, **arguments: Any) -> Any:
        """What the method gives for the file; an error after a minute without an answer."""
        if self.system.async_impl:
            arguments["timeout"] = TIMEOUT
        return getattr(self.system, name)(self.path, **arguments)

    def close(self) -> None:
        """Nothing to do: fsspec ends what it began."""


class LoneCalls(Calls):
    """The same calls, for one thread at a time: one that holds HDF5's lock.

    Objects of h5py wait for that lock before they die, so any other thread of Python may have to wait for it: it collects
    garbage at any moment, and finds one (h5py#2019). Here a thread is begun for each call and has ended when it returns, and
    no garbage is collected meanwhile.
    """

    def __init__(self, url: str, options: Mapping[str, Any], asynchronous: bool) -> None:
        self._loop = _Loop() if asynchronous else None
        super().__init__(url, options, **({"loop": self._loop} if asynchronous else {}))

    def __call__(self, name: str, **arguments: Any) -> Any:
        collecting = gc.isenabled()
        gc.disable()
        try:
            if self._loop is None:
                return super().__call__(name, **arguments)
            return self._run(self._loop, getattr(self.system, f"_{name}")(self.path, **arguments))
        finally:
            if collecting:
                gc.enable()

    def _run(self, loop: asyncio.AbstractEventLoop, answer: Coroutine[Any, Any, Any]) -> Any:
        given: list[Callable[[], Any]] = []

        def work() -> None:
            try:
                result = loop.run_until_complete(asyncio.wait_for(answer, TIMEOUT))
                given.append(lambda: result)
            except BaseException as error:
                given.append(_raising(error))

        # A thread, as this one may be running a loop already (Jupyter).
        thread = threading.Thread(target=work, name="functrain-fetch")
        thread.start()
        try:
            thread.join()
        except BaseException:
            loop.call_soon_threadsafe(_cancel, loop)
            thread.join()
            raise
        return given[0]()

    def close(self) -> None:
        session = getattr(self.system, "_session", None)
        if self._loop is not None and not self._loop.is_closed():
            if session is not None:
                self._run(self._loop, session.close())
            self._loop.close()


class _Loop(asyncio.SelectorEventLoop):
    async def getaddrinfo(self, host: Any, port: Any, **hints: Any) -> Any:
        # asyncio's own would begin a thread that stays.
        return socket.getaddrinfo(host, port, **hints)


def _raising(error: BaseException) -> Callable[[], Any]:
    def raise_again() -> Any:
        raise error

    return raise_again


def _cancel(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
