"""Small real things to test on: the tiny CLIP, a corner of the miniature world, clips of real data sets."""

import os
from pathlib import Path

import pytest
import torch

from applications.openvclip.miniature import tiny_clip
from applications.openvclip.model.clip import PretrainedCLIP
from tests.openvclip.files import write_small_world

torch.set_num_threads(1)  # the models of these tests are so small that more threads only wait for each other


@pytest.fixture(scope="session")
def source() -> PretrainedCLIP:
    return tiny_clip.load_pretrained(torch.device("cpu"))


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Manifests of a few classes of the miniature: 4 classes to train on, and two sets to test on."""
    return write_small_world(tmp_path_factory.mktemp("small_world"))


def kept_outside(name: str, variable: str) -> Path:
    """A folder of real data that is no part of this repository: beside it, or where an environment variable says."""
    folder = Path(os.environ.get(variable, Path(__file__).parents[3] / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}; {variable} names such a folder")
    return folder


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """Clips from real data sets."""
    return kept_outside("videos", "OPENVCLIP_TEST_VIDEOS")


@pytest.fixture(scope="session")
def label_lists() -> Path:
    """The label lists of the Open-VCLIP release and HMDB-51's official ones."""
    return kept_outside("label_db", "OPENVCLIP_TEST_LISTS")
