import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_modules import identical
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from interpolate import InterpolatedWeightRegularizer, SWAAverager
from interpolate.transformers import InterpolatedTrainer
from interpolate.weights import trainable_weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the libraries' own deprecations


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
        prediction = self.net(x)
        return {"loss": nn.functional.mse_loss(prediction, labels), "prediction": prediction}


def points() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(16)]


SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}


def anchor() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {n: torch.randn_like(p) for n, p in trainable_weights(Regression()).items()}


def regularizer(model: nn.Module, **options) -> InterpolatedWeightRegularizer:
    return InterpolatedWeightRegularizer(model, anchor=anchor(), seed=5, **options)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_equals_a_plain_loop_with_the_regularizer(accumulation: int, tmp_path: Path):
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, **SGD)
    model = Regression()
    trainer = InterpolatedTrainer(model=model, regularizer=regularizer, args=args, train_dataset=points())
    trainer.train()

    recorder = Seen(model=Regression(), args=args, train_dataset=points())
    recorder.train()
    reference = Regression()
    by_hand = regularizer(reference)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for i, batch in enumerate(recorder.seen, start=1):
        by_hand.backward(lambda m, batch=batch: m(**batch)["loss"] / accumulation)
        if i % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert trainer.regularizer.step == 4 * accumulation
    torch.testing.assert_close(dict(model.named_parameters()), dict(reference.named_parameters()))
    torch.testing.assert_close(trainer.regularizer.interpolated_loss, by_hand.interpolated_loss)


class OwnLoss(InterpolatedTrainer):
    """Computes its loss as many users' trainers do, some of them from the outputs of the trainer's own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        _, outputs = super().compute_loss(model, {**inputs, "labels": labels}, return_outputs=True)
        loss = nn.functional.mse_loss(outputs["prediction"], labels)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_a_loss_of_ones_own_is_scaled_like_the_trainers(strength: float, tmp_path: Path):
    models = Regression(), Regression()
    for trainer, model in zip((InterpolatedTrainer, OwnLoss), models, strict=True):
        trainer(
            model=model,
            regularizer=lambda m: regularizer(m, strength=strength),
            args=arguments(tmp_path, **SGD),
            train_dataset=points(),
        ).train()
    assert identical(dict(models[0].named_parameters()), dict(models[1].named_parameters()))


def test_a_training_step_that_hides_its_backward_pass_is_refused(tmp_path: Path):
    class Base(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model(**inputs)["loss"].backward()
            return torch.tensor(0.0)

    class Mixed(InterpolatedTrainer, Base):
        pass

    trainer = Mixed(model=Regression(), regularizer=regularizer, args=arguments(tmp_path), train_dataset=points())
    with pytest.raises(RuntimeError, match=r"training_step of Mixed must call self\.accelerator\.backward"):
        trainer.train()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_models_of_the_library_are_regularized_with_its_loss_and_label_smoothing(smoothing: float, tmp_path: Path):
    args = arguments(tmp_path, label_smoothing_factor=smoothing, **SGD)
    model, plain = tiny(), tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    away = {n: p + 0.1 for n, p in before.items()}
    trainer = InterpolatedTrainer(
        model=model,
        regularizer=lambda m: InterpolatedWeightRegularizer(m, anchor=away, strength=5.0),
        args=args,
        train_dataset=data(),
    )
    trainer.train()
    recorder = Seen(model=plain, args=args, train_dataset=data())
    recorder.train()
    assert not torch.equal(model.classifier.weight, plain.classifier.weight)

    reference = tiny()
    by_hand = InterpolatedWeightRegularizer(reference, anchor=away, strength=5.0)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batch in recorder.seen:
        labels = batch.pop("labels")
        by_hand.backward(
            lambda m, batch=batch, labels=labels: nn.functional.cross_entropy(
                m(**batch).logits, labels, label_smoothing=smoothing
            )
        )
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(dict(model.named_parameters()), dict(reference.named_parameters()))


class Recorder(TrainerCallback):
    """Keeps theta after every optimizer step, and what the model held when it was evaluated."""

    def __init__(self) -> None:
        self.theta: list[dict[str, Tensor]] = []
        self.evaluated: list[dict[str, Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.theta.append({n: p.detach().clone() for n, p in model.named_parameters()})

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.evaluated.append({n: p.detach().clone() for n, p in model.named_parameters()})

    def average(self, steps: int, start: int = 0) -> dict[str, Tensor]:
        return {n: torch.stack([theta[n] for theta in self.theta[start:steps]]).mean(0) for n in self.theta[0]}


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
BEST = {**EVALUATED, "load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}


def averaging(folder: Path, recorder: Recorder, **options) -> InterpolatedTrainer:
    score = {"compute_metrics": lambda _: {"score": recorder.evaluated[-1]["classifier.weight"].sum().item()}}
    return InterpolatedTrainer(
        model=tiny(),
        averager=SWAAverager,
        args=arguments(folder, **{**EVALUATED, **options}),
        train_dataset=data(),
        eval_dataset=data()[:2],
        callbacks=[recorder],
        **score,
    )


def test_what_is_evaluated_saved_and_shipped_is_the_average(tmp_path: Path):
    recorder = Recorder()
    trainer = averaging(tmp_path, recorder)
    trainer.train()
    plain = Trainer(model=tiny(), args=arguments(tmp_path / "plain"), train_dataset=data())
    plain.train()
    assert identical(recorder.theta[-1], dict(plain.model.named_parameters()))  # training goes on at theta
    assert len(recorder.evaluated) == 2
    for steps, evaluated in zip((2, 4), recorder.evaluated, strict=True):
        torch.testing.assert_close(evaluated, recorder.average(steps))
        saved = BertForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{steps}")
        torch.testing.assert_close(dict(saved.named_parameters()), recorder.average(steps))
    scores = [log["eval_score"] for log in trainer.state.log_history if "eval_score" in log]
    torch.testing.assert_close(scores[-1], recorder.average(4)["classifier.weight"].sum().item())
    torch.testing.assert_close(dict(trainer.model.named_parameters()), recorder.average(4))
    trainer.save_model(tmp_path / "shipped")
    shipped = BertForSequenceClassification.from_pretrained(tmp_path / "shipped")
    assert identical(dict(shipped.named_parameters()), dict(trainer.model.named_parameters()))
    trainer.predict(data()[:2])
    trainer.evaluate()
    for evaluated in recorder.evaluated[-2:]:
        assert identical(evaluated, dict(trainer.model.named_parameters()))


def test_the_best_average_is_chosen_and_loaded_at_the_end(tmp_path: Path):
    recorder = Recorder()
    trainer = averaging(tmp_path, recorder, max_steps=6, **BEST)
    trainer.train()
    averages = [recorder.average(steps) for steps in (2, 4, 6)]
    scores = [average["classifier.weight"].sum().item() for average in averages]
    assert trainer.state.best_metric == pytest.approx(max(scores))
    torch.testing.assert_close(dict(trainer.model.named_parameters()), averages[scores.index(max(scores))])


ELSEWHERE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from pathlib import Path
from transformers import BertForSequenceClassification, Trainer
from test_transformers import Recorder, arguments, data

recorder, model = Recorder(), BertForSequenceClassification.from_pretrained(sys.argv[1])
Trainer(model=model, args=arguments(Path(sys.argv[1])), eval_dataset=data()[:2], callbacks=[recorder]).evaluate()
torch.testing.assert_close(recorder.evaluated[-1], torch.load(sys.argv[2]))
"""


def test_a_checkpoint_is_the_average_in_another_process(tmp_path: Path):
    averaging(tmp_path, recorder := Recorder()).train()
    torch.save(recorder.average(2), tmp_path / "expected.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "checkpoint-2"), str(tmp_path / "expected.pt")]
    tests = Path(__file__).parent
    subprocess.run(command, check=True, cwd=tests, env={**os.environ, "PYTHONPATH": str(tests.parent)})


def test_an_interrupted_training_is_evaluated_and_saved_at_the_average(tmp_path: Path):
    class Interrupting(Recorder):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    trainer = averaging(tmp_path, recorder := Interrupting())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.evaluate()
    trainer.save_model(tmp_path / "shipped")
    shipped = BertForSequenceClassification.from_pretrained(tmp_path / "shipped")
    for weights in (recorder.evaluated[-1], dict(shipped.named_parameters())):
        torch.testing.assert_close(weights, recorder.average(3))
    assert identical(dict(trainer.model.named_parameters()), recorder.theta[-1])


def test_resuming_from_any_folder_equals_never_stopping(tmp_path: Path):
    def train(folder: Path, steps: int, resume: Path | None = None) -> tuple[InterpolatedTrainer, Recorder]:
        recorder = Recorder()
        trainer = InterpolatedTrainer(
            model=tiny(),
            regularizer=InterpolatedWeightRegularizer,
            averager=lambda model: SWAAverager(model, start_step=1),
            args=arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"),
            train_dataset=data(),
            callbacks=[recorder],
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer, recorder

    whole, kept = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 2)
    (tmp_path / "parts").rename(tmp_path / "elsewhere")
    train(tmp_path / "another", 4)  # another run's checkpoint-2 lies where the resumed run writes
    resumed, rest = train(tmp_path / "another", 6, resume=tmp_path / "elsewhere" / "checkpoint-2")
    assert identical(rest.theta[-1], kept.theta[-1])
    assert identical(dict(resumed.model.named_parameters()), dict(whole.model.named_parameters()))
    assert identical(resumed.averager.weights, whole.averager.weights)
    assert (resumed.averager.n_averaged, resumed.averager.step) == (5, 6)
    assert identical(resumed.regularizer.anchor, {n: p.detach() for n, p in tiny().named_parameters()})
    assert (resumed.regularizer.step, resumed.regularizer.alpha) == (6, whole.regularizer.alpha)


def test_resuming_without_what_was_saved_or_with_what_was_not_is_refused(tmp_path: Path):
    averaging(tmp_path, Recorder()).train()
    with pytest.raises(ValueError, match="checkpoint-2 was saved with averager, and can't be resumed with regularizer"):
        InterpolatedTrainer(
            model=tiny(), regularizer=InterpolatedWeightRegularizer, args=arguments(tmp_path), train_dataset=data()
        ).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    averaging(tmp_path / "models", Recorder(), save_only_model=True).train()
    with pytest.raises(ValueError, match="checkpoint-2 was saved with no regularizer and no averager"):
        averaging(tmp_path / "models", Recorder()).train(resume_from_checkpoint=str(tmp_path / "models/checkpoint-2"))


def test_adapters_of_peft_are_regularized_and_resumed_and_not_averaged(tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    def adapted() -> nn.Module:
        torch.manual_seed(3)
        return get_peft_model(tiny(), LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))

    def train(folder: Path, steps: int, resume: Path | None = None) -> InterpolatedTrainer:
        trainer = InterpolatedTrainer(
            model=adapted(),
            regularizer=InterpolatedWeightRegularizer,
            args=arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"),
            train_dataset=data(),
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    whole = train(tmp_path / "whole", 4)
    resumed = train(tmp_path / "parts", 4, resume=tmp_path / "whole" / "checkpoint-2")
    assert identical(trainable_weights(resumed.model), trainable_weights(whole.model))
    whole_weights = {n: p for n, p in trainable_weights(adapted()).items() if "modules_to_save" in n}
    assert identical(resumed.regularizer.anchor, whole_weights)
    with pytest.raises(ValueError, match="factors of an adapter"):
        InterpolatedTrainer(
            model=adapted(), averager=SWAAverager, args=arguments(tmp_path), train_dataset=data()
        ).train()


def test_a_training_without_a_snapshot_warns(tmp_path: Path):
    trainer = InterpolatedTrainer(
        model=Regression(),
        averager=lambda model: SWAAverager(model, start_step=4),
        args=arguments(tmp_path),
        train_dataset=points(),
    )
    with pytest.warns(UserWarning, match="averaged in 4 steps: the first snapshot is due at step 5"):
        trainer.train()


def test_objects_made_before_the_model_is_prepared_are_refused(tmp_path: Path):
    model = tiny()
    with pytest.raises(ValueError, match=r"lambda model: InterpolatedWeightRegularizer\(model\)"):
        InterpolatedTrainer(model=model, regularizer=InterpolatedWeightRegularizer(model), args=arguments(tmp_path))
    with pytest.raises(ValueError, match=r"lambda model: SWAAverager\(model\)"):
        InterpolatedTrainer(model=model, averager=SWAAverager(model), args=arguments(tmp_path))
    with pytest.raises(ValueError, match="needs a regularizer, an averager, or both"):
        InterpolatedTrainer(model=model, args=arguments(tmp_path))
