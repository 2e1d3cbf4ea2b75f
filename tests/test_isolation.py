"""What the pass at interpolated weights leaves behind in a model: nothing but gradients."""

import copy
from collections import Counter, deque

import pytest
import torch
from random_modules import batch, identical, snapshot
from test_regularizer import STRATEGIES, explicit_gradients, gradients, mse, regularizer_away_from_anchor
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interpolate import InterpolatedWeightRegularizer, load_weights, patch

F = nn.functional
with_both = pytest.mark.parametrize("strategy", STRATEGIES)


class Stateful(nn.Module):
    """Keeps state wherever a module can, and changes all of it in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("spread", torch.zeros(1).expand(3))
        self.register_buffer("grown", torch.zeros(0))
        self.longest = 0
        self.total = torch.tensor(0.0)
        self.also_total = self.total
        self.seen: list = []
        self.also_seen = self.seen
        self.nested = {"sums": [torch.zeros(1)], "pair": (torch.zeros(1), "a")}
        self.counts, self.recent, self.kinds = Counter(), deque(maxlen=2), set()
        self.hidden = [nn.BatchNorm1d(3)]  # not registered: no parameter of this model

    def forward(self, x: Tensor) -> Tensor:
        self.longest += len(x)
        self.register_buffer("scale", self.scale + 0.5)
        self.grown = torch.cat([self.grown, x.detach()[:, 0].float()])
        self.spread = self.spread + 1
        self.total += x.detach().float().sum()
        self.seen.append(len(self.seen))
        self.nested["sums"][0] += 1
        self.nested["pair"][0].add_(1)
        self.counts["calls"] += 1
        self.recent.append(self.longest)
        self.kinds.add(self.longest)
        self.newly_set = self.longest
        self.hidden[0](x.detach().float())
        return self.linear(x) * self.scale * self.longest * len(self.also_seen)


def state_of(model: Stateful) -> dict[str, object]:
    hidden = snapshot(model.hidden[0])
    own = {n: v for n, v in vars(model).items() if not n.startswith("_") and n != "hidden"}
    return {n: repr(v) for n, v in {**own, **snapshot(model), **hidden}.items()}


@with_both
def test_state_of_any_kind_moves_as_in_a_plain_step(strategy: str):
    model, loss_fn = Stateful().double(), mse(*batch())
    plain, tensors = copy.deepcopy(model), (model.total, model.nested["pair"][0], model.seen)
    regularizer = regularizer_away_from_anchor(model, strategy=strategy)
    expected = explicit_gradients(regularizer, loss_fn)
    loss_fn(plain).backward()
    regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model), expected)
    assert state_of(model) == state_of(plain)
    assert all(a is b for a, b in zip((model.total, model.nested["pair"][0], model.seen), tensors, strict=True))
    assert model.also_total is model.total


@with_both
def test_state_is_as_it_was_after_an_exception(strategy: str):
    model = Stateful().double()
    before = state_of(model)

    def failing(model: nn.Module) -> Tensor:
        model(batch()[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regularizer_away_from_anchor(model, strategy=strategy).backward(failing)
    assert state_of(model) == before


class MomentumEncoder(nn.Module):
    """A frozen copy follows the trained encoder in every forward pass, as MoCo's, ALBEF's and BYOL's do."""

    def __init__(self, update) -> None:
        super().__init__()
        self.update = update
        self.encoder = nn.Linear(3, 3).double()
        self.target = nn.Linear(3, 3).double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for target, p in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
            self.update(target, p)
        return self.encoder(x) - self.target(x)


def assigned(target: Tensor, p: Tensor) -> None:
    target.data = target.data * 0.9 + p.data * 0.1


def written(target: Tensor, p: Tensor) -> None:
    with torch.no_grad():
        target.mul_(0.9).add_(p, alpha=0.1)


def written_to_data(target: Tensor, p: Tensor) -> None:
    target.data.mul_(0.9).add_(p.data, alpha=0.1)


@with_both
def test_a_momentum_encoder_moves_once(strategy: str):
    model, loss_fn = MomentumEncoder(assigned), mse(*batch())
    plain, regularizer = copy.deepcopy(model), regularizer_away_from_anchor(model, strategy=strategy)
    expected = explicit_gradients(regularizer, loss_fn)
    loss_fn(plain).backward()
    regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model), expected)
    assert identical(snapshot(model), snapshot(plain))


@with_both
@pytest.mark.parametrize("update", [written, written_to_data])
def test_a_frozen_parameter_that_is_written_to_in_forward_is_refused(strategy: str, update):
    model = MomentumEncoder(update)
    regularizer, own = regularizer_away_from_anchor(model, strategy=strategy), snapshot(model.encoder)
    with pytest.raises(RuntimeError, match=r"2 frozen parameters \(target\.weight, target\.bias\) were written to"):
        regularizer.backward(mse(*batch()))
    assert identical(snapshot(model.encoder), own)


@with_both
def test_a_write_that_shows_in_no_sample_is_found_by_its_version(strategy: str):
    model = nn.Linear(3, 3).double()
    model.calls = nn.Parameter(torch.tensor(0), requires_grad=False)
    model.register_forward_pre_hook(lambda module, _: [module.calls.add_(1), None][1])
    with pytest.raises(RuntimeError, match=r"1 frozen parameters \(calls\) were written to"):
        regularizer_away_from_anchor(model, strategy=strategy).backward(mse(*batch()))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


@with_both
def test_cached_parametrizations_are_computed_for_each_pass(strategy: str):
    model, loss_fn = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double(), mse(*batch())
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    regularizer = regularizer_away_from_anchor(model, strategy=strategy)
    expected = explicit_gradients(regularizer, loss_fn)
    with parametrize.cached():
        at_theta = model[0].weight
        regularizer.backward(loss_fn)
        assert model[0].weight is at_theta
    torch.testing.assert_close(gradients(model), expected)


def test_an_attribute_computed_from_weights_beforehand_is_not_taken_for_interpolated():
    model = nn.Linear(3, 3).double()
    regularizer = regularizer_away_from_anchor(model)
    model.scaled = 2 * model.weight  # the graph leads to theta
    with pytest.raises(RuntimeError, match=r"went around the interpolated weights: .* \(weight\)"):
        regularizer.backward(lambda model: model.scaled.sum())


@pytest.mark.slow
@with_both
def test_dynamic_rope_of_transformers_is_that_of_a_plain_step(strategy: str):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}  # longer inputs re-register its frequencies
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, rope_parameters=rope)).double()
    x = torch.randint(50, (2, 40))

    def loss_fn(model: nn.Module) -> Tensor:
        return model(input_ids=x, labels=x, use_cache=False).loss

    plain, regularizer = copy.deepcopy(model), regularizer_away_from_anchor(model, strategy=strategy)
    expected = explicit_gradients(regularizer, loss_fn)
    loss_fn(plain).backward()
    regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model), expected)
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert torch.equal(model(input_ids=x).logits, plain(input_ids=x).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
@pytest.mark.parametrize("layer", ["Linear8bitLt", "Linear4bit"])
@with_both
def test_frozen_layers_of_bitsandbytes_stay_what_they_are(strategy: str, layer: str):
    bnb = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(0)
    options = {"has_fp16_weights": False} if layer == "Linear8bitLt" else {"compute_dtype": torch.float32}
    quantized = getattr(bnb, layer)(16, 16, **options).requires_grad_(False).to("cpu")  # moving it quantizes it
    model, x = nn.Sequential(nn.Linear(16, 16), quantized, nn.Linear(16, 16)), torch.randn(8, 16)
    theta = {n: p for n, p in model.named_parameters() if p.requires_grad}
    anchor, own = {n: p.detach() + 0.1 for n, p in theta.items()}, {n: p.detach().clone() for n, p in theta.items()}
    regularizer = InterpolatedWeightRegularizer(model, anchor=anchor, strategy=strategy)
    alpha = regularizer.alpha
    regularizer.backward(lambda model: model(x).square().mean())
    found = gradients(model)
    model.zero_grad()
    (regularizer.strength * model(x).square().mean()).backward()
    at_theta = {n: p.grad / regularizer.strength for n, p in theta.items()}
    model.zero_grad()
    load_weights(model, patch(anchor, own, anchor_weight=alpha))
    (regularizer.strength * model(x).square().mean()).backward()
    torch.testing.assert_close(found, {n: g + theta[n].grad for n, g in at_theta.items()})
    assert not quantized.weight.is_floating_point()


@pytest.mark.slow
@with_both
def test_metrics_in_the_model_count_a_batch_once(strategy: str):
    torchmetrics = pytest.importorskip("torchmetrics")
    model, (x, y) = nn.Linear(3, 3).double(), batch()
    model.error = torchmetrics.MeanSquaredError()
    model.average = torchmetrics.CatMetric()
    model.unregistered = {"mean": torchmetrics.MeanMetric()}

    def loss_fn(model: nn.Module) -> Tensor:
        output = model(x)
        model.error(output.detach().float(), y.float())
        model.average.update(output.detach().float()[:, 0])
        model.unregistered["mean"].update(len(x))
        return F.mse_loss(output, y)

    regularizer = regularizer_away_from_anchor(model, strategy=strategy)
    for calls in 1, 2:
        regularizer.backward(loss_fn)
        assert model.error.total == calls * y.numel()
        assert len(model.average.compute()) == calls * len(x)
        assert model.unregistered["mean"].update_count == calls
    torch.testing.assert_close(model.error.compute().double(), F.mse_loss(model(x), y).detach(), rtol=1e-5, atol=1e-6)
