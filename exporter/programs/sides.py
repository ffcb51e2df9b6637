"""One side of the guidance: the texts and numbers of the prompt, or of the negative prompt.

What a family says of its prompt holds for the negative one too, with a prefix before the names of
arguments and values, so that it is written once, for a `Side`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from latentc.exporter.programs.draft import Draft, Phase
from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.statements import Test

NEGATIVE = "negative_"
# What a side is without its text: the empty text, zeros in the place of what is made of the texts,
# or a side whose branches do not run.
Missing = Literal["empty", "zeros", "off"]


@dataclass
class Side:
    """The texts and numbers of all branches of one side of a draft."""

    draft: Draft
    prefix: str
    missing: Missing = "empty"
    _mains: dict[str, None] = field(default_factory=dict)

    def tokens(self, name: str, tokenizer: str, *texts: str, **how: Any) -> str:
        """Add the token ids of a text, and return their name.

        Args:
            name: what they are called, after the prefix.
            texts: the argument that holds the text, and those that it falls back to.
            how: other members of `Tokens`.
        """
        self._declare(texts)
        gives = self.draft.named(f"_{self.prefix}{name}")
        text = self.prefix + texts[0]
        self._add(form.Tokens(gives=gives, tokenizer=tokenizer, text=text, **how), Phase.TEXTS)
        return gives

    def _declare(self, texts: Sequence[str]) -> None:
        *others, main = (self.prefix + text for text in texts)
        self._mains[main] = None
        default = "" if self.prefix and self.missing == "empty" else None
        optional = bool(self.prefix) and self.missing != "empty"
        self.draft.text(form.Text(name=main, default=default, optional=optional))
        fallback = main
        for name in reversed(others):
            self.draft.text(form.Text(name=name, fallback=fallback))
            fallback = name

    def run(
        self, component: str, feeds: Mapping[str, str], gives: Mapping[str, str | None]
    ) -> dict[str, str]:
        """Add a run of a text encoder, and return the values by output.

        Args:
            gives: by output the name that users know it by, None where it has none.
        """
        names = {
            output: self.draft.named(
                self.prefix + public if public and not self._zeros() else f"_{self.prefix}{output}"
            )
            for output, public in gives.items()
        }
        group = None if self._zeros() else self._group()
        run = form.Run(component=component, feeds=dict(feeds), gives=names, group=group)
        self._add(run, Phase.TEXTS)
        return dict(names)

    def joined(self, public: str, parts: Sequence[str], axis: int) -> str:
        """Return the name of what users know as `public`: these values one after the other, or the
        only one, or zeros where the side has no text."""
        if len(parts) == 1:
            return self.or_zeros(public, parts[0])
        zeros = self._zeros()
        name = self.draft.named(f"_{self.prefix}{public}" if zeros else self.prefix + public)
        group = None if zeros else self._group()
        join = form.Join(gives=name, of=tuple(parts), axis=axis, group=group)
        self._add(join, Phase.EMBEDDINGS)
        return self.or_zeros(public, name)

    def or_zeros(self, public: str, value: str) -> str:
        """Return the name of a value, or of one that is it where the side has a text, and zeros
        like the prompt's where it has none."""
        if not self._zeros():
            return value
        zeros = self.draft.zeros_like(public, Phase.EMBEDDINGS)
        chosen = self.draft.named(self.prefix + public)
        self._add(
            form.Choose(
                gives=chosen,
                when=(Test(given=tuple(self._mains)),),
                then=value,
                otherwise=zeros,
                group=self._group(),
            ),
            Phase.EMBEDDINGS,
        )
        return chosen

    def cut(self, whole: str, names: Sequence[str], axis: int, sizes: Sequence[int]) -> list[str]:
        """Return the names of a value's parts along an axis; the value itself, if there is but
        one part."""
        if len(names) == 1:
            return [whole]
        gives = tuple(self.draft.named(f"_{self.prefix}{name}") for name in names)
        cut = form.Cut(gives=gives, of=whole, axis=axis, sizes=tuple(sizes))
        self._add(cut, Phase.EMBEDDINGS)
        return [*gives]

    def add(self, statement: form.Statement) -> None:
        """Add a statement about what encoders gave."""
        self._add(statement, Phase.EMBEDDINGS)

    def row(self, name: str, names: Sequence[str], own: Mapping[str, Sequence[str]]) -> str:
        """Add a row of numbers, and return its name.

        Args:
            name: what it is called, after the prefix.
            names: the arguments, which the draft has.
            own: those that this side has of its own, declared too; each with the other ones that
                must be given for it to count.
        """
        usual = [name if own.get(name) else self._own(name, own) for name in names]
        needed = dict.fromkeys(self.prefix + other for name in names for other in own.get(name, ()))
        row = self._row(name, usual)
        if not needed:
            return row
        whole = self._row(name, [self._own(name, own) for name in names])
        chosen = self.draft.named(f"_{self.prefix}{name}_chosen")
        tests = tuple(Test(given=(other,)) for other in needed)
        choose = form.Choose(gives=chosen, when=tests, then=whole, otherwise=row)
        self.draft.add(choose, Phase.NUMBERS)
        return chosen

    def _own(self, name: str, own: Mapping[str, Sequence[str]]) -> str:
        return self.prefix + name if name in own else name

    def _row(self, name: str, of: Sequence[str]) -> str:
        prefix = self.prefix if any(each.startswith(self.prefix) for each in of) else ""
        return self.draft.row(f"_{prefix}{name}", of)

    def feed(self, input: str, value: form.Feed) -> None:
        """Feed the denoiser in the branches of this side."""
        self.draft.feed(input, value, lambda branch: branch.side == self.prefix)

    def _zeros(self) -> bool:
        return bool(self.prefix) and self.missing == "zeros"

    def _group(self) -> str:
        return f"{self.prefix}prompt"

    def _add(self, statement: form.Statement, phase: Phase) -> None:
        """Add a statement.

        Texts stand in the order of the branches, so that a batch of them does.
        """
        rank = self.draft.sides().index(self.prefix) if phase == Phase.TEXTS else 0
        self.draft.add(statement, phase, rank)


def sides_of(draft: Draft, missing: Missing) -> Iterator[Side]:
    """Yield the sides of a draft's branches, that of the prompt first: others may be zeros like
    it."""
    for prefix in sorted(draft.sides()):
        yield Side(draft, prefix, missing if prefix else "empty")
