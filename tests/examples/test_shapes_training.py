"""The tokenizer and the training loop of the shapes example, at a tiny size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline

from examples.shapes import data, evaluate, networks, reading, stages, train
from examples.shapes.loop import Plan, learning_rate
from examples.shapes.tokenizer import build_tokenizer
from examples.shapes.workers import Worker
from latentc.benchmarks.shapes import captions, scenes

TINY = networks.Sizes(
    autoencoder=(8, 8, 16),
    denoiser=(32, 32),
    attention=(False, True),
    text_width=32,
    text_layers=1,
    text_heads=2,
)
CPU = torch.device("cpu")


def settings(out: Path) -> stages.Settings:
    return stages.Settings(
        out,
        autoencoder=Plan(2, 1e-3, warmup=1, save_every=1, seed=1),
        text=Plan(2, 1e-3, warmup=1, save_every=1, seed=3),
        denoiser=Plan(4, 1e-3, warmup=2, save_every=1, seed=2),
        sizes=TINY,
        autoencoder_batch=2,
        text_batch=4,
        denoiser_batch=4,
        images=8,
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    state = torch.load(out / "denoiser.pt", weights_only=True)
    averages = {f"average.{name}": value for name, value in state["averages"].items()}
    return {**state["networks"], **averages}


def test_resumed_run_equals_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = settings(tmp_path / "whole"), settings(tmp_path / "broken")
    for each in (whole, broken):
        each.out.mkdir()
        stages.train_autoencoder(each, CPU, resume=False)
        stages.train_text_encoder(each, CPU, resume=False)
    stages.train_denoiser(whole, CPU, resume=False)

    real = data.denoiser_batch

    def interrupt(latents, tokenizer, seed, step, size):  # type: ignore[no-untyped-def]
        if step == 2:
            raise KeyboardInterrupt
        return real(latents, tokenizer, seed, step, size)

    with monkeypatch.context() as patch:
        patch.setattr(data, "denoiser_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stages.train_denoiser(broken, CPU, resume=False)
    assert not (broken.out / "pipeline").exists()
    stages.train_denoiser(broken, CPU, resume=True)

    expected, got = weights(whole.out), weights(broken.out)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    pipeline = DiffusionPipeline.from_pretrained(broken.out / "pipeline")
    (image,) = evaluate.generate(pipeline, ["a red circle"], steps=2)
    assert image.size == (64, 64)


def test_autoencoder_resumes_exactly(tmp_path: Path) -> None:
    whole = settings(tmp_path / "whole")
    stages.train_autoencoder(whole, CPU, resume=False)
    # A level learning rate makes one step of two the same as one step of one.
    longer = dataclasses.replace(whole.autoencoder, decay=0.0)
    one = dataclasses.replace(longer, steps=1)
    parts = dataclasses.replace(whole, out=tmp_path / "parts", autoencoder=one)
    stages.train_autoencoder(parts, CPU, resume=False)
    parts = dataclasses.replace(parts, autoencoder=longer)
    got = stages.train_autoencoder(parts, CPU, resume=True)
    together = dataclasses.replace(whole, out=tmp_path / "together", autoencoder=longer)
    expected = stages.train_autoencoder(together, CPU, resume=False)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, got.state_dict()[name]), name


def test_workers_share_a_batch_and_average_its_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Linear(3, 2)

    def gradients(rows: torch.Tensor) -> list[torch.Tensor]:
        layer.zero_grad()
        layer(rows).square().mean().backward()
        return [value.grad.clone() for value in layer.parameters() if value.grad is not None]

    expected = gradients(batch)
    first, second = Worker(0, 2), Worker(1, 2)
    others = torch.cat([each.flatten() for each in gradients(second.part(batch))])
    gradients(first.part(batch))
    monkeypatch.setattr("torch.distributed.all_reduce", _adder(others))
    first.average_gradients(layer.parameters())
    for value, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(value.grad, gradient)


def _adder(others: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda together: together.add_(others)


def test_reading_answers_do_not_depend_on_the_wording() -> None:
    spec = scenes.Spec(
        (scenes.Thing("red", "star", "small"), scenes.Thing("blue", "circle", "large")), "above"
    )
    assert reading.answers(spec) == [1, 4, 1, 5, 1, 3, 11]
    single = scenes.Spec((scenes.Thing("orange", "square", "medium", "top left"),))
    assert reading.answers(single) == [2, 2, 2, 0, 0, 0, 6]
    assert reading.answers(None) == [0] * 7


def test_learning_rate_rises_stays_and_falls() -> None:
    plan = Plan(1000, 1.0, warmup=100, decay=0.3)
    rates = [learning_rate(plan, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[100] == rates[699] == 1.0
    assert rates[699:] == sorted(rates[699:], reverse=True)
    assert rates[-1] < 1e-4


def test_every_caption_word_is_one_token(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    for word in captions.all_words():
        assert tokenizer.tokenize(word) == [word + "</w>"]
    assert tokenizer.tokenize("RED Circle") == ["red</w>", "circle</w>"]
    assert tokenizer.model_max_length == 77
    row = data.tokenize(tokenizer, ["a red circle"])[0].tolist()
    assert len(row) == 77
    assert row[0] == tokenizer.bos_token_id
    assert row[4:] == [tokenizer.eos_token_id] * 73


@pytest.mark.parametrize("text", ["schöne Grüße", "漢字 🙂", "zebra!?", "tab\tand\nline", ""])
def test_any_text_tokenizes(tmp_path: Path, text: str) -> None:
    tokenizer = build_tokenizer(tmp_path)
    ids = tokenizer(text).input_ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(decoded.split()) == "".join(text.lower().split())


@pytest.mark.parametrize("command", [train.main, evaluate.main])
def test_commands_explain_themselves(command) -> None:  # type: ignore[no-untyped-def]
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0
    assert "--steps" in result.output


def test_steps_need_one_stage(tmp_path: Path) -> None:
    result = CliRunner().invoke(train.main, ["all", "--out", str(tmp_path), "--steps", "1"])
    assert result.exit_code == 2
    assert "one stage" in result.output
