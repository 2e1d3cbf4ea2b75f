"""The page itself: which parts it has, and what happens when one is touched."""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.workers import Workers
from applications.openvclip.inference.classifier import Classifier
from applications.openvclip.inference.labels import classes_of
from applications.openvclip.inference.timeline import plot_timeline
from applications.openvclip.inference.windows import Timeline, segments
from applications.openvclip.page import drawing
from applications.openvclip.page.content import Content
from applications.openvclip.page.uploads import Looks

WAITING = "Drop a video, record one, or take an example."


class Page:
    """What happens on the page; nothing of a visitor is kept but pixels of the model's size, until the visit ends.

    Args:
        classifier: The model; visitors at different anchor weights take turns.
        pool: Reads uploads (`UploadReader`).
        content: What else is shown.
    """

    def __init__(self, classifier: Classifier, pool: Workers[str, Looks], content: Content) -> None:
        self.classifier = classifier
        self.pool = pool
        self.content = content

    def look(self, path: str | None, labels: str, anchor_weight: float) -> tuple[Looks | None, str, str]:
        """A new video: what is kept of it, the bars, and the time line."""
        if path is None:
            return None, drawing.told(WAITING), ""
        looks = self.pool.ask(path)
        if isinstance(looks, VideoReadError):
            return None, drawing.told(str(looks).replace(path, "This video"), fault=True), ""
        return looks, self.bars(looks, labels, anchor_weight), self.timeline(looks, labels, anchor_weight)

    def bars(self, looks: Looks | None, labels: str, anchor_weight: float) -> str:
        """What the video shows, among these labels."""
        if looks is None:
            return drawing.told(WAITING)
        try:
            classes = classes_of(labels.replace("\n", ",").split(","))
            self.classifier.embeddings_of(classes)
        except ValueError as error:  # a label that is none, or that the model has no word for
            return drawing.told(str(error), fault=True)
        with self.classifier.at(anchor_weight):
            found = self.classifier.ranked(self.classifier.embed(torch.from_numpy(looks.views)), classes)
        shown = drawing.bars({label: found[label] for label in classes})
        return shown + (drawing.told(f"Cut off: {looks.shortfall}") if looks.shortfall else "")

    def timeline(self, looks: Looks | None, labels: str, anchor_weight: float) -> str:
        """What a long video shows, and when."""
        if looks is None or not len(looks.windows):
            return ""
        try:
            classes = classes_of(labels.replace("\n", ",").split(","))
            self.classifier.embeddings_of(classes)
        except ValueError:  # `bars` has said so
            return ""
        with self.classifier.at(anchor_weight):
            embeddings = self.classifier.embed(torch.from_numpy(looks.windows))
            probabilities = self.classifier.probabilities(embeddings, classes).numpy()
        pictures = looks.windows[:, :, looks.windows.shape[2] // 2].transpose(0, 2, 3, 1)
        timeline = Timeline("along its time", looks.length_s, looks.starts, looks.window_s, embeddings, pictures)
        file = io.BytesIO()
        plot_timeline(file, timeline, list(classes), probabilities, segments(timeline, list(classes), probabilities))
        return f'<div class="wide">{drawing.picture(file.getvalue(), "png", "probabilities along time")}</div>'

    def curve(self, anchor_weight: float) -> str:
        return self.content.tradeoff.svg(anchor_weight) if self.content.tradeoff else ""

    def example(self, name: str, folder: Path) -> str:
        """A copy of an example where uploads are, for the browser to show."""
        source = self.content.examples[name]
        copy = Path(tempfile.mkdtemp(dir=folder)) / f"example{source.suffix}"
        shutil.copyfile(source, copy)
        return str(copy)


def blocks(page: Page, uploads: Path, kept_s: int) -> gr.Blocks:
    """The page's parts, and what is called when one is touched.

    Args:
        page: What is called.
        uploads: Folder of uploads.
        kept_s: Seconds after which an upload is deleted; the browser shows it until then.
    """
    content, has_path = page.content, page.classifier.loaded.theta is not None
    with gr.Blocks(title="Open-VCLIP", analytics_enabled=False, delete_cache=(30, kept_s)) as app:
        looks = gr.State(None, time_to_live=kept_s)
        gr.HTML(drawing.heading("Open-VCLIP", content.about))
        with gr.Row(equal_height=False):
            with gr.Column(scale=5):
                video = gr.Video(
                    label="Video",
                    sources=["upload", "webcam"],
                    webcam_options=gr.WebcamOptions(mirror=False),
                    height=400,
                    elem_id="video",
                    buttons=[],
                )
                with gr.Row():
                    for name in content.examples:
                        button = gr.Button(name, size="sm", elem_classes="example")
                        button.click(_calls(page.example, name, uploads), None, video, api_visibility="private")
            with gr.Column(scale=6):
                labels = gr.Textbox(
                    content.labels,
                    label="Labels",
                    info="In your own words, parted by commas; | parts several names of one.",
                    lines=2,
                    elem_id="labels",
                )
                weight = gr.Slider(
                    0,
                    1,
                    page.classifier.anchor_weight,
                    step=0.05,
                    label="Anchor weight",
                    info="0 is the fine-tuned model, 1 is CLIP." if has_path else "There are no fine-tuned weights.",
                    interactive=has_path,
                    elem_id="weight",
                    buttons=[],
                )
                bars = gr.HTML(drawing.told(WAITING), elem_id="answers")
        timeline = gr.HTML("", elem_id="timeline")
        with gr.Row(equal_height=False):
            if content.tradeoff:
                with gr.Column(scale=5):
                    gr.HTML(drawing.heading("What this weight gives and takes", level=2))
                    curve = gr.HTML(page.curve(page.classifier.anchor_weight), elem_id="curve")
                    weight.input(
                        page.curve, weight, curve, show_progress="hidden", trigger_mode="always_last", queue=False
                    )
            if content.confusions:
                with gr.Column(scale=6):
                    gr.HTML(drawing.heading("What the evaluation mixed up most", level=2))
                    gr.HTML(content.confusions, elem_id="confusions")

        shown: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
        everything = [looks, bars, timeline]
        video.change(page.look, [video, labels, weight], everything, show_progress_on=bars, api_name="look")
        weight.input(page.bars, [looks, labels, weight], bars, api_name="bars", **shown)
        weight.release(page.timeline, [looks, labels, weight], timeline, api_name="timeline", **shown)
        labels.input(page.bars, [looks, labels, weight], bars, api_visibility="private", **shown)
        labels.blur(page.timeline, [looks, labels, weight], timeline, api_visibility="private", **shown)
    return app


def _calls(function: Any, *arguments: Any) -> Any:
    return lambda: function(*arguments)
