"""Bundles of format 1 as programs: what tasks, preparations, branches and vectors say, said in
statements.

The programs do what the runtime has always done with such a bundle, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

from msgspec import structs

from latentc.runtimes.bundle.sizes import BINNING
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.errors import BundleError
from latentc.runtimes.programs import statements as form
from latentc.runtimes.programs.loops import MOST_STEPS
from latentc.runtimes.programs.statements import Feed, Program, Statement, Test
from latentc.runtimes.version_1.fields import Branch as OldBranch
from latentc.runtimes.version_1.fields import CallFields, Embedding, VectorInput
from latentc.runtimes.version_1.tasks import NOISE, START, STEPS, Preparation, Task, argument
from latentc.runtimes.version_1.tasks import Feed as OldFeed

_LATENTS, _IMAGE_LATENTS = "latents", "image_latents"


class Untranslatable(BundleError):
    """An `Untranslatable` tells that what a manifest says cannot be said in statements."""


def program_of(task: Task, fields: CallFields) -> Program:
    """Return the program that does what a task says.

    Raises:
        Untranslatable: it says what no exporter has written.
    """
    return _Translation(fields, task).program()


def with_positions(component: Component, embeddings: Sequence[Embedding]) -> Component:
    """Return an encoder that says which numbers of its outputs say something of which input's token
    ids."""
    columns = {name: each for embedding in embeddings for name, each in embedding.inputs.items()}
    positions = {name: columns[name] for name in component.outputs if columns.get(name)}
    return structs.replace(component, positions=positions if component.role == "encoder" else {})


def tokenizer_of(input: str) -> str:
    """Return the name of the tokenizer of an encoder's input: ``tokenizer_2`` of
    ``input_ids_2``."""
    return input.replace("input_ids", "tokenizer")


@dataclass
class _Translation:
    """One task becoming a program."""

    fields: CallFields
    task: Task
    arguments: dict[str, form.Argument] = field(default_factory=dict)
    steps: list[Statement] = field(default_factory=list)
    pixels: dict[form.Pixels, str] = field(default_factory=dict)
    zeros: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    # By branch and denoiser input; those that all branches share have the branch "".
    feeds: dict[str, dict[str, Feed]] = field(default_factory=dict)

    def program(self) -> Program:
        """Return the whole."""
        self.feeds = {branch.name: {} for branch in self.fields.guidance.branches}
        self._declare_texts()
        self._declare_images()
        self._declare_numbers()
        self._texts()
        self._vectors()
        self._direct()
        for preparation in self.task.preparations:
            if not preparation.late:
                self._prepare(preparation)
        self._latents()
        for preparation in self.task.preparations:
            if preparation.late:
                self._prepare(preparation)
        self._loop()
        self._decode()
        bins = self.fields.latents.bins
        return Program(
            name=self.task.name,
            stands_for=self.fields.pipeline_class,
            symbols=self._symbols(),
            arguments=tuple(self.arguments.values()),
            steps=tuple(self.steps),
            bins=None if bins is None else form.Bins(argument=BINNING, sizes=bins),
        )

    # What the call gives.

    def _prefixes(self) -> tuple[str, ...]:
        branches = self.fields.guidance.branches
        return tuple(dict.fromkeys(branch.prefix for branch in branches))

    def _of_prefix(self, prefix: str) -> list[OldBranch]:
        return [branch for branch in self.fields.guidance.branches if branch.prefix == prefix]

    def _missing(self, prefix: str) -> str:
        """Return what a prefix's texts are where there are none."""
        ways = {each.missing for each in self._of_prefix(prefix)}
        if len(ways) != 1:
            raise Untranslatable(f"branches of one prefix that differ in `missing`: {ways}")
        return ways.pop()

    def _mains(self, prefix: str) -> tuple[str, ...]:
        """Return the texts that say whether a branch has any."""
        return tuple(dict.fromkeys(prefix + texts[-1] for texts in self.fields.texts.values()))

    def _declare_texts(self) -> None:
        for prefix in ("", *(each for each in self._prefixes() if each)):
            for texts in self.fields.texts.values():
                self._declare_chain(prefix, texts)

    def _declare_chain(self, prefix: str, texts: Sequence[str]) -> None:
        """Declare the texts of an encoder's input, each of which falls back to the next."""
        *others, main = texts
        missing = self._missing(prefix) if prefix else None
        default = "" if missing == "empty" else None
        optional = missing in ("zeros", "off")
        self._declare(form.Text(name=prefix + main, default=default, optional=optional))
        fallback = prefix + main
        for name in reversed(others):
            self._declare(form.Text(name=prefix + name, fallback=fallback))
            fallback = prefix + name

    def _declare(self, argument: form.Argument) -> None:
        self.arguments.setdefault(argument.name, argument)

    def _declare_images(self) -> None:
        start = self.task.start_picture()
        kinds: dict[str, list[str]] = {}
        for name, kind in self.task.pictures.items():
            kinds.setdefault(argument(name), []).append(kind)
        for name, items in kinds.items():
            if items[0] == "mask":
                self._declare(form.Mask(name=name))
                continue
            listed = f"{name}[0]" in self.task.pictures
            latents = _IMAGE_LATENTS if name == start else None
            self._declare(
                form.Image(name=name, count=len(items) if listed else None, latents=latents)
            )

    def _declare_numbers(self) -> None:
        fields, task = self.fields, self.task
        for name, scale in fields.guidance.defaults.items():
            rescale = name == fields.guidance.rescale
            least, most = (0.0, 1.0) if rescale else (None, None)
            default = task.defaults.get(name, (scale,))
            self._declare(form.Numbers(name=name, default=default, least=least, most=most))
        if fields.guidance.defaults:
            self._declare(form.Numbers(name="guidance_start", default=(0.0,), least=0, most=1))
            self._declare(form.Numbers(name="guidance_stop", default=(1.0,), least=0, most=1))
        if fields.of_role("shallow"):
            self._declare(form.Numbers(name="cache_interval", default=(1,), least=1, whole=True))
        steps = task.defaults.get(STEPS, (fields.num_inference_steps,))
        self._declare(form.Numbers(name=STEPS, default=steps, least=1, most=MOST_STEPS, whole=True))
        if task.strength is not None:
            self._declare(form.Numbers(name="strength", default=(task.strength,), above=0, most=1))
        if task.start_picture() is not None:
            self._declare(form.Numbers(name="denoising_start", optional=True, above=0, most=1))
        self._declare(form.Numbers(name="denoising_end", default=(1.0,), above=0, most=1))

    def _number(self, name: str, fallback: str | None = None) -> str:
        """Declare an argument, or one of a branch that falls back to another."""
        listed = {each.name: each for each in self.fields.arguments}
        own = listed.get(name) or listed[fallback or name]
        least, most = own.limits or (None, None)
        default = self.task.defaults.get(name, own.default)
        falls_back = fallback is not None and name not in listed
        self._declare(
            form.Numbers(
                name=name,
                count=len(own.default),
                default=() if falls_back else default,
                fallback=fallback if falls_back else None,
                least=least,
                most=most,
                spread=own.spread,
            )
        )
        return name

    def _symbols(self) -> dict[str, form.Symbol]:
        latents, sample = self.fields.latents, self._denoiser().inputs["sample"]
        of = None
        if self.task.size_of is not None:
            of = form.SizeOf(image=argument(self.task.size_of), times=self.task.enlarges)
        defaults = {"height": latents.default_height, "width": latents.default_width}
        symbols = {}
        for place, name in enumerate(defaults):
            only = sample.shape[2 + place]
            fixed = only if isinstance(only, int) else None
            symbols[name] = form.Symbol(
                argument=name,
                unit=latents.factor,
                default=fixed or defaults[name] // latents.factor,
                multiple=1 if fixed else latents.multiple,
                least=fixed or latents.minimum,
                most=fixed or latents.maximum,
                rounds=latents.rounds,
                of=of,
                together=tuple(defaults) if self.task.sides_together else (),
            )
        return symbols

    # What is made of it.

    def _denoiser(self) -> Component:
        return self.fields.component("denoiser")

    def _named(self, name: str) -> str:
        """Return a name that nothing has yet."""
        taken = self.names | self.arguments.keys()
        found = name
        for number in count(2):
            if found not in taken:
                self.names.add(found)
                return found
            found = f"{name}_{number}"
        raise AssertionError

    def _texts(self) -> None:
        values: dict[str, dict[str, str]] = {}
        for prefix in self._prefixes():
            if self.fields.texts:
                values[prefix] = self._encoded(prefix)
        for prefix in sorted(values):  # that of the call itself first: others may be zeros like it
            self._embeddings(prefix, values)

    def _encoded(self, prefix: str) -> dict[str, str]:
        """Add tokens and runs of the encoders; return the values by output."""
        ids: dict[str, str] = {}
        for input, texts in self.fields.texts.items():
            name = ids[input] = self._named(f"_{prefix}{input}")
            tokens = form.Tokens(gives=name, tokenizer=tokenizer_of(input), text=prefix + texts[0])
            self.steps.append(tokens)
        values: dict[str, str] = {}
        for encoder in self.fields.of_role("encoder"):
            gives = {
                output: self._named(self._output_name(prefix, output))
                for output in encoder.outputs
                if output in self._denoiser().inputs
            }
            values |= gives
            feeds = {name: ids[name] for name in encoder.inputs}
            group = None if self._missing_zeros(prefix) else self._group(prefix)
            run = form.Run(component=encoder.name, feeds=feeds, gives=gives, group=group)
            self.steps.append(run)
        return values

    def _missing_zeros(self, prefix: str) -> bool:
        return bool(prefix) and self._missing(prefix) == "zeros"

    def _group(self, prefix: str) -> str:
        return f"{prefix}prompt"

    def _output_name(self, prefix: str, output: str) -> str:
        """Return the public name of an output where it has one of its own."""
        for embedding in self.fields.embeddings:
            alone = tuple(embedding.inputs) == (output,) and embedding.frame is None
            if alone and not self._missing_zeros(prefix):
                return prefix + embedding.name
        return f"_{prefix}{output}"

    def _embeddings(self, prefix: str, values: Mapping[str, dict[str, str]]) -> None:
        """Give the encoded texts their public names, and feed them to the branches."""
        own = dict(values[prefix])
        grouped = {name for each in self.fields.embeddings for name in each.inputs}
        for embedding in self.fields.embeddings:
            parts = [own[name] for name in embedding.inputs]
            whole = self._whole(prefix, embedding, parts)
            if self._missing_zeros(prefix):
                whole = self._or_zeros(prefix, embedding, whole)
            own |= self._parts(prefix, embedding, whole)
        if self._missing_zeros(prefix):
            for name in own.keys() - grouped:
                own[name] = self._chosen(prefix, own[name], values[""][name], f"_{prefix}{name}")
        for branch in self._of_prefix(prefix):
            self.feeds[branch.name] |= own

    def _whole(self, prefix: str, embedding: Embedding, parts: Sequence[str]) -> str:
        """Return the name of an embedding's array, joined of what the encoders gave."""
        if embedding.frame is not None:
            return self._framed(prefix, embedding, parts)
        if len(parts) == 1:
            return parts[0]
        axis = len(self._denoiser().inputs[next(iter(embedding.inputs))].shape) - 1
        return self._joined(prefix, embedding, parts, axis)

    def _framed(self, prefix: str, embedding: Embedding, parts: Sequence[str]) -> str:
        """Join values of several widths one below the other, with zeros beside them."""
        assert embedding.frame is not None
        positions, columns = embedding.frame
        rows: list[str] = []
        for part, (length, width) in zip(parts, self._framed_sizes(embedding), strict=True):
            rows.append(part if width == columns else self._widened(part, length, columns - width))
            positions -= length
        if positions:
            rows.append(self._zeros((positions, columns)))
        return self._joined(prefix, embedding, rows, 1)

    def _framed_sizes(self, embedding: Embedding) -> list[tuple[int, int]]:
        shapes = [self._denoiser().inputs[name].shape for name in embedding.inputs]
        return [(int(shape[1]), int(shape[2])) for shape in shapes]

    def _widened(self, part: str, length: int, more: int) -> str:
        name = self._named(f"{'' if part.startswith('_') else '_'}{part}_wide")
        of = (part, self._zeros((length, more)))
        self.steps.append(form.Join(gives=name, of=of, axis=2))
        return name

    def _zeros(self, shape: tuple[int, ...]) -> str:
        name = self._named("_zeros")
        self.steps.append(form.Zeros(gives=name, shape=shape))
        return name

    def _joined(self, prefix: str, embedding: Embedding, parts: Sequence[str], axis: int) -> str:
        zeros = self._missing_zeros(prefix)
        name = self._named(f"_{prefix}{embedding.name}" if zeros else prefix + embedding.name)
        group = None if zeros else self._group(prefix)
        self.steps.append(form.Join(gives=name, of=tuple(parts), axis=axis, group=group))
        return name

    def _or_zeros(self, prefix: str, embedding: Embedding, whole: str) -> str:
        return self._chosen(prefix, whole, embedding.name, prefix + embedding.name)

    def _chosen(self, prefix: str, value: str, like: str, name: str) -> str:
        """Choose a branch's value where it has a text, else zeros like another's."""
        chosen = self._named(name)
        self.steps.append(
            form.Choose(
                gives=chosen,
                when=(Test(given=self._mains(prefix)),),
                then=value,
                otherwise=self._zeros_like(like),
                group=None if chosen.startswith("_") else self._group(prefix),
            )
        )
        return chosen

    def _zeros_like(self, value: str) -> str:
        if value not in self.zeros:
            name = self.zeros[value] = self._named(f"_no_{value.lstrip('_')}")
            self.steps.append(form.Zeros(gives=name, like=value))
        return self.zeros[value]

    def _parts(self, prefix: str, embedding: Embedding, whole: str) -> dict[str, str]:
        """Return the values of the denoiser's inputs that an embedding's array is cut into."""
        inputs = [*embedding.inputs]
        if len(inputs) == 1 and embedding.frame is None:
            return {inputs[0]: whole}
        if embedding.frame is not None:
            return self._framed_parts(prefix, embedding, whole)
        shapes = [self._denoiser().inputs[name].shape for name in inputs]
        sizes = tuple(int(shape[-1]) for shape in shapes)
        names = tuple(self._named(f"_{prefix}{name}") for name in inputs)
        axis = len(shapes[0]) - 1
        self.steps.append(form.Cut(gives=names, of=whole, axis=axis, sizes=sizes))
        return dict(zip(inputs, names, strict=True))

    def _framed_parts(self, prefix: str, embedding: Embedding, whole: str) -> dict[str, str]:
        assert embedding.frame is not None
        sizes = self._framed_sizes(embedding)
        names = [self._named(f"_{prefix}{name}") for name in embedding.inputs]
        wide = [
            name if width == embedding.frame[1] else self._named(f"{name}_wide")
            for name, (_, width) in zip(names, sizes, strict=True)
        ]
        lengths = tuple(length for length, _ in sizes)
        self.steps.append(form.Cut(gives=tuple(wide), of=whole, axis=1, sizes=lengths))
        for name, before, (_, width) in zip(names, wide, sizes, strict=True):
            if name != before:
                self.steps.append(form.Cut(gives=(name,), of=before, axis=2, sizes=(width,)))
        return dict(zip(embedding.inputs, names, strict=True))

    def _vectors(self) -> None:
        denoiser = self._denoiser().inputs
        for vector in self.fields.vectors:
            for prefix in self._prefixes() if vector.input in denoiser else ():
                value = self._vector(vector, prefix)
                for branch in self._of_prefix(prefix):
                    self.feeds[branch.name][vector.input] = self._windowed(vector, value)

    def _vector(self, vector: VectorInput, prefix: str) -> str:
        """Return the name of a branch's row of numbers."""
        usual: list[str] = []
        whole: list[str] = []
        needed: dict[str, None] = {}
        for name in vector.arguments:
            others = self._others(name, prefix)
            if others is None or others or not self._listed(prefix + name):
                self._number(name)
            own = name if others is None else self._number(prefix + name, name)
            usual.append(name if others else own)
            whole.append(own)
            needed |= dict.fromkeys(others or ())
        value = self._row(vector.input, prefix, usual)
        if not needed:
            return value
        chosen = self._named(f"_{prefix}{vector.input}_chosen")
        self.steps.append(
            form.Choose(
                gives=chosen,
                when=tuple(Test(given=(name,)) for name in needed),
                then=self._row(vector.input, prefix, whole),
                otherwise=value,
            )
        )
        return chosen

    def _listed(self, name: str) -> bool:
        """Return whether an argument has a default of its own."""
        return any(each.name == name for each in self.fields.arguments)

    def _others(self, name: str, prefix: str) -> tuple[str, ...] | None:
        """Return what a branch's own argument must be given with; None where it has none."""
        if not prefix:
            return None
        allowed = self.task.branch_arguments
        if allowed is None:
            return None if name.startswith(prefix) else ()
        return allowed.get(prefix + name)

    def _row(self, input: str, prefix: str, names: Sequence[str]) -> str:
        """Return the name of the row of these arguments, which is made once."""
        for step in self.steps:
            if isinstance(step, form.NumberRow) and step.of == tuple(names):
                return step.gives
        own = prefix if any(name.startswith(prefix) for name in names) else ""
        row = form.NumberRow(gives=self._named(f"_{own}{input}"), of=tuple(names))
        self.steps.append(row)
        return row.gives

    def _windowed(self, vector: VectorInput, value: str) -> Feed:
        if vector.window is not None and vector.until is not None:
            raise Untranslatable(f"vector {vector.input!r}: a window, and `until`")
        if vector.window is not None:
            start, stop = map(self._number, vector.window)
            return form.During(value, form.Window(count="within", start=start, stop=stop))
        if vector.until is not None:
            stop = self._number(vector.until)
            return form.During(value, form.Window(count="steps", stop=stop))
        return value

    def _direct(self) -> None:
        """Feed the denoiser what images give it as they are. Those that are no masks are for the
        prompts, as in diffusers' pipelines with ControlNets."""
        for name, feed in self.task.inputs.items():
            image = self.task.pictures.get(feed.picture) == "image"
            value = self._image(name, feed, self._denoiser().inputs[name].shape, image)
            for own in self.feeds.values():
                own[name] = value

    def _image(
        self, input: str, feed: OldFeed, shape: Sequence[int | str], for_prompts: bool = False
    ) -> str:
        """Return the value of an image in a size, which is made once."""
        whole, _, item = feed.picture.partition("[")
        pixels = form.Pixels(
            gives="",
            of=whole,
            shape=tuple(shape[1:]),
            item=int(item[:-1]) if item else None,
            for_prompts=for_prompts,
            resample=feed.resample,
            fit=feed.fit,
            fill=feed.fill if feed.mask is not None else 0.5,
            fill_where=feed.mask,
        )
        if pixels not in self.pixels:
            self.pixels[pixels] = self._named(f"_{input}")
            self.steps.append(structs.replace(pixels, gives=self.pixels[pixels]))
        return self.pixels[pixels]

    def _prepare(self, preparation: Preparation) -> None:
        component = next(
            each for each in self.fields.components if each.name == preparation.component
        )
        shapes = {name: spec.shape for name, spec in component.inputs.items()}
        feeds = {
            name: self._image(f"{component.name}_{name}", feed, shapes[name])
            for name, feed in preparation.feeds.items()
        }
        if NOISE in shapes:
            feeds[NOISE] = self._noise(preparation, shapes[NOISE])
        if not preparation.gives:
            return
        for vector in self.fields.vectors:
            if vector.input in shapes:
                feeds[vector.input] = self._vector(vector, "")
        outputs = [*preparation.gives, *preparation.others]
        names = {output: self._named(self._made(preparation, output)) for output in outputs}
        self.steps.append(form.Run(component=component.name, feeds=feeds, gives=names))
        for output, target in preparation.gives.items():
            if target != START:
                self._feed_target(preparation, target, names[output], names)

    def _made(self, preparation: Preparation, output: str) -> str:
        """Return what an output of a preparation is called."""
        if preparation.gives.get(output) == START:
            return _IMAGE_LATENTS if self.task.start_picture() else f"_{_IMAGE_LATENTS}"
        return f"_{preparation.gives.get(output, output)}"

    def _noise(self, preparation: Preparation, shape: Sequence[int | str]) -> str:
        """Add the draw of a preparation. It is marked where nothing uses it in some call."""
        task = self.task
        starts = preparation.gives and {*preparation.gives.values()} == {START}
        at_full_strength = starts and task.noise_at_full_strength and task.blend is None
        always = not preparation.gives or (at_full_strength and not preparation.below_full_strength)
        if preparation.below_full_strength and not (at_full_strength and preparation.gives):
            raise Untranslatable(f"{preparation.component!r} left out at full strength")
        pictures = dict.fromkeys(argument(feed.picture) for feed in preparation.feeds.values())
        noise = form.Noise(
            gives=self._named(f"_{preparation.component}_noise"),
            shape=tuple(shape[1:]),
            rows=tuple(pictures),
            each_made=preparation.each,
            always=bool(always),
        )
        self.steps.append(noise)
        return noise.gives

    def _feed_target(
        self, preparation: Preparation, target: str, value: str, names: Mapping[str, str]
    ) -> None:
        """Feed a denoiser input, with something else or zeros in the branches that get none."""
        others = {fed: names[output] for output, fed in preparation.others.items()}
        for branch in self.fields.guidance.branches:
            if not preparation.branches or branch.name in preparation.branches:
                self.feeds[branch.name][target] = value
            else:
                self.feeds[branch.name][target] = others.get(target) or self._zeros_like(value)

    def _latents(self) -> None:
        sample = self._denoiser().inputs["sample"]
        latents = self.fields.latents
        shape = (latents.channels, *sample.shape[2:])
        self.steps.append(form.Noise(gives=self._named(_LATENTS), shape=shape))

    # The loop, and what follows.

    def _loop(self) -> None:
        fields, task = self.fields, self.task
        state = form.State(
            name=self._named("denoised"),
            noise=_LATENTS,
            clean=self._clean(),
            clean_when=(
                (Test(argument="strength", below=1.0),)
                if task.strength is not None and task.noise_at_full_strength
                else ()
            ),
            prediction=self._prediction(),
            keep=self._keep(),
        )
        part = form.Part(
            strength=None if task.strength is None else "strength",
            rounds=task.rounds,
            start="denoising_start" if task.start_picture() is not None else None,
            stop="denoising_end",
        )
        shared = self._shared()
        self.steps.append(
            form.Loop(
                denoiser=self._denoiser().name,
                plan=form.Plan(),
                state=state,
                branches=tuple(self._branches(shared)),
                feeds=shared,
                part=part,
                rescale=fields.guidance.rescale,
                cache=self._cache(),
            )
        )

    def _clean(self) -> str | None:
        if self.task.strength is None:
            return None
        return _IMAGE_LATENTS if self.task.start_picture() else f"_{_IMAGE_LATENTS}"

    def _prediction(self) -> str:
        (name,) = self._denoiser().outputs.keys() - {*self.fields.cached()}
        return name

    def _keep(self) -> form.Keep | None:
        if self.task.blend is None:
            return None
        sample = self._denoiser().inputs["sample"]
        feed = OldFeed(self.task.blend)
        where = self._image("mask", feed, ("batch", 1, *sample.shape[2:]))
        return form.Keep(value=f"_{_IMAGE_LATENTS}", where=where, noise=_LATENTS)

    def _cache(self) -> form.Cache | None:
        for shallow in self.fields.of_role("shallow"):
            return form.Cache(
                component=shallow.name, keeps=self.fields.cached(), every="cache_interval"
            )
        return None

    def _shared(self) -> dict[str, Feed]:
        """Return the feeds that are the same in all branches."""
        first, *others = self.feeds.values()
        return {
            name: feed
            for name, feed in first.items()
            if others and all(other.get(name) == feed for other in others)
        }

    def _branches(self, shared: Mapping[str, Feed]) -> Iterator[form.Branch]:
        guidance = self.fields.guidance
        pushes = _pushes(guidance.branches, guidance.single)
        when = tuple(self._when())
        during = form.Window(count="floor", start="guidance_start", stop="guidance_stop")
        for branch in guidance.branches:
            feeds = self.feeds[branch.name]
            own = {name: feed for name, feed in feeds.items() if name not in shared}
            if branch.name == guidance.single:
                yield form.Branch(name=branch.name, feeds=own)
            else:
                yield form.Branch(
                    name=branch.name,
                    feeds=own,
                    when=when,
                    during=during,
                    push=(pushes[branch.name],),
                )

    def _when(self) -> Iterator[Test]:
        """Yield the tests that all branches but one run where they hold."""
        guidance = self.fields.guidance
        if guidance.scale is not None:
            yield Test(argument=guidance.scale, above=1.0)
        for name, least in guidance.least.items():
            yield Test(argument=name, at_least=least)
        for prefix in self._prefixes():
            if prefix and self._missing(prefix) == "off":
                encoded = tuple(prefix + embedding.name for embedding in self.fields.embeddings)
                yield Test(given=(*self._mains(prefix), *encoded))

    def _decode(self) -> None:
        decoder = self.fields.component("decoder")
        image = self._named("_image")
        run = form.Run(
            component=decoder.name,
            feeds={"latents": "denoised"},
            gives={"image": image},
            tiles=True,
        )
        self.steps += [run, form.Emit(kind="images", of=image)]


def _pushes(branches: Sequence[OldBranch], single: str) -> dict[str, form.Push]:
    """Return how each branch but the base pushes the one before it, so that what each gets in all
    is its weight.

    Raises:
        Untranslatable: the weights are no chain of differences.
    """
    base = next(branch for branch in branches if branch.name == single)
    chain = [base, *(branch for branch in branches if branch is not base)]
    pushes: dict[str, form.Push] = {}
    amount: dict[str, float] = {}  # of the push towards the one before, as constant and scales
    for before, branch in reversed([*pairwise(chain)]):
        scales = {name: -value for name, value in branch.scales.items()}
        for name, value in amount.items():
            if name:
                scales[name] = scales.get(name, 0.0) + value
        constant = amount.get("", 0.0) - branch.constant
        scales = {name: value for name, value in scales.items() if value}
        if [*scales.values()] != [1.0]:
            raise Untranslatable(f"guidance branch {branch.name!r}: no difference of predictions")
        (by,) = scales
        pushes[branch.name] = form.Push(branch=before.name, by=by, less=-constant)
        amount = {"": constant, **scales}
    rest = {**{name: value for name, value in amount.items() if name}}
    if (base.constant, dict(base.scales)) != (1.0 + amount.get("", 0.0), rest):
        raise Untranslatable("guidance: the weights do not make one")
    return pushes
