"""Give a run away: weights, settings, results and a model card, to the Hugging Face hub or into a folder.

$ openvclip push runs/vit_b_16-… OWNER/NAME --private
$ openvclip push runs/vit_b_16-… OWNER/NAME --folder for_others        # to look at it first; nothing is uploaded

The settings name your data sets as you gave them, paths included. The other way: Classifier.from_pretrained, or --run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.cli(push, prog="openvclip push", description=__doc__, args=arguments)


def push(
    run: tyro.conf.Positional[Path],
    name: tyro.conf.Positional[str],
    private: bool = False,
    folder: Path | None = None,
) -> None:
    """Write what is for others, and upload it.

    Args:
        run: Folder of a finished run.
        name: Of the model on the hub, OWNER/NAME.
        private: Keep it to yourself.
        folder: Write it here, and upload nothing.
    """
    from rich.console import Console

    from applications.openvclip.inference.classifier import Classifier

    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such folder; a run is one.")
    classifier = Classifier.load(run)
    if folder is not None:
        classifier.save_pretrained(folder, repo_id=name)
        place = str(folder)
    else:
        try:
            place = classifier.push_to_hub(name, private=private)
        except Exception as error:  # the hub's client raises errors of its own, and of the libraries below it
            raise RuntimeError(
                f"{name}: not uploaded ({type(error).__name__}: {str(error).splitlines()[0]})."
            ) from error
    Console().print(f"{run} as {name}: {place}", soft_wrap=True, highlight=False, markup=False)
