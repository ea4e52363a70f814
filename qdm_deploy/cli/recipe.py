"""``qdm-deploy recipe``: how models are quantized, by name or from a file."""

from typing import TYPE_CHECKING

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.tables import print_table
from qdm_deploy.cli.verb import Verb, VerbGroup

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["recipe"]


@click.group(
    "recipe",
    cls=VerbGroup,
    short_help="List, show and check recipes: how a model is quantized.",
    examples=(
        "qdm-deploy recipe list",
        "qdm-deploy recipe show w4a8 > mine.toml",
        "qdm-deploy recipe check mine.toml && qdm-deploy build --int8 --recipe mine.toml",
    ),
)
def recipe() -> None:
    r"""A recipe is a TOML file. Keys that it leaves out are as in the recipe it names as its base.

    \b
        base = "default"
        [weights]
        bits = 4
        reconstruct = "full"
        [[layers]]
        match = "down_blocks.0.*"
        bits = 8
    """


@recipe.command("list", cls=Verb, short_help="Print the recipes that come with qdm-deploy.")
@click.pass_obj
def list_(output: Output) -> None:
    """Print name and purpose of every recipe that comes with qdm-deploy."""
    from qdm_deploy.pipeline import list_recipes

    found = list_recipes()
    output.result(
        {"recipes": found},
        lambda console: print_table(console, "recipes", ("name", "what it is for"), found.items()),
        list(found),
    )


@recipe.command(
    "show", cls=Verb, short_help="Print a recipe with every key.", examples=("qdm-deploy recipe show fast",)
)
@click.argument("name", metavar="NAME|FILE", help="A recipe of `qdm-deploy recipe list`, or a TOML file.")
@click.pass_obj
def show(output: Output, name: str) -> None:
    """Print a recipe with every key, its value and its meaning, as a TOML file that `build --recipe` takes."""
    from qdm_deploy.pipeline import read_recipe, write_recipe

    found = read_recipe(name)
    text = write_recipe(found)
    output.result({"recipe": found.document()}, lambda console: _write(console, text), [text.rstrip()])


@recipe.command("check", cls=Verb, short_help="Check a recipe file.", examples=("qdm-deploy recipe check mine.toml",))
@click.argument("file", metavar="FILE", help="A TOML file.")
@click.pass_obj
def check(output: Output, file: str) -> None:
    """Read a recipe; an unknown key or value is an error, with what is allowed.

    Whether its layer rules fit a model is known when it is built.
    """
    from qdm_deploy.pipeline import read_recipe

    found = read_recipe(file)
    output.result({"recipe": found.document()}, lambda console: console.print(f"{file} is a recipe"), [])


def _write(console: "Console", text: str) -> None:
    # As it is: it goes to a file, where nothing may be wrapped or coloured.
    console.out(text, end="", highlight=False)
