"""The command line: each command parses, builds and calls one function.

Nothing heavy is imported before a command needs it, so that `dkdetr --help` is quick.
"""

import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="dkdetr",
    help="Open-vocabulary detection by distilling CLIP into Deformable DETR, with CLIP out of the "
    "training loop: cache-teacher, then train, then eval.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="Look at a teacher cache and check it.", no_args_is_help=True)
data_app = typer.Typer(help="Data sets: what is known, what is there.", no_args_is_help=True)
config_app = typer.Typer(help="Experiments and their settings.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")

DataRoot = Annotated[
    Path, typer.Option("--data-root", envvar="DKDETR_DATA", help="Folder of coco/ lvis/ ...")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Json = Annotated[
    str | None, typer.Option("--json", help="Write the result as JSON to a file, or - for stdout")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: a.b=c (repeatable)")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show a traceback with errors")]

_OUT_OF_MEMORY = "OutOfMemoryError"


def _command(group: typer.Typer, name: str) -> Callable[[Callable[..., None]], Any]:
    """Registers a command whose errors become one message and the documented exit code."""

    def register(function: Callable[..., None]) -> Any:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except KeyboardInterrupt:
                _say("stopped")
                raise typer.Exit(130) from None
            except Exception as error:
                code = _exit_code(error)
                if code is None or kwargs.get("verbose"):
                    traceback.print_exc()
                if code is None:
                    raise typer.Exit(1) from None
                _say(f"error [{code}]: {error}")
                raise typer.Exit(code) from None

        return group.command(name)(guarded)

    return register


def _exit_code(error: Exception) -> int | None:
    """Returns the documented exit code of an error, None for one of our own mistakes."""
    if isinstance(error, OSError) and error.errno == 28:
        return 6
    if type(error).__name__ == _OUT_OF_MEMORY:
        return 9
    return getattr(error, "exit_code", None)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _report(result: dict[str, Any], destination: str | None) -> None:
    if destination == "-":
        print(json.dumps(result, indent=2, default=str))
    elif destination is not None:
        from dkdetr.atomic_file import write_text

        write_text(Path(destination), json.dumps(result, indent=2, default=str) + "\n")


def main() -> None:
    """Runs the program."""
    app(prog_name="dkdetr")
