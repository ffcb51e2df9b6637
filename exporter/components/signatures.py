"""Functions that take their arguments by names known only at run time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def named(call: Callable[[Mapping[str, Any]], Any], names: Sequence[str]) -> Callable[..., Any]:
    """Return a function of these named arguments: `torch.export` goes by the signature."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(signature.bind(*args, **kwargs).arguments)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward
