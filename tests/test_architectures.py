"""Real architectures, small and random: gradients of explicit float64 copies, state of a plain step."""

import copy
from collections.abc import Callable

import pytest
import torch
from random_modules import identical, snapshot
from test_regularizer import STRATEGIES, explicit_gradients, gradients, regularizer_away_from_anchor
from torch import Tensor, nn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings are the other libraries' own

LossFn = Callable[[nn.Module], Tensor]
Case = tuple[nn.Module, LossFn]
TOKENS = 40
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def of_images(model: nn.Module, size: int = 32) -> Case:
    images = torch.randn(4, 3, size, size).double()
    return model, lambda model: model(images).square().mean()


def of_tokens(model: nn.Module, length: int = 12, **inputs: Tensor) -> Case:
    tokens = torch.randint(1, TOKENS, (2, length))
    return model, lambda model: model(input_ids=tokens, labels=tokens, **inputs).loss


def resnet() -> Case:
    import torchvision

    return of_images(torchvision.models.resnet18(num_classes=5, zero_init_residual=True))


def convnext() -> Case:
    import timm

    return of_images(timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5))


def vit() -> Case:
    import timm

    return of_images(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


def lstm_and_gru() -> Case:
    x = torch.randn(3, 7, 4).double()
    return Recurrent(), lambda model: model(x).square().mean()


def normalised_weights() -> Case:
    from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

    layers = weight_norm(nn.Linear(3, 8)), spectral_norm(nn.Linear(8, 8)), orthogonal(nn.Linear(8, 8))
    x = torch.randn(5, 3).double()
    return nn.Sequential(*layers), lambda model: model(x).square().mean()


def bert() -> Case:
    from transformers import BertConfig, BertForMaskedLM

    return of_tokens(BertForMaskedLM(BertConfig(vocab_size=TOKENS, **SIZES)))


def gpt2_with_tied_weights() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    return of_tokens(GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_embd=16, n_layer=2, n_head=2)))


def llama_with_dynamic_rope() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = LlamaConfig(vocab_size=TOKENS, max_position_embeddings=8, rope_parameters=rope, **SIZES)
    return of_tokens(LlamaForCausalLM(config), length=20)


def mixtral() -> Case:
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 4, "num_key_value_heads": 1, "output_router_logits": True}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=TOKENS, **experts, **SIZES))
    model.set_experts_implementation("eager")  # the grouped multiplication knows no float64
    return of_tokens(model)


def t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=TOKENS, dropout_rate=0.0, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    config.decoder_start_token_id = 0
    return of_tokens(T5ForConditionalGeneration(config))


def whisper() -> Case:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 10}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=TOKENS, **layers, **sizes, **special))
    sound, tokens = torch.randn(2, 8, 20).double(), torch.randint(1, TOKENS, (2, 6))
    return model, lambda model: model(input_features=sound, labels=tokens).loss


def clip_with_both_towers() -> Case:
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP

    vision = {"image_size": 32, "layers": 2, "width": 16, "patch_size": 16, "head_width": 8}
    text = {"context_length": 8, "vocab_size": TOKENS, "width": 16, "heads": 2, "layers": 2}
    model, images, tokens = CLIP(16, vision, text), torch.randn(4, 3, 32, 32).double(), torch.randint(TOKENS, (4, 8))
    return model, lambda model: ClipLoss()(*model(images, tokens))


def clip_of_transformers() -> Case:
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": TOKENS, "max_position_embeddings": 8, "eos_token_id": 2, **SIZES}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 16, **SIZES}, projection_dim=16)
    )
    images, tokens = torch.randn(4, 3, 32, 32).double(), torch.randint(TOKENS, (4, 8))
    return model, lambda model: model(input_ids=tokens, pixel_values=images, return_loss=True).loss


CASES: list[Callable[[], Case]] = [
    resnet,
    convnext,
    vit,
    lstm_and_gru,
    normalised_weights,
    bert,
    gpt2_with_tied_weights,
    llama_with_dynamic_rope,
    mixtral,
    t5,
    whisper,
    clip_with_both_towers,
    clip_of_transformers,
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_a_step_is_that_of_explicit_copies(build: Callable[[], Case], strategy: str):
    torch.manual_seed(0)
    model, loss_fn = build()
    model.double().train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # masks are drawn anew in each pass and can't be compared
    regularizer = regularizer_away_from_anchor(model, strategy=strategy)
    expected, plain = explicit_gradients(regularizer, loss_fn), copy.deepcopy(model)
    loss_fn(plain).backward()
    regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)
    assert identical(snapshot(model), snapshot(plain))
    model.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(loss_fn(model), loss_fn(plain))
