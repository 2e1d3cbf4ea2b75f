"""Pre-train the tiny CLIP on captioned stills of the miniature world, from random weights.

    python -m applications.openvclip.miniature.pretrain

writes the file that the package ships (`tiny_clip.safetensors`, half precision; how long it took and how good it is are
in its metadata). About 640,000 image-caption pairs; the symmetric contrastive loss of CLIP. The world opens gradually:
glyphs start upright, centred and still, or nothing is learnt for thousands of steps.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from applications.openvclip.miniature import glyphs, tiny_clip, world
from applications.openvclip.model.classifier import class_embeddings
from applications.openvclip.model.clip import PlainCLIP
from applications.openvclip.model.prompts import OBJECT_TEMPLATES
from applications.openvclip.progress import progress_bar
from applications.openvclip.runs.provenance import command
from applications.openvclip.runs.weights import save_weights
from applications.openvclip.training.optimisation import LearningRate, adamw

BATCH_SIZE = 128
LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 200
STILL_STEPS = 400
UPRIGHT_STEPS = 1500
MOVING_SHARE = 0.45
MAX_LOGIT_SCALE = math.log(100)


def normalised(images: Tensor) -> Tensor:
    """Images in [0, 1] as the tower expects them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tiny_clip.IMAGE_MEAN, tiny_clip.IMAGE_STD))
    return (images - mean) / std


def batch(seed: int, step: int) -> tuple[Tensor, list[str]]:
    """The images and captions of one step, a function of the seed and the step alone."""
    rng = np.random.default_rng([seed, step])
    concepts = rng.integers(glyphs.N_GLYPHS, size=BATCH_SIZE)
    moving = MOVING_SHARE if step >= STILL_STEPS else 0.0
    return world.stills(rng, concepts, jitter=min(1.0, step / UPRIGHT_STEPS), moving=moving)


@torch.no_grad()
def accuracy(model: PlainCLIP, seed: int, repeats: int = 4) -> float:
    """Zero-shot accuracy among all concepts on fresh clean still images, in [0, 1]."""
    tokenizer = tiny_clip.WordTokenizer()
    model.eval()
    classes = class_embeddings(model, tokenizer, glyphs.names(), OBJECT_TEMPLATES)
    concepts = np.tile(np.arange(glyphs.N_GLYPHS), repeats)
    images, _ = world.stills(np.random.default_rng([seed, 1 << 31]), concepts)
    predicted = (model.encode_image(normalised(images)) @ classes.T).argmax(dim=1)
    model.train()
    return (predicted == torch.from_numpy(concepts)).float().mean().item()


def pretrain(seed: int, steps: int) -> PlainCLIP:
    """Train a tiny CLIP from random weights, showing progress and the time left."""
    torch.manual_seed(seed)
    model, tokenizer, loss_fn = tiny_clip.build(), tiny_clip.WordTokenizer(), open_clip.ClipLoss()
    optimizer = adamw(model, WEIGHT_DECAY, betas=(0.9, 0.98))
    learning_rate = LearningRate(LEARNING_RATE, 0.0, WARMUP_STEPS, steps, "cosine")
    with progress_bar() as progress:
        task = progress.add_task("pre-training", total=steps)
        for step in range(steps):
            images, captions = batch(seed, step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            loss = loss_fn(*model(normalised(images), tokenizer(captions)))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            progress.update(task, advance=1, description=f"loss {loss.item():.3f}")
            if (step + 1) % 500 == 0 and step + 1 < steps:
                progress.console.print(f"step {step + 1}: accuracy {accuracy(model, seed):.3f}")
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=tiny_clip.WEIGHTS)
    parser.add_argument("--steps", type=int, default=5000, help="batches of 128 pairs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    start = time.monotonic()
    model = pretrain(options.seed, options.steps)
    seconds = time.monotonic() - start
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict(half)
    metadata = {
        "command": command(),
        "steps": str(options.steps),
        "seed": str(options.seed),
        "seconds": f"{seconds:.0f}",
        "threads": str(torch.get_num_threads()),
        "hardware": f"{platform.machine()}, CPU",
        "versions": f"torch {torch.__version__}, open_clip {open_clip.__version__}, python {platform.python_version()}",
        "accuracy": f"{accuracy(model, options.seed):.4f}",
        "accuracy_protocol": f"zero-shot top-1 among {glyphs.N_GLYPHS} concepts, 4 fresh clean stills of each",
        "logit_scale": f"{model.logit_scale.exp().item():.2f}",
        "vocabulary": json.dumps(world.vocabulary()),
    }
    save_weights(options.output, half, metadata)
    print(f"{options.output}: accuracy {metadata['accuracy']} after {options.steps} steps, {seconds:.0f} s")


if __name__ == "__main__":
    main()
