"""After the stream: decode both recordings, compare them, and leave what was found in the output directory."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import assets, measure, probe, report, sheet
from .source import Published


@dataclass(frozen=True)
class Played:
    """What is known when the stream is over."""

    clip: assets.Clip
    size: tuple[int, int]  # that the worker was asked for
    workflow: str
    published: Published
    arrivals: probe.Arrivals
    change: report.Change | None
    worker: dict[str, Any]  # its account of the frames


def analyse(played: Played, work_dir: Path, output: Path) -> report.Report:
    """Write out.mp4, contact-sheet.png, report.txt and report.json. Reads in.ts and out.ts of ``work_dir``.

    Decodes everything: seconds of work, for a thread.
    """
    sent, received = work_dir / "in.ts", work_dir / "out.ts"
    latencies = measure.latencies_ms(played.published.video, played.arrivals.video)
    offset, method, misnumbered = _compare(sent, received) if played.arrivals.video else (None, "no sound", None)
    width, height = played.size
    found = report.Report(
        clip=played.clip.name,
        workflow=played.workflow,
        size=f"{width}x{height} at {float(played.clip.rate):g} fps",
        av_offset_ms=offset,
        av_method=method,
        change=played.change,
        worker=played.worker,
        misnumbered=misnumbered,
        **report.figures(played.published, played.arrivals, latencies),
    )
    (output / "report.txt").write_text(found.as_text(), encoding="utf-8")
    (output / "report.json").write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
    if played.arrivals.video:
        probe.to_mp4(received, output / "out.mp4")
        pts = sorted(played.published.video)
        change = played.change.effective_pts if played.change else None
        with contextlib.suppress(ImportError):  # Pillow comes with the ComfyUI extra; the report says all without it
            sheet.write(
                output / "contact-sheet.png",
                sent,
                received,
                chosen=sheet.choose(pts, change),
                first_pts=pts[0],
                change=change,
                title=f"{played.clip.name} through {played.workflow}: what went in above what came out",
                update=json.dumps(played.change.body) if played.change else "",
            )
    return found


def _compare(sent: Path, received: Path) -> tuple[float | None, str, int | None]:
    """Sound against picture in ms, how it was found, and how many frames show another picture than was sent."""
    before, after = probe.sound(sent), probe.sound(received)
    # Only numbered clips have numbers; the first picture tells.
    first = next(iter(probe.pictures(sent)), None)
    if first is not None and probe.number_of(first[1]) is not None:
        numbers, seen = probe.numbers(sent), probe.numbers(received)
        misnumbered = sum(numbers.by_pts.get(pts) != number for pts, number in seen.by_pts.items())
        if after is None:
            return None, "the clip has no sound", misnumbered
        offset = measure.nearest_offset_ms(measure.onsets(after), seen.bursts_due)
        return offset, "bursts of sound against numbered frames", misnumbered
    if before is None:
        return None, "the clip has no sound", None
    if after is None:
        return None, "no sound came out", None
    return measure.lag_ms(before, after), "input and output sound correlated", None
