"""Adapters and quantised weights, as the libraries that make them write them, are recognised and refused by name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interpolate import WeightMismatchError, average_files, patch, patch_files, slerp, task_arithmetic, uniform_soup
from interpolate._unmixable import adapter_factors, check_mixable, quantised
from interpolate.inspection import diff, inspect

Weights = dict[str, Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc, self.norm = nn.Embedding(8, 64), nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(self.embedding(x)))


def adapted(config: str, **options: Any) -> Weights:
    peft = pytest.importorskip("peft")
    options.setdefault("target_modules", ["fc"])
    model = peft.get_peft_model(Net(), getattr(peft, config)(**options))
    return {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}


PRODUCTS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"target_modules": ["fc", "embedding"], "use_dora": True},
    "AdaLoraConfig": {"total_step": 10},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "VeraConfig": {"r": 4},
    "OFTConfig": {},
    "BOFTConfig": {},
    "HRAConfig": {},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("config", PRODUCTS)
def test_adapters_of_peft_are_refused_by_the_names_of_their_layers(config: str):
    weights = adapted(config, **PRODUCTS[config])
    with pytest.raises(ValueError, match=r"adapter .* in base_model\.model\.(fc|embedding).*merge_and_unload"):
        patch(weights, weights, anchor_weight=0.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_adapters_that_act_linearly_are_mixed():
    weights = adapted("IA3Config", feedforward_modules=["fc"])
    assert list(weights) == ["base_model.model.fc.ia3_l"]
    other = {name: tensor + 2 for name, tensor in weights.items()}
    assert torch.equal(uniform_soup([weights, other])[next(iter(weights))], next(iter(weights.values())) + 1)


def test_every_kind_of_mixing_refuses_adapters(tmp_path: Path):
    weights = {"q.lora_A.weight": torch.randn(2, 8), "q.lora_B.weight": torch.zeros(8, 2)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    paths = [tmp_path / "adapter_model.safetensors"] * 2
    for mixing in (
        lambda: patch(weights, weights, anchor_weight=0.5),
        lambda: slerp(weights, weights, anchor_weight=0.5),
        lambda: uniform_soup([weights, weights]),
        lambda: task_arithmetic(weights, [weights], [0.5]),
        lambda: patch_files(*paths, tmp_path / "out.safetensors", anchor_weight=0.5),
        lambda: average_files(paths, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(ValueError, match=r"factors of an adapter \(such as LoRA\) in q:"):
            mixing()
    assert not (tmp_path / "out.safetensors").exists()
    assert [tensor.name for tensor in inspect(paths[0]).tensors] == list(weights)
    assert not any(tensor.differs for tensor in diff(*paths).tensors)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",  # kohya
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a",
        "lora_unet_mid_block_attentions_0_proj_in.lokr_w1",
        "lora_unet_mid_block_attentions_0_proj_in.dora_scale",
        "unet.down_blocks.0.attn1.to_q.lora_A.weight",  # diffusers
        "unet.down_blocks.0.attn1.processor.to_q_lora.down.weight",
        "unet.down_blocks.0.attn1.to_q.lora_linear_layer.up.weight",
        "double_blocks.0.processor.qkv_lora1.up.weight",  # xlabs
        "h.0.attn.lora_A",  # loralib
        "base_model.model.q.lora_A.default.weight",  # PEFT's own model, not its file
        "base_model.model.embed.lora_embedding_B.default",
    ],
)
def test_factors_are_known_by_name(name: str):
    assert adapter_factors([name]) == [name]


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attentions_0_proj_in.alpha",
        "model.layers.0.self_attn.q_a_proj.weight",  # DeepSeek's own low rank
        "blocks.0.attn.w_lora.lora.0.weight",  # RWKV-7's
        "down_blocks.0.up.weight",
        "explora.A.weight",
        "base_model.model.fc.ia3_l",
        "road.weight",
    ],
)
def test_other_names_are_no_factors(name: str):
    assert adapter_factors([name]) == []


def bitsandbytes_8bit() -> Weights:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)).to("cpu")
    model(torch.randn(2, 64))
    return model.state_dict()


def bitsandbytes_4bit() -> Weights:
    bnb = pytest.importorskip("bitsandbytes")
    return nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu").state_dict()


def quantize_dynamic() -> Weights:
    model = nn.Sequential(nn.Linear(4, 4))
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8).state_dict()


def quantize_statically() -> Weights:
    model = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Conv2d(3, 4, 1)).eval()
    model.qconfig = torch.ao.quantization.default_qconfig
    prepared = torch.ao.quantization.prepare(model)
    prepared(torch.randn(1, 3, 4, 4))
    return torch.ao.quantization.convert(prepared).state_dict()


def gptq() -> Weights:
    return {
        "0.qweight": torch.zeros(8, 64, dtype=torch.int32),
        "0.qzeros": torch.zeros(1, 8, dtype=torch.int32),
        "0.scales": torch.ones(1, 64, dtype=torch.float16),
        "0.g_idx": torch.zeros(64, dtype=torch.int32),
    }


def compressed_tensors() -> Weights:
    return {"0.weight_packed": torch.zeros(8, 8, dtype=torch.int32), "0.weight_scale": torch.ones(8, 1)}


def int8_with_a_scale() -> Weights:
    return {"0.gate_up_proj": torch.zeros(8, 8, dtype=torch.int8), "0.gate_up_proj_scale": torch.ones(8, 1)}


def deepseek_float8() -> Weights:
    return {"0.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn), "0.weight_scale_inv": torch.ones(1, 1)}


def gpt_oss() -> Weights:
    codes = torch.zeros(2, 4, dtype=torch.uint8)
    return {"0.gate_up_proj_blocks": codes, "0.gate_up_proj_scales": codes[:, 0], "0.gate_up_proj_bias": torch.ones(2)}


@pytest.mark.filterwarnings("ignore")  # torch.ao's own
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(bitsandbytes_8bit, marks=pytest.mark.slow),
        pytest.param(bitsandbytes_4bit, marks=pytest.mark.slow),
        quantize_dynamic,
        quantize_statically,
        gptq,
        compressed_tensors,
        int8_with_a_scale,
        deepseek_float8,
        gpt_oss,
    ],
)
def test_quantised_weights_are_refused_by_the_names_of_their_layers(make: Callable[[], Weights]):
    weights = make()
    with pytest.raises(ValueError, match=r"quantised weights in [01](, 1)?: .* before quantisation"):
        patch(weights, weights, anchor_weight=0.5)


def test_integer_buffers_and_fake_quantisers_are_not_quantised_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    buffers = {
        "relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
        "embeddings.position_ids": torch.arange(4),
        "actnorm.initialized": torch.tensor(1, dtype=torch.uint8),
        "actnorm.scale": torch.ones(4),
        "mask": torch.ones(2, 2, dtype=torch.bool),
        "weight_fake_quant.scale": torch.ones(1),
        "weight_fake_quant.zero_point": torch.zeros(1, dtype=torch.int32),
        "weight_fake_quant.fake_quant_enabled": torch.ones(1, dtype=torch.uint8),
    }
    assert quantised({**model.state_dict(), **buffers}) == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_float8_is_mixed_in_float32_and_rounded_once(dtype: torch.dtype, tmp_path: Path):
    anchor, theta = ({"norm.weight": torch.randn(257).to(dtype), "norm.scale": torch.ones(3).to(dtype)} for _ in "at")
    a, t = anchor["norm.weight"].float(), theta["norm.weight"].float()
    for i, source in enumerate((anchor, theta)):
        save_file(source, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    patch_files(*paths, tmp_path / "out.safetensors", anchor_weight=0.3)
    for patched in (patch(anchor, theta, anchor_weight=0.3), load_file(tmp_path / "out.safetensors")):
        assert patched["norm.weight"].dtype is dtype
        assert torch.equal(patched["norm.weight"].float(), torch.lerp(t, a, 0.3).to(dtype).float())
    assert torch.equal(uniform_soup([anchor, theta])["norm.weight"].float(), ((a + t) / 2).to(dtype).float())


@pytest.mark.parametrize("other", [torch.int8, torch.complex64])
def test_numbers_of_another_kind_are_refused_on_either_side(other: torch.dtype):
    floating, others = {"w": torch.tensor([0.5])}, {"w": torch.tensor([100]).to(other)}
    for anchor, theta in ((others, floating), (floating, others)):
        with pytest.raises(WeightMismatchError, match=re.escape(f"{other}".removeprefix("torch."))):
            patch(anchor, theta, anchor_weight=0.5)


def test_what_is_checked_needs_no_values():
    with torch.device("meta"):
        check_mixable(nn.Linear(2, 2).state_dict(), nn.Linear(2, 2).state_dict())
