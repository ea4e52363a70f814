"""``qdm-deploy healthcheck``: does a server admit requests; for containers and scripts."""

import json
import urllib.error
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from typing import TYPE_CHECKING

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.verb import Verb, option
from qdm_deploy.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["healthcheck"]

_MOST_BYTES = 1 << 16


@click.command(
    "healthcheck",
    cls=Verb,
    short_help="Ask a running server whether it is ready.",
    examples=(
        "qdm-deploy healthcheck",
        "qdm-deploy healthcheck http://127.0.0.1:9000 --live",
        "qdm-deploy healthcheck -q || systemctl restart qdm",
    ),
)
@click.argument("url", default="http://127.0.0.1:8000", help="Base URL of the server.")
@option("--live", is_flag=True, help="Ask only whether the process can work, as it can while it loads or drains.")
@option("--timeout", type=float, default=5.0, help="Seconds to wait for the answer.")
@click.pass_obj
def healthcheck(output: Output, url: str, live: bool, timeout: float) -> int:
    """Ask URL/v2/health/ready, or URL/v2/health/live.

    The exit code is 0 when the answer is yes and 1 when it is no or does not come. No key is needed, and no proxy is
    used.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url!r} is no URL of a server; give http://HOST:PORT")
    if not 0 < timeout <= 3600:
        raise InputError(f"a timeout of {timeout} s cannot be used; choose more than 0 s and at most 3600 s")
    what = "live" if live else "ready"
    good, detail = _ask(f"{url.rstrip('/')}/v2/health/{what}", timeout)

    def text(console: "Console") -> None:
        console.print(f"{url} is {what}" if good else f"{url} is not {what}: {detail}")

    output.result({"url": url, what: good, "detail": detail}, text, () if good else (detail,))
    return 0 if good else 1


def _ask(url: str, timeout: float) -> tuple[bool, str]:
    """Whether the answer is 200, and otherwise why not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as answer:
            answer.read(_MOST_BYTES)
            return answer.status == 200, f"HTTP {answer.status}"
    except urllib.error.HTTPError as error:
        with error, suppress(OSError, HTTPException):  # a body that does not come changes nothing
            return False, _message(error.read(_MOST_BYTES)) or f"HTTP {error.code}"
        return False, f"HTTP {error.code}"
    except (OSError, HTTPException) as error:  # URLError and timeouts are among the first
        return False, str(getattr(error, "reason", error))
    except ValueError as error:
        raise InputError(f"{url} cannot be asked: {error}") from error


def _message(body: bytes) -> str | None:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
