"""Fetching parts of a file behind a URL through fsspec, again where that fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from functrain.core.errors import DataError, FunctrainError
from functrain.data.h5.calls import Calls, LoneCalls

T = TypeVar("T")

_ATTEMPTS = 5
_FIRST_PAUSE = 0.1
# What file systems call that by which one version of a file is told from another.
_MARKS = (
    *("ETag", "etag", "md5Hash", "md5", "Content-MD5", "Digest", "generation", "version_id", "VersionId"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created"),
)


class Version(NamedTuple):
    """One version of a file: its size in bytes, and what the file system says of it besides (ETag, time)."""

    size: int
    marks: dict[str, str]


class Fetcher:
    """The file at a URL, as one process reaches it: fsspec's file systems do not survive a fork."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url, self._options = url, options
        self._closed = threading.Event()
        self._calls = Calls(url, options)
        self._lone: LoneCalls | None = None
        self._guards: bool | None = None

    def version(self) -> Version:
        """The version of the file that is there now; `DataError` for none, and for a server that gives whole files only."""
        version = self._attempted("be found", lambda: self._version(self._calls))
        if self._calls.http and version.size > 1:
            self._attempted("be read in parts", lambda: self._check_parts(version.size))
            self._guarded(self._calls, version)
        return version

    def fetched(self, start: int, stop: int, version: Version, alone: bool = False) -> bytes:
        """The bytes from `start` to `stop` of this version of the file; `alone`, without any other thread (see `LoneCalls`).

        A fetch that fails is tried 5 times. Raises `DataError` that names URL and offset where it fails for good, and where
        another version is there now.
        """
        calls = self._alone() if alone else self._calls
        extra: dict[str, Any] = {}
        tag = version.marks.get("ETag", "")
        # With a tag that is not weak, an HTTP server checks by itself, and before it answers.
        guarded = self._guarded(calls, version)
        if calls.http:
            extra["headers"] = _headers(calls, tag if guarded else None)

        def fetch() -> bytes:
            data = calls("cat_file", start=start, end=stop, **extra)
            if len(data) > stop - start:
                raise self._unable()
            if len(data) < stop - start:
                raise OSError(f"{len(data)} bytes came instead of {stop - start}")
            if not guarded and self._version(calls) != version:
                raise self._changed()
            return bytes(data)

        return self._attempted(f"be read at byte {start}", fetch)

    def _guarded(self, calls: Calls, version: Version) -> bool:
        """Whether the server gives no bytes of another version than the one asked for: found out once, by one that is not."""
        if not calls.http or not version.marks.get("ETag", "").startswith('"'):
            return False

        def ask() -> bool:
            try:
                calls("cat_file", start=0, end=1, headers=_headers(calls, '"functrain: no version"'))
            except Exception as error:
                if getattr(error, "status", None) != 412:
                    raise
                return True
            return False

        if self._guards is None:
            self._guards = self._attempted("be read by version", ask)
        return self._guards

    def _alone(self) -> LoneCalls:
        if self._lone is None:
            self._lone = LoneCalls(self.url, self._options, self._calls.system.async_impl)
        return self._lone

    def close(self) -> None:
        """End the attempts of all threads, of which the next is a `DataError`."""
        self._closed.set()
        if self._lone is not None:
            self._lone.close()

    # --- attempts --------------------------------------------------------------------------------------------

    def _attempted(self, what: str, ask: Callable[[], T]) -> T:
        """What `ask` gives, asked again where it fails in a way that may pass; `DataError` where it fails for good."""
        for attempt in range(1, _ATTEMPTS + 1):
            if self._closed.is_set():
                raise DataError(f"{self.url!r} was closed: open it again")
            try:
                return ask()
            except FunctrainError:
                raise
            # Each file system raises errors of its own: aiohttp's, botocore's, …
            except Exception as error:
                if getattr(error, "status", None) == 412:
                    raise self._changed() from error
                if attempt == _ATTEMPTS or _final(error):
                    said = f"{type(error).__name__}: {error}"
                    raise DataError(f"{self.url!r} cannot {what} (attempt {attempt}): {said}") from error
            self._closed.wait(_FIRST_PAUSE * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    def _version(self, calls: Calls) -> Version:
        calls.system.invalidate_cache()
        about = calls("info")
        if about.get("type") == "directory":
            raise DataError(f"{self.url!r} is a directory, not an HDF5 file")
        if not isinstance(about.get("size"), int):
            raise DataError(f"the server of {self.url!r} does not say how long the file is: download it first")
        return Version(about["size"], {name: str(about[name]) for name in _MARKS if about.get(name) is not None})

    def _check_parts(self, size: int) -> None:
        """Raise `DataError` for a web server that would send the whole file each time: of one byte, nothing more is read."""
        with self._calls.system.open(self._calls.path, "rb", size=size, cache_type="none") as file:
            file.seek(size - 1)
            try:
                file.read(1)
            except ValueError as error:
                raise self._unable() from error

    def _unable(self) -> DataError:
        return DataError(f"the server of {self.url!r} does not serve parts of files (HTTP ranges): download it first")

    def _changed(self) -> DataError:
        return DataError(f"{self.url!r} was replaced by another version since it was opened: open it again")


def _headers(calls: Calls, tag: str | None) -> dict[str, str]:
    """The headers of a request for bytes as they are, on condition of a tag."""
    condition = {} if tag is None else {"If-Match": tag}
    return {**calls.system.kwargs.get("headers", {}), "Accept-Encoding": "identity", **condition}


def _final(error: BaseException) -> bool:
    """Whether there is no use in asking again."""
    # fsspec calls anything that goes wrong with a web server's first answer "not found"; the cause says what it was.
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return _final(error.__cause__)
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError))
