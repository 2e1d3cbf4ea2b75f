"""The paper's figures, to be shown next to one's own where the protocol is the very same."""

from __future__ import annotations

from applications.openvclip.zeroshot.results import ProtocolResult

_HASHES = {
    "ucf101/EP1": "1db943ac7c85d201",
    "ucf101/EP2": "f3eb9db58005aeca",
    "ucf101/EP3": "2233b96a5fae825a",
    "hmdb51/EP1": "7b398e5d48c3cf5a",
    "hmdb51/EP2": "238ab6d2714f77b7",
    "hmdb51/EP3": "41bfc0b4a0e3c1e0",
    "kinetics600/zero-shot": "45dcbf76e0d77cf1",
}
"""Of the protocols with the lists of the Open-VCLIP release, its class names, 28 templates and 3 x 1 views."""

_FIGURES: dict[str, dict[str, dict[str, str]]] = {
    "ViT-B-32": {
        "CLIP*": {"ucf101/EP2": "69.1", "hmdb51/EP2": "45.4", "kinetics600/zero-shot": "64.8"},
        "fine-tuned": {"ucf101/EP2": "78.0", "hmdb51/EP2": "47.3", "kinetics600/zero-shot": "62.8"},
        "Open-VCLIP": {
            "ucf101/EP1": "87.1±2.4",
            "ucf101/EP2": "79.5",
            "ucf101/EP3": "79.4±1.1",
            "hmdb51/EP1": "62.3±4.0",
            "hmdb51/EP2": "49.9",
            "hmdb51/EP3": "50.6±0.3",
            "kinetics600/zero-shot": "69.5±0.6",
            "kinetics600/zero-shot, top-5": "91.7±0.1",
        },
    },
    "ViT-B-16": {
        "CLIP*": {"ucf101/EP2": "74.2", "hmdb51/EP2": "47.6", "kinetics600/zero-shot": "68.1"},
        "fine-tuned": {"ucf101/EP2": "79.7", "hmdb51/EP2": "49.2", "kinetics600/zero-shot": "65.9"},
        "Open-VCLIP": {
            "ucf101/EP1": "89.9±1.7",
            "ucf101/EP2": "83.5",
            "ucf101/EP3": "83.4±1.2",
            "hmdb51/EP1": "64.5±4.5",
            "hmdb51/EP2": "53.2",
            "hmdb51/EP3": "53.9±1.2",
            "kinetics600/zero-shot": "73.0±0.8",
            "kinetics600/zero-shot, top-5": "93.2±0.1",
        },
    },
    "ViT-L-14": {
        "CLIP*": {"ucf101/EP2": "80.5", "hmdb51/EP2": "55.0", "kinetics600/zero-shot": "76.2"},
        "fine-tuned": {"ucf101/EP2": "85.0", "hmdb51/EP2": "51.9", "kinetics600/zero-shot": "74.9"},
        "Open-VCLIP": {
            "ucf101/EP1": "93.1±1.9",
            "ucf101/EP2": "87.9",
            "ucf101/EP3": "87.6±1.2",
            "hmdb51/EP1": "68.5±4.0",
            "hmdb51/EP2": "58.3",
            "hmdb51/EP3": "59.0±0.6",
            "kinetics600/zero-shot": "81.1±0.8",
            "kinetics600/zero-shot, top-5": "96.3±0.3",
        },
    },
}
"""In %, tables 1 to 4, by image model, method and protocol; top-1 unless said."""

OTHERS: dict[str, dict[str, str]] = {
    "TACO (arXiv 2606.25478), names of classes rephrased": {
        "ViT-B-16": "85.6±1.2 / 60.0±0.5 / 77.0±0.9",
        "ViT-L-14": "91.4±0.7 / 64.2±0.8 / 83.9±0.7",
    },
    "TC-CLIP (ECCV 2024), names of classes rephrased": {"ViT-B-16": "85.4 / 56.0 / 78.1"},
    "FROSTER (ICLR 2024), names of classes rephrased": {"ViT-B-16": "84.8 / 54.8 / 74.8"},
    "Open-MeDe (ICCV 2025)": {"ViT-B-16": "83.7±1.3 / 54.6±1.1 / 73.7±0.9"},
    "MoTE (NeurIPS 2024)": {"ViT-B-16": "83.4 / 55.8 / 70.2", "ViT-L-14": "88.7 / 61.4 / 78.4"},
}
"""What came after, as its authors report it: UCF-101, HMDB-51 and Kinetics-600, each under a protocol of its own."""


def published(result: ProtocolResult, model: str, method: str, metric: str = "top-1") -> str | None:
    """The published figure of a method under the very protocol of a result, if there is one.

    Source: Weng et al. 2023 (arXiv 2302.00624), tables 1-4.

    Args:
        result: Whose protocol it is.
        model: Name of the image model, as in open_clip.
        method: "CLIP*", "fine-tuned" or "Open-VCLIP".
        metric: "top-1" or "top-5".
    """
    return figure(result.protocol, model, method, metric) if _HASHES.get(result.protocol) == result.hash else None


def figure(protocol: str, model: str, method: str, metric: str = "top-1") -> str | None:
    """A published figure by the name of its protocol alone, which others may give to something else."""
    figures = _FIGURES.get(model.removesuffix("-quickgelu"), {}).get(method, {})
    return figures.get(protocol if metric == "top-1" else f"{protocol}, {metric}")
