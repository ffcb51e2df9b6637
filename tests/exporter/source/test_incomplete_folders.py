"""Folders that lack files which a library would do without: a tokenizer without its vocabulary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from diffusers import DiffusionPipeline

from latentc.exporter.families import family_of
from latentc.exporter.source import model_files
from latentc.exporter.source import resolving as source
from latentc.runtimes.errors import SourceError, UnsupportedPipeline
from tests.support.uncaptured import uncaptured


@pytest.fixture
def folder(smallest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(smallest, tmp_path / "pipeline"))


@pytest.mark.fault("2.10", "a tokenizer without its vocabulary files")
@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        (("vocab.json", "merges.txt"), "needs vocab.json and merges.txt, or tokenizer.json there"),
        (("vocab.json",), "needs vocab.json, or tokenizer.json there"),
        (("merges.txt",), "needs merges.txt, or tokenizer.json there"),
    ],
)
def test_files_of_a_vocabulary_are_asked_for(
    folder: Path, lacks: tuple[str, ...], says: str
) -> None:
    for name in (*lacks, "tokenizer.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(SourceError, match=f"tokenizer is incomplete: a CLIPTokenizer.* {says}"):
        source.resolve(folder)


@pytest.mark.fault("2.10", "a vocabulary of another size than the text encoder's")
@pytest.mark.parametrize("words", ["fewer", "more"])
def test_a_vocabulary_of_another_size(folder: Path, words: str) -> None:
    tokens = folder / "tokenizer"
    (tokens / "tokenizer.json").unlink(missing_ok=True)
    path = tokens / "vocab.json"
    vocabulary = json.loads(path.read_text())
    if words == "fewer":
        kept = {key: value for key, value in vocabulary.items() if key.startswith("<|")}
        (tokens / "merges.txt").write_text("#version: 0.2\n")
    else:
        kept = {**vocabulary, "another": len(vocabulary)}
    path.write_text(json.dumps({key: index for index, key in enumerate(kept)}))
    with pytest.raises(
        SourceError, match=r"tokenizer has a vocabulary of \d+ words and text_encoder embeddings of"
    ):
        source.load(source.resolve(folder))


@pytest.mark.fault("2.10", "the bundle does not say how many words its text encoder knows")
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_bundle_has_the_size_of_each_vocabulary(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = pipeline_folder(name)
    bundle = uncaptured(folder, tmp_path / "bundle", mixing=True).manifest
    for tokenizer in bundle.tokenizers:
        encoder = tokenizer.name.replace("tokenizer", "text_encoder")
        config = json.loads((folder / encoder / "config.json").read_bytes())
        assert tokenizer.vocabulary == config["vocab_size"]


@pytest.mark.fault("2.13", "Stable Diffusion 3 with its third text encoder and no tokenizer for it")
def test_a_text_encoder_without_a_tokenizer(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pipeline_folder("sd3"), tmp_path / "pipeline"))
    shutil.rmtree(folder / "tokenizer_3")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer_3"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    theirs = DiffusionPipeline.from_pretrained(folder, tokenizer_3=None)
    with pytest.raises(TypeError):
        theirs("red", num_inference_steps=1)
    with pytest.raises(SourceError, match="text_encoder_3 has no tokenizer_3, without which diff"):
        source.load(source.resolve(folder))
    assert source.load(source.resolve(folder, without=["text_encoder_3"])).tokenizer_3 is None


def _spoilt(tokens: Path, how: str) -> None:
    (tokens / "tokenizer.json").unlink(missing_ok=True)
    if how in ("empty", "cut"):
        lines = (tokens / "merges.txt").read_text().splitlines()
        (tokens / "merges.txt").write_text("\n".join(lines[: 1 if how == "empty" else 3]))
        return
    vocabulary = json.loads((tokens / "vocab.json").read_text())
    vocabulary["a"] = 5000 if how == "beyond" else vocabulary["b"]
    (tokens / "vocab.json").write_text(json.dumps(vocabulary))


@pytest.mark.fault("2.10", "merges that are cut short, ids that are beyond the encoder's or shared")
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("empty", "words that no merge makes, such as .*merges.txt is cut short"),
        ("cut", "words that no merge makes"),
        ("beyond", "up to 5000; expected one id for each"),
        ("shared", "expected one id for each"),
    ],
)
def test_a_vocabulary_of_the_right_size(folder: Path, how: str, says: str) -> None:
    _spoilt(folder / "tokenizer", how)
    with pytest.raises(SourceError, match=f"tokenizer has .*{says}"):
        source.load(source.resolve(folder))


@pytest.mark.fault("2.10", "other parts without the files that they are read from")
@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("scheduler", "scheduler_config.json"),
        ("unet", "config.json"),
        ("text_encoder", "config.json"),
    ],
)
def test_configurations_are_asked_for(folder: Path, part: str, file: str) -> None:
    (folder / part / file).unlink()
    with pytest.raises(SourceError, match=f"{part} is incomplete: a .* needs {file} there"):
        source.resolve(folder)


@pytest.mark.parametrize(
    ("class_name", "files", "complete"),
    [
        ("CLIPImageProcessor", (), False),
        ("CLIPImageProcessor", ("preprocessor_config.json",), True),
        ("DPTFeatureExtractor", (), False),
        ("DPTImageProcessorPil", (), False),
        ("T5TokenizerFast", ("tokenizer_config.json",), False),
        ("T5TokenizerFast", ("spiece.model",), True),
        ("T5Tokenizer", ("tokenizer.json",), True),
        ("PNDMScheduler", ("config.json",), False),
        ("OtherTokenizer", (), True),
    ],
)
def test_which_files_are_enough(
    tmp_path: Path, class_name: str, files: tuple[str, ...], complete: bool
) -> None:
    for name in files:
        (tmp_path / name).touch()
    if complete:
        model_files.refuse_incomplete(tmp_path, class_name)
        return
    with pytest.raises(SourceError, match=f"a {class_name} needs"):
        model_files.refuse_incomplete(tmp_path, class_name)


@pytest.mark.parametrize("name", ["CLIPTokenizer", "T5TokenizerFast"])
def test_the_files_of_a_vocabulary_are_those_of_transformers(name: str) -> None:
    known = {file for choice in model_files._NEEDED[name] for file in choice}
    assert known == set(getattr(transformers, name).vocab_files_names.values())


@pytest.mark.fault("2.10", "texts of more ids than a text encoder has positions for")
@pytest.mark.parametrize("name", ["sd", "flux-dev", "sd3"])
def test_longer_texts_than_the_encoder_takes(
    pipeline_folder: Callable[[str], Path], name: str
) -> None:
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder(name))
    pipe.tokenizer.model_max_length = 500
    with pytest.raises(
        UnsupportedPipeline, match="makes 500 ids of each text and the text encoder"
    ):
        family_of(type(pipe).__name__).describe(pipe)
