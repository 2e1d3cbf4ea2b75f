"""A new head, new tokens: what theta has and the anchor has not."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interpolate import (
    InterpolatedWeightRegularizer,
    WeightMismatchError,
    evaluate_path,
    patch,
    patch_files,
    pull,
)
from interpolate.__main__ import main
from interpolate.inspection import verify

F = nn.functional
PATTERNS = ["head.*", "embed.weight[4:]"]


class Tagger(nn.Module):
    """An embedding of so many tokens and a head of so many classes, or none."""

    def __init__(self, tokens: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, 3)
        self.layer = nn.Linear(3, 3)
        self.head = nn.Linear(3, classes) if classes else None

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.embed(tokens)))
        return self.head(hidden) if self.head else hidden


def pretrained(classes: int = 0) -> Tagger:
    torch.manual_seed(0)
    return Tagger(4, classes).double()


def fine_tuned() -> Tagger:
    torch.manual_seed(1)
    return Tagger(6, 2).double()


def expected(anchor: Tagger, theta: Tagger, weight: float) -> dict[str, Tensor]:
    mixed = {n: t.clone() for n, t in theta.state_dict().items()}
    for name in ("layer.weight", "layer.bias"):
        mixed[name] = weight * anchor.state_dict()[name] + (1 - weight) * mixed[name]
    mixed["embed.weight"][:4] = weight * anchor.embed.weight.detach() + (1 - weight) * mixed["embed.weight"][:4]
    return mixed


@pytest.mark.parametrize("classes", [0, 5, 2], ids=["no head", "another head", "a head of this shape"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_what_is_only_thetas_stays_and_all_else_is_mixed(classes: int, prefix: str):
    anchor, theta = pretrained(classes), fine_tuned()
    named = {prefix + n: t for n, t in theta.state_dict().items()}
    patterns = [prefix + pattern for pattern in PATTERNS]
    patched = patch(anchor, named, anchor_weight=0.3, theta_only=patterns)
    assert list(patched) == list(named)
    for name, tensor in expected(anchor, theta, 0.3).items():
        torch.testing.assert_close(patched[prefix + name], tensor)
    for weight in (0, 1):
        patched = patch(anchor, named, anchor_weight=weight, theta_only=patterns)
        for name, tensor in expected(anchor, theta, weight).items():
            assert torch.equal(patched[prefix + name], tensor)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_files_are_patched_as_what_is_in_memory_and_can_be_verified(tmp_path, monkeypatch, prefix: str):
    monkeypatch.chdir(tmp_path)
    anchor, theta = pretrained(5), {prefix + n: t for n, t in fine_tuned().state_dict().items()}
    save_file(anchor.state_dict(), "anchor.safetensors")
    save_file(theta, "theta.safetensors")
    patterns = [prefix + pattern for pattern in PATTERNS]
    report = patch_files(
        "anchor.safetensors", "theta.safetensors", "a.safetensors", anchor_weight=0.3, theta_only=patterns
    )
    assert {t.name.removeprefix(prefix) for t in report.tensors if not t.mixed} == {"head.weight", "head.bias"}
    flags = [part for pattern in patterns for part in ("--theta-only", pattern)]
    command = ["patch", "anchor.safetensors", "theta.safetensors", "--anchor-weight", "0.3", "-o", "b.safetensors"]
    assert main([*command, *flags]) == 0
    in_memory = patch(anchor, theta, anchor_weight=0.3, theta_only=patterns)
    for path in ("a.safetensors", "b.safetensors"):
        assert verify(path) == []
        written = load_file(path)
        assert written.keys() == in_memory.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in in_memory.items())


def test_a_part_that_is_not_named_is_an_error_as_ever():
    with pytest.raises(
        WeightMismatchError, match=r"2 of 5 weights missing \(head\.weight, head\.bias\), 1 of 5 weights of"
    ):
        patch(pretrained(), fine_tuned(), anchor_weight=0.5)
    with pytest.raises(WeightMismatchError, match=r"anchor .* theta: 1 of 3 weights of another shape \(embed\.weight"):
        patch(pretrained(), fine_tuned(), anchor_weight=0.5, theta_only=["head.*"])


def test_the_command_line_says_by_what_it_can_be_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(pretrained(5).state_dict(), "anchor.safetensors")
    save_file(fine_tuned().state_dict(), "theta.safetensors")
    assert main(["patch", "anchor.safetensors", "theta.safetensors", "--anchor-weight", "0.3", "-o", "out.pt"]) == 2
    assert "What the anchor does not have can be named: --theta-only PATTERN.\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["haed.*"], r"theta_only: 'haed\.\*' fits none of 5 weights, e\.g\. embed\.weight"),
        ("head.*", r"theta_only is a list of patterns, got the text 'head\.\*'"),
        (
            ["head.*", "embed.weight[5:]"],
            r"rows of 'embed\.weight' are new from 5 on: .* theta is \(6, 3\), the anchor \(4",
        ),
        (["head.*", "embed.weight[6:]"], r"rows of 'embed\.weight' are new from 6 on"),
        (["embed.weight[4:]", "head.weight[1:]", "head.bias"], r"rows of 'head\.weight' .* the anchor without it"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(patterns, message: str):
    with pytest.raises(ValueError, match=message):
        patch(pretrained(), fine_tuned(), anchor_weight=0.5, theta_only=patterns)
    with pytest.raises(ValueError, match=message):
        InterpolatedWeightRegularizer(fine_tuned(), anchor=pretrained().state_dict(), theta_only=patterns)


@pytest.mark.parametrize("strategy", ["functional", "in_place"])
@pytest.mark.parametrize("written", [False, True], ids=["backward", "two terms"])
def test_new_parts_are_regularized_where_they_are(strategy: str, written: bool):
    anchor, theta = pretrained(), fine_tuned()
    tokens, labels = torch.arange(6), torch.tensor([0, 1, 0, 1, 0, 1])
    regularizer = InterpolatedWeightRegularizer(
        theta, anchor=anchor.state_dict(), theta_only=PATTERNS, strategy=None if written else strategy
    )
    with torch.no_grad():  # training has gone on: new rows too are those of now
        for p in theta.parameters():
            p.add_(0.1)
    tilde = fine_tuned()
    tilde.load_state_dict(expected(anchor, theta, regularizer.alpha))
    plain = copy.deepcopy(theta)
    loss_fn = lambda model: F.cross_entropy(model(tokens), labels)  # noqa: E731
    for model in (plain, tilde):
        loss_fn(model).backward()
    if written:
        loss = loss_fn(theta) + regularizer.beta * F.cross_entropy(regularizer(tokens), labels)
        loss.backward()
    else:
        regularizer.backward(loss_fn)
        torch.testing.assert_close(regularizer.interpolated_loss, loss_fn(tilde).detach())
    for (name, p), a, b in zip(theta.named_parameters(), plain.parameters(), tilde.parameters(), strict=True):
        torch.testing.assert_close(p.grad, a.grad + 0.5 * b.grad, msg=name)
    final = patch(regularizer.anchor, theta, anchor_weight=0.5, theta_only=PATTERNS)
    for name, tensor in expected(anchor, theta, 0.5).items():
        torch.testing.assert_close(final[name], tensor)


def test_a_regularizer_of_new_parts_resumes_and_its_anchor_moves():
    regularizer = InterpolatedWeightRegularizer(fine_tuned(), anchor=pretrained().state_dict(), theta_only=PATTERNS)
    resumed = InterpolatedWeightRegularizer(fine_tuned(), theta_only=PATTERNS)
    resumed.load_state_dict(regularizer.state_dict())
    assert "head.weight" not in resumed.anchor
    assert torch.equal(resumed.anchor["embed.weight"][:4], pretrained().embed.weight)
    resumed.move_anchor(pretrained().state_dict(), weight=0.5)
    resumed.move_anchor()
    assert torch.equal(resumed.anchor["layer.weight"], fine_tuned().layer.weight)


def test_the_model_at_the_anchor_has_thetas_new_parts():
    anchor, theta = pretrained(), fine_tuned()
    regularizer = InterpolatedWeightRegularizer(theta, anchor=anchor.state_dict(), theta_only=PATTERNS)
    at_anchor = fine_tuned()
    at_anchor.load_state_dict(expected(anchor, theta, 1))
    assert torch.equal(regularizer.at_anchor(torch.arange(6)), at_anchor(torch.arange(6)))


def test_the_path_and_a_pull_leave_new_parts_alone():
    anchor, theta = pretrained(), fine_tuned()
    values = evaluate_path(
        theta, anchor.state_dict(), lambda model: model.layer.bias[0].item(), anchor_weights=(0, 1), theta_only=PATTERNS
    ).values
    assert values == (theta.layer.bias[0].item(), anchor.layer.bias[0].item())
    head, embed = theta.head.weight.clone(), theta.embed.weight.clone()
    pull(theta, anchor, weight=1, theta_only=["head.*", "embed.*"])
    assert torch.equal(theta.layer.weight, anchor.layer.weight)
    assert torch.equal(theta.head.weight, head)
    assert torch.equal(theta.embed.weight, embed)


def test_rows_that_an_anchor_has_beyond_its_own_do_not_count():
    anchor, theta = pretrained(), fine_tuned()
    weights = dict(anchor.state_dict())
    weights["embed.weight"] = torch.cat([weights["embed.weight"], torch.full([2, 3], 9.0).double()])
    patched = patch(weights, theta, anchor_weight=0.5, theta_only=PATTERNS)
    torch.testing.assert_close(patched["embed.weight"], expected(anchor, theta, 0.5)["embed.weight"])


def test_new_rows_keep_their_bits_beside_an_anchor_in_half_precision():
    theta, anchor = torch.randn(5, 2), torch.randn(3, 2).bfloat16()
    for weight in (0.3, 0.7, 1.0):
        mixed = patch({"e": anchor}, {"e": theta}, anchor_weight=weight, theta_only=["e[3:]"])["e"]
        assert torch.equal(mixed[3:], theta[3:])
        torch.testing.assert_close(mixed[:3], weight * anchor.float() + (1 - weight) * theta[:3])
