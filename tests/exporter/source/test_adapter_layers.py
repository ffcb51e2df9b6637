"""Every difference that is fused is the file's: its tensors multiplied, times its own alpha."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from latentc.exporter.source import resolving as source
from latentc.runtimes.errors import SourceError

RANK = 4
Deltas = dict[tuple[str, str], torch.Tensor]
# Layers of the tiny Stable Diffusion XL, of all kinds, and their names in Stability AI's code.
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks.1.0.emb_layers.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.attentions.0.proj_in": "input_blocks.3.1.proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
    ),
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (
        "middle_block.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_out.0": (
        "output_blocks.1.1.transformer_blocks.1.attn2.to_out.0"
    ),
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0.conv_shortcut": "output_blocks.2.0.skip_connection",
    "conv_out": "out.2",
}
TEXT = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.1.self_attn.out_proj",
    "encoder.layers.2.mlp.fc1",
)
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


def flat(beginning: str, name: str) -> str:
    return beginning + name.replace(".", "_")


def by_kohya(part: str, module: str) -> str:
    if part == "unet":
        return flat("lora_unet_", module)
    beginning = "lora_te1_" if part == "text_encoder" else "lora_te2_"
    return flat(f"{beginning}text_model_", module.removeprefix("text_model."))


def by_stability(part: str, module: str) -> str:
    return flat("lora_unet_", UNET[module]) if part == "unet" else by_kohya(part, module)


def dotted(part: str, module: str) -> str:
    return f"{part}.{module}"


# How names are written, and the endings of the two factors.
FORMS: Mapping[str, tuple[Callable[[str, str], str], str, str]] = {
    "kohya": (by_kohya, "lora_down.weight", "lora_up.weight"),
    "Stability AI's names": (by_stability, "lora_down.weight", "lora_up.weight"),
    "PEFT": (dotted, "lora_A.weight", "lora_B.weight"),
    "diffusers": (dotted, "lora.down.weight", "lora.up.weight"),
}


@pytest.fixture(scope="module")
def plain(pipeline_folder: Callable[[str], Path]) -> Any:
    return DiffusionPipeline.from_pretrained(pipeline_folder("sdxl"))


def targets(pipe: Any) -> Iterator[tuple[str, str]]:
    yield from (("unet", module) for module in UNET)
    for part in ("text_encoder", "text_encoder_2"):
        inner = "text_model." if hasattr(getattr(pipe, part), "text_model") else ""
        yield from ((part, inner + module) for module in TEXT)


def weight(pipe: Any, part: str, module: str) -> torch.Tensor:
    found: torch.Tensor = getattr(pipe, part).get_submodule(module).weight
    return found.detach()


def factors(shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random factors of a weight, `down` with the kernel of a convolution."""
    kernel = [1] * (len(shape) - 2)
    return torch.randn(RANK, *shape[1:]), torch.randn(shape[0], RANK, *kernel)


def loaded(folder: Path, file: Path, scale: float = 1.0) -> Any:
    return source.load(source.resolve(folder, asked={"lora": [f"{file}:{scale}"]}))


def assert_changed_by(ours: Any, plain: Any, expected: Deltas) -> None:
    """Every weight is the plain one and what the file adds to it, and the others are as before."""
    for part in ("unet", "text_encoder", "text_encoder_2"):
        before, after = (getattr(pipe, part).state_dict() for pipe in (plain, ours))
        for key, value in before.items():
            module, _, which = key.rpartition(".")
            wanted = expected.get((part, module)) if which == "weight" else None
            if wanted is None:
                assert torch.equal(after[key], value), key
            else:
                torch.testing.assert_close(after[key] - value, wanted.reshape(value.shape))


@pytest.mark.fault("2.12", "an alpha of its own for each layer meets no layer")
@pytest.mark.parametrize("form", FORMS)
def test_each_layer_has_its_own_alpha(
    pipeline_folder: Callable[[str], Path], plain: Any, tmp_path: Path, form: str
) -> None:
    named, down_name, up_name = FORMS[form]
    torch.manual_seed(0)
    file, expected, scale = dict[str, torch.Tensor](), Deltas(), 0.7
    for index, (part, module) in enumerate(targets(plain)):
        shape = weight(plain, part, module).shape
        down, up = factors(shape)
        alpha = 0.25 * (1 + index)
        name = named(part, module)
        file |= {f"{name}.{down_name}": down, f"{name}.{up_name}": up}
        file[f"{name}.alpha"] = torch.tensor(alpha)
        product = up.reshape(shape[0], RANK) @ down.reshape(RANK, -1)
        expected[part, module] = scale * (alpha / RANK) * product
    save_file(file, tmp_path / "one.safetensors")
    ours = loaded(pipeline_folder("sdxl"), tmp_path / "one.safetensors", scale)
    assert_changed_by(ours, plain, expected)


@pytest.mark.fault("2.12", "an alpha of its own for each layer meets no layer")
def test_alphas_in_the_metadata_that_diffusers_writes(
    pipeline_folder: Callable[[str], Path], plain: Any, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    modules = [f"{ATTENTION}.to_q", f"{ATTENTION}.to_v", "mid_block.resnets.1.conv2"]
    settings = {
        "unet.r": RANK,
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {"to_v": 3.0, "mid_block.*": 1.0, "conv2": 5.0},
        "unet.use_rslora": True,
    }
    file, expected = dict[str, torch.Tensor](), Deltas()
    for module, alpha in zip(modules, (8.0, 3.0, 5.0), strict=True):
        shape = weight(plain, "unet", module).shape
        down, up = factors(shape)
        file |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
        product = up.reshape(shape[0], RANK) @ down.reshape(RANK, -1)
        expected["unet", module] = alpha / RANK**0.5 * product
    path = tmp_path / "one.safetensors"
    save_file(file, path, {"lora_adapter_metadata": json.dumps(settings)})
    folder = pipeline_folder("sdxl")
    with pytest.raises(SourceError, match="pattern that is not taken from a file: 'mid_block"):
        loaded(folder, path)
    del settings["unet.alpha_pattern"]["mid_block.*"]  # type: ignore[attr-defined]
    save_file(file, path, {"lora_adapter_metadata": json.dumps(settings)})
    assert_changed_by(loaded(folder, path), plain, expected)


def test_former_names_of_attention(
    pipeline_folder: Callable[[str], Path], plain: Any, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    pairs = {
        f"unet.{ATTENTION}.processor.to_q_lora": ("unet", f"{ATTENTION}.to_q"),
        f"unet.{ATTENTION}.processor.to_out_lora": ("unet", f"{ATTENTION}.to_out.0"),
    }
    file, expected = dict[str, torch.Tensor](), Deltas()
    for name, place in pairs.items():
        down, up = factors(weight(plain, *place).shape)
        file |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
        expected[place] = up @ down
    save_file(file, tmp_path / "one.safetensors")
    ours = loaded(pipeline_folder("sdxl"), tmp_path / "one.safetensors")
    assert_changed_by(ours, plain, expected)


@pytest.mark.fault("2.12", "an alpha of its own for each layer meets no layer")
def test_flux_names_that_diffusers_converts(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """One matrix for query, key and value, whose alpha is the same for the three."""
    folder = pipeline_folder("flux-dev")
    plain = DiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(3)
    block = "transformer_blocks.0.attn"
    width = weight(plain, "transformer", f"{block}.to_q").shape[1]
    file, expected = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for theirs, names, alpha in (
        ("img_attn_qkv", ("to_q", "to_k", "to_v"), 1.0),
        ("txt_attn_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"), 6.0),
    ):
        down, up = torch.randn(RANK, width), torch.randn(3 * width, RANK)
        name = f"lora_unet_double_blocks_0_{theirs}"
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        file[f"{name}.alpha"] = torch.tensor(alpha)
        for module, piece in zip(names, (alpha / RANK * up @ down).chunk(3), strict=True):
            expected[f"{block}.{module}.weight"] = piece
    save_file(file, tmp_path / "one.safetensors")
    ours = loaded(folder, tmp_path / "one.safetensors").transformer.state_dict()
    for key, value in plain.transformer.state_dict().items():
        zero = torch.zeros_like(value)
        torch.testing.assert_close(ours[key] - value, expected.get(key, zero), atol=1e-6, rtol=1e-5)


PEFT = {
    "loha": lambda names: LoHaConfig(
        r=RANK, alpha=3, target_modules=names, init_weights=False, use_effective_conv2d=False
    ),
    "loha, convolutions in parts": lambda names: LoHaConfig(
        r=RANK, alpha=3, target_modules=names, init_weights=False, use_effective_conv2d=True
    ),
    "lokr": lambda names: LoKrConfig(r=1, alpha=3, target_modules=names, init_weights=False),
    "lokr, convolutions in parts": lambda names: LoKrConfig(
        r=1,
        alpha=3,
        target_modules=names,
        init_weights=False,
        use_effective_conv2d=True,
        decompose_both=True,
        decompose_factor=4,
    ),
    "dora": lambda names: LoraConfig(
        r=RANK, lora_alpha=3, target_modules=names, init_lora_weights=False, use_dora=True
    ),
}


@pytest.mark.fault("3.5", "LoHa and LoKr are refused with an empty message")
@pytest.mark.parametrize("kind", PEFT)
def test_what_peft_merges(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    folder = pipeline_folder("sd")
    torch.manual_seed(4)
    names = ["to_q", "ff.net.0.proj", "conv1", "conv_shortcut"]
    model = get_peft_model(DiffusionPipeline.from_pretrained(folder).unet, PEFT[kind](names))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "magnitude" in name:  # else it is what it would be without
                value.mul_(torch.rand_like(value) + 0.5)
    state = get_peft_model_state_dict(model)
    file = {key.replace("base_model.model.", "unet."): value for key, value in state.items()}
    layers = {re.split(r"\.(?:hada|lokr|lora)_", key)[0] for key in file}
    file |= {f"{name}.alpha": torch.tensor(3.0) for name in layers}
    contiguous = {key: value.contiguous() for key, value in file.items()}
    save_file(contiguous, tmp_path / "one.safetensors")
    ours = loaded(folder, tmp_path / "one.safetensors").unet.state_dict()
    for key, value in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-5)


@pytest.mark.fault("3.5", "full differences are refused with an empty message")
def test_full_differences_and_norms(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = pipeline_folder("sd")
    before = DiffusionPipeline.from_pretrained(folder).unet.state_dict()
    pairs = {
        ("mid_block.resnets.0.conv1", "diff", "diff_b"),
        ("mid_block.resnets.0.norm1", "w_norm", "b_norm"),
    }
    file, expected = {}, dict[str, torch.Tensor]()
    for module, weights, biases in pairs:
        for which, key in ((weights, f"{module}.weight"), (biases, f"{module}.bias")):
            file[f"{flat('lora_unet_', module)}.{which}"] = torch.randn(before[key].shape)
            expected[key] = 0.5 * file[f"{flat('lora_unet_', module)}.{which}"]
    save_file(file, tmp_path / "one.safetensors")
    after = loaded(folder, tmp_path / "one.safetensors", 0.5).unet.state_dict()
    for key, value in before.items():
        torch.testing.assert_close(after[key] - value, expected.get(key, torch.zeros_like(value)))


def test_dora_as_kohya_writes_it(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers leaves the lengths out with a warning."""
    folder, module = pipeline_folder("sd"), "mid_block.resnets.0.conv1"
    before = DiffusionPipeline.from_pretrained(folder).unet.get_submodule(module).weight.detach()
    torch.manual_seed(5)
    down, up = factors(before.shape)
    product = (up.reshape(-1, RANK) @ down.reshape(RANK, -1)).reshape(before.shape)
    changed = before + product / RANK
    name = flat("lora_unet_", module)
    for axes, scale in (((1, 2, 3), 1.0), ((0, 2, 3), 0.5)):
        norm = changed.pow(2).sum(dim=axes, keepdim=True).sqrt()
        lengths = torch.rand_like(norm) + 0.5
        file = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        file |= {f"{name}.alpha": torch.tensor(1.0), f"{name}.dora_scale": lengths}
        save_file(file, tmp_path / "one.safetensors")
        ours = loaded(folder, tmp_path / "one.safetensors", scale).unet
        wanted = before + scale * (changed / norm * lengths - before)
        torch.testing.assert_close(ours.get_submodule(module).weight.detach(), wanted)


Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


BOTH = {f"{Q}.lora_down.weight": (4, 32), f"{Q}.lora_up.weight": (32, 4)}
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@pytest.mark.fault("2.13", "tensors of an adapter that nothing reads")
@pytest.mark.fault("2.13", "of two kinds of differences of one layer one is dropped")
@pytest.mark.parametrize(
    ("file", "says"),
    [
        ({f"{Q}.oft_blocks": (2, 4, 4)}, "has 1 tensors of 1 that are not of LoRA, DoRA, LoHa"),
        ({f"{Q}.alpha": ()}, f"not of LoRA, DoRA.*{Q}.alpha"),
        ({f"{Q}.lora_up.weight": (32, 4)}, "is incomplete: it has only up"),
        ({f"{Q}.hada_w1_a": (32, 4), f"{Q}.hada_w1_b": (4, 32)}, "is incomplete: it has only hada"),
        ({f"{Q}.lokr_w1": (2, 2)}, "is incomplete: it has no lokr_w2"),
        (
            {f"{Q}.diff": (3, 5)},
            r"is for a weight of shape \[3, 5\], and the layer's is",
        ),
        ({f"{Q}.diff_b": (32,)}, "changes a bias, and the layer has no such bias"),
        (BOTH | {f"{Q}.diff": (32, 32)}, "would be lost: diff beside down, up"),
        (BOTH | {f"{Q}.{h}": (4, 4) for h in HADAMARD}, "would be lost: hada_w1_a, .* beside down"),
        (BOTH | {f"{Q}.lora_magnitude_vector": (32,), f"{Q}.dora_scale": (32, 1)}, "dora_scale be"),
        (
            {f"{Q}.{n}": (2, 2) for n in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2")},
            "would be lost: lokr_w1_a, lokr_w1_b beside lokr_w1, lokr_w2",
        ),
        (BOTH | {f"{Q}.lora_A.weight": (4, 32)}, "the same tensor of .* under two names"),
        (BOTH | {f"{Q}.lora_mid.weight": (3, 4)}, "does not fit"),
        (BOTH | {f"{Q}.alpha": (0,)}, r"an alpha of .* that is no number: .* found \[\]"),
        (BOTH | {f"{Q}.alpha": (2,)}, r"an alpha of .* that is no number: .* found \[1.0, 1.0\]"),
        ({f"{Q}.lora_down.weight": (0, 32), f"{Q}.lora_up.weight": (32, 0)}, "is of rank 0"),
        ({f"{Q}.lora_down.weight": (2, 32), f"{Q}.lora_up.weight": (32, 4)}, "shape .64, 32"),
        (BOTH | {f"{Q.replace('_unet_', '_te2_')}.diff": (3, 5)}, "1 of its 2 layers meet none"),
    ],
)
def test_files_that_are_refused(
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    file: Mapping[str, tuple[int, ...]],
    says: str,
) -> None:
    tensors = {name: torch.ones(shape) for name, shape in file.items()}
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(SourceError, match=f"the LoRA one.safetensors .*{says}"):
        loaded(pipeline_folder("sd"), tmp_path / "one.safetensors")


@pytest.mark.fault("2.12", "an alpha or a factor that is NaN or infinity is fused")
@pytest.mark.parametrize("which", ["alpha", "lora_up.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, which: str, value: float
) -> None:
    tensors = {name: torch.ones(shape) for name, shape in (BOTH | {f"{Q}.alpha": ()}).items()}
    tensors[f"{Q}.{which}"].fill_(value)
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(SourceError, match=r"NaN or infinity|no number: expected one, found"):
        loaded(pipeline_folder("sd"), tmp_path / "one.safetensors")


@pytest.mark.fault("2.13", "layers of an adapter that diffusers' conversion drops")
@pytest.mark.parametrize(
    "dropped",
    [
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
        "lora_te3_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
        "lora_unet_double_blocks_0_img_mod_lin.diff_b",
        "lora_unet_double_blocks_0_img_attn_qkv.dora_scale",
    ],
)
def test_what_a_conversion_drops(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, dropped: str
) -> None:
    name, width = "lora_unet_double_blocks_0_img_attn_qkv", 24
    file = {f"{name}.lora_down.weight": torch.ones(RANK, width), f"{name}.alpha": torch.tensor(2.0)}
    file[f"{name}.lora_up.weight"] = torch.ones(3 * width, RANK)
    save_file({**file, dropped: torch.ones(RANK, RANK)}, tmp_path / "one.safetensors")
    with pytest.raises(SourceError, match=f"1 tensors of 4 that diffusers does not.*{dropped}"):
        loaded(pipeline_folder("flux-dev"), tmp_path / "one.safetensors")


def test_convolutions_in_three_parts(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Convolutions in three parts, as LyCORIS writes them, are what the three do one after another.

    `mid` has the kernel; an alpha of 0 adds nothing.
    """
    folder, modules = pipeline_folder("sd"), ("mid_block.resnets.0.conv1", "conv_out")
    before = DiffusionPipeline.from_pretrained(folder).unet
    torch.manual_seed(6)
    file, expected = {}, dict[str, torch.Tensor]()
    for module, alpha in zip(modules, (2.0, 0.0), strict=True):
        out, width = before.get_submodule(module).weight.shape[:2]
        down, mid, up = (
            torch.randn(*sides)
            for sides in ((RANK, width, 1, 1), (RANK, RANK, 3, 3), (out, RANK, 1, 1))
        )
        name = flat("lora_unet_", module)
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid}
        file |= {f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
        points = torch.zeros(width, width, 5, 5)
        points[range(width), range(width), 2, 2] = 1.0
        conv = torch.nn.functional.conv2d
        seen = conv(conv(conv(points, down), mid, padding=1), up)[:, :, 1:4, 1:4]
        expected[module] = alpha / RANK * seen.flip(-1, -2).transpose(0, 1)
    save_file(file, tmp_path / "one.safetensors")
    after = loaded(folder, tmp_path / "one.safetensors").unet
    for module, wanted in expected.items():
        added = after.get_submodule(module).weight - before.get_submodule(module).weight
        torch.testing.assert_close(added.detach(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"unet.alpha_pattern": [1]}', '{"unet.lora_alpha": "8"}', "[" * 100_000]
)
def test_damaged_metadata(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, text: str
) -> None:
    file = {f"{Q}.lora_down.weight": torch.ones(4, 32), f"{Q}.lora_up.weight": torch.ones(32, 4)}
    save_file(file, tmp_path / "one.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(SourceError, match="not PEFT's configuration of a LoRA"):
        loaded(pipeline_folder("sd"), tmp_path / "one.safetensors")
