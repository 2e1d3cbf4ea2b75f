"""LoRA as PEFT makes it: the regularizer interpolates the updates of the weights, and adapters are mixed by them."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from interpolate import InterpolatedWeightRegularizer, patch
from interpolate._unmixable import adapter_factors
from interpolate.lora import Adapter, mix_adapters

peft = pytest.importorskip("peft")
F = nn.functional


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.conv = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.fc(self.embed(tokens)))
        return self.head(torch.tanh(self.conv(hidden.mT)).mean(-1))


TOKENS, LABELS = torch.arange(16).reshape(4, 4) % 8, torch.tensor([0, 1, 1, 0])
CONFIGS = {
    "plain": {"target_modules": ["fc"], "r": 2},
    "embedding and convolution": {"target_modules": ["fc", "embed", "conv"], "r": 3, "lora_alpha": 5},
    "rslora with biases": {"target_modules": ["fc"], "r": 4, "use_rslora": True, "bias": "all", "lora_bias": True},
    "with a head": {"target_modules": ["fc"], "r": 2, "modules_to_save": ["head"]},
}


def loss_fn(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(TOKENS), LABELS)


def adapted(seed: int = 1, **config) -> nn.Module:
    """A model with adapters after some training."""
    torch.manual_seed(0)
    config = {"bias": "none"} | config
    if config["bias"] != "none":
        config["lora_bias"] = False  # PEFT takes one of the two
    model = peft.get_peft_model(Net(), peft.LoraConfig(**config)).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


def merged(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).merge_and_unload()


def base_of() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("way", ["functional", "in_place", "two terms"])
def test_the_gradient_is_that_of_merged_weights_on_the_straight_path_from_the_base(config: dict, way: str):
    """What autograd gives for `L(theta) + beta L(theta_tilde)`, theta_tilde being made of merged weights."""
    model = adapted(**config)
    anchor = dict(base_of().named_parameters())
    saved = {n: p.detach().clone() + 0.1 for n, p in model.named_parameters() if p.requires_grad}
    saved = {n: t for n, t in saved.items() if n not in adapter_factors(saved)}
    regularizer = InterpolatedWeightRegularizer(model, anchor=saved, strategy=None if way == "two terms" else way)
    alpha, beta = regularizer.alpha, regularizer.beta
    assert not adapter_factors(regularizer.anchor)

    theta = merged(model)
    whole = {n: p.detach() for n, p in theta.named_parameters()}
    start = {n: p.detach() for n, p in anchor.items()}
    for name, tensor in saved.items():  # what is trained whole has an anchor of its own
        plain = (
            name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", "")
        )
        start[plain] = tensor
    tilde = {n: alpha * start[n] + (1 - alpha) * t for n, t in whole.items()}
    at_tilde = Net().double()
    at_tilde.load_state_dict(tilde)

    reference = copy.deepcopy(model)
    factors = {n: p for n, p in reference.named_parameters() if p.requires_grad}

    def weights_from(scale: float) -> dict[str, Tensor]:
        """The interpolated weights as a differentiable function of what is trained."""
        weights = {}
        for name, module in reference.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                weights[f"{name}.weight"] = module.base_layer.weight + scale * module.get_delta_weight("default")
        for name, p in factors.items():
            if name in saved:
                plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
                plain = plain.replace(".modules_to_save.default", "")
                weights[plain] = scale * p + (1 - scale) * saved[name]
        return {n: weights.get(n, start[n]) for n in start}

    for name, tensor in weights_from(1 - alpha).items():
        torch.testing.assert_close(tensor, tilde[name])
    empty = Net().double()
    at = lambda scale: torch.func.functional_call(empty, weights_from(scale), (TOKENS,))  # noqa: E731
    (F.cross_entropy(at(1.0), LABELS) + beta * F.cross_entropy(at(1 - alpha), LABELS)).backward()

    before = {n: t.clone() for n, t in model.state_dict().items()}
    for p in factors.values():
        p.grad *= 2  # two steps' worth, by accumulation
    for _ in range(2):
        with regularizer.one_step():
            if way == "two terms":
                (loss_fn(model) + beta * F.cross_entropy(regularizer(TOKENS), LABELS)).backward()
            else:
                regularizer.backward(loss_fn)
                torch.testing.assert_close(regularizer.interpolated_loss, loss_fn(at_tilde).detach())
        regularizer.step = 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, factors[name].grad, msg=name)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    torch.testing.assert_close(loss_fn(model), loss_fn(theta))  # scales are what they were


class Attending(nn.Module):
    """As the towers of open_clip, whose projections are no layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 6), nn.Linear(6, 2)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return self.head(self.attn(hidden, hidden, hidden, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("strategy", ["functional", "in_place"])
def test_adapters_of_an_attention_are_regularized_on_the_path_from_the_base(strategy: str):
    torch.manual_seed(0)
    plain = Attending().double()
    config = peft.LoraConfig(target_modules=["attn"], r=2, lora_alpha=3)
    model = peft.get_peft_model(copy.deepcopy(plain), config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.5 * torch.randn_like(p))
    regularizer = InterpolatedWeightRegularizer(model, strategy=strategy)
    alpha, beta = regularizer.alpha, regularizer.beta
    # The update B A by factors of its own, not by a scale: PEFT up to 0.21 puts that of out_proj into the forward pass
    # twice (huggingface/peft#3774), so that merged weights, written out here, would not be those of its model.
    theta, tilde = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for name, p in tilde.named_parameters():
            if "lora_B" in name:
                p.mul_(1 - alpha)
    loss_fn(theta).backward()
    loss_fn(tilde).backward()
    regularizer.backward(loss_fn)
    torch.testing.assert_close(regularizer.interpolated_loss, loss_fn(tilde).detach())
    at_tilde = dict(tilde.named_parameters())
    factors = {name: p for name, p in theta.named_parameters() if p.requires_grad}
    assert len(factors) == 4
    for name, p in factors.items():
        second = at_tilde[name].grad / (1 - alpha if "lora_A" in name else 1)  # tilde's A sees (1 - alpha) B
        expected = p.grad + (1 - alpha) * beta * second
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, expected, msg=name)
    torch.testing.assert_close(regularizer.at_anchor(TOKENS), plain(TOKENS))
    torch.testing.assert_close(loss_fn(model), loss_fn(theta))


def test_the_model_at_the_anchor_is_the_base():
    model = adapted(**CONFIGS["embedding and convolution"])
    regularizer = InterpolatedWeightRegularizer(model)
    torch.testing.assert_close(regularizer.at_anchor(TOKENS), base_of()(TOKENS))
    with pytest.raises(ValueError, match="the anchor of adapters is the base model"):
        regularizer.move_anchor()


def test_scales_come_back_after_an_exception():
    model = adapted(**CONFIGS["plain"])
    scales = [dict(m.scaling) for m in model.modules() if hasattr(m, "scaling")]
    with pytest.raises(ZeroDivisionError):
        InterpolatedWeightRegularizer(model).backward(lambda model: 1 / 0)
    assert scales == [m.scaling for m in model.modules() if hasattr(m, "scaling")]


@pytest.mark.parametrize(
    "config",
    [peft.LoraConfig(target_modules=["fc"], use_dora=True), peft.LoHaConfig(target_modules=["fc"])],
    ids=["DoRA", "LoHa"],
)
def test_adapters_whose_update_is_not_scaled_are_refused(config):
    with pytest.raises(ValueError, match=r"the adapters' weights base_model\.model\.fc\..* can't be regularized"):
        InterpolatedWeightRegularizer(peft.get_peft_model(Net(), config))


def test_a_variant_of_lora_with_the_same_weights_is_refused():
    model = adapted(**CONFIGS["plain"])
    model.base_model.model.fc.lora_variant["default"] = object()  # as DoRA has one, and VeLoRA, whose names are LoRA's
    with pytest.raises(ValueError, match=r"the adapters' weights base_model\.model\.fc\.lora_A.* can't be regularized"):
        InterpolatedWeightRegularizer(model)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_begin_by_changing_the_base_are_refused(init: str):
    config = peft.LoraConfig(target_modules=["fc"], r=2, init_lora_weights=init)
    with pytest.raises(ValueError, match=f"was begun by init_lora_weights='{init}', which changes"):
        InterpolatedWeightRegularizer(peft.get_peft_model(Net(), config))


def test_a_frozen_adapter_beside_the_trained_one_belongs_to_the_anchor():
    model = adapted(target_modules=["fc", "embed"], r=2)
    model.add_adapter("second", peft.LoraConfig(target_modules=["fc"], r=3))
    model = model.double()
    model.base_model.set_adapter(["default", "second"])
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        p.requires_grad_("second" in name)
        if "second" in name:
            p.data.add_(0.3 * torch.randn_like(p))
    regularizer = InterpolatedWeightRegularizer(model)
    before = copy.deepcopy(model)
    before.base_model.set_adapter("default")
    torch.testing.assert_close(regularizer.at_anchor(TOKENS), before(TOKENS))
    anchor, theta = (merged(m).state_dict() for m in (before, model))
    tilde = Net().double()
    tilde.load_state_dict(patch(anchor, theta, anchor_weight=regularizer.alpha))
    regularizer.backward(loss_fn)
    torch.testing.assert_close(regularizer.interpolated_loss, loss_fn(tilde).detach())


def test_merged_adapters_are_refused():
    model = adapted(**CONFIGS["plain"])
    regularizer = InterpolatedWeightRegularizer(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="adapters are merged into the weights of Linear"):
        regularizer.backward(loss_fn)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT's own, of transformers
def test_the_gradient_is_right_in_a_model_of_transformers_that_multiplies_from_the_right():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ).double()
    tokens = torch.randint(20, (3, 8))
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(copy.deepcopy(base), config).double().train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    regularizer = InterpolatedWeightRegularizer(model)
    loss_of = lambda model: model(input_ids=tokens, labels=tokens).loss  # noqa: E731
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
    for anchor_weight, strength in ((0.0, 1.0), (regularizer.alpha, 0.5)):
        mixed = copy.deepcopy(base)
        mixed.load_state_dict(patch(base, merged(model), anchor_weight=anchor_weight))
        mixed.requires_grad_(True).zero_grad()
        loss_of(mixed).backward()
        for name, layer in model.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                whole = strength * mixed.get_parameter(f"{name}.weight").grad.T * layer.scaling["default"]
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                expected[f"base_model.model.{name}.lora_A.default.weight"] += b.T @ whole
                expected[f"base_model.model.{name}.lora_B.default.weight"] += whole @ a.T
    regularizer.backward(loss_of)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def saved(folder: Path, seed: int, **config) -> tuple[nn.Module, Adapter]:
    model = adapted(seed, **config)
    model.save_pretrained(folder)
    return model, Adapter.load(folder)


def loaded(adapter: Adapter, folder: Path) -> nn.Module:
    """The base with an adapter, as PEFT reads it from a folder."""
    adapter.save(folder)
    return peft.PeftModel.from_pretrained(base_of(), folder).double()


LINEAR = {
    "plain": ({"target_modules": ["fc"], "r": 2}, {"target_modules": ["fc"], "r": 2}),
    "unlike ranks, scales, layers": (
        {"target_modules": ["fc", "embed"], "r": 2, "rank_pattern": {"fc": 4}, "alpha_pattern": {"embed": 3}},
        {"target_modules": ["fc"], "r": 3, "lora_alpha": 7, "use_rslora": True},
    ),
    "heads": ({"target_modules": ["fc"], "r": 2, "modules_to_save": ["head"]},) * 2,
}


def test_an_adapter_saved_by_torch_save_is_read_too(tmp_path: Path):
    model, adapter = saved(tmp_path / "new", 1, target_modules=["fc"], r=2)
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old" / "adapter_model.bin").exists()
    old = Adapter.load(tmp_path / "old")
    assert old.weights.keys() == adapter.weights.keys()
    assert all(torch.equal(old.weights[name], tensor) for name, tensor in adapter.weights.items())
    with pytest.raises(FileNotFoundError, match=r"there is no file .*adapter_config\.json"):
        Adapter.load(tmp_path)


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of a base without a configuration
@pytest.mark.parametrize("configs", LINEAR.values(), ids=LINEAR)
def test_a_mean_of_adapters_is_that_of_merged_weights(configs: tuple, tmp_path: Path):
    models, adapters = zip(*(saved(tmp_path / str(i), i, **c) for i, c in enumerate(configs)), strict=True)
    mean, errors = mix_adapters(adapters)
    assert set(errors.values()) == {0}
    whole = [merged(model).state_dict() for model in models]
    for name, tensor in merged(loaded(mean, tmp_path / "mean")).state_dict().items():
        torch.testing.assert_close(tensor, (whole[0][name] + whole[1][name]) / 2)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_weights_of_any_sum_scale_the_update_and_a_rank_costs_the_error_that_is_told(tmp_path: Path):
    models, adapters = zip(*(saved(tmp_path / str(i), i, target_modules=["fc"], r=2) for i in (1, 2)), strict=True)
    base = base_of().fc.weight.detach()
    update = sum(w * (merged(m).fc.weight.detach() - base) for w, m in zip((0.9, -0.4), models, strict=True))
    mixed, _ = mix_adapters(adapters, [0.9, -0.4])
    torch.testing.assert_close(merged(loaded(mixed, tmp_path / "mixed")).fc.weight.detach() - base, update)
    cut, errors = mix_adapters(adapters, [0.9, -0.4], rank=2)
    found = merged(loaded(cut, tmp_path / "cut")).fc.weight.detach() - base
    values = torch.linalg.svdvals(update)
    nearest = (values[2:].norm() / values.norm()).item()
    assert errors == {"base_model.model.fc": pytest.approx(nearest)}
    assert ((found - update).norm() / update.norm()).item() == pytest.approx(nearest)
    assert cut.config["r"] == 2
    assert mix_adapters(adapters, rank=9)[1] == {"base_model.model.fc": 0}


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(target_modules=["fc"], use_dora=True), r"has use_dora: its update is not s B A"),
        (peft.LoraConfig(target_modules=["fc"], r=2, init_lora_weights="pissa"), r"init_lora_weights='pissa', which"),
        (peft.LoHaConfig(target_modules=["fc"]), r"an adapter of type LOHA; only LORA can be mixed"),
        (peft.LoraConfig(target_modules=["conv"]), r"factors that are no matrices"),
    ],
    ids=["DoRA", "PiSSA", "LoHa", "convolution"],
)
def test_adapters_whose_update_is_not_a_product_on_the_base_are_refused(config, message: str, tmp_path: Path):
    peft.get_peft_model(Net(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Adapter.load(tmp_path)


def test_what_can_not_be_mixed_is_said(tmp_path: Path):
    _, plain = saved(tmp_path / "a", 1, target_modules=["fc"], r=2)
    _, headed = saved(tmp_path / "b", 1, target_modules=["fc"], r=2, modules_to_save=["head"])
    for adapters, options, message in (
        ([], {}, "no adapter was given"),
        ([plain, plain], {"weights": [1.0]}, r"weights must be 2 finite numbers.*got \[1\.0\]"),
        ([plain], {"rank": 0}, "rank must be at least 1, got 0"),
        ([plain, headed], {}, r"the adapters differ in modules_to_save"),
        (
            [headed, headed],
            {"weights": [1, 1]},
            r"whole weights \(.*head.*\) can be averaged only, the weights' sum is 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            mix_adapters(adapters, **options)
    with pytest.raises(FileExistsError, match="exists; give a folder that does not"):
        plain.save(tmp_path / "a")
