"""Anchor weights that change with depth, the depth being found from the names of the weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from interpolate._names import bare
from interpolate.weights import listed


def by_depth(
    names: Iterable[str], *, first: float, last: float, blocks: Collection[str] | None = None
) -> dict[str, float]:
    """One weight of the anchor for each block of a network, from `first` to `last` in equal steps.

    Shallow layers hold what is general: with more of the anchor in them, less is forgotten. What is returned are
    patterns, as `patch` and `patch_files` take them for `anchor_weight`, and shows which blocks were found. Blocks are
    what is numbered on the outermost level and made of modules (`encoder.layers.0.…`; `layer1.0.…` is before
    `layer2.0.…`), at least two. Each tower has a depth of its own. All that is in no block has the weight `first`, the
    last norm and the head too: put patterns of your own before these, as in `{"head.*": 0.0} | by_depth(…)`.

    Source: Wang et al. 2024 (arXiv 2410.17146), "LiNeS": its alpha is `1 - first`, its alpha + beta `1 - last`.

    Args:
        names: Of theta's weights; a state dict will do.
        first: Weight of the anchor in the first block of each tower.
        last: The same in the last block.
        blocks: What the blocks are numbered under, such as `["encoder.layers"]`. None: what is found; layers that are
            a single module, as in an `nn.Sequential`, are not.

    Raises:
        ValueError: There are no blocks, or none under one of `blocks`.

    Example:
        >>> by_depth(["stem.w", "h.0.fc.w", "h.1.fc.w", "h.2.fc.w"], first=1.0, last=0.5)
        {'h.0.*': 1.0, 'h.1.*': 0.75, 'h.2.*': 0.5, '*': 1.0}
    """
    names = list(bare(dict.fromkeys(names)))
    weights: dict[str, float] = {}
    for tower in towers(names, blocks).values():
        for i, block in enumerate(tower):
            weights[re.sub(r"([*?[])", r"[\1]", block) + ".*"] = first + (last - first) * i / (len(tower) - 1)
    return weights | {"*": first}


def towers(names: Collection[str], blocks: Collection[str] | None) -> dict[str, list[str]]:
    """What blocks are numbered under → the names of the blocks, in their order; as `by_depth` finds them."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    under = set()
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            container = ".".join(parts[:i])
            if part.isdecimal() and (len(parts) > i + 2 if blocks is None else container in blocks):
                under.add(container)
                tower = container.rstrip("0123456789")  # the stages of a ResNet are one tower
                stage = int(container[len(tower) :] or 0)
                found.setdefault(tower, {})[".".join(parts[: i + 1])] = stage, int(part)
                break
    ordered = {tower: sorted(numbers, key=lambda block: numbers[block]) for tower, numbers in found.items()}
    if missing := [container for container in blocks or () if container not in under]:
        raise ValueError(f"blocks: nothing is numbered under {listed(map(repr, missing))}, e.g. {listed(names)}.")
    ordered = {tower: numbers for tower, numbers in ordered.items() if len(numbers) > 1}
    if not ordered:
        raise ValueError(
            f"no depth is to be seen in the names of {len(names)} weights, e.g. {listed(names)}: there are not two "
            "numbered blocks. Weigh them by patterns of their names; in Python, by_depth(…, blocks=[…]) takes what "
            "they are numbered under."
        )
    return ordered
