"""Which codec with which preset, rate and threads, and what happens where the hardware fails.

There is no GPU in these tests: its codecs are x264 and libavcodec's decoder in disguise, which fail when they are
told to and speak NV12 as NVDEC does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import numpy as np
import pytest

from gateway_shim.localnet.numbered import picture
from gateway_shim.media import decode, h264, hardware, threads
from gateway_shim.media.bit_rate import RateMeter, declared_rate, default_bit_rate
from gateway_shim.media.decode import Decoder, DecoderSettings
from gateway_shim.media.encode import Encoder
from gateway_shim.media.h264 import H264Encoder
from gateway_shim.media.hardware import NVENC, X264, Codecs, probe
from gateway_shim.media.planes import frame_of, planes_of
from gateway_shim.media.preset import PresetChoice
from gateway_shim.media.rows import planes_size
from gateway_shim.media.settings import EncoderSettings
from gateway_shim.media.sound import TIME_BASE
from tests.fakes.media_clips import clip, decoded, numbers, pictures, units_of, video

WIDTH, HEIGHT = 320, 240
SETTINGS = EncoderSettings(WIDTH, HEIGHT, Fraction(30), audio=False)


def error(text: str) -> av.FFmpegError:
    return av.error.ExternalError(1, text)


# ---- rates


def test_rate_is_the_middle_distance() -> None:
    meter = RateMeter(Fraction(25))
    assert meter.rate == 25
    stamps = np.cumsum([1500] * 20 + [900_000] + [1500] * 5 + [3000] + [-7000] + [1500] * 8)
    for pts in stamps.tolist():
        meter.add(pts)
    assert meter.rate == 60
    for pts in range(10_000_000, 10_000_000 + 60 * 3000, 3000):
        meter.add(pts)
    assert meter.rate == 30  # it follows


@pytest.mark.parametrize(("said", "believed"), [(Fraction(60), 60), (Fraction(90_000), None), (None, None)])
def test_impossible_declarations_are_not_believed(said: Fraction | None, believed: int | None) -> None:
    assert declared_rate(said) == believed


def test_the_decoder_knows_the_rate_from_the_first_picture() -> None:
    decoder = Decoder()
    assert decoder.frame_rate is None
    units = video(units_of(clip(30)))
    decoder.feed(units[:1])
    assert decoder.frame_rate == 30  # what the stream says of itself
    decoder.feed([replace(unit, pts=unit.pts // 2, dts=None) for unit in units[1:] if unit.pts is not None])
    assert decoder.frame_rate == 60  # what it does


def noisy_bits_per_s(settings: EncoderSettings, fps: int, seconds: int = 8) -> float:
    """Of the last half, with content that fills any bit rate."""
    noise = np.random.default_rng(3)
    encode = Encoder(settings)
    planes = noise.integers(80, 170, planes_size(settings.width, settings.height), np.uint8)
    sizes = []
    for number in range(fps * seconds):
        frame = frame_of(np.roll(planes, 97 * number).data, settings.width, settings.height)
        sizes.append(sum(len(chunk.data) for chunk in encode.video(frame, number * 90_000 // fps)))
    return sum(sizes[len(sizes) // 2 :]) * 8 / (seconds / 2)


@pytest.mark.parametrize("fps", [15, 30, 60])
def test_the_bit_rate_asked_for_holds_at_every_frame_rate(fps: int) -> None:
    settings = EncoderSettings(WIDTH, HEIGHT, None, bit_rate=600_000, audio=False, preset="ultrafast")
    assert noisy_bits_per_s(settings, fps) == pytest.approx(600_000, rel=0.25)


def test_the_default_bit_rate_follows_the_frame_rate_of_the_pictures() -> None:
    encoder = H264Encoder(replace(SETTINGS, frame_rate=None))
    assert encoder.bit_rate == default_bit_rate(WIDTH, HEIGHT, Fraction(30))
    for number in range(20):
        encode_one(encoder, number, pts=number * 1500, idr=number % 10 == 0)
    assert encoder.bit_rate == default_bit_rate(WIDTH, HEIGHT, Fraction(60))


# ---- presets


def encode_one(encoder: H264Encoder, number: int, *, pts: int | None = None, idr: bool = False) -> list[Any]:
    frame = picture(number, WIDTH, HEIGHT)
    frame.pts, frame.time_base = number * 3000 if pts is None else pts, TIME_BASE
    return encoder.encode(frame, idr=idr)


def spend(choice: PresetChoice, load: float, seconds: float) -> None:
    for _ in range(round(seconds * 30)):
        choice.spent(load / 30, 1 / 30)


def test_a_machine_that_cannot_keep_up_gets_the_fastest_preset_and_later_the_better_one_again() -> None:
    choice = PresetChoice("auto")
    spend(choice, 5.0, 0.5)
    assert choice.next() == "superfast"  # too early to tell
    spend(choice, 0.7, 10)
    assert choice.next() == "superfast"
    spend(choice, 0.95, 10)
    assert choice.next() == "ultrafast"
    spend(choice, 0.2, 19)
    assert choice.next() == "ultrafast"
    spend(choice, 0.2, 2)
    assert choice.next() == "superfast"
    spend(choice, 0.95, 10)
    assert choice.next() == "ultrafast"
    spend(choice, 0.5, 60)
    assert choice.next() == "ultrafast"  # superfast would be at its limit at once


def test_pauses_do_not_hide_a_slow_machine() -> None:
    choice = PresetChoice("auto")
    for _ in range(100):
        choice.spent(0.04, 1 / 30)
        choice.spent(0.04, 30.0)
    assert choice.next() == "ultrafast"


def test_a_preset_that_was_asked_for_stays() -> None:
    choice = PresetChoice("veryfast")
    spend(choice, 3.0, 10)
    assert choice.next() == "veryfast"


class Clock:
    """Every encoding takes ``seconds``: the clock is read before and after."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._now = 0.0
        self._reads = 0

    def __call__(self) -> float:
        self._now += self.seconds if self._reads % 2 else 0.0
        self._reads += 1
        return self._now


def as_stream(packets: list[Any]) -> list[Any]:
    track = video(units_of(clip(2)))[0].track
    unit = video(units_of(clip(2)))[0]
    return [
        replace(unit, track=track, pts=packet.pts, dts=packet.pts, data=bytes(packet), keyframe=packet.is_keyframe)
        for packet in packets
    ]


def test_the_preset_changes_with_an_idr_picture_and_every_picture_is_out_at_once() -> None:
    encoder = H264Encoder(SETTINGS, Clock(0.05))
    packets = []
    presets = []
    for number in range(120):
        [packet] = encode_one(encoder, number, idr=number % 60 == 0)
        presets.append(encoder.preset)
        packets.append(packet)
    assert presets == ["superfast"] * 60 + ["ultrafast"] * 60
    assert encoder.load == pytest.approx(1.5, rel=0.05)
    assert [packet.is_keyframe for packet in packets] == [number % 60 == 0 for number in range(120)]
    assert numbers(decoded(as_stream(packets))) == list(range(120))


def test_an_encoder_opened_anew_changes_nothing_that_viewers_have_settled_on() -> None:
    """Size, colour and order; the tables and the stamps of the stream go on."""
    encode = Encoder(replace(SETTINGS, colour=decode.Colour("bt709"), segment_s=1.0))
    assert encode.h264 is not None
    encode.h264._clock = Clock(0.05)
    chunks = [chunk for number in range(90) for chunk in encode.video(picture(number, WIDTH, HEIGHT), number * 3000)]
    assert encode.h264.preset == "ultrafast"
    items = pictures(decoded(units_of(b"".join(chunk.data for chunk in chunks))))
    assert [item.pts for item in items] == [number * 3000 for number in range(90)]
    assert {(item.width, item.height, item.colour) for item in items} == {(WIDTH, HEIGHT, decode.Colour("bt709"))}
    assert [chunk.starts_segment for chunk in chunks].count(True) == 3


# ---- threads


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Callable[..., None]]:
    def of(cores: int, quota: str = "max 100000") -> None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(threads, "_CGROUP_CPU", tmp_path / "cpu.max")
        threads.cores.cache_clear()

    yield of
    monkeypatch.undo()
    threads.cores.cache_clear()


UHD60, HD30 = 3840 * 2160 * 60.0, 1280 * 720 * 30.0


@pytest.mark.parametrize(
    ("cores", "streams", "pixels_per_s", "encoder", "decoder"),
    [(2, 1, UHD60, 1, 1), (16, 1, UHD60, 4, 4), (16, 1, HD30, 1, 4), (16, 4, UHD60, 1, 1), (128, 1, UHD60, 7, 4)],
)
def test_threads_only_where_cores_are_free_and_pictures_need_them(
    machine: Callable[..., None], cores: int, streams: int, pixels_per_s: float, encoder: int, decoder: int
) -> None:
    machine(cores)
    assert threads.encoder_threads(pixels_per_s, streams) == encoder
    assert threads.decoder_threads(streams) == decoder


@pytest.mark.parametrize(
    ("quota", "cores"), [("400000 100000", 4), ("50000 100000", 1), ("max 100000", 64), ("", 64)]
)
def test_a_container_has_the_cores_of_its_quota(machine: Callable[..., None], quota: str, cores: int) -> None:
    machine(64, quota)
    assert threads.cores() == cores


# ---- NVENC


class Failing:
    """An encoder's context that works for a while."""

    def __init__(self, context: Any, pictures: int) -> None:
        self._context = context
        self._left = pictures

    def encode(self, frame: av.VideoFrame | None) -> list[Any]:
        if frame is None or self._left == 0:
            raise error("the GPU fell off the bus")
        self._left -= 1
        packets: list[Any] = self._context.encode(frame)
        return packets


def test_x264_begins_where_nvenc_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise error("OpenEncodeSessionEx failed: out of memory (10)")

    monkeypatch.setattr(h264, "open_nvenc", refuse)
    encoder = H264Encoder(replace(SETTINGS, codec=NVENC))
    assert encoder.name == X264
    assert "out of memory" in encoder.fallback
    [packet] = encode_one(encoder, 0, idr=True)
    assert packet.is_keyframe


def test_x264_goes_on_where_nvenc_fails_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        h264, "open_nvenc", lambda *settings: Failing(h264.open_x264(*settings, "ultrafast"), pictures=17)
    )
    encode = Encoder(replace(SETTINGS, codec=NVENC))
    assert encode.h264 is not None
    assert encode.h264.preset == "p4"
    chunks = []
    for number in range(70):
        assert encode.h264.name == (NVENC if number < 18 else X264)
        [chunk] = encode.video(picture(number, WIDTH, HEIGHT), number * 3000)
        chunks.append(chunk)
    assert "fell off the bus" in encode.h264.fallback
    units = video(units_of(b"".join(chunk.data for chunk in chunks + encode.flush())))
    assert [number for number, unit in enumerate(units) if unit.keyframe] == [0, 17, 60]
    assert numbers(decoded(units)) == list(range(70))


def test_the_end_of_a_stream_survives_the_end_of_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h264, "open_nvenc", lambda *s: Failing(h264.open_x264(*s, "ultrafast"), pictures=9))
    encode = Encoder(replace(SETTINGS, codec=NVENC))
    encode.video(picture(0, WIDTH, HEIGHT), 0)
    assert encode.flush() == []


def test_every_option_of_nvenc_exists_in_this_ffmpeg() -> None:
    """Opening fails without a GPU before the options are looked at; a typing error would show there alone."""
    context = av.CodecContext.create(NVENC, "w")
    supported = context.supported_options
    known = {option.name: option for option in (*supported.private, *supported.generic)}
    for name, value in (h264._options(1_000_000) | h264.NVENC_OPTIONS).items():
        choices = [choice.name for choice in known[name].choices]
        assert not choices or value in choices or value.isdecimal(), f"{name}={value}"


# ---- NVDEC


class Nvdec:
    """libavcodec's decoder as PyAV shows NVDEC: frames in memory, as NV12. Fails for units that ``fails`` names."""

    is_hwaccel = True

    def __init__(self, codec: str, fails: Callable[[int], bool]) -> None:
        self._context: Any = av.CodecContext.create(codec, "r")
        self._fails = fails
        self._units = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def decode(self, packet: Any) -> list[Any]:
        if packet is not None:
            self._units += 1
            if self._fails(self._units - 1):
                raise error("CUDA_ERROR_UNKNOWN")
        return [as_nv12(frame) for frame in self._context.decode(packet)]


def as_nv12(frame: av.VideoFrame) -> av.VideoFrame:
    """The same samples, without swscale's help; nothing but the stamp goes with them, as with PyAV's download."""
    out = av.VideoFrame(frame.width, frame.height, "nv12")
    y, u, v = (
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]  # type: ignore[call-overload]
        for plane in frame.planes
    )
    chroma = np.stack([u, v], axis=2).reshape(u.shape[0], -1)
    for plane, rows in zip(out.planes, (y, chroma), strict=True):
        target = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)  # type: ignore[call-overload]
        target[: len(rows), : rows.shape[1]] = rows
    out.pts = frame.pts
    return out


def gpu_decoder(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool] = lambda _: False) -> Decoder:
    real = hardware.open_decoder

    def opened(codec: str, device: Any) -> Any:
        return Nvdec(codec, fails) if device == "cuda" else real(codec, device)

    monkeypatch.setattr(decode, "open_decoder", opened)
    return Decoder(DecoderSettings(device="cuda"))


@pytest.mark.parametrize("size", [(320, 240), (854, 480), (318, 242)], ids=str)
def test_nv12_of_the_gpu_is_the_same_picture_to_the_byte(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    units = units_of(clip(5, width=size[0], height=size[1]))
    software = pictures(decoded(units))
    device = pictures(decoded(units, gpu_decoder(monkeypatch)))
    assert len(device) == 5
    for one, other in zip(software, device, strict=True):
        assert planes_of(one.frame) == planes_of(other.frame)
        assert (one.pts, one.colour, one.width) == (other.pts, other.colour, other.width)


@pytest.mark.parametrize("colour", [decode.Colour("bt709"), decode.Colour("bt601", full_range=True)], ids=str)
def test_the_gpus_frames_have_the_colour_that_the_stream_says(
    monkeypatch: pytest.MonkeyPatch, colour: decode.Colour
) -> None:
    encode = Encoder(replace(SETTINGS, colour=colour))
    units = units_of(b"".join(c.data for n in range(3) for c in encode.video(picture(n, WIDTH, HEIGHT), n * 3000)))
    shown = pictures(decoded(units, gpu_decoder(monkeypatch)))
    assert [item.colour for item in shown] == [colour] * 3
    assert numbers(shown) == [0, 1, 2]


@pytest.mark.parametrize("size", [(320, 240), (318, 242)], ids=str)
def test_nv12_is_encoded_like_the_same_picture_in_three_planes(size: tuple[int, int]) -> None:
    settings = replace(SETTINGS, width=size[0], height=size[1])
    one, other = Encoder(settings), Encoder(settings)
    for number in range(5):
        frame = picture(number, *size)
        assert one.video(as_nv12(frame), number * 3000) == other.video(frame, number * 3000)


def test_the_cpu_begins_where_the_gpu_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = hardware.open_decoder

    def opened(codec: str, device: Any) -> Any:
        if device == "cuda":
            raise error("no device")
        return real(codec, device)

    monkeypatch.setattr(decode, "open_decoder", opened)
    decoder = Decoder(DecoderSettings(device="cuda"))
    assert numbers(decoded(units_of(clip(30)), decoder)) == list(range(30))
    assert (decoder.device, "no device" in decoder.fallback) == ("cpu", True)
    assert decoder.counters.video_errors == 0


def test_a_key_frame_that_the_gpu_refuses_is_decoded_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = gpu_decoder(monkeypatch, lambda unit: unit >= 30)
    assert numbers(decoded(units_of(clip(60, gop=30)), decoder)) == list(range(60))
    assert decoder.device == "cpu"
    assert decoder.counters.video_errors == 0


def test_a_damaged_unit_does_not_end_the_gpus_work_but_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    # Counted are the units that the decoder is given: after a failure it waits for the next key frame.
    units = units_of(clip(90, gop=5))
    decoder = gpu_decoder(monkeypatch, lambda unit: unit == 7)
    shown = numbers(decoded(units, decoder))
    assert shown == [number for number in range(90) if number not in (7, 8, 9)]
    assert decoder.device == "cuda"
    decoder = gpu_decoder(monkeypatch, lambda unit: unit % 2 == 1)  # key frames alone pass
    shown = numbers(decoded(units, decoder))
    assert decoder.device == "cpu"
    assert shown[-20:] == list(range(70, 90))
    assert all(later > sooner for sooner, later in pairwise(n for n in shown if n is not None))


# ---- the choice at start


def test_a_machine_without_a_gpu_is_told_so_in_few_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def refuse(*_: object) -> None:
        raise error("Cannot load libcuda.so.1")

    monkeypatch.setattr(hardware, "probe_encoder", refuse)
    monkeypatch.setattr(hardware, "_NVIDIA_DRIVER", tmp_path / "nothing")
    assert probe("auto") == Codecs(X264, "cpu", "no NVIDIA GPU")
    monkeypatch.setattr(hardware, "_NVIDIA_DRIVER", tmp_path)
    assert "NVENC does not work: " in probe("auto").reason
    assert "libcuda" in probe("cuda").reason


def test_nothing_is_opened_when_the_cpu_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "probe_encoder", None)  # a call would raise
    assert probe("cpu") == Codecs(X264, "cpu", "the setting codec is cpu")


def test_encoder_and_decoder_are_chosen_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that quietly works on the CPU is not taken for a GPU's."""
    monkeypatch.setattr(hardware, "NVENC", X264)
    monkeypatch.setattr(hardware, "open_decoder", lambda codec, _, fall_back: av.CodecContext.create(codec, "r"))
    found = probe("auto")
    assert (found.encoder, found.decoder) == (X264, "cpu")
    assert found.reason == "NVDEC does not work: 3 of 3 pictures came back"
    monkeypatch.setattr(hardware, "open_decoder", lambda codec, _, fall_back: Nvdec(codec, lambda _: False))
    assert probe("auto").decoder == "cuda"


def test_pictures_of_the_gpu_fallback_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of one stream: a GPU that dies under decoder and encoder costs no picture."""
    monkeypatch.setattr(h264, "open_nvenc", lambda *s: Failing(h264.open_x264(*s, "ultrafast"), pictures=40))
    decoder = gpu_decoder(monkeypatch, lambda unit: unit >= 30)
    encode = Encoder(replace(SETTINGS, codec=NVENC))
    items = pictures(decoded(units_of(clip(60, gop=30)), decoder))
    data = b"".join(chunk.data for item in items for chunk in encode.video(item.frame, item.pts))
    assert numbers(decoded(units_of(data))) == list(range(60))
