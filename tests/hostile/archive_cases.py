"""Bad program archives of PyTorch (.pt2): pickles, code in expressions, other members."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentc.runtimes.errors import LatentcError
from tests.hostile.bad_bundle import BadBundle, case

Members = dict[str, bytes]


def _change(
    bad: BadBundle, change: Callable[[Members], object], component: str = "denoiser"
) -> None:
    """Write a component's archive anew after `change` altered its members."""
    path = bad.entry("torch", component)
    with zipfile.ZipFile(io.BytesIO(bad.read(path))) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    change(members)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    bad.put(path, data.getvalue())


def _trap(bad: BadBundle) -> bytes:
    """Return a pickle that makes a file outside of the bundle when it is loaded."""

    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(bad.outside / "pwned"), "w"))

    return pickle.dumps(Trap())


def _torch_trap(bad: BadBundle) -> bytes:
    """Return the same as `torch.save` writes it."""
    import torch

    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(bad.outside / "pwned"), "w"))

    data = io.BytesIO()
    torch.save(Trap(), data)
    return data.getvalue()


def _model(members: Members) -> Any:
    return json.loads(members["model/models/model.json"])


def _put_model(members: Members, model: Any) -> None:
    members["model/models/model.json"] = json.dumps(model).encode()


def _named(members: Members, end: str) -> str:
    return next(name for name in members if name.endswith(end))


@case("torch", "model.pt2", LatentcError)
def archive_cut_short(bad: BadBundle) -> None:
    """The archive ends in the middle."""
    path = bad.entry("torch", "denoiser")
    data = bad.read(path)
    bad.put(path, data[: len(data) // 2])


@case("torch", "model.pt2", LatentcError)
def archive_is_a_pickle(bad: BadBundle) -> None:
    """The archive is a plain pickle."""
    bad.put(bad.entry("torch", "denoiser"), _trap(bad))


@case("torch", "model.pt2", LatentcError)
def archive_is_a_torch_file(bad: BadBundle) -> None:
    """The archive is what `torch.save` makes of an object."""
    bad.put(bad.entry("torch", "denoiser"), _torch_trap(bad))


@case("torch", "model.pt2", LatentcError)
def archive_with_marked_pickle(bad: BadBundle) -> None:
    """A weight is marked as a pickle."""

    def change(members: Members) -> None:
        name = _named(members, "weights_config.json")
        config = json.loads(members[name])
        first = next(iter(config["config"].values()))
        first["use_pickle"] = True
        members[f"model/data/weights/{first['path_name']}"] = _torch_trap(bad)
        members[name] = json.dumps(config).encode()

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_with_marked_constant(bad: BadBundle) -> None:
    """A constant is marked as a pickle."""

    def change(members: Members) -> None:
        name = _named(members, "constants_config.json")
        config = json.loads(members[name])
        config["config"]["trap"] = {
            "path_name": "trap", "is_param": False, "use_pickle": True, "tensor_meta": None
        }  # fmt: skip
        members["model/data/constants/trap"] = _torch_trap(bad)
        members[name] = json.dumps(config).encode()

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_with_old_weights(bad: BadBundle) -> None:
    """The weights stand in one pickled file, which PyTorch falls back to."""

    def change(members: Members) -> None:
        del members[_named(members, "weights_config.json")]
        members["model/data/weights/model.pt"] = _torch_trap(bad)

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_with_old_weights_beside(bad: BadBundle) -> None:
    """Beside the weights there is one pickled file of weights."""
    _change(bad, lambda m: m.update({"model/data/weights/model.pt": _torch_trap(bad)}))


@case("torch", "model.pt2", LatentcError)
def archive_with_old_constants(bad: BadBundle) -> None:
    """The constants stand in one pickled file."""

    def change(members: Members) -> None:
        del members[_named(members, "constants_config.json")]
        members["model/data/constants/model.pt"] = _torch_trap(bad)

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_with_pickled_inputs(bad: BadBundle) -> None:
    """The example inputs are a pickle of something else than tensors."""

    def change(members: Members) -> None:
        members["model/data/sample_inputs/model.pt"] = _torch_trap(bad)

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_with_custom_object(bad: BadBundle) -> None:
    """There is a custom object among the constants."""
    _change(bad, lambda m: m.update({"model/data/constants/custom_obj_0": _torch_trap(bad)}))


@case("torch", "model.pt2", LatentcError)
def archive_with_compiled_code(bad: BadBundle) -> None:
    """There is a compiled library for PyTorch's inductor."""
    _change(bad, lambda m: m.update({"model/data/aotinductor/model/model.so": b"\x7fELF"}))


@case("torch", "model.pt2", LatentcError)
def archive_of_the_old_layout(bad: BadBundle) -> None:
    """The archive has the layout of older versions, with pickled weights."""

    def change(members: Members) -> None:
        model = members["model/models/model.json"]
        members.clear()
        members["version"] = b"8.0"
        members["serialized_exported_program.json"] = model
        members["serialized_state_dict.pt"] = _torch_trap(bad)
        members["serialized_constants.pt"] = _torch_trap(bad)
        members["serialized_example_inputs.pt"] = _torch_trap(bad)

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_with_two_roots(bad: BadBundle) -> None:
    """The archive holds a second program under another root."""

    def change(members: Members) -> None:
        members.update(
            {name.replace("model/", "other/", 1): x for name, x in list(members.items())}
        )

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_with_twin_members(bad: BadBundle) -> None:
    """Two members have the same name: one is checked, the other one loaded."""
    path = bad.entry("torch", "denoiser")
    data = io.BytesIO(bad.read(path))
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(data, "a", zipfile.ZIP_STORED) as archive:
        warnings.simplefilter("ignore")
        name = next(n for n in archive.namelist() if n.endswith("weights_config.json"))
        config = json.loads(archive.read(name))
        archive.writestr(name, json.dumps(config))
    bad.put(path, data.getvalue())


@case("torch", "model.pt2", LatentcError)
def archive_with_climbing_member(bad: BadBundle) -> None:
    """A member's name climbs out of the archive's folder."""
    _change(bad, lambda m: m.update({"model/../../../outside/pwned": b"x"}))


@case("torch", "model.pt2", LatentcError)
def archive_with_weights_elsewhere(bad: BadBundle) -> None:
    """A weight's path climbs out of the weights' folder."""

    def change(members: Members) -> None:
        name = _named(members, "weights_config.json")
        config = json.loads(members[name])
        next(iter(config["config"].values()))["path_name"] = "../constants/tensor_0"
        members[name] = json.dumps(config).encode()

    _change(bad, change)


def _code(bad: BadBundle) -> str:
    """Return Python that makes a file outside of the bundle."""
    return f"__import__('pathlib').Path({str(bad.outside / 'pwned')!r}).touch()"


def _everywhere(node: Any, key: str, value: Any) -> bool:
    """Replace every member of that name; return whether there is one."""
    changed = False
    if isinstance(node, dict):
        for name in node:
            if name == key:
                node[name] = value
                changed = True
            else:
                changed |= _everywhere(node[name], key, value)
    elif isinstance(node, list):
        for item in node:
            changed |= _everywhere(item, key, value)
    return changed


@case("torch", "", None)
def archive_with_code_in_an_expression(bad: BadBundle) -> None:
    """A symbolic size is Python code, which sympy would evaluate; a reader needs none of them."""

    def change(members: Members) -> None:
        model = _model(members)
        if not _everywhere(model, "expr_str", _code(bad)):
            raise AssertionError("no expression to change")
        _put_model(members, model)

    _change(bad, change)


@case("torch", "", None)
def archive_with_code_in_a_range(bad: BadBundle) -> None:
    """A symbol with a range has Python code for its name; a reader needs no ranges."""

    def change(members: Members) -> None:
        model = _model(members)
        ranges = model["range_constraints"]
        ranges[_code(bad)] = next(iter(ranges.values()))
        _put_model(members, model)

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_calling_python(bad: BadBundle) -> None:
    """A node's target is a function of Python's own library."""

    def change(members: Members) -> None:
        model = _model(members)
        model["graph_module"]["graph"]["nodes"][0]["target"] = "os.system"
        _put_model(members, model)

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_calling_another_library(bad: BadBundle) -> None:
    """A node's target is an operator of a library that is not PyTorch's own."""

    def change(members: Members) -> None:
        model = _model(members)
        model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.evil.run.default"
        _put_model(members, model)

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_reading_a_file(bad: BadBundle) -> None:
    """A node's target is the operator that maps a file of any name into memory."""

    def change(members: Members) -> None:
        model = _model(members)
        model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"
        _put_model(members, model)

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_deep(bad: BadBundle) -> None:
    """The program is 100,000 arrays deep."""
    _change(
        bad,
        lambda m: m.update({"model/models/model.json": b"[" * 100_000 + b"]" * 100_000}),
    )


@case("torch", "model.pt2", LatentcError)
def archive_with_huge_weight(bad: BadBundle) -> None:
    """A weight says that it has 2^50 elements."""

    def change(members: Members) -> None:
        name = _named(members, "weights_config.json")
        config = json.loads(members[name])
        meta = next(iter(config["config"].values()))["tensor_meta"]
        meta["sizes"] = [{"as_int": 2**25}, {"as_int": 2**25}]
        meta["strides"] = [{"as_int": 2**25}, {"as_int": 1}]
        members[name] = json.dumps(config).encode()

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_with_strides_beyond_the_weight(bad: BadBundle) -> None:
    """A weight's strides lead behind its bytes, into other memory."""

    def change(members: Members) -> None:
        name = _named(members, "weights_config.json")
        config = json.loads(members[name])
        meta = next(iter(config["config"].values()))["tensor_meta"]
        meta["storage_offset"] = {"as_int": 1 << 20}
        members[name] = json.dumps(config).encode()

    _change(bad, change)


@case("torch", "model.pt2", LatentcError)
def archive_that_unpacks_to_much(bad: BadBundle) -> None:
    """A member of few bytes unpacks to 8 GiB."""
    path = Path(bad.entry("torch", "denoiser"))
    data = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(bad.read(path.as_posix()))) as old,
        zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for info in old.infolist():
            archive.writestr(info.filename, old.read(info))
        with archive.open("model/data/weights/weight_bomb", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(bytes(1 << 22))
    raw = data.getvalue()
    bad.put(path.as_posix(), raw)
