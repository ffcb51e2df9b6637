"""An export says what a pipeline has and its bundle does not; and a writer runs its reader."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from msgspec import structs

from latentc.exporter.artifacts.store import Store
from latentc.exporter.artifacts.versions import libraries
from latentc.exporter.classes import CLASSES
from latentc.exporter.compiler.run import refuse_unreadable
from latentc.exporter.options import export_options, up_to_date
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source.left_out import left_out, present
from latentc.exporter.source.resolving import load, resolve
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import LeftOut
from latentc.runtimes.errors import BundleError, ExportError, InputError
from latentc.runtimes.presets.records import Choice, Record
from latentc.runtimes.programs.statements import Numbers
from latentc.runtimes.strict import readable
from tests.conftest import Run
from tests.support import fakes
from tests.support.sample_images import mask, sample_image
from tests.support.uncaptured import uncaptured

CHECKER = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}


def with_parts(folder: Path, source: Path, parts: Mapping[str, Any] = CHECKER) -> Path:
    """A pipeline's folder whose index names other parts, such as a safety checker."""
    index = json.loads((source / "model_index.json").read_text()) | parts
    folder.mkdir()
    for part in source.iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.fault("2.9", "the safety checker is left out without a word")
def test_what_is_left_out_is_said(smallest: Path, tmp_path: Path, run: Run) -> None:
    """By the manifest, the result, and ``inspect``, and that it was asked for where it was."""
    parts = {**CHECKER, "image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    source = with_parts(tmp_path / "pipeline", smallest, parts)
    pipe = uncaptured(source, tmp_path / "bundle", without=["safety_checker"])
    found = {each.name: each.chosen for each in pipe.manifest.left_out}
    assert found == {"image_encoder": False, "safety_checker": True}
    assert all(each.why for each in pipe.manifest.left_out)
    made = pipe("red", num_inference_steps=1, output_type="latent")
    assert made.left_out == tuple(found)
    _, out, _ = run("inspect", tmp_path / "bundle")
    assert "safety_checker (as asked)" in out
    assert "image_encoder: it is for IP-Adapters alone" in out


@pytest.mark.fault("2.9", "--without safety_checker is a choice that the bundle records")
def test_a_choice_makes_another_manifest(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Leaving out a part makes another manifest, whether bundles have that part or not."""
    source = pipeline_folder("sd-checked")
    checked, unchecked = resolve(source), resolve(source, without=["safety_checker"])
    assert checked.fingerprint != unchecked.fingerprint
    assert (checked.without, unchecked.without) == ((), ("safety_checker",))
    assert "feature_extractor" not in unchecked.parts
    source = with_parts(tmp_path / "pipeline", source, {"image_encoder": ["transformers", "A"]})
    plain, chosen = resolve(source), resolve(source, without=["image_encoder"])
    assert plain.fingerprint == chosen.fingerprint
    assert plain.without == chosen.without == ()
    bundle = fakes.make_bundle(tmp_path / "bundle")
    manifest = Manifest.load(bundle)
    made_by = structs.replace(manifest.created_by, libraries=libraries())
    named = {"id": plain.id, "fingerprint": plain.fingerprint}
    named |= {"scheduler_class": "DDIMScheduler"}
    source_of = structs.replace(manifest.source, **named)
    recorded = structs.replace(
        manifest, source=source_of, created_by=made_by, left_out=plain.left_out
    )
    options = export_options(verify=False, schedulers=())
    assert up_to_date(recorded, plain, bundle, {}, options)
    assert not up_to_date(recorded, chosen, bundle, {}, options)
    with pytest.raises(InputError, match="it works without: safety_checker, image_encoder"):
        resolve(source, without=["unet"])


@pytest.mark.fault("2.9", "SDXL's watermark is left out without a word")
@pytest.mark.parametrize("name", CLASSES)
def test_the_watermark(name: str) -> None:
    """It is named for the classes that put one into images, and for no other."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert ("watermark" in present(name, {})) == ("add_watermarker" in parameters)


# Of each class's constructor: what graphs are made of, or what changes how they are made.
USED = {
    *("vae", "unet", "transformer", "scheduler", "low_res_scheduler", "depth_estimator"),
    *("vqvae", "bert", "movq", "prior_prior", "prior_image_encoder", "prior_text_encoder"),
    *("prior_tokenizer", "prior_scheduler"),
    *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
    *("controlnet", "adapter", "max_noise_level", "is_cosxl_edit"),
    *("transformer_2", "boundary_ratio", "expand_timesteps"),
    *("force_zeros_for_empty_prompt", "requires_aesthetics_score", "id2label"),
}
# What says something of parts that are named by themselves.
OF_OTHERS = {"requires_safety_checker", "add_watermarker"}


@pytest.mark.fault("2.9", "second look: a part that no graph is made of, of any class")
@pytest.mark.parametrize("name", CLASSES)
def test_every_other_part_is_named(name: str) -> None:
    """Whatever a pipeline's class takes is used, can be left out, or is said to be."""
    taken = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
    others = taken - USED - OF_OTHERS
    index = {part: ["transformers", "AnyModel"] for part in others}
    said = set(present(name, index)) - {"watermark"}
    checked = {part for parts in CLASSES[name].may_lack.values() for part in parts}
    assert said == others - set(CLASSES[name].needs) - checked
    assert not set(present(name, {key: [None, None] for key in others})) - {"watermark"}


@pytest.mark.fault("2.9", "second look: the upscaler's own watermark, parts without the others")
@pytest.mark.parametrize(
    "parts",
    [
        {"watermarker": ["deepfloyd_if", "IFWatermarker"]},
        {"feature_extractor": CHECKER["feature_extractor"], "safety_checker": [None, None]},
        {**CHECKER, "watermarker": ["deepfloyd_if", "IFWatermarker"]},
    ],
    ids=lambda parts: "+".join(parts),
)
def test_parts_of_an_upscaler(
    parts: dict[str, Any], pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """They are said to be left out, and are not loaded."""
    folder = with_parts(tmp_path / "pipeline", pipeline_folder("upscaler"), parts)
    source = resolve(folder)
    named = [name for name, (_, class_name) in parts.items() if class_name]
    assert sorted(each.name for each in source.left_out) == sorted(named)
    assert not any(each.chosen for each in source.left_out)
    chosen = resolve(folder, without=named).left_out
    assert all(each.chosen for each in chosen)
    pipe = load(source)
    assert all(pipe.components[name] is None for name in parts)


@pytest.mark.fault(
    "2.9", "a checkpoint of one file has no safety checker, and is said to have none"
)
def test_a_checkpoint_of_one_file() -> None:
    """Whatever its configuration says: diffusers loads none with it either."""
    name = "StableDiffusionPipeline"
    assert present(name, CHECKER) == []
    assert present(name, CHECKER, single_file=True) == ["safety_checker", "feature_extractor"]
    left = left_out(name, ["safety_checker"], ["safety_checker"])
    assert [(each.name, each.chosen) for each in left] == [("safety_checker", True)]


@pytest.mark.fault("2.9", "the export says what it leaves out, unless it was asked to")
def test_the_export_says_it(
    smallest: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentc.exporter.compiler import export as entry
    from latentc.exporter.compiler.run import Exported

    manifest = Manifest.load(fakes.make_bundle(tmp_path / "bundle"))
    parts = (LeftOut("safety_checker", "images are not checked"), LeftOut("asked", "so", True))
    exported = Exported(tmp_path, structs.replace(manifest, left_out=parts))
    monkeypatch.setattr(entry, "export", lambda *_, **__: exported)
    code, out, err = run("export", smallest, "-o", tmp_path / "other")
    assert code == 0
    assert "left out: safety_checker (images are not checked)" in out + err
    assert "--without safety_checker" in out + err
    assert "left out: asked" not in out + err


@pytest.mark.fault("3.6", "SDXL inpainting with the refiner's aesthetic score")
def test_inpainting_with_an_aesthetic_score(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """By blending, as the class does with a refiner: the same latents."""
    with quiet_loading():
        refiner = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder("refiner"))
        theirs: Any = StableDiffusionXLInpaintPipeline(
            **refiner.components,
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
        theirs.save_pretrained(tmp_path / "pipeline")
    theirs.set_progress_bar_config(disable=True)
    ours = uncaptured(tmp_path / "pipeline", tmp_path / "bundle")
    assert [program.name for program in ours.manifest.programs] == ["image-to-image", "inpainting"]
    call = {"image": sample_image(32, 32), "mask_image": mask(32, 32), "num_inference_steps": 2}
    call |= {"prompt": "red", "aesthetic_score": 9.0, "strength": 1.0}
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        expected = theirs(**call, generator=generator, output_type="latent").images
    found = ours(**call, seed=3, output_type="latent").latents
    assert np.abs(found - np.asarray(expected)).max() < 1e-4


@pytest.mark.fault("3.6", "the upscaler with fewer noise classes than its level says")
def test_an_upscaler_with_few_classes(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with quiet_loading():
        pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder("upscaler"))
    pipe.unet.register_to_config(num_class_embeds=8)
    pipe.unet.class_embedding = torch.nn.Embedding(8, pipe.unet.class_embedding.embedding_dim)
    pipe.save_pretrained(tmp_path / "pipeline")
    ours = uncaptured(tmp_path / "pipeline", tmp_path / "bundle")
    (level,) = (a for a in ours.manifest.programs[0].arguments if a.name == "noise_level")
    assert isinstance(level, Numbers)
    assert (level.least, level.most, level.default) == (0.0, 7.0, (7.0,))
    call = {"image": sample_image(16, 16), "num_inference_steps": 1, "output_type": "latent"}
    assert ours("red", noise_level=7, **call).latents.shape == (1, 4, 16, 16)
    with pytest.raises(InputError, match="must be from 0 to 7"):
        ours("red", noise_level=8, **call)


@pytest.mark.fault("3.6", "a manifest that its own reader refuses is published")
def test_a_writer_runs_its_reader(tmp_path: Path) -> None:
    """Every writer runs its reader: of manifests wherever they are written, of records, reports and
    recipes.
    """
    manifest = Manifest.load(fakes.make_bundle(tmp_path / "bundle"))
    (program,) = manifest.programs
    symbols = {**program.symbols, "width": structs.replace(program.symbols["width"], multiple=0)}
    bad = structs.replace(manifest, programs=(structs.replace(program, symbols=symbols),))
    with pytest.raises(ExportError, match="expected default, multiple and least from 1"):
        refuse_unreadable(bad)
    store = Store(tmp_path / "other", None)
    with pytest.raises(BundleError, match="expected default, multiple and least from 1"):
        store.publish(bad)
    assert not (tmp_path / "other").exists()
    choice = Choice("b", "k", "1", "cpu", None, 0, False, {}, float("nan"), 1.0, None)
    record = Record("bundle", "place", {}, "now", 4, {"fast": choice})
    with pytest.raises(BundleError, match="record that could not be read is not written"):
        readable(record)


@pytest.mark.fault("3.6", "Stable Diffusion 3 with CLIP wider than the joint width")
def test_clip_wider_than_the_joint_width(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The width that is too much is cut off, as in diffusers, and encoded texts fit the frame."""
    with quiet_loading():
        pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder("sd3"))
        torch.manual_seed(8)
        config = {**pipe.transformer.config, "joint_attention_dim": 16}
        narrow = diffusers.SD3Transformer2DModel.from_config(config)
        parts = {**pipe.components, "transformer": narrow}
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
        theirs = diffusers.StableDiffusion3Pipeline(**parts)
        theirs.save_pretrained(tmp_path / "pipeline")
    theirs.set_progress_bar_config(disable=True)
    ours = uncaptured(tmp_path / "pipeline", tmp_path / "bundle")
    call = {"prompt": "red", "num_inference_steps": 1, "guidance_scale": 3.0}
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        expected = theirs(**call, generator=generator, output_type="latent").images
    found = ours(**call, seed=3, output_type="latent").latents
    assert np.abs(found - np.asarray(expected)).max() < 1e-4
    encoded = ours.encode_prompt("red")
    again = ours(**{**call, "prompt": None}, **encoded, seed=3, output_type="latent").latents
    assert np.array_equal(again, found)
