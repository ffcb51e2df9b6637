"""Adapters of all kinds that are found, read or refused as they should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from latentc.cli import run as command
from latentc.exporter.classes import CLASSES
from latentc.exporter.compiler.requested import with_tasks
from latentc.exporter.families import family_of
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source import resolving as source
from latentc.runtimes.errors import InputError, SourceError
from tests.support import tiny

Asked = Mapping[str, list[str]]


@pytest.fixture(scope="module")
def plain(pipeline_folder: Callable[[str], Path]) -> Any:
    return DiffusionPipeline.from_pretrained(pipeline_folder("sd"))


@pytest.fixture
def load(pipeline_folder: Callable[[str], Path]) -> Callable[..., Any]:
    def loaded(asked: Asked, **options: Any) -> Any:
        return source.load(source.resolve(pipeline_folder("sd"), asked=asked, **options))

    return loaded


@pytest.mark.fault("3.5", "ControlNet folders of image-to-image and inpainting are refused")
@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_controlnet_pipelines_for_images(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, family: str, task: str
) -> None:
    """Such a folder is what its parts are with ``--controlnet`` and ``--task``."""
    with quiet_loading():
        pipe = DiffusionPipeline.from_pretrained(pipeline_folder(family))
        net = tiny.controlnet(pipe.unet, 1)
        more = {"requires_safety_checker": False} if family == "sd" else {}
        xl = "XL" if family == "sdxl" else ""
        name = f"StableDiffusion{xl}ControlNet{task}Pipeline"
        made = getattr(diffusers, name)(**pipe.components, controlnet=net, **more)
        made.save_pretrained(tmp_path)
        found = source.load(source.resolve(tmp_path))
        usual = AutoPipelineForText2Image.from_pipe(pipe, controlnet=net)
    (expected,) = CLASSES[name].tasks
    described = [
        with_tasks(family_of(type(each).__name__).describe(each), [expected], name)
        for each in (found, usual)
    ]
    ours, theirs = described
    assert [program.name for program in ours.programs] == ["text-to-image", expected]
    assert ours.programs == theirs.programs
    components = [[graph.component for graph in each.graphs] for each in (ours, theirs)]
    assert components[0] == components[1]


class Harmful:
    """A pickle of it makes a file when it is read as pickles are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def lora_file(pipe: Any, file: Path) -> dict[str, torch.Tensor]:
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    shape = pipe.unet.get_submodule(module).weight.shape
    torch.manual_seed(0)
    state = {f"unet.{module}.lora_A.weight": torch.randn(4, shape[1])}
    state[f"unet.{module}.lora_B.weight"] = torch.randn(shape[0], 4)
    save_file(state, file)
    return state


@pytest.mark.fault("3.5", "adapters' files that are pickles are refused with --allow-pickle")
def test_a_lora_that_is_a_pickle(plain: Any, load: Callable[..., Any], tmp_path: Path) -> None:
    state = lora_file(plain, tmp_path / "one.safetensors")
    expected = load({"lora": [str(tmp_path / "one.safetensors")]}).unet.state_dict()
    asked = {"lora": [str(tmp_path / "one.bin")]}
    for content in (state, {"state_dict": state}):
        torch.save(content, tmp_path / "one.bin")
        with pytest.raises(SourceError, match=r"one\.bin is a pickle.*give --allow-pickle"):
            load(asked)
        found = load(asked, allow_pickle=True).unet.state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.fault("3.5", "adapters' files that are pickles are refused with --allow-pickle")
@pytest.mark.parametrize("kind", ["lora", "textual-inversion", "ip-adapter"])
def test_no_code_of_an_adapter_runs(
    plain: Any, load: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    tiny.ip_adapter(plain.unet, tmp_path)
    touched = tmp_path / "touched"
    torch.save({"a": Harmful(touched)}, tmp_path / "one.bin")
    with pytest.raises(SourceError, match=r"one\.bin: not a"):
        load({kind: [str(tmp_path / "one.bin")]}, allow_pickle=True)
    assert not touched.exists()


@pytest.mark.fault("3.5", "adapters' files that are pickles are refused with --allow-pickle")
@pytest.mark.parametrize("form", ["diffusers", "web interfaces"])
def test_a_word_that_is_a_pickle(
    plain: Any, load: Callable[..., Any], tmp_path: Path, form: str
) -> None:
    width = plain.text_encoder.get_input_embeddings().weight.shape[1]
    vectors = torch.arange(2.0 * width).reshape(2, width)
    content: dict[str, Any] = {"<cat>": vectors}
    if form == "web interfaces":
        content = {"name": "<cat>", "string_to_param": {"*": vectors}, "step": 7}
    torch.save(content, tmp_path / "style.pt")
    asked = {"textual-inversion": [str(tmp_path / "style.pt")]}
    with pytest.raises(SourceError, match=r"style\.pt is a pickle"):
        load(asked)
    pipe = load(asked, allow_pickle=True)
    rows = [pipe.tokenizer.convert_tokens_to_ids(each) for each in ("<cat>", "<cat>_1")]
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[rows], vectors)


@pytest.mark.fault("2.13", "tensors of a textual inversion that nothing reads")
def test_tensors_of_a_word_that_nothing_reads(
    plain: Any, load: Callable[..., Any], tmp_path: Path
) -> None:
    """Tensors beside the vectors of a web interface's file are refused; its word's old id is
    harmless.
    """
    width = plain.text_encoder.get_input_embeddings().weight.shape[1]
    vectors, old = torch.ones(1, width), {"*": torch.tensor(265)}
    asked = {"textual-inversion": [str(tmp_path / "style.pt")]}
    content = {"name": "<cat>", "string_to_token": old, "string_to_param": {"*": vectors}}
    torch.save(content, tmp_path / "style.pt")
    assert load(asked, allow_pickle=True) is not None
    for more in ({"string_to_param": {"*": vectors, "+": vectors}}, {"layers": {"a": vectors}}):
        torch.save({**content, **more}, tmp_path / "style.pt")
        with pytest.raises(SourceError, match=r"but 1 of its tensors .(string_to_param.|layer)"):
            load(asked, allow_pickle=True)
    save_file({"<cat>": vectors, "other": vectors.clone()}, tmp_path / "style.safetensors")
    with pytest.raises(SourceError, match="expected one tensor"):
        load({"textual-inversion": [str(tmp_path / "style.safetensors")]})


@pytest.mark.fault("2.1", "a tensor of an adapter that is NaN or infinity")
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["lora", "textual-inversion", "ip-adapter"])
def test_tensors_that_are_not_finite(
    plain: Any, load: Callable[..., Any], tmp_path: Path, kind: str, number: float
) -> None:
    file = tmp_path / "one.safetensors"
    if kind == "ip-adapter":
        file = tiny.ip_adapter(plain.unet, tmp_path)
    elif kind == "lora":
        lora_file(plain, file)
    else:
        save_file({"<cat>": torch.ones(1, 32)}, file)
    state = load_file(file)
    name = max(state)
    state[name].view(-1)[1] = number
    save_file(state, file)
    with pytest.raises(SourceError, match="NaN or infinity") as caught:
        load({kind: [str(file)]})
    assert (name if kind != "lora" else "attn1.to_q") in str(caught.value)


@pytest.mark.fault("3.5", "a textual inversion whose word exists is called unfitting")
def test_a_word_that_exists(plain: Any, load: Callable[..., Any], tmp_path: Path) -> None:
    width = plain.text_encoder.get_input_embeddings().weight.shape[1]
    save_file({"a": torch.zeros(1, width)}, tmp_path / "style.safetensors")
    with pytest.raises(SourceError, match=r"'a' of style.* already; give .*style.safetensors:WORD"):
        load({"textual-inversion": [str(tmp_path / "style.safetensors")]})


def encoder(folder: Path, width: int) -> Path:
    torch.manual_seed(1)
    sizes = {"hidden_size": width, "projection_dim": 24, "image_size": 32, "patch_size": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, **layers)).save_pretrained(folder)
    return folder


@pytest.mark.fault("3.5", "an IP-Adapter with the other image encoder is a raw matrix error")
@pytest.mark.parametrize("kind", ["adapter", "plus", "full"])
def test_the_image_encoder_that_fits(
    plain: Any, load: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    file = tiny.ip_adapter(plain.unet, tmp_path, kind=kind)
    right = (tmp_path / "image_encoder").rename(tmp_path / "right")
    wrong = encoder(tmp_path / "image_encoder", 64)
    if kind == "adapter":  # it takes the projected image, of any width inside
        state = load_file(file)
        key = "image_proj.proj.weight"
        state[key] = torch.cat([state[key]] * 2, dim=1)
        save_file(state, file)
        wrong, right = right, encoder(tmp_path / "wider", 64)
        config = right / "config.json"
        config.write_text(
            config.read_text().replace('"projection_dim": 24', '"projection_dim": 48')
        )
        weights = load_file(right / "model.safetensors")
        weights["visual_projection.weight"] = torch.cat([weights["visual_projection.weight"]] * 2)
        save_file(weights, right / "model.safetensors", {"format": "pt"})
    asked = {"ip-adapter": [str(file)]}
    with pytest.raises(SourceError, match=r"is for an image encoder with a .*name the other one"):
        load(asked, image_encoder=str(wrong))
    pipe = load(asked, image_encoder=str(right))
    width = CLIPVisionConfig.from_pretrained(right).hidden_size
    assert pipe.image_encoder.config.hidden_size == width
    save_file({"a": torch.ones(1)}, right / "other.safetensors")  # is not the encoder's
    (right / "model.safetensors").rename(right / "renamed.safetensors")
    with pytest.raises(SourceError, match=r"right|wider"):
        load(asked, image_encoder=str(right))


@pytest.mark.fault("3.5", "adapters' files that are pickles are refused with --allow-pickle")
def test_an_ip_adapter_that_is_a_pickle(
    plain: Any, load: Callable[..., Any], tmp_path: Path
) -> None:
    file = tiny.ip_adapter(plain.unet, tmp_path)
    expected = load({"ip-adapter": [str(file)]}).unet.state_dict()
    content: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_file(file).items():
        part, _, name = key.partition(".")
        content[part][name] = value
    torch.save(content, tmp_path / "adapter.bin")
    asked = {"ip-adapter": [str(tmp_path / "adapter.bin")]}
    with pytest.raises(SourceError, match=r"adapter\.bin is a pickle.*give --allow-pickle"):
        load(asked)
    found = load(asked, allow_pickle=True).unet.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_image_encoders_that_are_refused(
    plain: Any,
    load: Callable[..., Any],
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(InputError, match="is for IP-Adapters; give one"):
        load({}, image_encoder=str(tmp_path))
    file = tiny.ip_adapter(plain.unet, tmp_path)
    with pytest.raises(SourceError, match="no such image encoder"):
        load({"ip-adapter": [str(file)]}, image_encoder=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    given = ["--ip-adapter", str(file), "--image-encoder", str(tmp_path / "empty")]
    folder, output = str(pipeline_folder("sd")), str(tmp_path / "b")
    assert command(["export", folder, "-o", output, *given]) == 3
    assert "one that --image-encoder names" in " ".join(capsys.readouterr().err.split())


@pytest.mark.fault("2.13", "tensors of an IP-Adapter that nothing reads")
@pytest.mark.parametrize("kind", ["adapter", "plus", "full"])
def test_tensors_of_an_ip_adapter_that_nothing_reads(
    plain: Any, load: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    """Layers of a larger UNet, LoRAs of a FaceID, what stands beside both halves."""
    files = [tiny.ip_adapter(plain.unet, tmp_path / n, kind=n) for n in ("adapter", kind)]
    asked = {"ip-adapter": [str(file) for file in files]}
    state = load_file(files[1])
    for key in ("ip_adapter.99.to_k_ip.weight", "ip_adapter.0.to_q_lora.up.weight", "image_proj.a"):
        save_file({**state, key: torch.ones(3, 3)}, files[1])
        with pytest.raises(SourceError, match=f"reads all but 1 of its tensors .{key}., which wou"):
            load(asked)
    save_file(state, files[1])
    assert load(asked) is not None
