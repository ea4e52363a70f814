"""``qdm-deploy serve``: a bundle behind HTTP."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.verb import Verb, option

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["serve"]


@click.command(
    "serve",
    cls=Verb,
    short_help="Serve a bundle over HTTP, with the OpenAI Images API.",
    examples=(
        "qdm-deploy serve fashion.qdm",
        "qdm-deploy serve fashion.qdm --port 9000 --max-batch-rows 16",
        "qdm-deploy serve fashion.qdm --host 0.0.0.0 --api-key-file key.txt",
    ),
)
@click.argument("bundle", type=click.Path(path_type=Path), help="Bundle made by `qdm-deploy build`.")
@option("--host", default="127.0.0.1", help="Address to listen on; any but this machine's own needs an API key.")
@option("--port", type=int, default=8000, help="Port; 0 takes a free one.")
@option("--max-batch-rows", type=int, default=8, section="Batching", help="Rows of a step; a guided image takes two.")
@option("--max-waiting", type=int, default=64, section="Batching", help="Requests that may wait for a row.")
@option(
    "--deterministic",
    is_flag=True,
    section="Batching",
    help="Same bits whatever shares the batch; every step runs a full batch.",
)
@option(
    "--request-timeout", type=float, default=300.0, section="Limits", help="Seconds for a request, its wait included."
)
@option(
    "--drain-timeout", type=float, default=30.0, section="Limits", help="Seconds for running requests after SIGTERM."
)
@option(
    "--step-timeout",
    type=float,
    default=60.0,
    section="Limits",
    help="Seconds after which a step counts as hung, and the engine process is started again.",
)
@option(
    "--load-timeout",
    type=float,
    default=1800.0,
    section="Limits",
    help="Seconds to load the bundle, the build of a GPU engine included.",
)
@option("--max-images", type=int, default=10, section="Limits", help="Images in one request.")
@option("--max-steps", type=int, default=1000, section="Limits", help="Denoising steps of one request.")
@option(
    "--queue-full-status",
    type=click.Choice(["503", "429"]),
    default="503",
    section="Limits",
    help="What a full queue answers, with Retry-After.",
)
@option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    section="Access",
    help="File with the key that clients must send.  [default: the variable QDM_API_KEY, if set]",
)
@option(
    "--allow-unauthenticated",
    is_flag=True,
    section="Access",
    help="Listen beyond this machine without a key, behind something that checks who calls.",
)
@option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    section="Access",
    help="Name that Host headers may carry besides this machine's own; can be repeated.",
)
@option(
    "--backend",
    default="auto",
    metavar="NAME",
    section="Runtime",
    help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx; auto is the faster CPU one, timed once.",
)
@option(
    "--precision",
    type=click.Choice(["int8", "float"]),
    default="int8",
    section="Runtime",
    help="Run the INT8 graph or the float reference.",
)
@option("--threads", type=int, section="Runtime", help="CPU threads.  [default: all cores]")
@click.pass_obj
def serve(output: Output, /, **options: Any) -> int:
    """Answer POST /v1/images/generations and show a page to try the model at /.

    Requests that come while others run join their batch at the next denoising step. The URL is printed to stdout once
    connections are taken; logs are JSON lines on stderr. SIGTERM or Ctrl-C finishes what was admitted and ends with
    exit code 0; a second one ends at once.
    """
    from qdm_deploy.pipeline import ServeOptions
    from qdm_deploy.pipeline import serve as run

    options["queue_full_status"] = int(options["queue_full_status"])
    chosen = ServeOptions(**options, quiet=output.quiet)

    def listening(url: str, model: str, bundle_id: str) -> None:
        def text(console: "Console") -> None:
            console.print(f"{model} on {url}; page: {url}/, API: {url}/v1/images/generations")

        output.result({"url": url, "model": model, "bundle_id": bundle_id}, text, (url,))

    return run(chosen, listening)
