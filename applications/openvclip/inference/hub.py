"""A run as a folder for others: its weights, its settings and results, and a card that says what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from applications.openvclip.config import from_dict, to_dict
from applications.openvclip.inference.loading import Loaded, goes_on
from applications.openvclip.runs.folder import RunFolder
from applications.openvclip.runs.texts import write_text
from applications.openvclip.runs.weights import load_weights, save_weights
from applications.openvclip.zeroshot import tables
from applications.openvclip.zeroshot.results import Results, read_results

_LICENCES = {"openai": ("mit", "OpenAI's, MIT"), None: ("mit", "that of this package, MIT")}
"""By what the anchor is: the hub's name of its licence, and a sentence. None is the miniature's."""

ANCHOR = "anchor.safetensors"


def write_folder(loaded: Loaded, folder: Path, name: str) -> None:
    """What others need of a run: it loads from there as it does from its own folder.

    Neither the training state nor the logits go along. Pretrained weights that are a file here do.

    Raises:
        ValueError: The folder is the run's own; or as `ended_run`.
    """
    run = ended_run(loaded)
    if folder.resolve() == run.path.resolve():
        raise ValueError(f"{folder} is the run itself; write what is for others somewhere else.")
    folder.mkdir(parents=True, exist_ok=True)
    there = RunFolder(folder)
    config = from_dict(run.read_settings())
    if config.model.pretrained and Path(config.model.pretrained).is_file():
        whole, _ = load_weights(run.averaged)  # its text tower is the anchor's
        save_weights(folder / ANCHOR, whole | loaded.anchor, {"content": "the pretrained weights"})
        config = replace(config, model=replace(config.model, pretrained=ANCHOR))
    write_text(there.config, json.dumps(to_dict(config), indent=2) + "\n")
    for kind in ("averaged", "results", "markdown", "plot", "calibration"):
        if getattr(run, kind).exists():
            shutil.copyfile(getattr(run, kind), getattr(there, kind))
    write_text(folder / "README.md", card(loaded, to_dict(config), name))


def ended_run(loaded: Loaded) -> RunFolder:
    """The run that a model is, which has left its weights.

    Raises:
        ValueError: The model is no run, so that nothing tells what it is; or the run has not ended.
    """
    run = loaded.folder
    if run is None or loaded.theta is None:
        raise ValueError(f"only a run can be given away, with its settings and results; this is {loaded.model.name}.")
    if goes_on(run):
        raise ValueError(
            f"{run.path} has not ended, and only a run that has can be given away: `openvclip train --resume "
            f"{run.path}` goes on with it, and with --finish ends it where it is."
        )
    return run


def card(loaded: Loaded, settings: Mapping[str, Any], name: str) -> str:
    """The model card of a run, made from what the run wrote.

    Args:
        loaded: The run.
        settings: Its configuration, as plain values.
        name: Of the model on the hub.
    """
    run = loaded.folder
    assert run is not None
    results = read_results(run.results) if run.results.exists() else None
    trained: list[str] = json.loads(loaded.metadata["classes"])
    anchor = f"{loaded.model.name}, {settings['model']['pretrained'] or 'built in'}"
    tag, licence = _LICENCES.get(settings["model"]["pretrained"], ("other", "not known here; look it up"))
    o = settings["optimization"]
    return f"""\
---
license: {tag}
library_name: interpolate-weights
pipeline_tag: video-classification
tags: [open-vocabulary, video, clip, open-vclip, weight-interpolation]
---

# {settings["recipe"]}: an open-vocabulary video CLIP

A CLIP that was fine-tuned on videos and pulled back towards its pretrained weights, the anchor, after
Weng et al., [Open-VCLIP](https://arxiv.org/abs/2302.00624) (ICML 2023). It scores videos against any labels in words.

## Use

```python
from applications.openvclip import Classifier  # pip install '.[openvclip]' in a clone of interpolate

classifier = Classifier.from_pretrained({json.dumps(name)})
classifier.anchor_weight = {loaded.anchor_weight:g}  # as it is anyway; any other in [0, 1] can be set
classifier.classify("clip.mp4", {json.dumps(trained[:2])})  # any labels
```

`averaged.safetensors` holds the fine-tuned weights under open_clip's names, not patched; the final model is
`{loaded.anchor_weight:g} * anchor + {1 - loaded.anchor_weight:g} * averaged`.

## How it was made

| | |
|---|---|
| anchor | {anchor} |
| method | {settings["method"]}, {_regularizer(settings)} |
| training set | {settings["data"]["train"]}, {len(trained)} classes |
| clips | {loaded.sampling.frames} frames, stride {loaded.sampling.stride:g} |
| optimisation | {o["epochs"]} epochs, batch {o["batch_size"]}, learning rate {o["learning_rate"]:g} |
| seed | {settings["seed"]} |
| templates | {len(loaded.templates)}, such as "{loaded.templates[0]}" |
| versions | {_versions(results)} |

All settings are in `config.json`.

## Results

{_results(results)}

## Limits

It knows the concepts of its anchor, in the words of its anchor's text tower, and shares that one's biases. It was not
tested for surveillance, for telling people apart or for decisions about them. A video that shows none of the labels
gets one all the same. {_toy(loaded)}

## Licence

Of the anchor: {licence}. The training set has terms of its own.
"""


def _regularizer(settings: Mapping[str, Any]) -> str:
    r = settings["regularizer"]
    return f"alpha up to {r['max_alpha']:g}, strength {r['strength']:g}"


def _versions(results: Results | None) -> str:
    found = results.provenance.get("versions", {}) if results else {}
    return ", ".join(f"{name} {number}" for name, number in found.items()) or "not noted"


def _results(results: Results | None) -> str:
    if results is None:
        return "It was not evaluated."
    found, _, _ = tables.markdown(results).partition("\n## Classes of")
    return found.partition("\n")[2].replace("\n## ", "\n### ").strip()


def _toy(loaded: Loaded) -> str:
    toy = "This one is a toy of 1.3 million parameters, and knows nothing of real videos."
    return toy if loaded.model.name == "miniature" else ""
