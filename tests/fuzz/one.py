"""Fuzz one parser in this process, by atheris: ``python -m tests.fuzz.one NAME [OPTION]...``.

The options are libFuzzer's.

The process ends as libFuzzer does: 0, or another code after an input that raised, hung or took too
much memory; that input is kept where ``-artifact_prefix`` says.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings


def main() -> None:
    """Read the command line and fuzz."""
    import atheris

    name, *options = sys.argv[1:]
    module = name.partition(":")[0]
    package = ".".join(module.split(".")[:2])
    with atheris.instrument_imports(
        include=[package, "latentc.runtimes", "PIL", "msgspec"], exclude=[]
    ):
        from tests.fuzz import targets

        target = targets.target(name)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w", encoding="utf-8") as nothing:

        def test(data: bytes) -> None:
            with contextlib.redirect_stdout(nothing):
                target.run(data)

        atheris.Setup([sys.argv[0], *options], test)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
