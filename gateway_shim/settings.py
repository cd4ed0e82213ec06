"""Everything the shim can be told: each setting's default, its meaning and how it is read, and what follows from it.

``config`` finds the values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from proto import engine_address, run_directory

from . import options as read
from .keys import BUDGET_MS, POLICIES
from .options import Option, option

#: Largest body the gateway passes on is 10 MiB (go-livepeer byoc/stream_gateway.go); the rest is headroom.
BODY_LIMIT_BYTES = 16 * 1024 * 1024

#: From the fastest; hot-path.md section 5 has what each costs.
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium")

_LEVELS = ("debug", "info", "warning", "error")

#: Addresses that mean "all interfaces" and tell nobody how to reach us.
_WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104


@dataclass(frozen=True)
class Settings:
    """Everything the shim can be told. ``config.load`` checks; a value given in code is taken as it is."""

    listen_host: str = field(
        default="127.0.0.1", metadata=option("address to listen on", read.name, "a host name or address")
    )
    listen_port: int = field(
        default=8188,
        metadata=option("port to listen on; 0: a free one", read.integer(0, 65535), "a whole number from 0 to 65535"),
    )
    run_dir: Path = field(
        default_factory=run_directory, metadata=option("where sockets and journals lie", read.path, "a directory")
    )
    engine_address: str = field(
        default="",
        metadata=option(
            "gRPC addresses of engines", read.text, "unix:/path/to.sock or host:port, separated by commas"
        ),
    )
    engine_count: int = field(
        default=1,
        metadata=option(
            "engines under run_dir, when engine_address names none",
            read.integer(0, 64),
            "0 to 64",
            "HEADRACE_ENGINES",
        ),
    )
    lane: str = field(
        default="auto",
        metadata=option(
            "how planes get to the engine; auto: shared memory where engine and shim are on one machine",
            read.choice("auto", "bytes"),
            "auto or bytes",
        ),
    )
    # With supervisord's five seconds between two looks, and the second in which it starts another: within ten.
    engine_silence_s: float = field(
        default=3.0,
        metadata=option(
            "silence of a ready engine after which the watchdog restarts it",
            read.seconds(0.1, 3600),
            "seconds, 0.1 to 3600",
        ),
    )
    capacity: int = field(
        default=1,
        metadata=option("streams at once", read.integer(1, 64), "a whole number from 1 to 64", "CAPABILITY_CAPACITY"),
    )
    orch_url: str = field(
        default="",
        metadata=option("orchestrator to register with; none: do not", read.url, "http(s)://host:port", "ORCH_URL"),
    )
    orch_secret: str = field(
        default="",
        repr=False,
        metadata=option("the orchestrator's -orchSecret", read.text, "text", "ORCH_SECRET", secret=True),
    )
    capability_name: str = field(
        default="comfystream",
        metadata=option("name clients ask for", read.name, "text without spaces", "CAPABILITY_NAME"),
    )
    capability_description: str = field(
        default="",
        metadata=option("description sent with the registration", read.text, "text", "CAPABILITY_DESCRIPTION"),
    )
    capability_url: str = field(
        default="",
        metadata=option(
            "where the orchestrator reaches us; a path prefix is allowed",
            read.url,
            "http(s)://host:port",
            "CAPABILITY_URL",
        ),
    )
    capability_price_per_unit: int = field(
        default=0,
        metadata=option(
            "price of one second, in currency / price_scaling",
            read.integer(0, 2**63 - 1),
            "a whole number from 0",
            "CAPABILITY_PRICE_PER_UNIT",
        ),
    )
    capability_price_scaling: int = field(
        default=1,
        metadata=option(
            "divisor of the price", read.integer(1, 2**63 - 1), "a whole number from 1", "CAPABILITY_PRICE_SCALING"
        ),
    )
    # An orchestrator without a price feed for another currency drops the connection unanswered (protocol.md 3.1).
    capability_currency: str = field(
        default="wei",
        metadata=option(
            "wei, eth, or one the orchestrator has a price feed for", read.currency, "letters", "CAPABILITY_CURRENCY"
        ),
    )
    auth_token: str = field(
        default="",
        repr=False,
        metadata=option(
            "bearer token callers must send; none: no check", read.text, "text", "AUTH_TOKEN", secret=True
        ),
    )
    model_id: str = field(
        default="",
        metadata=option(
            "model_id of /version and aiModels.json; by default the capability's name",
            read.model,
            f"text without spaces, none of {', '.join(read.BUILT_IN_MODELS)}, streamdiffusion*",
            "MODEL_ID",
        ),
    )
    pipeline: str = field(
        default="live-video-to-video",
        metadata=option("pipeline of /version and events", read.name, "text without spaces", "PIPELINE"),
    )
    reregister_s: float = field(
        default=60.0,
        metadata=option("how often to register again while idle", read.seconds(1, 86400), "seconds, 1 to 86400"),
    )
    latency_budget_ms: int = field(
        default=400,
        metadata=option(
            "how late a frame may be, in streams that do not say",
            read.integer(*BUDGET_MS),
            "milliseconds, 20 to 30000",
        ),
    )
    fallback: str = field(
        default="auto",
        metadata=option(
            "what viewers see while the graph gives nothing, in streams that do not say: auto: the last picture for "
            "half a second, then the input; hold: the last picture, dimmed; overlay: that with the reason on it",
            read.choice(*POLICIES),
            ", ".join(POLICIES),
        ),
    )
    encoder_preset: str = field(
        default="auto",
        metadata=option(
            "x264 preset: slower is better looking at the same bit rate; auto: superfast, or ultrafast where that is "
            "more than the machine can do",
            read.choice("auto", *PRESETS),
            ", ".join(("auto", *PRESETS)),
        ),
    )
    codec: str = field(
        default="auto",
        metadata=option(
            "where video is decoded and encoded; auto: NVDEC and NVENC where they work",
            read.choice("auto", "cpu", "cuda"),
            "auto, cpu or cuda",
        ),
    )
    codec_threads: int = field(
        default=0,
        metadata=option(
            "threads of each video codec on the CPU; 0: from the cores, the capacity and the picture's size",
            read.integer(0, 64),
            "0 to 64",
        ),
    )
    bit_rate: int = field(
        default=0,
        metadata=option(
            "bit rate of the output's video; 0: one that suits its size and frame rate",
            read.integer(0, 200_000_000),
            "bits per second, 0 to 200000000",
        ),
    )
    input_timeout_s: float = field(
        default=60.0,
        metadata=option("input silence after which a stream ends", read.seconds(1, 86400), "seconds, 1 to 86400"),
    )
    body_limit_bytes: int = field(
        default=BODY_LIMIT_BYTES,
        metadata=option("largest request body", read.integer(1024, 2**30), "bytes, 1024 to 1073741824"),
    )
    default_workflow: Path | None = field(
        default=None,
        metadata=option("workflow of streams that bring none; none: pass-through", read.path, "a JSON file"),
    )
    trickle_hosts: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "hosts, or host:port, that channel URLs may name besides the orchestrator's; * allows any",
            read.hosts,
            "host names separated by commas",
        ),
    )
    verify_tls: bool = field(  # off: orchestrators make their own certificates (go-livepeer server/cert.go)
        default=False, metadata=option("check the orchestrator's certificate", read.switch, "true or false")
    )
    # `headrace up` lets supervisord wait for this and for the end of a stream (manager.END_S, CUT_OFF_S) beyond it.
    drain_s: float = field(
        default=5.0,
        metadata=option("time for streams to end at shutdown", read.seconds(0, 600), "seconds, 0 to 600"),
    )
    # Gateways give a worker up after 30 s of silence (protocol.md 1.8), of which a segment and our start take some.
    resume_within_s: float = field(
        default=20.0,
        metadata=option(
            "silence after which streams of a killed shim still go on in the next one; 0: always handed over",
            read.seconds(0, 600),
            "seconds, 0 to 600",
        ),
    )
    log_format: str = field(
        default="text", metadata=option("form of log lines", read.choice("text", "json"), "text or json")
    )
    log_level: str = field(
        default="info",
        metadata=option("least severity logged", read.choice(*_LEVELS), "debug, info, warning or error"),
    )
    access_log: bool = field(
        default=False, metadata=option("log every request; /health is polled", read.switch, "true or false")
    )
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.engine_address:
            object.__setattr__(self, "engine_address", engine_address(directory=self.run_dir))
        if not self.model_id:
            object.__setattr__(self, "model_id", self.capability_name)

    @property
    def engine_addresses(self) -> tuple[str, ...]:
        """Where the engines are; at least one."""
        if self.engine_address == engine_address(directory=self.run_dir):
            return tuple(engine_address(index, self.run_dir) for index in range(max(1, self.engine_count)))
        return tuple(address for part in self.engine_address.split(",") if (address := part.strip()))

    @property
    def is_local(self) -> bool:
        """Whether none but programs of this machine can reach us."""
        return self.listen_host == "localhost" or self.listen_host.startswith("127.") or self.listen_host == "::1"

    def public_url(self, port: int | None = None) -> str:
        """Where the orchestrator reaches us, without trailing slash; empty when nobody said and we cannot know.

        port: the one that is really bound, when ``listen_port`` is 0.
        """
        if self.capability_url:
            return self.capability_url.rstrip("/")
        if self.listen_host in _WILDCARDS:
            return ""
        return self.local_url(port)

    def local_url(self, port: int | None = None) -> str:
        """Where programs of this machine reach us."""
        host = "127.0.0.1" if self.listen_host in _WILDCARDS else self.listen_host
        return f"http://{f'[{host}]' if ':' in host else host}:{port or self.listen_port}"

    @property
    def channel_hosts(self) -> tuple[str, ...]:
        """Hosts that channel URLs may name; empty means any.

        With no orchestrator configured (it drives us by ``aiModels.json``) its trickle address is unknown until the
        first start, so any host is allowed then; an allow-list closes that.
        """
        if "*" in self.trickle_hosts:
            return ()
        orchestrator = urlsplit(self.orch_url).hostname
        return (*self.trickle_hosts, orchestrator) if orchestrator else self.trickle_hosts


def options() -> dict[str, Option]:
    """Every setting's name and how it is read, in the order of the table in the README."""
    return {item.name: item.metadata["option"] for item in dataclasses.fields(Settings) if "option" in item.metadata}
