"""What an operator decides about a server: where it listens, who may use it, and how much it takes on."""

from dataclasses import dataclass, field
from pathlib import Path

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and access. Times are seconds, sizes bytes."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ()  # of web pages; none: browsers keep other pages away
    adapter_root: Path | None = None  # where clients may load adapters from; None: they may not
    max_batch: int = 16  # answers that decode together
    max_queue: int = 64  # answers that wait for a place
    max_body: int = 4_000_000
    max_tokens: int = 4_096  # of one answer
    timeout: float = 600.0  # from a request's arrival to the end of its answer
    grace: float = 30.0  # for answers under way when the server is told to stop
    body_timeout: float = 30.0  # for a client to send its request
    keepalive: float = 10.0  # silence on a stream before a comment is sent

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK
