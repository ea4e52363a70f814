"""The program ``qdm-deploy``: its commands, and the one place where exceptions become exit codes."""

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from qdm_deploy.cli.batch import batch
from qdm_deploy.cli.build import build
from qdm_deploy.cli.compare import compare
from qdm_deploy.cli.doctor import doctor
from qdm_deploy.cli.engine import engine
from qdm_deploy.cli.evaluate import evaluate
from qdm_deploy.cli.export_triton import export_triton
from qdm_deploy.cli.failures import EXIT_CODES, Terminated, show_failure
from qdm_deploy.cli.generate import generate
from qdm_deploy.cli.healthcheck import healthcheck
from qdm_deploy.cli.inspect import inspect
from qdm_deploy.cli.recipe import recipe
from qdm_deploy.cli.serve import serve
from qdm_deploy.cli.verb import Settings, common_switches, write_lines
from qdm_deploy.cli.verify import verify

__all__ = ["cli", "main"]

_NAME = "qdm-deploy"
_COMPLETION = "_QDM_DEPLOY_COMPLETE"


class _Program(click.Group):
    """The group of commands; it ends the process with the exit code of what happened."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; see ``click.Command.main``. Errors are reported here only in standalone mode."""
        if not standalone_mode or _COMPLETION in os.environ:
            return super().main(args, _NAME, _COMPLETION, standalone_mode=standalone_mode, **extra)
        arguments = list(sys.argv[1:] if args is None else args)
        settings = Settings(arguments=tuple(arguments))
        try:
            with self.make_context(_NAME, list(arguments), obj=settings, **extra) as context:
                code = self.invoke(context) or 0
        except click.exceptions.Exit as end:
            code = end.exit_code
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
            # The switch may stand behind the word that could not be parsed.
            settings.json = settings.json or (isinstance(error, click.UsageError) and "--json" in arguments)
            code = show_failure(error, settings)
        sys.exit(code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which they are used."""
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """First steps and the exit codes."""
        write_lines(
            formatter,
            "Examples",
            (
                "qdm-deploy build --int8                              the model that comes with qdm-deploy",
                "qdm-deploy build --int8 google/ddpm-cifar10-32       a model of the Hugging Face hub, or a folder",
                "qdm-deploy generate ddpm-cifar10-32.qdm --out images",
            ),
        )
        write_lines(formatter, "Exit codes", (f"{code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()))


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name=_NAME)
def cli() -> None:
    """INT8 deployment of diffusion U-Nets: calibrate, export, build, verify, run."""


cli.params += common_switches()
_COMMANDS = (
    build,
    recipe,
    generate,
    batch,
    serve,
    inspect,
    verify,
    compare,
    evaluate,
    engine,
    export_triton,
    healthcheck,
    doctor,
)
for _command in _COMMANDS:
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line of this process and end it with the exit code."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    if not sys.warnoptions:
        # Those of the libraries below address programmers; ours are errors or lines of the report.
        warnings.simplefilter("ignore")
    cli.main()
    raise AssertionError("cli.main ends the process")


if __name__ == "__main__":
    main()
