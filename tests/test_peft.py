"""Students that PEFT has wrapped, from a folder too, and the model under their adapter as the teacher."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from akl_lightning.callbacks import StudentExport
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.divergences import ForwardKL, ReverseKL
from akl_lightning.errors import UsageError
from akl_lightning.models.load import load_causal_lm
from akl_lightning.models.lora import LoraSettings, virtual_tokens
from akl_lightning.module import DistillationModule
from akl_lightning.projection import Projection
from tests.conftest import QUIET, gpt2
from tests.test_module import Bigram, loader, parameters, samples, stack

PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
PROMPTS: dict[str, peft.PeftConfig] = {
    "prompt tuning": peft.PromptTuningConfig(**PROMPT),
    "p-tuning": peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=8),
    "prefix tuning": peft.PrefixTuningConfig(**PROMPT),
}
SETTINGS = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"]}
ADAPTERS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(**SETTINGS, r=4, init_lora_weights=False, lora_dropout=0.1),
    "lora on the head": peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["c_attn", "lm_head"], init_lora_weights=False
    ),
    "dora and a head trained as a copy": peft.LoraConfig(
        **SETTINGS, use_dora=True, init_lora_weights=False, modules_to_save=["lm_head"]
    ),
    "ia3": peft.IA3Config(**SETTINGS, feedforward_modules=[], init_ia3_weights=False),
}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    torch.manual_seed(2)
    gpt2(16, layers=2).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def wrapped(folder: str, config: peft.PeftConfig) -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(load_causal_lm(folder), copy.deepcopy(config))
    with torch.no_grad():  # as new, some do nothing, and a copied head is the head
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05)


def at_responses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return logits[:, :-1][batch["labels"][:, 1:] != -100]


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


# --------------------------------------------------------------------------------------------------------------------
# An adapter's folder as the student


@pytest.mark.parametrize("kind", [*ADAPTERS, *PROMPTS])
def test_training_goes_on_from_an_adapters_folder(kind: str, folder: str, tmp_path: Path) -> None:
    first = wrapped(folder, {**ADAPTERS, **PROMPTS}[kind])
    first.eval().save_pretrained(tmp_path / "adapter")
    module = DistillationModule(str(tmp_path / "adapter"), gpt2(24), optimizer=sgd)
    student = module.student.model
    assert student.training and type(student) is peft.PeftModelForCausalLM
    batch = stack(samples())
    assert torch.allclose(student.eval()(**inputs(batch)).logits, first(**inputs(batch)).logits, atol=1e-6)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    if kind != "p-tuning":  # whose prompt comes back as what its encoder has given
        assert trained == {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    Trainer(**QUIET, max_epochs=2).fit(module, loader([batch]))
    changed = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and changed <= trained and (changed == trained or "copy" in kind)


def test_an_adapters_folder_is_exported_and_taken_as_a_teacher(
    folder: str, data: InstructionDataModule, tmp_path: Path
) -> None:
    wrapped(folder, ADAPTERS["lora"]).save_pretrained(tmp_path / "adapter")
    module = DistillationModule(str(tmp_path / "adapter"), str(tmp_path / "adapter"), optimizer=sgd)
    assert not any(parameter.requires_grad for parameter in module.teacher.model.parameters())
    rows = inputs(stack(samples()))
    for export in (StudentExport(str(tmp_path / "merged")), StudentExport(str(tmp_path / "alone"), merge=False)):
        Trainer(**QUIET, max_epochs=1, callbacks=[export]).fit(module, data)
        expected = module.student.model.eval()(**rows).logits
        assert torch.allclose(load_causal_lm(str(export.exported)).eval()(**rows).logits, expected, atol=1e-5)
    assert (tmp_path / "alone/adapter_config.json").exists() and not (tmp_path / "alone/config.json").exists()


def test_what_has_nothing_to_train_is_refused(folder: str, data: InstructionDataModule) -> None:
    frozen = gpt2(16).requires_grad_(False)
    adapted = wrapped(folder, ADAPTERS["lora"]).requires_grad_(False)
    for student, name in ((frozen, "GPT2LMHeadModel"), (adapted, "GPT2LMHeadModel"), (Bigram(), "Bigram")):
        student.requires_grad_(False)
        module = DistillationModule(student, gpt2(24))
        reason = f"there is nothing to train: no parameter of the student, {name}.*, requires a gradient; give model"
        with pytest.raises(UsageError, match=reason):
            Trainer(**QUIET, max_epochs=1).fit(module, data)
        Trainer(**QUIET).validate(module, data, verbose=False)


# --------------------------------------------------------------------------------------------------------------------
# The model under the adapter as the teacher


@pytest.mark.parametrize("kind", [*ADAPTERS, *PROMPTS])
def test_the_teacher_is_the_model_without_its_adapter(kind: str, folder: str) -> None:
    student = wrapped(folder, {**ADAPTERS, **PROMPTS}[kind]).double()
    criterion = DistillationCriterion(ForwardKL(), alpha=1.0)
    module = DistillationModule(student, "base", criterion=criterion)
    base, batch = load_causal_lm(folder).double().eval(), stack(samples())
    held = {id(parameter) for parameter in module.student.parameters()}
    assert {id(parameter) for parameter in module.teacher._model.parameters()} <= held, "one copy of the weights"
    assert module.teacher.num_parameters == sum(parameter.numel() for parameter in base.parameters())

    student.eval()
    loss = module.distill(batch).loss
    loss.backward()
    given = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.requires_grad}
    student.zero_grad()
    # By hand, from the logits of all positions.
    logits = student(**inputs(batch)).logits[:, -batch["input_ids"].shape[1] :]
    ours, theirs = (at_responses(each, batch).log_softmax(-1) for each in (logits, base(**inputs(batch)).logits))
    expected = (theirs.exp() * (theirs - ours)).sum()
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-9)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert (given[name] - parameter.grad).norm() <= 1e-9 * parameter.grad.norm() + 1e-15, name
    assert any(gradient is not None and gradient.norm() > 0 for gradient in given.values())


def test_the_teacher_has_no_dropout_and_the_student_keeps_its_modes(folder: str) -> None:
    student = wrapped(folder, ADAPTERS["lora on the head"]).train()
    student.get_base_model().transformer.drop.p = 0.5
    frozen = student.get_base_model().transformer.h[0].eval()
    module = DistillationModule(student, "base")
    batch = module.prepare_batch(stack(samples()))
    requires = [parameter.requires_grad for parameter in student.parameters()]
    logits = module.teacher(batch, batch["response"].positions)
    assert isinstance(logits, Projection) and type(logits.head) is nn.Linear and not logits.hidden.requires_grad
    expected = load_causal_lm(folder).eval()(**inputs(batch)).logits
    assert torch.allclose(logits.logits(), at_responses(expected, batch), atol=1e-5)
    assert student.training and not frozen.training and student.get_base_model().transformer.drop.training
    assert [parameter.requires_grad for parameter in student.parameters()] == requires
    with torch.no_grad():
        adapted = student.eval()(**inputs(batch)).logits
    assert not torch.allclose(adapted, expected, atol=1e-2), "the adapter is at work again"


@pytest.mark.parametrize("packing", [False, True])
def test_a_student_learns_from_its_base(
    folder: str, data: InstructionDataModule, packing: bool, tmp_path: Path
) -> None:
    """And nothing of the base moves."""
    torch.manual_seed(1)
    lora = LoraSettings(rank=4, alpha=8, target_modules=["c_attn", "lm_head"])
    criterion = DistillationCriterion(ReverseKL(), alpha=1.0)
    module = DistillationModule(
        folder, "base", criterion, optimizer=lambda p: torch.optim.Adam(p, 1e-2), lora=lora, packing=packing
    )
    with torch.no_grad():
        for name, parameter in module.student.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    base = load_causal_lm(folder)
    trainer = Trainer(**QUIET, max_epochs=3)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    assert 0 < trainer.callback_metrics["val/rkl"] < 0.5 * before["val/rkl"]
    kept = parameters(module.student.model.unload())
    assert torch.equal(kept, parameters(base))


def test_no_base_to_learn_from(folder: str, data: InstructionDataModule) -> None:
    for student in (folder, gpt2(16), Bigram()):
        with pytest.raises(UsageError, match=r"model\.teacher base is the model under the student's adapter, and"):
            DistillationModule(student, "base")
    trains_biases = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], bias="all")
    module = DistillationModule(wrapped(folder, trains_biases), "base")
    with pytest.raises(UsageError, match=r"would change as the student learns, which trains .*bias as well: freeze it"):
        Trainer(**QUIET, max_epochs=1).fit(module, data)


# --------------------------------------------------------------------------------------------------------------------
# Prompts that are learnt


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_virtual_tokens_of_a_prompt_are_no_positions_of_the_sample(kind: str, folder: str) -> None:
    student = wrapped(folder, PROMPTS[kind]).double().eval()
    module = DistillationModule(student, gpt2(24).double(), DistillationCriterion(ForwardKL(), alpha=0.5))
    batch = stack(samples())
    output = module.distill(batch)
    # By hand: prefixes are keys and values, the other prompts embeddings before those of the sample.
    base, length = student.get_base_model(), batch["input_ids"].shape[1]
    if kind == "prefix tuning":
        logits = student(**inputs(batch)).logits
        assert logits.shape[1] == length
    else:
        prompts = student.get_prompt(len(batch["input_ids"]))
        embeddings = torch.cat([prompts, base.get_input_embeddings()(batch["input_ids"])], 1)
        mask = torch.cat([torch.ones(len(prompts), 5), batch["attention_mask"]], 1)
        logits = base(inputs_embeds=embeddings, attention_mask=mask).logits[:, 5:]
    ours = at_responses(logits, batch).log_softmax(-1)
    theirs = at_responses(module.teacher.model.model(**inputs(batch)).logits, batch).log_softmax(-1)
    labels = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    expected = 0.5 * (theirs.exp() * (theirs - ours)).sum() - 0.5 * ours.gather(-1, labels[:, None]).sum()
    assert torch.allclose(output.loss, expected, rtol=1e-9)
    assert module.student.max_positions == 64 - 5 and virtual_tokens(student) == 5
    with pytest.raises(UsageError, match=r"data\.max_length = 60 is beyond the 59 positions of the student"):
        module.student.check_fits("student", None, 60)
    with pytest.raises(UsageError, match="GPT2LMHeadModel does not tell samples in one row apart"):
        DistillationModule(student, gpt2(24).double(), packing=True).distill(batch)


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_is_learnt_answers_and_is_exported(
    kind: str, folder: str, data: InstructionDataModule, tmp_path: Path
) -> None:
    student = wrapped(folder, PROMPTS[kind])
    with pytest.raises(UsageError, match="StudentExport cannot merge this kind of adapter: give it merge=False"):
        Trainer(**QUIET, callbacks=[StudentExport(str(tmp_path / "student"))]).fit(
            DistillationModule(student, gpt2(24)), data
        )
    module = DistillationModule(student, gpt2(24), optimizer=lambda p: torch.optim.AdamW(p, 1e-2), max_new_tokens=8)
    export = StudentExport(str(tmp_path / "student"), merge=False)
    trainer = Trainer(**QUIET, max_epochs=3, callbacks=[export])
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/loss"] < before["val/loss"]
    answers = trainer.predict(module, data)
    assert all(answer.shape[1] <= module.max_new_tokens for answer in answers)
    rows = inputs(stack(samples()))
    again = load_causal_lm(str(export.exported)).eval()
    assert torch.allclose(again(**rows).logits, student.eval()(**rows).logits, atol=1e-5)
