"""What is scored: CLIP* frame by frame, and the sum over the views of a video."""

from pathlib import Path

import numpy as np
import torch

from applications.openvclip.data.manifest import Manifest
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.zeroshot.evaluation import scorers_of
from applications.openvclip.zeroshot.logits import LogitFiles
from applications.openvclip.zeroshot.passes import Pass
from applications.openvclip.zeroshot.protocols import Protocol
from applications.openvclip.zeroshot.scores import result_of
from interpolate.weights import trainable_weights


def test_the_baseline_is_the_image_model_on_every_frame(source) -> None:
    anchor = trainable_weights(VideoEncoder(source.clip))
    scorer = scorers_of(source.clip, "mask", anchor, None, [])["CLIP*"]
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(2, 3, 4, 32, 32, generator=generator)
    classes = torch.nn.functional.normalize(torch.randn(5, 128, generator=generator), dim=-1)
    with torch.no_grad():
        frames = torch.stack([source.clip.encode_image(video[:, :, t], normalize=True) for t in range(4)], dim=1)
        expected = source.clip.logit_scale.exp() * frames.mean(dim=1) @ classes.T
        torch.testing.assert_close(scorer(video, classes), expected, rtol=1e-4, atol=1e-4)


def test_the_views_of_a_video_are_added(tmp_path: Path) -> None:
    content = {"videos": ["/v.mp4"], "scorers": ["CLIP*"], "views": 2, "classes": ["a", "b"]}
    files = LogitFiles(tmp_path, content)
    files.prepare()
    files.append(0, [0], np.array([[[[1.0, 0.0], [0.0, 3.0]]]], np.float32))  # the second view is surer than the first
    part = Manifest("m", "/", ("v.mp4",), (1,), ("a", "b"))
    protocol = Protocol("p", (part,), sampling=Sampling(views=2))
    one = Pass(("/v.mp4",), ("a", "b"), protocol.templates, protocol.sampling)
    assert result_of(protocol, one, files).accuracy == {"CLIP*": {"top-1": [1.0]}}
