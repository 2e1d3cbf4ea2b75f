import pytest
import torch
from torch import nn

from interpolate import by_depth, patch


def test_weights_go_from_the_first_block_to_the_last_in_equal_steps():
    names = [f"encoder.layers.{i}.mlp.0.weight" for i in range(12)] + ["embedding.weight", "norm.weight"]
    found = by_depth(names, first=1.0, last=0.45)
    assert list(found)[-1] == "*"
    assert found["*"] == found["encoder.layers.0.*"] == 1
    assert [found[f"encoder.layers.{i}.*"] for i in range(12)] == pytest.approx([1 - 0.05 * i for i in range(12)])


def test_patched_blocks_are_scaled_as_in_the_paper():
    """LiNeS, eq. 5: the update of block l of L is multiplied by alpha + beta (l - 1) / (L - 1)."""
    network = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 4, norm=nn.LayerNorm(4))
    anchor = {n: t.clone().double() for n, t in network.state_dict().items()}
    theta = {n: t + torch.randn_like(t) for n, t in anchor.items()}
    alpha, beta = 0.2, 0.6
    patched = patch(anchor, theta, anchor_weight=by_depth(theta, first=1 - alpha, last=1 - alpha - beta))
    for name, tensor in theta.items():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        scale = alpha + beta * layer / 3
        torch.testing.assert_close(patched[name], anchor[name] + scale * (tensor - anchor[name]))


def test_each_tower_has_a_depth_of_its_own_and_the_stages_of_a_resnet_have_one():
    clip = [f"{tower}transformer.resblocks.{i}.ln.weight" for tower in ("visual.", "") for i in range(3)]
    assert set(by_depth(clip, first=1, last=0).values()) == {1, 0.5, 0}
    resnet = [f"layer{stage}.{i}.conv1.weight" for stage in (2, 1) for i in range(2)] + ["conv1.weight", "fc.weight"]
    found = by_depth(resnet, first=0.9, last=0.0)
    assert found == pytest.approx({"layer1.0.*": 0.9, "layer1.1.*": 0.6, "layer2.0.*": 0.3, "layer2.1.*": 0, "*": 0.9})


def test_names_of_wrappers_do_not_matter_and_signs_of_patterns_are_no_patterns():
    found = by_depth([f"module._orig_mod.h[a].{i}.fc.w" for i in range(2)], first=1, last=0)
    assert found == {"h[[]a].0.*": 1, "h[[]a].1.*": 0, "*": 1}
    weights = {f"h[a].{i}.fc.w": torch.ones(1) for i in range(2)}
    assert patch({n: 0 * t for n, t in weights.items()}, weights, anchor_weight=found)["h[a].1.fc.w"] == 1


def test_patterns_before_those_of_the_depth_hold():
    names = ["h.0.fc.w", "h.1.fc.w", "h.2.fc.w", "head.w"]
    theta, anchor = ({n: torch.tensor([v]) for n in names} for v in (0.0, 1.0))
    patched = patch(anchor, theta, anchor_weight={"head.*": 0.0} | by_depth(names, first=1, last=0.5))
    assert [patched[n].item() for n in names] == [1, 0.75, 0.5, 0]


def test_single_layers_are_blocks_only_where_they_are_named():
    names = ["features.0.weight", "features.3.weight", "features.6.weight", "classifier.0.weight"]
    with pytest.raises(ValueError, match=r"no depth is to be seen in the names of 4 weights, e\.g\. features\.0\.weig"):
        by_depth(names, first=1, last=0)
    found = by_depth(names, first=1, last=0, blocks=["features"])
    assert found == {"features.0.*": 1, "features.3.*": 0.5, "features.6.*": 0, "*": 1}
    with pytest.raises(ValueError, match=r"blocks: nothing is numbered under 'feature', e\.g\. features"):
        by_depth(names, first=1, last=0, blocks=["features", "feature"])


def test_a_weight_out_of_range_is_refused_where_it_is_used():
    theta = {f"h.{i}.fc.w": torch.ones(1) for i in range(2)}
    with pytest.raises(ValueError, match=r"anchor_weight of 'h\.1\.\*' .* in \[0, 1\], got -0\.5"):
        patch(theta, theta, anchor_weight=by_depth(theta, first=1, last=-0.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "blocks"),
    [("vit_tiny_patch16_224", 12), ("resnet18", 8), ("convnext_atto", 4), ("efficientnet_b0", 7), ("mixer_s16_224", 8)],
)
def test_the_blocks_of_timms_models_are_found(name: str, blocks: int):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        found = by_depth(timm.create_model(name).state_dict(), first=1, last=0)
    assert len(found) == blocks + 1
    assert list(found.values())[:-1] == pytest.approx([1 - i / (blocks - 1) for i in range(blocks)])
