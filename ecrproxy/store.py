"""
The cache directory: verified content by digest, entries by cache key, and what is still arriving.

Rules:

- The directory is the whole truth. The L{Ledger} only counts it, and is made anew at each start.
- A file gets into C{content/} by one road alone: L{Writer.commit}, which has hashed every byte of it.
- What is in C{content/} and C{entries/} is never changed in place: it is replaced by rename, or unlinked.
  Whoever has a file open keeps reading the bytes that were there.
- Nothing here waits for anything but the disk. All of it is called in threads, several at a time.
- What can't be read, doesn't parse or has the wrong size is as good as absent: a miss, never a failure.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
import stat
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from twisted.logger import Logger

from ecrproxy.oci import Descriptor, Digest, Kind, Route

log = Logger()

_DRAFTS: Final = ("entry.", "probe.")
_YOUNG_SECONDS: Final = 60

ANSWERS_LIMIT: Final = 16
"""The most Accept sets whose answers one tag's entry keeps: clients in the field send two or three."""


class DigestMismatchError(Exception):
    """
    The bytes that arrived are not those that the digest names.
    """


@dataclass(frozen=True, slots=True)
class Confirmed:
    """
    That ECR gave C{descriptor} as its answer, and when, in seconds since the epoch.
    """

    descriptor: Descriptor
    when: float


@dataclass(frozen=True, slots=True)
class Entry:
    """
    What one repository's reference led to.

    @ivar answers: by the Accept set that it was an answer to, for ECR converts manifests to what the
        client takes; by the empty set alone for what is named by its digest, which is never converted.
    """

    kind: Kind
    repository: str
    reference: str
    answers: Mapping[frozenset[str], Confirmed] = field(default_factory=dict)

    def is_of(self, route: Route) -> bool:
        """
        Tell whether this entry speaks of what C{route} asks for.
        """
        return (self.kind, self.repository, self.reference) == (route.kind, route.repository, route.reference)

    def latest(self, accept: frozenset[str]) -> Confirmed | None:
        """
        Choose the last known answer for a client that takes C{accept} when ECR can't be asked.
        """
        if accept in self.answers:
            return self.answers[accept]
        fitting = [known for known in self.answers.values() if not accept or known.descriptor.media_type in accept]
        return max(fitting, key=lambda known: known.when, default=None)

    def with_answer(self, accept: frozenset[str], confirmed: Confirmed) -> Entry:
        """
        Add an answer; the longest unconfirmed ones make room for it.
        """
        answers = sorted({**self.answers, accept: confirmed}.items(), key=lambda item: -item[1].when)
        return Entry(self.kind, self.repository, self.reference, dict(answers[:ANSWERS_LIMIT]))

    def to_json(self) -> bytes:
        """
        Write the entry as its file has it.
        """
        answers = [
            {
                "accept": sorted(accept),
                "mediaType": known.descriptor.media_type,
                "digest": str(known.descriptor.digest),
                "size": known.descriptor.size,
                "confirmed": known.when,
            }
            for accept, known in self.answers.items()
        ]
        document = {
            "kind": self.kind.value,
            "repository": self.repository,
            "reference": self.reference,
            "answers": answers,
        }
        return json.dumps(document).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Entry:
        """
        Read an entry's file.

        @raise ValueError: if it is none.
        """
        try:
            document = json.loads(data)
            answers = {frozenset(item["accept"]): _confirmed(item) for item in document["answers"]}
            return cls(Kind(document["kind"]), str(document["repository"]), str(document["reference"]), answers)
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as problem:
            raise ValueError(f"no entry: {problem!r}") from None


def _confirmed(item: Mapping[str, Any]) -> Confirmed:
    descriptor = Descriptor(str(item["mediaType"]), Digest.parse(item["digest"]), int(item["size"]))
    when = float(item["confirmed"])
    if not math.isfinite(when):
        raise ValueError("no time")
    return Confirmed(descriptor, when)


def entry_name(cache_key: str, route: Route) -> str:
    """
    Name the entry that C{cache_key} and C{route} lead to, as its file is called.

    What was asked for is part of the name whatever the key says: a key that different requests share
    can cost hits, but can never hand one the other's content.
    """
    parts = (cache_key, route.kind.value, route.repository, route.reference)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


class Ledger:
    """
    How many bytes the directory holds, which file was used least recently, and which are being read.

    Shared by threads. A path is relative to the cache directory.

    @ivar total: the bytes of the files known.
    @ivar reserved: the bytes promised to what is arriving.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.total = 0
        self.reserved = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._readers: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._sizes)

    def used(self, path: str, size: int) -> None:
        """
        Note that C{path}, of C{size} bytes, is there and was used just now.
        """
        with self.lock:
            self.total += size - self._sizes.pop(path, 0)
            self._sizes[path] = size

    def gone(self, path: str) -> int:
        """
        Note that C{path} is there no more.

        @return: the bytes that it had.
        """
        with self.lock:
            size = self._sizes.pop(path, 0)
            self.total -= size
            return size

    def reading(self, path: str, readers: int) -> None:
        """
        Note that C{path} has so many readers more, or fewer.
        """
        with self.lock:
            self._readers[path] += readers
            if not self._readers[path]:
                del self._readers[path]

    def reserve(self, size: int) -> None:
        """
        Promise bytes to something arriving, or, negative, take the promise back.
        """
        with self.lock:
            self.reserved += size

    def load(self, files: Iterable[tuple[str, int]]) -> None:
        """
        Take in path and bytes of all files, the least recently used first; what was used meanwhile is more recent.
        """
        sizes = OrderedDict(files)
        with self.lock:
            for path, size in self._sizes.items():
                sizes[path] = size
                sizes.move_to_end(path)
            self._sizes, self.total = sizes, sum(sizes.values())

    def oldest(self) -> Iterator[tuple[str, int, bool]]:
        """
        Yield path, bytes and whether it is being read, the least recently used first. Hold C{lock} meanwhile.
        """
        for path, size in self._sizes.items():
            yield path, size, path in self._readers


class Content:
    """
    One open verified file. While it is open it stays readable and is not evicted.

    @ivar size: in bytes.
    """

    def __init__(self, fd: int, size: int, closed: Callable[[], None]) -> None:
        self._fd, self.size, self._closed = fd, size, closed

    def fileno(self) -> int:
        """
        Hand out the file descriptor, for reading at offsets.
        """
        return self._fd

    def read(self) -> bytes:
        """
        Read all of it: for small content.
        """
        return os.pread(self._fd, self.size, 0)

    def close(self) -> None:
        """
        Let go of the file.
        """
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._closed()

    # A thread may open a file for a client who has gone meanwhile: nobody is left to close it then.
    __del__ = close


class Writer:
    """
    A file that arrives: hashed as it grows, content once its digest is right.

    @ivar written: the bytes written and hashed so far.
    """

    def __init__(self, store: Store, digest: Digest, size: int) -> None:
        self._store, self._digest, self.size = store, digest, size
        self._hash = digest.hasher()
        self.written = 0
        self._committed: str | None = None
        self._path = store.ingest / f"{digest.algorithm}-{digest.hex}.{secrets.token_hex(4)}"
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            # The lock says that somebody lives behind this file; the kernel drops it with the process.
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if size:
                os.posix_fallocate(self._fd, 0, size)  # a disk too full says so now, not in the middle
        except OSError:
            self.discard()
            raise

    def fileno(self) -> int:
        """
        Hand out the file descriptor, for reading what was written.
        """
        return self._fd

    def write(self, pieces: Sequence[bytes]) -> None:
        """
        Append C{pieces}.

        @raise OSError: if the disk fails; what was written before stays readable.
        """
        for piece in pieces:
            view = memoryview(piece)
            offset = self.written
            while view:
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count
            self._hash.update(piece)
            self.written = offset

    def hash(self) -> Any:  # noqa: ANN401 (hashlib's objects have no public type)
        """
        Copy the state of the hash over what was written.
        """
        return self._hash.copy()

    def verify(self) -> None:
        """
        Hold the hash against the digest.

        @raise DigestMismatchError: if they differ.
        """
        if self._hash.hexdigest() != self._digest.hex:
            raise DigestMismatchError(f"what arrived is not {self._digest}")

    def commit(self) -> None:
        """
        Make the file content, for good. The file descriptor stays open until L{close}.

        @raise DigestMismatchError: if it is not what its digest names.
        @raise OSError: if the disk fails; the file is not content then.
        """
        self.verify()
        if self.written < self.size:
            os.ftruncate(self._fd, self.written)
        os.fsync(self._fd)
        path = self._store.content_path(self._digest)
        target = self._store.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        self._path.rename(target)
        self._store.ledger.used(path, self.written)
        self._store.ledger.reading(path, 1)  # by those who follow, until it is closed
        self._committed = path

    def close(self) -> None:
        """
        Let go of the file, committed or discarded before.
        """
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._committed is not None:
                self._store.ledger.reading(self._committed, -1)

    def discard(self) -> None:
        """
        Unlink the file and let go of it.
        """
        with contextlib.suppress(OSError):
            self._path.unlink()
        self.close()


class Store:
    """
    The cache directory.

    @param root: where it is; made if it is missing.
    @param now: seconds since the epoch.
    """

    def __init__(self, root: Path, now: Callable[[], float]) -> None:
        self.root, self._now = root, now
        self.ingest = root / "ingest"
        self.ledger = Ledger()

    def prepare(self) -> None:
        """
        Make the directories and see that files can be made in them.

        @raise OSError: if not.
        """
        for name in ("content", "entries", "ingest"):
            (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.check()

    def check(self) -> None:
        """
        See that a file can be written.

        @raise OSError: if not.
        """
        probe = self.ingest / f"probe.{secrets.token_hex(4)}"
        try:
            probe.write_bytes(b"ok")
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    def sweep(self) -> None:
        """
        Unlink what arrived for writers that are no more.

        Drafts of entries have no lock; another daemon on this directory may be about to rename a young one.
        """
        for path in self._names(self.ingest):
            with contextlib.suppress(OSError):
                if path.name.startswith(_DRAFTS) and self._now() - path.stat().st_mtime < _YOUNG_SECONDS:
                    continue
            with contextlib.suppress(OSError), open(path, "rb", opener=_without_waiting) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    def count(self) -> None:
        """
        Fill the ledger from the directory: its files by their last use, which is their mtime.
        """
        found = []
        for top in ("content", "entries"):
            for folder, _, names in os.walk(self.root / top):
                for name in names:
                    with contextlib.suppress(OSError):
                        path = os.path.join(folder, name)  # noqa: PTH118 (a Path each would cost seconds at 200,000)
                        status = os.lstat(path)
                        found.append((status.st_mtime_ns, os.path.relpath(path, self.root), status.st_size))
        self.ledger.load((path, size) for _, path, size in sorted(found))

    def has(self, digest: Digest) -> bool:
        """
        Tell whether there is a file of this name, without opening it or noting a use.
        """
        try:
            return stat.S_ISREG(os.lstat(self.root / self.content_path(digest)).st_mode)
        except OSError:
            return False

    def writer(self, digest: Digest, size: int) -> Writer:
        """
        Begin a file that arrives.

        @param size: in bytes; so many are taken of the disk at once.
        @raise OSError: if the disk has no room for them, or fails.
        """
        return Writer(self, digest, size)

    def content_path(self, digest: Digest) -> str:
        """
        Name the file of C{digest}, relative to the cache directory.
        """
        return f"content/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}"

    def open(self, digest: Digest, size: int | None = None) -> Content | None:
        """
        Open verified content and note its use.

        @param size: what its descriptor says that it has, if there is one. If the file has another, it is
            hashed: it may have been cut behind our back, or the descriptor may be wrong.
        """
        path = self.content_path(digest)
        try:
            fd = os.open(self.root / path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as problem:
            if not isinstance(problem, FileNotFoundError):
                log.warn("Can't read {path} from the cache: {problem}", path=path, problem=problem)
            self.ledger.gone(path)
            return None
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or (size not in (None, status.st_size) and not _is_whole(fd, digest)):
            os.close(fd)
            log.warn("{path} in the cache is not what it was: dropped", path=path)
            self.remove(path)
            return None
        self._touch(fd, path, status.st_size)
        self.ledger.reading(path, 1)
        return Content(fd, status.st_size, lambda: self.ledger.reading(path, -1))

    def entry(self, name: str, route: Route) -> Entry | None:
        """
        Read the entry called C{name}, if there is one and it speaks of C{route}; note its use.
        """
        path = self._entry_path(name)
        try:
            with open(self.root / path, "rb", opener=_without_waiting) as file:
                data = file.read()
                entry = Entry.from_json(data)
                self._touch(file.fileno(), path, len(data))
        except (OSError, ValueError):
            return None
        return entry if entry.is_of(route) else None

    def save(self, name: str, entry: Entry) -> None:
        """
        Write an entry, whole or not at all.

        @raise OSError: if the disk fails.
        """
        data, path = entry.to_json(), self._entry_path(name)
        target, draft = self.root / path, self.ingest / f"entry.{secrets.token_hex(8)}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(data)
            draft.rename(target)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
        self.ledger.used(path, len(data))

    def forget(self, name: str) -> None:
        """
        Drop the entry called C{name}.
        """
        self.remove(self._entry_path(name))

    def remove(self, path: str) -> bool:
        """
        Unlink one file of content or entries; those who have it open go on reading it.

        @return: whether it is gone.
        """
        try:
            (self.root / path).unlink()
        except FileNotFoundError:
            pass
        except OSError as problem:  # it goes on being counted
            log.warn("Can't remove {path} from the cache: {problem}", path=path, problem=problem)
            return False
        self.ledger.gone(path)
        return True

    def _touch(self, fd: int, path: str, size: int) -> None:
        now = self._now()
        with contextlib.suppress(OSError):  # a read-only disk still serves what it has
            os.utime(fd, (now, now))
        self.ledger.used(path, size)

    @staticmethod
    def _entry_path(name: str) -> str:
        return f"entries/{name[:2]}/{name}"

    @staticmethod
    def _names(folder: Path) -> Iterable[Path]:
        with contextlib.suppress(OSError):
            yield from folder.iterdir()


def _is_whole(fd: int, digest: Digest) -> bool:
    state, offset = digest.hasher(), 0
    try:
        while data := os.pread(fd, 2**20, offset):
            state.update(data)
            offset += len(data)
    except OSError:
        return False
    return state.hexdigest() == digest.hex


def _without_waiting(path: str, flags: int) -> int:
    """
    Open a file that somebody may have replaced by something else.
    """
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
