"""The ``latentc`` command: finds the subcommands, turns errors into one line and an exit code.

A subcommand's module is imported when it is used, so that ``latentc --help`` stays quick and
works where the compiler is not installed.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from io import TextIOWrapper
from typing import TextIO

import click

from latentc.runtimes.errors import LatentcError
from latentc.runtimes.interrupts import noticed

# name → where it is, one line about it
from latentc.runtimes.terminal import say
from latentc.runtimes.unknown_names import suggestion
from latentc.runtimes.version import __version__

COMMANDS = {
    "export": ("latentc.exporter.cli:export", "Compile a diffusers pipeline into a bundle."),
    "schedule": ("latentc.exporter.cli:schedule", "Add sampling plans to a bundle."),
    "generate": ("latentc.runtimes.commands.generate:generate", "Make images."),
    "compute": (
        "latentc.runtimes.commands.compute:compute",
        "Write values of a call, such as encoded texts.",
    ),
    "inspect": ("latentc.runtimes.commands.generate:inspect", "Show what a bundle holds."),
    "upgrade": ("latentc.runtimes.commands.upgrade:upgrade", "Bring an older bundle up to date."),
    "build": (
        "latentc.runtimes.commands.build:build",
        "Build a bundle's engines for this machine.",
    ),
    "tune": ("latentc.runtimes.commands.tune:tune", "Find the fastest settings on this machine."),
    "verify": (
        "latentc.runtimes.commands.verify:verify",
        "Check a bundle's files and figures on this machine.",
    ),
    "plans": ("latentc.runtimes.commands.generate:plans", "Write sampling plans as JSON."),
    "bench": ("latentc.benchmarks.bench.cli:bench", "Measure a bundle's builds against PyTorch."),
    "backends": ("latentc.runtimes.commands.generate:backends", "List the inference engines."),
}
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_BROKEN_PIPE = 1  # as click has it, where it notices first


class LazyGroup(click.Group):
    """Knows its subcommands by `COMMANDS` and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"no such command: {name}; {suggestion(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""
    \b
    Exit codes: 0 done · 2 bad argument · 3 bad source · 4 bad bundle · 5 backend failed ·
    6 verification missed · 7 export failed · 8 slower than before · 130 interrupted.
    LATENTC_DEBUG=1 shows tracebacks.
    """,
)
@click.version_option(__version__, prog_name="latentc")
@click.pass_context
def cli(context: click.Context) -> None:
    """Compile diffusion pipelines to ONNX, OpenVINO and more; run them without PyTorch."""
    if context.invoked_subcommand is None:
        say(context.get_help())


def main(arguments: list[str] | None = None) -> None:
    """Run a command line (of the process, if None) and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code; errors become one line on stderr."""
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        _never_fails(stream)
    with noticed() as interrupted:
        try:
            code = cli.main(arguments, prog_name="latentc", standalone_mode=False)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except BrokenPipeError:
            # Whoever read our output has gone: nothing is left to say, also not at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _BROKEN_PIPE
        except (KeyboardInterrupt, click.Abort):
            _say("interrupted")
            return _INTERRUPTED
        except Exception as error:
            if not interrupted():
                return _code_of(error)
            _say("interrupted")
            return _INTERRUPTED


def _code_of(error: Exception) -> int:
    """Say what went wrong in one line, and return the exit code; raise what is no error of ours."""
    if isinstance(error, click.ClickException):
        _say(_usage(error))
        return error.exit_code
    if isinstance(error, LatentcError):
        return _fail(error, error.exit_code, str(error))
    if isinstance(error, ImportError):
        hint = "; the compiler needs: pip install 'latentc[export]'"
        return _fail(error, LatentcError.exit_code, f"{error}{hint}")
    if isinstance(error, OSError):
        return _fail(error, LatentcError.exit_code, str(error))
    raise error


def _fail(error: BaseException, code: int, message: str) -> int:
    if os.environ.get("LATENTC_DEBUG"):
        raise error
    _say(f"error: {' '.join(message.split())}")
    return code


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    message = error.format_message()
    if isinstance(error, click.NoSuchOption):
        from latentc.runtimes.commands.declared_options import no_such_option

        message = no_such_option(error.option_name, context.command if context else cli)
    see = f" (see: {context.command_path} --help)" if context else ""
    return f"error: {message}{see}"


def _never_fails(stream: TextIO) -> None:
    """Have a stream write what its encoding lacks as escapes; it raised UnicodeEncodeError."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def _say(line: str) -> None:
    say(line, err=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, UserWarning):
        _say(f"warning: {' '.join(str(message).split())}")
