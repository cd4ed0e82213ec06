"""``python -m bench.timed FILE PROGRAM ...``: one of our programs with a stop watch around its codec and its stages.

The program is the real one; what is wrapped costs about a microsecond a call. ``FILE`` is a shared page of counters:
nanoseconds of CPU time of the calling thread, and calls, for each of ``STAGES``. With ``--moments FILE2`` the times
at which a unit came, was decoded and its picture left are written there as well, one line each. The shim also writes
what its sockets took of each channel, piece by piece, beside ``FILE``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import mmap
import runpy
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import proto.polling  # noqa: F401  first: gRPC reads it when it is imported

#: Their order is that of the page: two signed 64-bit numbers each.
STAGES = ("decode", "encode", "ts", "mux", "copy", "forward", "graph", "back")
#: Behind them: whether all stages are timed, or the codec alone.
_ALL = 2 * len(STAGES)
_BYTES = 8 * (_ALL + 1)
#: Always timed.
_CODEC = frozenset({"decode", "encode"})

#: What a stage is, by module and name; a class's method is replaced in the class. All of a program's have to exist.
_STEPS = {
    "gateway_shim": {
        "ts": ["gateway_shim.media.ts:TsReader.feed", "gateway_shim.media.ts:TsReader.end_segment"],
        "mux": ["gateway_shim.media.mux:TsWriter.video", "gateway_shim.media.mux:TsWriter.tables"],
        "copy": ["gateway_shim.engine_lane:write_planes"],
    },
    "engine": {},
}
#: Of the engine, once torch is there.
_GRAPH_STEPS = {
    "forward": ["engine.graph.tensors:Converter.to_images"],
    "back": ["engine.graph.tensors:Converter.to_planes"],
    "graph": ["engine.graph.plan:PlanRunner.tick"],
}


class Page:
    """The counters, in this process or in another one's."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(_BYTES))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _BYTES)
        self.numbers = memoryview(self._memory).cast("q")
        if create:
            self.watch_all(True)

    def watch_all(self, yes: bool) -> None:
        """Time every stage, from the next call on, or the codec alone: nine watches cost 10 to 20 us a frame."""
        self.numbers[_ALL] = yes

    def read(self) -> dict[str, tuple[int, int]]:
        """Nanoseconds and calls of each stage."""
        return {name: (self.numbers[2 * at], self.numbers[2 * at + 1]) for at, name in enumerate(STAGES)}

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        at = 2 * STAGES.index(stage)
        numbers, clock, always = self.numbers, time.thread_time_ns, stage in _CODEC

        def run(*arguments: Any, **options: Any) -> Any:
            if not (always or numbers[_ALL]):
                return call(*arguments, **options)
            began = clock()
            try:
                return call(*arguments, **options)
            finally:
                numbers[at] += clock() - began
                numbers[at + 1] += 1

        return run

    def wrap(self, stage: str, place: str) -> None:
        """Replace ``module:Class.method``."""
        module, _, name = place.partition(":")
        owner: Any = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, self.timed(stage, getattr(owner, last)))


class _Codec:
    """A codec context whose decode and encode are timed; everything else is the context's own."""

    def __init__(self, context: Any, page: Page, on_decoded: Callable[[int, float, float], None] | None) -> None:
        object.__setattr__(self, "_context", context)
        video = context.type == "video"
        object.__setattr__(self, "encode", page.timed("encode", context.encode) if video else context.encode)
        decode = page.timed("decode", context.decode) if video else context.decode
        if video and on_decoded is not None:
            decode = _told(decode, on_decoded)
        object.__setattr__(self, "decode", decode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._context, name, value)


def _told(decode: Callable[..., Any], tell: Callable[[int, float, float], None]) -> Callable[..., Any]:
    def run(packet: Any) -> Any:
        began = time.monotonic()
        frames = decode(packet)
        ended = time.monotonic()
        for frame in frames:
            tell(frame.pts, began, ended)
        return frames

    return run


class Moments:
    """Lines ``kind pts seconds [seconds]``: ``came`` (the bytes that complete the unit were read), ``decoded`` (begin
    and end), ``left`` (the picture's bytes were handed to the socket). Clock: monotonic, one for all processes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)  # a line is there when it is written
        self._came = 0.0
        self._coded: deque[int] = deque()  # pts of pictures that are not yet with the publisher
        self._buffered: deque[int] = deque()  # and of those that are not yet with the socket

    def decoded(self, pts: int, began: float, ended: float) -> None:
        self._file.write(f"decoded {pts} {began:.6f} {ended:.6f}\n")

    def install(self) -> None:
        """In the shim, before a stream begins."""
        from gateway_shim.media.mux import TsWriter
        from gateway_shim.media.ts import TsReader
        from gateway_shim.trickle.post import Post
        from gateway_shim.trickle.publisher import OutgoingSegment
        from gateway_shim.trickle.subscriber import Segment

        read, feed, mux = Segment.__anext__, TsReader.feed, TsWriter.video
        write, take = OutgoingSegment.write, Post.take

        async def have_read(segment: Any) -> bytes:
            data = await read(segment)
            self._came = time.monotonic()
            return data

        def have_fed(reader: Any, data: bytes) -> list[Any]:
            units = feed(reader, data)
            for unit in units:
                if unit.track.kind == "video":
                    self._file.write(f"came {unit.pts} {self._came:.6f}\n")
            return units

        def have_muxed(writer: Any, pts: int, *arguments: Any, **options: Any) -> bytes:
            self._coded.append(pts)
            return mux(writer, pts, *arguments, **options)

        async def have_written(segment: Any, data: bytes) -> None:
            while self._coded:
                self._buffered.append(self._coded.popleft())
            await write(segment, data)

        async def have_taken(post: Any) -> bytes:
            data = await take(post)
            while data and self._buffered and post.publisher.content_type == "video/mp2t":
                self._file.write(f"left {self._buffered.popleft()} {time.monotonic():.6f}\n")
            return data

        Segment.__anext__, TsReader.feed, TsWriter.video = have_read, have_fed, have_muxed  # type: ignore[method-assign]
        OutgoingSegment.write, Post.take = have_written, have_taken  # type: ignore[method-assign]


def takes_beside(page: Path) -> Path:
    """Lines ``url segment bytes``: each piece that a socket took."""
    return page.with_suffix(".takes")


def note_takes(path: Path) -> None:
    """In the shim, before a stream begins."""
    from gateway_shim.trickle.post import Post

    lines: list[str] = []
    path.write_text("")
    take = Post.take

    async def noted(post: Any) -> bytes:
        data = await take(post)
        if data:
            lines.append(f"{post.publisher.url} {post.seq} {len(data)}\n")
        if not data or len(lines) >= 64:  # a write each costs 1 % of the loop's time
            with path.open("a") as file:
                file.writelines(lines)
            lines.clear()
        return data

    Post.take = noted  # type: ignore[method-assign]


def watch_codecs(page: Page, moments: Moments | None = None) -> None:
    """Every codec context that is made from here on is timed."""
    import av

    class Watched:
        @staticmethod
        def create(*arguments: Any, **options: Any) -> Any:
            context = av.codec.context.CodecContext.create(*arguments, **options)
            return _Codec(context, page, moments.decoded if moments else None)

    av.CodecContext = Watched  # type: ignore[misc,assignment]


@contextlib.contextmanager
def _after_import(name: str, call: Callable[[], None]) -> Iterator[None]:
    """``call`` when the module ``name`` was imported for the first time: it must not come earlier than by itself."""
    import importlib.abc

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
            if fullname != name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            assert spec is not None
            assert spec.loader is not None
            load = spec.loader.exec_module

            def load_and_call(module: Any) -> None:
                load(module)
                call()

            spec.loader.exec_module = load_and_call  # type: ignore[method-assign]
            return spec

    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(finder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.timed", description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("program", choices=sorted(_STEPS))
    parser.add_argument("--moments", type=Path)
    arguments, rest = parser.parse_known_args()
    page = Page(arguments.page, create=True)
    if arguments.program == "gateway_shim":
        moments = Moments(arguments.moments) if arguments.moments else None
        watch_codecs(page, moments)
        note_takes(takes_beside(arguments.page))
        if moments is not None:
            moments.install()
    for stage, places in _STEPS[arguments.program].items():
        for place in places:
            page.wrap(stage, place)

    def wrap_graph() -> None:
        for stage, places in _GRAPH_STEPS.items():
            for place in places:
                page.wrap(stage, place)

    sys.argv = [arguments.program, *rest]
    with _after_import("engine.comfy_backend", wrap_graph):
        runpy.run_module(f"{arguments.program}.__main__", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
