"""A program's statements, run in their order as far as a call needs them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from time import perf_counter

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.session import Session, cast
from latentc.runtimes.backends.sessions import Sessions
from latentc.runtimes.calls.request import Request
from latentc.runtimes.errors import NumericalError
from latentc.runtimes.images import image
from latentc.runtimes.images.tiling import Tiling, decode
from latentc.runtimes.interpreter import texts
from latentc.runtimes.interpreter.loop import LoopRun, Schedule, sampling_plan
from latentc.runtimes.interpreter.texts import Tokenizers
from latentc.runtimes.interpreter.timings import Timings
from latentc.runtimes.interpreter.values import Value, together
from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.dimensions import parse
from latentc.runtimes.programs.statements import Run, Statement, Tokens
from latentc.runtimes.programs.values import Rows
from latentc.runtimes.sampling import noise
from latentc.runtimes.sampling.plan import SamplingPlan
from latentc.runtimes.sampling.sampler import Step, Steps
from latentc.runtimes.texts.encoded import Encoded, check_finite


class Execution:
    """One call of a program.

    Args:
        schedule_of: loop → the plans that it follows.
        known: what encoders made of earlier calls' texts.
        tiles: how components run that may run in tiles.
    """

    def __init__(
        self,
        call: Request,
        sessions: Sessions,
        tokenizers: Tokenizers,
        schedule_of: Callable[[form.Loop], Schedule],
        known: Encoded | None = None,
        tiles: Tiling | None = None,
    ) -> None:
        self.call = call
        self._schedule_of = schedule_of
        self._tiles = tiles or Tiling()
        self.values = {
            name: Value(array, call.facts.types[name].rows) for name, array in call.values.items()
        }
        self.emitted: dict[str, Array] = {}  # images
        self.arrays: dict[str, Array] = {}  # emitted as they are
        self._plans: dict[str, SamplingPlan] = {}  # by the name of what the loop makes
        self.timings = Timings()
        self.interrupted = False  # the loop ends before its next step, where it is True
        self._sessions = sessions
        self._tokenizers = tokenizers
        self._known = known
        seeds, given = call.seeds, call.generators
        self._generators: noise.Generators = (
            given[0] if len(given) == 1 else given
        ) or noise.seeded(seeds if len(seeds) > 1 else seeds[0])

    def steps(self) -> Generator[Step | None, Array | None, None]:
        """Run the statements; yield the steps of the main loop, whose sample `send` replaces, and
        None after each step of another one. The values that were made stand in `values`, what is
        emitted in `emitted` and `arrays`."""
        for place in self.call.demand.live:
            statement = self.call.facts.program.steps[place]
            stage = "encode" if place < self.call.facts.loop_place else "decode"
            if statement is self.call.facts.loop:
                yield from self._loop(statement)
            elif isinstance(statement, form.Loop):
                yield from (None for _ in self._loop(statement))
            elif isinstance(statement, form.Tokens):
                self._run(statement)  # which tells tokens and encoding apart
            else:
                with self.timings.stage(stage):
                    self._run(statement)

    def plan(self, loop: form.Loop) -> SamplingPlan:
        """Return the plan that a loop follows in this call. Raises InputError, PlanNotFound."""
        name = loop.state.name
        if name not in self._plans:
            self._plans[name] = sampling_plan(self.call, loop, self._schedule_of(loop))
        return self._plans[name]

    def values_of(self, names: Sequence[str]) -> dict[str, Array]:
        """Run all statements, and return copies of the values of these names, which the call asks
        for."""
        for _ in self.steps():
            pass
        return {name: self.values[name].array.copy() for name in names}

    def evaluations(self) -> int:
        """Return how often the denoiser is evaluated for each image. Raises InputError,
        PlanNotFound."""
        return self.plan(self.call.facts.loop).num_evaluations if self.call.denoises else 0

    def images(self, name: str) -> Array:
        """Return a value with a row for each image that is made."""
        call = self.call
        return self.values[name].as_rows(Rows.IMAGES, call.made, call.images_per_prompt)

    def _run(self, statement: Statement) -> None:
        if isinstance(statement, form.Emit):
            self._emit(statement)
            return
        if all(name in self.values for name in form.names_given(statement)):
            return  # the call gives them, or they were made together with others
        match statement:
            case form.Tokens():
                self._encode_texts()
            case form.Pixels():
                array = self.call.images.pixels[statement.gives]
                several = Rows.PROMPTS if len(array) > 1 else Rows.CALL
                self._put(statement.gives, array, several if statement.for_prompts else Rows.GIVEN)
            case form.NumberRow():
                self._number_row(statement)
            case form.Noise():
                self._draw(statement)
            case form.Zeros():
                self._zeros(statement)
            case form.Run():
                self._run_component(statement)
            case form.Join():
                self._join(statement)
            case form.Cut():
                self._cut(statement)
            case form.Choose():
                chosen = statement.then if self.call.holds(statement.when) else statement.otherwise
                self.values[statement.gives] = self.values[chosen]
            case _:
                raise AssertionError(statement)

    def _emit(self, statement: form.Emit) -> None:
        array, resized = self.values[statement.of].array, self.call.sizes.resized
        if statement.kind == "arrays":
            self.arrays[statement.of] = array
        else:
            self.emitted[statement.of] = (
                array if resized is None else image.resized(array, *resized)
            )

    def _put(self, name: str, array: Array, rows: Rows) -> None:
        self.values[name] = Value(array, rows)

    def _number_row(self, statement: form.NumberRow) -> None:
        """Put arguments side by side; there are as many rows as the type says."""
        call, kind = self.call, self.call.facts.types[statement.gives].rows
        columns: list[tuple[float, ...]] = []  # each of one number, or of one for each prompt
        for part in statement.of:
            if not isinstance(part, str):
                columns.append((part,))
            elif part in call.row_numbers:
                columns.append(call.row_numbers[part])
            else:
                columns += [(number,) for number in call.numbers[part]]
        rows = call.prompts if kind == Rows.PROMPTS else 1
        every = [np.broadcast_to(np.array(column, np.float32), rows) for column in columns]
        self._put(statement.gives, np.stack(every, axis=1), kind)

    def _encode_texts(self) -> None:
        """Run all encoders of texts at once: each runs on the distinct texts of the whole call."""
        steps = [self.call.facts.program.steps[place] for place in self.call.demand.live]
        tokens = {step.gives for step in steps if isinstance(step, Tokens)}
        runs = [step for step in self.call.facts.encoders if step in steps]
        with self.timings.stage("tokenize"):
            loaded = self._sessions.components
            reader = texts.Reader(self.call, self._tokenizers, runs, loaded)
        with self.timings.stage("encode"):
            made = texts.encode(reader, runs, self._sessions, self._known)
        for name, array in made.items():
            self._put(name, array, Rows.PROMPTS)
        for name in tokens:
            self.values.setdefault(name, Value(np.empty((0, 0), np.int64), Rows.PROMPTS))

    def _draw(self, statement: form.Noise) -> None:
        dimensions = [parse(each) for each in statement.shape]
        shape = [
            dimension.value(self.call.symbols) for dimension in dimensions if dimension is not None
        ]
        rows, kind = self.call.made, Rows.IMAGES
        several = not isinstance(self._generators, noise.Generator)
        if statement.rows and not (several and statement.each_made):
            lists = self.call.images.lists
            rows = max(len(item) for name in statement.rows for item in lists[name])
            kind = Rows.GIVEN
        generators = self._generators
        if not isinstance(generators, noise.Generator):
            generators = generators[:rows]
        self._put(statement.gives, noise.draw(generators, (rows, *shape)), kind)

    def _zeros(self, statement: form.Zeros) -> None:
        if statement.like is not None:
            other = self.values[statement.like]
            self._put(statement.gives, np.zeros_like(other.array), other.rows)
        else:
            self._put(statement.gives, np.zeros((1, *statement.shape), np.float32), Rows.CALL)

    def _run_component(self, statement: Run) -> None:
        """Run a component; one that looks at images of the call gets one row at a time, since the
        images of a call may be many, and large."""
        call, name = self.call, statement.component
        values = [self.values[feed] for feed in statement.feeds.values()]
        arrays, kind = together(values, call.made, call.images_per_prompt)
        feeds = dict(zip(statement.feeds, arrays, strict=True))
        types = call.facts.types
        looks = any(types[each].rows == Rows.GIVEN for each in statement.feeds.values())
        for value in statement.feeds.values() if statement.tiles else ():
            check_finite(name, value, self.values[value].array, "input")
        with self._sessions.using(name) as session:
            if statement.tiles:
                outputs = self._in_tiles(session, statement, feeds)
            elif looks:
                outputs = _row_by_row(session, feeds)
            else:
                outputs = session.run(cast(session, feeds))
        for output, gives in statement.gives.items():
            check_finite(name, output, outputs[output])
            self._put(gives, outputs[output], kind)

    def _in_tiles(
        self, session: Session, statement: Run, feeds: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run a component of one input and one output in the tiles that the caller asks for."""
        ((input, array),), (output,) = feeds.items(), statement.gives
        made = decode(
            lambda part: session.run(cast(session, {input: part}))[output], array, self._tiles
        )
        return {output: made}

    def _join(self, statement: form.Join) -> None:
        values = [self.values[name] for name in statement.of]
        arrays, kind = together(values, self.call.made, self.call.images_per_prompt)
        self._put(statement.gives, np.concatenate(arrays, axis=statement.axis), kind)

    def _cut(self, statement: form.Cut) -> None:
        whole = self.values[statement.of]
        start = 0
        for name, size in zip(statement.gives, statement.sizes, strict=True):
            place = [slice(None)] * statement.axis + [slice(start, start + size)]
            self._put(name, np.ascontiguousarray(whole.array[tuple(place)]), whole.rows)
            start += size

    def _loop(self, loop: form.Loop) -> Steps:
        timings = self.timings
        with ExitStack() as held:
            run = LoopRun(self.call, loop, self.plan(loop), self.images, self._sessions, held)
            with timings.stage("denoise"):
                states, steps = run.steps(self._generators)
            self._put_states(loop, states)
            edited: Array | None = None
            while not self.interrupted:
                begun = perf_counter()
                try:
                    step = steps.send(edited)
                except StopIteration:
                    return
                except NumericalError as error:
                    raise NumericalError(f"{loop.denoiser}: {error}") from error
                finally:
                    spent = perf_counter() - begun
                    timings.denoise += spent
                if loop is self.call.facts.loop:
                    timings.steps.append(spent)
                self._put_states(loop, (step.latents, *step.others))
                edited = yield step
                if edited is not None:
                    self._put(loop.state.name, edited, Rows.IMAGES)

    def _put_states(self, loop: form.Loop, states: Sequence[Array]) -> None:
        for state, array in zip(loop.states, states, strict=True):
            self._put(state.name, array, Rows.IMAGES)


def _row_by_row(session: Session, feeds: Mapping[str, Array]) -> dict[str, Array]:
    every = cast(session, feeds)
    count = len(next(iter(every.values())))
    parts = [session.run({n: v[i : i + 1] for n, v in every.items()}) for i in range(count)]
    return {name: np.concatenate([part[name] for part in parts]) for name in session.outputs}
