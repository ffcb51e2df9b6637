"""This module says what to do about a name that there is not: which names may have been meant, and
what stands here for what other tools call so.

Everything that refuses a name asks `suggestion`. Names that are taken, in another spelling, stand
in the declarations of the options (`latentc.runtimes.options.Option.aliases`); here stands what
latentc has no option for, and what the same thing is called elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

_ALIKE = 0.74  # from which on one name is taken for another, misspelt: one letter of four
_LONGEST = 80  # characters of a name that is compared with others
_SHORTEST = 3  # characters of a name that others may begin with
_SUGGESTED = 3  # names at most
_LISTED = 40  # names at most, of which all are listed

# What is called by different names in different tools. Spellings that differ in case, hyphens and
# underscores only need not stand here.
_SAME_THINGS: tuple[tuple[str, ...], ...] = (
    ("export", "convert", "compile", "save"),
    ("generate", "run", "infer", "sample", "predict", "txt2img", "img2img", "draw", "image"),
    ("inspect", "info", "show", "describe", "ls", "list"),
    ("bench", "benchmark", "perf", "measure", "time", "profile"),
    ("tune", "optimize", "optimise", "autotune"),
    ("verify", "check", "validate", "test"),
    ("backends", "devices", "engines", "providers"),
    ("onnx", "onnxruntime", "ort"),
    ("openvino", "ov", "openvinoir", "ir"),
    ("tensorrt", "trt"),
    ("torch", "pytorch", "pt", "pt2", "eager"),
    ("coreml", "mlpackage", "mlprogram", "mlmodel", "apple", "ane"),
    ("cuda", "gpu", "nvidia"),
    ("fp32", "float32", "float", "f32", "full"),
    ("fp16", "float16", "half", "f16", "torch.float16"),
    ("bf16", "bfloat16", "torch.bfloat16"),
    ("int8", "int8_sym", "int8_asym", "q8", "q8_0", "w8", "w8a16"),
    ("int4", "int4_sym", "int4_asym", "nf4", "q4", "q4_0", "q4_k", "w4", "w4a16"),
    ("text-to-image", "txt2img", "text2image", "t2i"),
    ("image-to-image", "img2img", "image2image", "i2i"),
    ("inpainting", "inpaint"),
    ("upscaling", "upscale", "superresolution"),
    ("euler_a", "euler_ancestral", "k_euler_ancestral"),
    ("dpmpp_2m", "dpm", "dpm2m", "dpmsolver", "dpm_solver_multistep"),
    ("dpmpp_2m_karras", "dpm2m_karras", "dpmpp2mv2"),
    ("pndm", "plms"),
    ("flow_euler", "flowmatch", "flow_match_euler", "simple"),
)
_FIRST = "the model or the bundle comes first, without a name"
_BY_EXPORT = "is fixed when a bundle is exported: leave it out"
_OF_PRECISION = "is a precision, which is a value: --precision {}"
# What options and arguments of other tools stand for that have none here.
ADVICE_ON_OPTIONS: Mapping[str, str] = {
    **dict.fromkeys(("model", "m", "model_id", "model_path", "repo_id"), _FIRST),
    "pretrained_model_name_or_path": _FIRST,
    **{name: f"{name} {_OF_PRECISION.format(name)}" for name in ("fp16", "bf16", "int8", "int4")},
    "half": f"half precision {_OF_PRECISION.format('fp16')}",
    "dtype": "the precision is that of a build: precision, of an export and of load",
    "torch_dtype": "the precision is that of a build: precision='fp16', of an export and of load",
    "weight_format": "weights get their format by an export: latentc export --precision int8",
    "opset": "the lowering chooses the opset, and ONNX Runtime verifies each build: leave it out",
    "device": "an export is for every device: the device is chosen by generate and load",
    "framework": "a source is read by diffusers: leave it out",
    "library": "a source is read by diffusers: leave it out",
    "trust_remote_code": "pipelines with code of their own are not read: leave it out",
    "optimize": "graphs are optimised anyhow: leave it out",
    "atol": "every build is verified with the tolerance of its precision: leave it out",
    "cache_dir": "the Hub's cache is where HF_HOME says, that of latentc where LATENTC_CACHE says",
    "dataset": "give prompts: --calibration-prompts FILE",
    "provider": "an engine and its device are chosen: backend='onnxruntime', device='cuda'",
    "device_map": "a bundle is loaded on one device: device=…; low_memory=True holds less there",
    "low_cpu_mem_usage": "for less memory: low_memory=True",
    "use_safetensors": "a pickle is read with --allow-pickle only: leave it out",
    "safety_checker": "to leave it out: latentc export --without safety_checker",
    "eta": "the sampling plans have eta as the scheduler's default, 0 of DDIM: leave it out, or "
    "take another scheduler",
    "clip_skip": f"the text encoder's last layer {_BY_EXPORT}, or give prompt_embeds",
    **dict.fromkeys(
        ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"),
        f"how attention is computed {_BY_EXPORT}; the scale of a LoRA is given there: "
        "latentc export --lora FILE:SCALE",
    ),
    "return_dict": "a call of the pipeline takes it; this gives what its name says",
    **dict.fromkeys(("callback", "callback_steps"), "give callback_on_step_end"),
    **dict.fromkeys(
        ("timesteps", "sigmas"),
        "the timesteps are those of a sampling plan: num_inference_steps and scheduler choose it",
    ),
}
_FIXED = "the parts of a bundle are fixed when it is exported"
_DEVICE = "a pipeline is loaded for a device: latentc.load(bundle, backend=…, device=…)"
_WITH_LORA = f"{_FIXED}: latentc export --lora FILE"
_EXPORTED = (
    "export the pipeline, latentc.export(source, folder), then load the bundle, "
    "latentc.load(folder)"
)
_LESS_MEMORY = (
    "for less memory: latentc.load(bundle, low_memory=True), enable_vae_tiling(), "
    "enable_vae_slicing()"
)
# What diffusers' pipelines have, and what stands for it here; * is any end.
ADVICE_ON_ATTRIBUTES: Mapping[str, str] = {
    **dict.fromkeys(("to", "cuda", "cpu", "half", "float", "dtype"), _DEVICE),
    **dict.fromkeys(("from_pretrained", "from_single_file", "*Pipeline"), _EXPORTED),
    "save_pretrained": "a bundle is a folder, which can be copied",
    **dict.fromkeys(("enable_*", "disable_*"), _LESS_MEMORY),
    "set_progress_bar_config": "for each step: pipe.stream(…), or callback_on_step_end",
    "load_ip_adapter": f"{_FIXED}: latentc export --ip-adapter FILE",
    "load_textual_inversion": f"{_FIXED}: latentc export --textual-inversion FILE",
    **dict.fromkeys(("load_lora*", "fuse_*", "unfuse_*", "set_adapters"), _WITH_LORA),
    "vae": f"{_FIXED}: latentc export --vae FOLDER",
    "controlnet": f"{_FIXED}: latentc export --controlnet FOLDER",
    **dict.fromkeys(("unet", "transformer*", "text_encoder*", "tokenizer*"), _FIXED),
}


def suggestion(
    name: str,
    known: Iterable[str],
    has: str = "there are",
    *,
    listed: str = "",
    other_names: Mapping[str, str] | None = None,
    advice: Mapping[str, str] | None = None,
) -> str:
    """Return what comes after the words that there is no such name: advice, the names that may have
    been meant, or all names.

    Args:
        known: the names that there are.
        has: what leads to the list of all names; "" leaves the list out.
        listed: the list, where it says more than the names.
        other_names: further names that may have been meant, with the known one that each stands
            for.
        advice: what to do instead, by name.
    """
    names, others = [*known], other_names or {}
    told = advised(name, advice or {})
    if told and not any(_plain(each) == _plain(name) for each in (*names, *others)):
        return told
    near = near_names(name, names, others)
    if near:
        return f"did you mean {' or '.join(map(_quoted, near))}?"
    if not has:
        return ""
    if len(names) > _LISTED and not listed:
        return f"{has} {len(names)}, such as {', '.join(names[-8:])}"
    return f"{has}: {listed or ', '.join(names) or 'none'}"


def advised(name: str, advice: Mapping[str, str]) -> str:
    """Return what advice there is on a name: its own, or that of a pattern with *; "" for none."""
    plain = _plain(name)
    own = next((text for each, text in advice.items() if _plain(each) == plain), "")
    patterns = ((each, text) for each, text in advice.items() if "*" in each)
    return own or next((text for each, text in patterns if fnmatchcase(name, each)), "")


def near_names(
    name: str, known: Collection[str], other_names: Mapping[str, str] | None = None
) -> list[str]:
    """Return the names that may have been meant, the likeliest first, `_SUGGESTED` at most."""
    if not 0 < len(name) <= _LONGEST:
        return []
    plain, others = _plain(name), other_names or {}
    meant = {**{each: each for each in known}, **others}
    equal = [meant[each] for each in meant if _plain(each) == plain]
    if equal and plain:
        return [*dict.fromkeys(equal)][:_SUGGESTED]
    things = [{_plain(each) for each in thing} for thing in _SAME_THINGS]
    same = [each for thing in things if plain in thing for each in meant if _plain(each) in thing]
    likeness = {each: _likeness(plain, each) for each in meant}
    alike = [each for each in meant if likeness[each] >= _ALIKE]
    alike.sort(key=lambda each: (-likeness[each], len(each)))
    return [*dict.fromkeys(meant[each] for each in (*same, *alike))][:_SUGGESTED]


def _likeness(plain: str, known: str) -> float:
    """Return how alike a plain name is to a known one, 0 to 1: to all of it, or to some of its
    words; one that the other begins with counts as alike."""
    from difflib import SequenceMatcher

    words = [word for word in re.split(r"[\W_]+", known.lower()) if word]
    runs = {
        "".join(words[first:last])
        for first in range(len(words))
        for last in range(first + 1, len(words) + 1)
    }
    whole = _plain(known)
    begins = len(plain) >= _SHORTEST and whole.startswith(plain)
    goes_on = len(whole) > _SHORTEST and plain.startswith(whole)
    best = _ALIKE if begins or goes_on else 0.0
    matcher = SequenceMatcher(a="", b=plain, autojunk=False)
    for part in {whole, *(run for run in runs if len(run) > _SHORTEST)}:
        matcher.set_seq1(part)
        if matcher.real_quick_ratio() >= _ALIKE and matcher.quick_ratio() >= _ALIKE:
            share = 1.0 if part == whole else 0.9  # some of the words are less than all of them
            best = max(best, share * matcher.ratio())
    return best


def _plain(name: str) -> str:
    """Return a name without what spellings differ in: case, hyphens, underscores; + is p."""
    return re.sub(r"[\W_]+", "", name.lower().replace("+", "p"))


def _quoted(name: str) -> str:
    return name if name.startswith("-") else repr(name)
