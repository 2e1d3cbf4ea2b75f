"""What a video shows, from a file that `openvclip export` wrote: numpy, PyAV and onnxruntime are all it takes.

$ python examples/classify_exported.py model.onnx clip.mp4
"""

import json
import math
import sys
from pathlib import Path

import av
import numpy as np
import onnxruntime

model, video = map(Path, sys.argv[1:])
facts = json.loads(model.with_name("labels.json").read_text())
size, frames = facts["size"], facts["sampling"]["frames"]

with av.open(str(video)) as container:
    pictures = []
    for picture in container.decode(video=0):
        scale = size / min(picture.width, picture.height)
        width, height = round(picture.width * scale), round(picture.height * scale)
        pixels = picture.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
        top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
        pictures.append(pixels[top : top + size, left : left + size])
chosen = [int((i + 0.5) * len(pictures) / frames) for i in range(frames)]  # one of each of as many equal parts
clip = np.stack([pictures[i] for i in chosen]).transpose(3, 0, 1, 2)  # (3, T, H, W)

inputs = {"video": clip[None], "class_embeddings": np.array(facts["class_embeddings"], np.float32)}
if facts["anchor_weight"] == "input":
    inputs["anchor_weight"] = np.array(0.5, np.float32)
(logits,) = onnxruntime.InferenceSession(model).run(["logits"], inputs)[0]
probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
for i in np.argsort(-probabilities)[:5]:
    print(f"{probabilities[i]:6.1%}  {facts['labels'][i]}")
