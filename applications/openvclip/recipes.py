"""Complete runs by name."""

from __future__ import annotations

from applications.openvclip.config import (
    AveragerConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizationConfig,
    RegularizerConfig,
)
from applications.openvclip.data.augmentation import Augmentation
from applications.openvclip.data.sampling import Sampling


def miniature() -> Config:
    """The whole method on the built-in small world of videos, on a laptop's processor.

    openvclip train miniature
    """
    return Config(
        recipe="miniature",
        data=DataConfig(
            train="miniature:train",
            test=tuple(f"miniature:{name}" for name in ("closed", "zs_object", "zs_motion", "zs_colour", "images")),
            templates="objects",
        ),
        sampling=Sampling(frames=4, stride=4, target_fps=None, sampler="dense", views=1),
    )


def vit_b_32() -> Config:
    """The paper's ViT-B/32 on Kinetics-400.

    openvclip train vit_b_32 --data.train k400/train --evaluation.protocols ucf101/EP2
    --evaluation.videos ucf101 UCF-101 --evaluation.lists ucf101 zs_label_db

    Published (top-1, %): UCF-101 EP1 87.1, EP2 79.5, EP3 79.4; HMDB-51 EP1 62.3, EP2 49.9, EP3 50.6;
    Kinetics-600 69.5. Published on 8 GPUs with 8 clips each.

    GB of a GPU with 1, 2, 4 and 8 clips at once (--clips-at-once), counted by benchmarks/training_memory.py:
    fp32 3.7, 4.1, 4.7, 6.1; bf16 3.8, 3.9, 4.3, 4.9;
    fp32 with --activation-checkpointing 3.5, 3.5, 3.7, 3.9.
    Of a batch's 64 clips, cards of 24, 40 and 80 GB have room for 54, 64 and 64 in fp32, 64, 64 and 64 in bf16,
    64, 64 and 64 in fp32 with checkpointing.
    """
    return _published("vit_b_32", "ViT-B-32-quickgelu", anchor_weight=0.5)


def vit_b_16() -> Config:
    """The paper's ViT-B/16 on Kinetics-400.

    openvclip train vit_b_16 --data.train k400/train --evaluation.protocols ucf101/EP2
    --evaluation.videos ucf101 UCF-101 --evaluation.lists ucf101 zs_label_db

    Published (top-1, %): UCF-101 EP1 89.9, EP2 83.5, EP3 83.4; HMDB-51 EP1 64.5, EP2 53.2, EP3 53.9;
    Kinetics-600 73.0; Kinetics-400 78.9. Published on 8 GPUs with 8 clips each.

    GB of a GPU with 1, 2, 4 and 8 clips at once (--clips-at-once), counted by benchmarks/training_memory.py:
    fp32 4.6, 5.9, 8.5, 13.6; bf16 4.2, 4.8, 6.1, 8.7;
    fp32 with --activation-checkpointing 3.6, 3.8, 4.2, 5.1.
    Of a batch's 64 clips, cards of 24, 40 and 80 GB have room for 14, 25 and 53 in fp32, 28, 50 and 64 in bf16,
    64, 64 and 64 in fp32 with checkpointing.
    """
    return _published("vit_b_16", "ViT-B-16-quickgelu", anchor_weight=0.5)


def vit_l_14() -> Config:
    """The paper's ViT-L/14 on Kinetics-400.

    openvclip train vit_l_14 --data.train k400/train --evaluation.protocols ucf101/EP2
    --evaluation.videos ucf101 UCF-101 --evaluation.lists ucf101 zs_label_db

    Published (top-1, %): UCF-101 EP1 93.1, EP2 87.9, EP3 87.6; HMDB-51 EP1 68.5, EP2 58.3, EP3 59.0;
    Kinetics-600 81.1. Published on 8 GPUs with 8 clips each.

    GB of a GPU with 1, 2, 4 and 8 clips at once (--clips-at-once), counted by benchmarks/training_memory.py:
    fp32 15.8, 20.1, 28.8, 46.2; bf16 14.2, 16.4, 20.7, 29.4;
    fp32 with --activation-checkpointing 11.9, 12.4, 13.3, 15.2.
    Of a batch's 64 clips, cards of 24, 40 and 80 GB have room for 2, 5 and 13 in fp32, 4, 11 and 27 in bf16,
    21, 52 and 64 in fp32 with checkpointing.
    """
    return _published("vit_l_14", "ViT-L-14-quickgelu", anchor_weight=0.6)


def _published(recipe: str, model: str, *, anchor_weight: float) -> Config:
    """Source: section 5.1.3 of the paper and the published scripts."""
    return Config(
        recipe=recipe,
        model=ModelConfig(name=model, pretrained="openai"),
        data=DataConfig(templates="actions", workers=8),
        sampling=Sampling(frames=8, stride=16, target_fps=30, sampler="slowfast-offset", views=3),
        augmentation=Augmentation(max_short_side=256 / 224, horizontal_flip=True, colour_jitter=0.4),
        optimization=OptimizationConfig(
            epochs=22,
            batch_size=64,
            micro_batch=8,  # of each of the 8 published GPUs, with an alpha of its own
            learning_rate=3.33e-6,
            lowest_learning_rate=3.33e-8,
            warmup_epochs=2,
            schedule="cosine",
            weight_decay=0.01,
            betas=(0.9, 0.999),
            max_gradient_norm=1.0,
        ),
        regularizer=RegularizerConfig(max_alpha=0.6, strength=0.5),
        averager=AveragerConfig(start_epoch=1, snapshots_per_epoch=1),  # the ends of epochs 2 to 22
        evaluation=EvaluationConfig(
            anchor_weight=anchor_weight,
            anchor_weights=(0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0),
            batch_size=16,
        ),
    )


RECIPES = {recipe.__name__: recipe for recipe in (miniature, vit_b_32, vit_b_16, vit_l_14)}
