"""How a server is set up: one frozen value, made by ``sumuk serve`` from its flags, or in Python."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sumuk.base.errors import BadInput

MIB = 2**20


def state_folder() -> Path:
    """Where a server keeps jobs and results unless told otherwise."""
    return Path.home() / ".local" / "share" / "sumuk" / "server"


class ServeConfig(BaseModel):
    """A server.

    Raises:
        BadInput: a value is out of range, or the server would stand open to the network without a token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Where and for whom.
    host: str = "127.0.0.1"
    port: int = Field(default=7860, ge=0, le=65535)
    tokens: dict[str, str] = Field(default_factory=dict)
    """Name of a key -> the token. Needed off loopback; each name has its own jobs and limits."""
    hosts: tuple[str, ...] = ()
    """Further names under which the server is reached (``Host`` header), besides loopback and ``host`` itself."""
    origins: tuple[str, ...] = ()
    """Further sites whose pages may call (``https://sso.example``)."""
    proxies: tuple[str, ...] = ()
    """Addresses whose ``X-Forwarded-For`` is believed."""
    page: bool = True
    """Serve the web page too."""
    state: Path = Field(default_factory=state_folder)

    # What draws.
    model: Path | None = None
    """The usual checkpoint; None: the miniature."""
    parts: dict[str, Path] = Field(default_factory=dict)
    """Files that supply parts of it (``{"tiny_decoder": ...}``), see :func:`sumuk.load`."""
    shelf: Path | None = None
    """A folder of further checkpoints, LoRAs, embeddings, autoencoders, ControlNets that orders can name."""
    device: str = "cpu"
    dtype: str | None = None
    mode: Literal["exact", "fast"] | None = None
    """See :mod:`sumuk.generate.engine`; None: ``exact`` on a CPU, ``fast`` elsewhere."""
    together: int | None = Field(default=None, ge=1, le=256)
    """Pictures drawn at once; None: 2 in exact mode, 16 in fast mode."""
    threads: int | None = Field(default=None, ge=1)
    memory: int | None = Field(default=None, ge=64 * MIB)
    """Bytes that models may take together; the least recently used goes. None: three quarters of what there is."""
    preview: int = Field(default=2, ge=0, le=1000)
    """Steps between previews for who looks on (the page, A1111's clients); 0: none."""

    # How much.
    queue_jobs: int = Field(default=256, ge=1)
    queue_cost: float = Field(default=2e12, gt=0)
    """Pixels x steps x rows that may wait."""
    job_cost: float = Field(default=4e11, gt=0)
    """The same of one job: ten pictures of 1024 x 1024 pixels in 1000 steps of two rows are 2e10."""
    per_key: str = "120/minute"
    """Orders of one key, in the notation of the package limits."""
    per_address: str = "240/minute"
    patience: float = Field(default=3600.0, gt=0)
    """Seconds after which a job that is not finished is given up, unless it says less."""
    body_bytes: int = Field(default=64 * MIB, ge=1024)
    body_seconds: float = Field(default=30.0, gt=0)
    picture_pixels: int = Field(default=16_777_216, ge=64)
    """Of one picture that is sent."""
    prompt_characters: int = Field(default=20_000, ge=1)
    keep_days: float = Field(default=30.0, gt=0)
    """Results of ended jobs are kept so long,"""
    keep_bytes: int = Field(default=20 * 2**30, ge=0)
    """and no more than this; the oldest goes first."""
    drain: float = Field(default=30.0, ge=0)
    """Seconds that running jobs get after SIGTERM; what is not finished is queued again for the next start."""

    # What is watched.
    check_prompts: bool = False
    check_images: bool = False
    blocked_words: Path | None = None
    """A text file, a word or phrase a line, for ``check_prompts``."""
    sign: Path | None = None
    """A folder with ``cert.pem`` and ``key.pem``: results are signed (C2PA)."""
    log: Literal["json", "text"] = "text"

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            text = first["msg"].removeprefix("Value error, ")
            raise BadInput(f"{name}: {text} (got {first['input']!r:.80})" if name else text) from None

    @property
    def usual(self) -> str:
        """The name of the usual checkpoint, by which orders may ask for it too."""
        return "miniature" if self.model is None else self.model.stem or self.model.name

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host == "localhost" or _is_loopback(self.host)

    @model_validator(mode="after")
    def _closed(self) -> ServeConfig:
        if not self.loopback and not self.tokens:
            raise ValueError(
                f"host {self.host} is reached from other machines, so that a token is needed: "
                "give --token NAME=SECRET (or SUMUK_TOKENS), or stay on 127.0.0.1"
            )
        for name, token in self.tokens.items():
            if len(token) < 16:
                raise ValueError(f"the token of {name!r} has {len(token)} characters; at least 16 are needed")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
