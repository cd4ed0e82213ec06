"""What a successor needs to take a stream up again when this shim is killed: two small files for each stream.

``<name>.json`` has what rarely changes, and is replaced as a whole. ``<name>.pos`` has how far the stream is, and is
written in place before each picture goes out: what the kernel has taken survives our death, so that no stamp is ever
given twice. Neither is synced to the disk; after a crash of the machine its streams are long gone.

Files are their user's alone (0600): the URL of a channel is the right to use it. Nothing else in them is secret.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..params import CHANNELS, StartRequest

logger = logging.getLogger(__name__)

FORMAT: Final = 1
FOLDER: Final = "streams"
#: Whole file of a position; what is written is padded, so that a shorter one leaves nothing of a longer one.
_POSITION_BYTES: Final = 256
#: A start request has at most 16 MiB (settings.BODY_LIMIT_BYTES), and its workflow is in here once.
MAX_BYTES: Final = 64 << 20
#: Parameters of the start that are kept for the status; larger ones are workflows, which are here in any case.
_MAX_PARAMS_BYTES: Final = 64 << 10


class Position(NamedTuple):
    """How far a stream is.

    at: seconds since the Unix epoch; the shim lived then. pts: of the last picture that may have gone out, 90 kHz.
    source, offset: the input's latest stamp, unwrapped, and what is added to its stamps, 90 kHz.
    input_seq, control_seq: last segment of the input that was read whole; of the control channel, that is done with.
    """

    at: float
    pts: int | None = None
    source: int | None = None
    offset: int = 0
    input_seq: int | None = None
    control_seq: int | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """What must not change within a stream (protocol.md 7, rule 19): size, tracks, colour of the output."""

    width: int
    height: int
    audio: bool
    matrix: str
    full_range: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """What rarely changes. ``resumed_at``: when earlier shims took it up, seconds since the Unix epoch."""

    request: StartRequest
    prompt: dict[str, Any]  # with every accepted override
    version: int  # of the parameters
    shape: Shape | None = None  # None before the first picture
    resumed_at: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Kept:
    """A stream whose shim was killed."""

    facts: Facts
    position: Position
    record: Record

    @property
    def silent_s(self) -> float:
        return max(0.0, time.time() - self.position.at)


class Record:
    """One stream's files. A disk that takes nothing costs the stream its successor and nothing else."""

    def __init__(self, folder: Path, stream_id: str) -> None:
        # Hashed: an id may be any text, and is not to choose a path.
        name = hashlib.sha256(stream_id.encode("utf-8", "surrogatepass")).hexdigest()[:24]
        self._facts_path, self._position_path = folder / f"{name}.json", folder / f"{name}.pos"
        self._position: int | None = None  # descriptor
        self._lock = threading.Lock()  # over the next, and what must not come after it
        self._removed = False
        self._failed = False

    def write(self, facts: Facts) -> bool:
        """Replace what is kept; False where the disk did not take it, and what was there before is there still.

        May take a while for a workflow of megabytes: not on the event loop then. A stream that ends meanwhile stays
        forgotten.
        """
        part = self._facts_path.with_suffix(".part")
        text = json.dumps({"format": FORMAT, **asdict(_trimmed(facts))}, default=str).encode()
        try:
            if not self._removed:
                with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                    file.write(text)
                with self._lock:
                    if not self._removed:
                        part.replace(self._facts_path)
        except (OSError, ValueError) as exc:
            self._failure(exc)
            return False
        return True

    def reached(self, position: Position) -> None:
        """4 us: one write of one page into the kernel's cache."""
        with self._failures():
            if self._position is None:
                self._position = os.open(self._position_path, os.O_WRONLY | os.O_CREAT, 0o600)
            text = json.dumps(position._asdict())
            os.pwrite(self._position, text.encode().ljust(_POSITION_BYTES), 0)

    def remove(self) -> None:
        """The stream is over, or somebody else's."""
        if self._position is not None:
            os.close(self._position)
            self._position = None
        with self._lock:
            self._removed = True
        with self._failures():
            for path in (self._facts_path, self._facts_path.with_suffix(".part"), self._position_path):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _failures(self) -> Any:
        try:
            yield
        except (OSError, ValueError) as exc:
            self._failure(exc)

    def _failure(self, exc: Exception) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("the journal cannot be kept, a killed shim will lose its streams: %s", exc)


class Journal:
    """The folder with all records. Only one shim has it: the lock goes with its process, however that ends."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._folder = folder
        self._lock = lock

    @classmethod
    def open(cls, run_dir: Path) -> Journal | None:
        """None where another shim has it, or the folder cannot be made; streams then have no successor."""
        folder = run_dir / FOLDER
        lock = -1
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if lock >= 0:
                os.close(lock)
            logger.warning("no journal in %s, a killed shim will lose its streams: %s", folder, exc)
            return None
        return cls(folder, lock)

    def close(self) -> None:
        os.close(self._lock)

    def record(self, stream_id: str) -> Record:
        return Record(self._folder, stream_id)

    def read(self) -> list[Kept]:
        """Streams that a killed shim left. What cannot be read is removed: nobody will ever understand it."""
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                found.append(self._kept(path))
            except Exception as exc:  # it may hold anything; the shim starts in any case, and says so
                logger.warning("the journal's %s cannot be read and is removed: %r", path.name, exc)
                path.unlink(missing_ok=True)
        known = {path.stem for path in self._folder.glob("*.json")}
        for path in self._folder.glob("*.*"):
            if path.stem not in known or path.suffix == ".part":
                path.unlink(missing_ok=True)
        return found

    def _kept(self, path: Path) -> Kept:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("it is too large")
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']!r}, this is {FORMAT}")
        request = _made(StartRequest, values["request"] | {"aliases": tuple(values["request"]["aliases"])})
        if not isinstance(values["prompt"], dict) or not request.channels:
            raise ValueError("it holds no stream")
        facts = Facts(
            request,
            values["prompt"],
            int(values["version"]),
            None if values["shape"] is None else _made(Shape, values["shape"]),
            tuple(map(float, values["resumed_at"])),
        )
        try:
            position = _position(path.with_suffix(".pos").read_bytes())
        except Exception:  # killed before the first one, or something else damaged it, in whatever way
            position = Position(path.stat().st_mtime)
        return Kept(facts, position, self.record(request.stream_id))


def _position(text: bytes) -> Position:
    """Raises for what no `Record.reached` has written: who takes the stream up reckons with these numbers."""
    position = Position(**json.loads(text))
    numbers = (position.offset, *(number for number in position[1:] if number is not None))
    if not math.isfinite(position.at) or any(type(number) is not int for number in numbers):
        raise ValueError(f"no position: {position}")
    return position._replace(at=float(position.at))


def _trimmed(facts: Facts) -> Facts:
    """The workflow once, and no parameters of megabytes."""
    request = replace(facts.request, workflow=None)
    if len(json.dumps(request.params, default=str)) > _MAX_PARAMS_BYTES:
        request = replace(request, params={})
    return replace(facts, request=request)


def _made(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass from its own fields; TypeError for others, as for missing ones."""
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is no object")
    for item in fields(kind):
        if item.name in CHANNELS and not isinstance(values.get(item.name), str | None):
            raise TypeError(f"{item.name} is no URL")
    return kind(**values)
