"""The least that makes an image from a bundle's ONNX graphs: what latentc is compared with.

    python benchmarks/bare_onnx.py BUNDLE PROMPT STEPS GUIDANCE SEED SHAPE OUT.png

Written by hand over numpy, tokenizers, onnxruntime and Pillow for one pipeline family, one
scheduler (DDIM) and one size. Nothing is checked: no hashes, no shapes, no NaN, no arguments.
SHAPE is that of the latents, such as 1,4,16,16.
"""

import json
import sys
import zipfile

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer


def main(
    bundle: str, prompt: str, steps: int, guidance: float, seed: int, shape: list[int], out: str
) -> None:
    """Encode both texts, run the loop, decode, save."""
    text_encoder, denoiser, decoder = (
        onnxruntime.InferenceSession(f"{bundle}/onnx-fp32/{name}/model.onnx")
        for name in ("text_encoder", "denoiser", "vae_decoder")
    )
    tokenizer = Tokenizer.from_file(f"{bundle}/tokenizers/tokenizer/tokenizer.json")
    ids = np.array([tokenizer.encode(text).ids for text in ("", prompt)])
    (states,) = text_encoder.run(None, {"input_ids": ids})

    with zipfile.ZipFile(f"{bundle}/schedules/ddim.zip") as archive:
        document = json.loads(archive.read(f"{steps}.json"))
    table = {name: np.array(values) for name, values in document.items()}
    plan = table["steps"].tolist().index(steps)
    first, last = table["offsets"][plan : plan + 2]
    sample = np.random.default_rng(seed).standard_normal(shape, np.float32)
    sample = sample * np.float32(table["init_noise_scale"][plan])
    for step in range(first, last):
        row = table["rows"][step, min(step - first, table["rows"].shape[1] - 1)]
        feeds = {
            "sample": np.concatenate([sample, sample]),
            "timestep": table["timesteps"][step : step + 1].astype(np.float32),
            "encoder_hidden_states": states,
        }
        negative, positive = np.split(denoiser.run(None, feeds)[0], 2)
        guided = negative + np.float32(guidance) * (positive - negative)
        kept, added = table["state"][row, 0, 0], table["prediction"][row, 0]
        sample = np.float32(kept) * sample + np.float32(added) * guided

    (image,) = decoder.run(None, {"latents": sample})
    pixels = (image[0].transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(out)


if __name__ == "__main__":
    bundle, prompt, steps, guidance, seed, shape, out = sys.argv[1:]
    sides = [int(side) for side in shape.split(",")]
    main(bundle, prompt, int(steps), float(guidance), int(seed), sides, out)
