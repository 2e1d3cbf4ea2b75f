from pathlib import Path

import pytest
import torch
from random_modules import identical
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from interpolate import InterpolatedWeightRegularizer, SWAAverager
from interpolate.transformers import AveragingCallback, RegularizedTrainer
from interpolate.weights import trainable_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own deprecations


def tiny() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def data() -> list[dict]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 20, (6,)), "labels": torch.tensor(i % 2)} for i in range(16)]


def arguments(folder: Path, **options) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "max_grad_norm": 0.0,
            **options,
        }
    )


class Seen(Trainer):
    """Keeps the batches that it trains on."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), {k: v.clone() for k, v in inputs.items()}]
        return super().training_step(model, inputs, *args, **kwargs)


class Regression(nn.Module):
    """Takes no keyword arguments for its loss, so that the trainer divides by the accumulation steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.net(x), labels)}


def points() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(16)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_equals_a_plain_loop_with_the_regularizer(accumulation: int, tmp_path: Path):
    options = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, **options)
    torch.manual_seed(2)
    anchor = {n: torch.randn_like(p) for n, p in trainable_weights(Regression()).items()}

    model = Regression()
    regularizer = InterpolatedWeightRegularizer(model, anchor=anchor, seed=5)
    RegularizedTrainer(model=model, regularizer=regularizer, args=args, train_dataset=points()).train()

    recorder = Seen(model=Regression(), args=args, train_dataset=points())
    recorder.train()
    reference = Regression()
    by_hand = InterpolatedWeightRegularizer(reference, anchor=anchor, seed=5)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for i, batch in enumerate(recorder.seen, start=1):
        by_hand.backward(lambda m, batch=batch: m(**batch)["loss"] / accumulation)
        if i % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert regularizer.step == 4 * accumulation
    torch.testing.assert_close(dict(model.named_parameters()), dict(reference.named_parameters()))
    torch.testing.assert_close(regularizer.interpolated_loss, by_hand.interpolated_loss)


def test_models_of_the_library_are_regularized(tmp_path: Path):
    model, plain = tiny(), tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    regularizer = InterpolatedWeightRegularizer(model, strength=5.0)
    RegularizedTrainer(model=model, regularizer=regularizer, args=arguments(tmp_path), train_dataset=data()).train()
    Trainer(model=plain, args=arguments(tmp_path), train_dataset=data()).train()
    assert regularizer.step == 4
    assert torch.equal(regularizer.anchor["classifier.weight"], before["classifier.weight"])
    assert not torch.equal(model.classifier.weight, plain.classifier.weight)


def test_the_average_is_saved_and_resumed_with_the_trainer(tmp_path: Path):
    def train(folder: Path, steps: int, resume: str | None = None) -> tuple[nn.Module, SWAAverager]:
        callback = AveragingCallback(lambda model: SWAAverager(model, start_step=1))
        args = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
        trainer = Trainer(model=tiny(), args=args, train_dataset=data(), callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model, callback.averager

    whole_model, whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    model, resumed = train(tmp_path / "parts", 4, resume=str(tmp_path / "parts" / "checkpoint-2"))
    assert identical(dict(model.named_parameters()), dict(whole_model.named_parameters()))
    assert identical(resumed.weights, whole.weights)
    assert (resumed.n_averaged, resumed.step) == (3, 4)
    with resumed.applied() as average:
        assert torch.equal(average.classifier.weight, resumed.weights["classifier.weight"])


def test_a_regularizer_of_another_model_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="made with the model that is given to the trainer"):
        RegularizedTrainer(
            model=tiny(),
            regularizer=InterpolatedWeightRegularizer(tiny()),
            args=arguments(tmp_path),
            train_dataset=data(),
        )
