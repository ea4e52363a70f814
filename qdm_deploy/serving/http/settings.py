"""What the operator decides about the HTTP side; nothing here changes a picture."""

import hmac
import ipaddress
from dataclasses import dataclass
from typing import Literal

from qdm_deploy.artifacts.pipeline_spec import PipelineSpec, StatesFile
from qdm_deploy.components.decoder import refuse_latents
from qdm_deploy.errors import InputError

__all__ = ["HttpSettings", "check_servable", "is_loopback"]

MIN_KEY_LENGTH = 16
MAX_PREVIEWS = 16


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class HttpSettings:
    """Limits, times and access of the HTTP side.

    Attributes:
        bundle_id: names the bundle in pictures and metadata.
        precision: of the session, for the metadata.
        host, port: where to listen; port 0 takes a free one.
        api_key: what clients must send as ``Authorization: Bearer KEY``; None asks for none.
        allow_unauthenticated: listen beyond this machine without a key.
        allowed_hosts: names that a ``Host`` header may carry beside this machine's own. The header is looked at where
            ``host`` is this machine only and no key is asked for.
        request_timeout: seconds from submission to images, the queue included; 504 afterwards.
        drain_timeout: seconds that running requests get after SIGTERM.
        body_timeout: seconds for a request's header, and again for its body.
        max_body_bytes: of a request.
        max_connections: open at once.
        max_images, max_steps, max_prompt: of one request.
        default_steps: where a request names none.
        queue_full_status: what a full queue answers; clients and balancers differ in which one they retry.
    """

    bundle_id: str = "unknown"
    precision: str = "int8"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allow_unauthenticated: bool = False
    allowed_hosts: tuple[str, ...] = ()
    request_timeout: float = 300.0
    drain_timeout: float = 30.0
    body_timeout: float = 10.0
    max_body_bytes: int = 1 << 20
    max_connections: int = 1000
    max_images: int = 10
    max_steps: int = 1000
    max_prompt: int = 4000
    default_steps: int = 50
    queue_full_status: Literal[429, 503] = 503

    def __post_init__(self) -> None:
        """Refuse what would be unsafe or could not work."""
        if not is_loopback(self.host) and self.api_key is None and not self.allow_unauthenticated:
            raise InputError(
                f"host {self.host} is reachable from other machines; give an API key (--api-key-file or the variable "
                "QDM_API_KEY), or --allow-unauthenticated where something in front of it checks who calls"
            )
        if self.api_key is not None and (
            len(self.api_key) < MIN_KEY_LENGTH or not self.api_key.isascii() or not self.api_key.isprintable()
        ):
            raise InputError(
                f"the API key has {len(self.api_key)} characters; give at least {MIN_KEY_LENGTH}, printable ASCII "
                "only, for example those of `openssl rand -hex 32`"
            )
        if not 0 <= self.port <= 65535:
            raise InputError(f"port {self.port} is out of range; choose 0 (any free one) .. 65535")
        for what, seconds in (
            ("request timeout", self.request_timeout),
            ("drain timeout", self.drain_timeout),
            ("body timeout", self.body_timeout),
        ):
            if not 0 < seconds <= 86_400:
                raise InputError(f"a {what} of {seconds} s cannot be used; choose more than 0 s and at most 86400 s")
        for what, count, most in (
            ("images in a request", self.max_images, 1000),
            ("steps in a request", self.max_steps, 1000),
            ("bytes in a request", self.max_body_bytes, 1 << 26),
            ("open connections", self.max_connections, 1_000_000),
        ):
            if not 1 <= count <= most:
                raise InputError(f"a limit of {count} {what} cannot be used; choose 1 .. {most}")

    def is_key(self, given: str) -> bool:
        """Whether a client sent the key; the time it takes does not say how much of it was right."""
        return self.api_key is not None and hmac.compare_digest(given.encode(), self.api_key.encode())


def check_servable(model: PipelineSpec) -> None:
    """Refuse a model whose pictures the HTTP side cannot make.

    Raises:
        InputError: it makes latents and has no decoder, or is conditioned on states that nothing makes.
    """
    refuse_latents(model)
    if isinstance(model.encoder, StatesFile):
        raise InputError(
            f"{model.name} is conditioned on {', '.join(model.encoder.inputs)}, and this version has no encoder that "
            "makes them; serve an unconditional or class-conditional model, or use `qdm-deploy generate --conditioning`"
        )
    channels = (model.picture_shape or model.sample_shape)[0]
    if channels not in (1, 3):
        raise InputError(f"{model.name} makes {channels} channels; pictures have 1 or 3")
