"""Training from a cache, and caches that are refused."""

import copy
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig, get_peft_model
from tokenizers.normalizers import Lowercase
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from akl_lightning.criterion import DistillationCriterion
from akl_lightning.data.module import InstructionDataModule
from akl_lightning.data.sources import JsonLines
from akl_lightning.divergences import ForwardKL, SkewKL
from akl_lightning.errors import UsageError
from akl_lightning.module import DistillationModule
from akl_lightning.teachers.cache import reader
from akl_lightning.teachers.cache.format import file_digest, manifest_checksum, read_manifest
from akl_lightning.teachers.cache.reader import CachedTeacher
from akl_lightning.teachers.cache.samples import sample_digests
from tests.conftest import PAIRS, QUIET, Bigram, gpt2, write
from tests.distributed.training import forkserver


def module(teacher: Any, **settings: Any) -> DistillationModule:
    torch.manual_seed(1)
    adam = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, 1e-2)}
    return DistillationModule(**{"student": gpt2(16), "teacher": teacher, **adam, **settings})


class Curve(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.losses.append(trainer.callback_metrics["train/loss_step"].item())


def train(module_: DistillationModule, data: Any, epochs: int = 3, **settings: Any) -> tuple[Tensor, Tensor]:
    """Loss of every step, and the student's parameters."""
    curve = Curve()
    Trainer(**QUIET, max_epochs=epochs, callbacks=[curve], **settings).fit(module_, data)
    return torch.tensor(curve.losses), torch.cat([p.detach().flatten() for p in module_.student.parameters()])


def sharp(width: int = 32) -> nn.Module:
    """A teacher whose distributions have a head."""
    teacher = gpt2(width)
    teacher.lm_head.weight.data.mul_(20)
    return teacher


@pytest.fixture
def cache(data: InstructionDataModule, tmp_path: Path) -> Path:
    write(sharp(), tmp_path / "cache", data, shard_tokens=100)
    assert len(list((tmp_path / "cache").glob("shard-*"))) > 2
    return tmp_path / "cache"


def refused(path: Path, data: Any, message: str) -> None:
    """Before the first step, whether at the module or at the Trainer's setup."""
    curve = Curve()
    with pytest.raises(UsageError, match=message):
        Trainer(**QUIET, max_epochs=1, callbacks=[curve]).fit(module(f"cache:{path}"), data)
    assert not curve.losses


# --------------------------------------------------------------------------------------------------------------------
# Training


def test_the_teacher_is_not_needed(data: InstructionDataModule, tokenizer: Any, tmp_path: Path) -> None:
    sharp().save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    live, _ = train(module(str(tmp_path / "teacher")), data)
    cached = write(str(tmp_path / "teacher"), tmp_path / "cache", data)
    shutil.rmtree(tmp_path / "teacher")
    module_ = module(cached)
    curve, _ = train(module_, data)
    assert (curve - live).abs().max() <= 0.01 * live.mean()
    assert curve[-1] < 0.8 * curve[0]
    assert module_.hparams["teacher"] == cached
    assert not any("teacher" in name for name in module_.state_dict())
    assert copy.deepcopy(module_).teacher is module_.teacher
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert manifest["teacher"]["name"] == str(tmp_path / "teacher")


@pytest.mark.parametrize(("codec", "bound"), [("bfloat16", 0.003), ("int8", 0.003), ("int4", 0.05)])
def test_curves_are_equal_within_the_codecs_error(
    data: InstructionDataModule, tmp_path: Path, codec: str, bound: float
) -> None:
    teacher = sharp()
    live, weights = train(module(teacher), data)
    cached, ours = train(module(write(teacher, tmp_path / "cache", data, codec=codec)), data)
    assert (cached - live).abs().max() <= bound * live.mean()
    assert not torch.equal(ours, weights)


def test_metrics_of_all_stages(data: InstructionDataModule, tmp_path: Path) -> None:
    teacher = sharp()
    cached = write(teacher, tmp_path / "cache", data, codec="bfloat16")
    for stage in ("validate", "test"):
        (live,), (ours,) = (
            getattr(Trainer(**QUIET), stage)(module(source), data, verbose=False) for source in (teacher, cached)
        )
        assert live.keys() == ours.keys()
        for name, value in live.items():
            assert ours[name] == pytest.approx(value, rel=0.02, abs=1e-3), name


def test_scaled_and_capped_logits(data: InstructionDataModule, tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    }  # fmt: skip
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=2.0))
    scaled = CohereForCausalLM(CohereConfig(**sizes, logit_scale=5.0))
    for teacher in (capped, scaled):
        teacher.lm_head.weight.data.mul_(20)
        path = tmp_path / type(teacher).__name__
        live, cached = (module(source) for source in (teacher, write(teacher, path, data, codec="bfloat16")))
        batch = next(iter(data.samples("train", 8)))
        for name, value in live.distill(batch).statistics.items():
            if name in ("fkl", "rkl"):
                assert torch.allclose(cached.distill(batch).statistics[name], value, rtol=0.05, atol=1e-3)


def test_any_order_split_padding_and_loader(
    cache: Path, data: InstructionDataModule, tokenizer: Any, corpus: str
) -> None:
    # Other splits, another seed, fewer samples.
    Path(corpus).write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[5:30]))
    other = InstructionDataModule(
        tokenizer, JsonLines(corpus), batch_size=3, max_length=40, validation_size=9, test_size=2, seed=7
    )
    train(module(f"cache:{cache}"), other, epochs=1)
    # Plain loaders, padded on the left, with nothing but batches.
    batch = next(iter(data.samples("train", 8)))
    width = batch["labels"].shape[1] + 5
    fillers = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    left = {key: torch.full((8, width), filler) for key, filler in fillers.items()}
    for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        for key in fillers:
            left[key][row, width - length :] = batch[key][row, :length]
    module_ = module(f"cache:{cache}")
    positions, _ = module_.criterion.response_positions(batch["labels"])
    shifted, _ = module_.criterion.response_positions(left["labels"])
    assert sample_digests(left, shifted) == sample_digests(batch, positions)
    one, two = (module_.teacher(*pair) for pair in ((batch, positions), (left, shifted)))
    assert torch.equal(one.hidden, two.hidden)
    train(module_, DataLoader([left], batch_size=None), epochs=1)


def test_a_sample_without_a_response_needs_no_entry(cache: Path, data: InstructionDataModule) -> None:
    batch = next(iter(data.samples("train", 4)))
    batch["input_ids"][1] = 7
    batch["labels"][1] = -100
    module_ = module(f"cache:{cache}")
    output = module_.distill(batch)
    assert output.statistics["fkl"].numel() == (batch["labels"][:, 1:] != -100).sum()
    batch["labels"].fill_(-100)
    output = module_.distill(batch)
    output.loss.backward()
    assert output.loss == 0 and output.statistics["fkl"].numel() == 0


def test_an_empty_response_in_the_data(tokenizer: Any, data: InstructionDataModule, tmp_path: Path) -> None:
    data.setup("fit")
    rows = list(data.samples("train", 4))
    rows[0]["labels"][2] = -100
    rows[1]["labels"].fill_(-100)
    loader = DataLoader(rows, batch_size=None)
    cached = write(sharp(), tmp_path / "cache", loader)
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert manifest["data"]["samples"] == sum((row["labels"] != -100).any(-1).sum().item() for row in rows)
    train(module(cached), loader, epochs=1)
    with pytest.raises(UsageError, match="the data have no response token"):
        write(sharp(), tmp_path / "other", DataLoader([rows[1]], batch_size=None))


def test_a_resumed_run_ends_like_one_that_never_stopped(
    cache: Path, data: InstructionDataModule, tmp_path: Path
) -> None:
    _, whole = train(module(f"cache:{cache}"), data)
    stopped = Trainer(**QUIET, max_epochs=1)
    stopped.fit(module(f"cache:{cache}"), data)
    stopped.save_checkpoint(tmp_path / "one.ckpt")
    resumed = module(f"cache:{cache}")
    Trainer(**QUIET, max_epochs=3).fit(resumed, data, ckpt_path=tmp_path / "one.ckpt")
    assert torch.equal(torch.cat([p.detach().flatten() for p in resumed.student.parameters()]), whole)

    other = write(gpt2(24), tmp_path / "other", data)
    with pytest.raises(UsageError, match="trained with the cache of another teacher"):
        Trainer(**QUIET, max_epochs=3).fit(module(other), data, ckpt_path=tmp_path / "one.ckpt")


def test_it_travels_to_another_process(cache: Path, data: InstructionDataModule) -> None:
    teacher, batch = CachedTeacher(cache), next(iter(data.samples("train", 4)))
    with forkserver().Pool(1) as pool:
        hidden = pool.apply(_hidden, (teacher, batch))
    assert torch.equal(hidden, _hidden(teacher, batch))


def _hidden(teacher: CachedTeacher, batch: dict[str, Tensor]) -> Tensor:
    positions, _ = DistillationCriterion().response_positions(batch["labels"])
    return teacher(batch, positions).hidden


def test_checksums_are_compared_once_and_again_after_a_change(
    cache: Path, data: InstructionDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(reader, "file_digest", lambda path: read.append(path.name) or file_digest(path))
    names = sorted(path.name for path in cache.glob("*.safetensors"))
    for expected in (names, []):
        train(module(f"cache:{cache}"), data, epochs=1)
        assert sorted(read) == expected
        read.clear()
    os.utime(cache / "head.safetensors")
    train(module(f"cache:{cache}"), data, epochs=1)
    assert read == ["head.safetensors"]


# --------------------------------------------------------------------------------------------------------------------
# Top log-probabilities


def test_top_k_serves_forward_kl_and_warns_of_a_reverse_part(data: InstructionDataModule, tmp_path: Path) -> None:
    teacher = sharp()
    cached = write(teacher, tmp_path / "cache", data, top_k=64)
    for divergence in (ForwardKL(), SkewKL()):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*reverse part")
            live, ours = (
                train(module(source, criterion=DistillationCriterion(divergence, 1.0)), data)[0]
                for source in (teacher, cached)
            )
        assert ours[-1] < 0.8 * ours[0]
        assert (ours - live).abs().max() <= 0.2 * live.max()
    module_ = module(cached)
    with pytest.warns(UserWarning, match=r"reverse part.*top 64 .*0\.44, 0\.38 and 0\.34") as caught:
        train(module_, data, epochs=1)
        Trainer(**QUIET).test(module_, data, verbose=False)
    assert sum("reverse part" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("temperature", [2.0, 0.5])
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_top_k_knows_no_temperature(
    data: InstructionDataModule, tmp_path: Path, temperature: float, stage: str
) -> None:
    cached = write(sharp(), tmp_path / "cache", data, top_k=8)
    module_ = module(cached, criterion=DistillationCriterion(ForwardKL(), temperature=temperature))
    with pytest.raises(UsageError, match=rf"top 8 log-probabilities, .* temperature of {temperature} spreads the rest"):
        getattr(Trainer(**QUIET, max_epochs=1), stage)(module_, data)
    # Hidden states do.
    cached = write(sharp(), tmp_path / "hidden", data)
    train(module(cached, criterion=DistillationCriterion(ForwardKL(), temperature=temperature)), data, epochs=1)


@pytest.mark.parametrize("ignored", [0, -1])
def test_another_label_for_what_is_not_learnt(data: InstructionDataModule, tmp_path: Path, ignored: int) -> None:
    data.setup("fit")
    rows = list(data.samples("train", 4))
    for row in rows:
        row["labels"][row["labels"] == -100] = ignored
    loader = DataLoader(rows, batch_size=None)
    teacher = sharp()
    criterion = DistillationCriterion(ignore_index=ignored)
    cached = write(teacher, tmp_path / "cache", loader, codec="bfloat16", ignore_index=ignored)
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert manifest["data"]["tokens"] == sum((row["labels"][:, 1:] != ignored).sum().item() for row in rows)
    live, ours = (train(module(source, criterion=criterion), loader, epochs=1)[0] for source in (teacher, cached))
    assert (ours - live).abs().max() <= 0.003 * live.mean()
    with pytest.raises(UsageError, match=f"ignore_index = {ignored} and InstructionDataModule labels with -100"):
        train(module(cached, criterion=criterion), data, epochs=1)


class Doubled(GPT2LMHeadModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_model_that_does_not_split(data: InstructionDataModule, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Bigram has no linear output layer that turns its hidden states into its log"):
        write(Bigram(), tmp_path / "cache", data)
    # Its logits are not its output layer on its hidden states, which only a run of it tells.
    with (
        pytest.warns(UserWarning, match="does not give its logits"),
        pytest.raises(UsageError, match="Doubled has no linear output layer"),
    ):
        write(Doubled(sharp().config), tmp_path / "cache", data)
    adapted = get_peft_model(sharp(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UsageError, match=r"logits \(it is a Linear.*; merge an adapter into the model\)"):
        write(adapted, tmp_path / "cache", data)
    assert not (tmp_path / "cache").exists()
    train(module(write(Bigram(), tmp_path / "cache", data, top_k=8)), data, epochs=1)
    with pytest.raises(UsageError, match="top_k must be less than the teacher's 300 outputs, got 300"):
        write(Bigram(), tmp_path / "other", data, top_k=300)


# --------------------------------------------------------------------------------------------------------------------
# Caches that do not fit


def test_a_missing_sample_is_named(cache: Path, data: InstructionDataModule, tokenizer: Any, corpus: str) -> None:
    shorter = InstructionDataModule(
        tokenizer, JsonLines(corpus), batch_size=4, max_length=17, validation_size=4, test_size=4
    )
    refused(
        cache,
        shorter,
        r"lacks \d+ of 28 train samples, first the one of 17 tokens that begins 'Say .*written with data\.max_length = "
        r"40, this run cuts at 17: run akl cache on this run's data",
    )
    with Path(corpus).open("a") as file:
        file.write(json.dumps({"instruction": "Say nothing", "output": "no"}) + "\n")
    more = InstructionDataModule(
        tokenizer, JsonLines(corpus), batch_size=4, max_length=40, validation_size=4, test_size=4
    )
    refused(cache, more, r"lacks 1 of \d+ (train|validation) samples.*begins 'Say nothing")
    batch = next(iter(data.samples("train", 4)))
    batch["input_ids"][2, 0] += 1
    with pytest.raises(UsageError, match=r"lacks 1 of 4 samples of this batch, first the one of \d+ tokens that begin"):
        train(module(f"cache:{cache}"), DataLoader([batch], batch_size=None), epochs=1)


def test_another_tokenizer(cache: Path, data: InstructionDataModule, tokenizer: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.normalizer = Lowercase()
    data.tokenizer = other
    refused(cache, data, "made with another tokenizer than the data's, its normalizer differs: give the data the teach")


def test_another_template(cache: Path, tokenizer: Any, corpus: str) -> None:
    """What counts is the samples, so that a cache of an earlier version, or of a template by another name, goes on."""
    sizes = {"batch_size": 4, "max_length": 40, "validation_size": 4, "test_size": 4}
    other = InstructionDataModule(tokenizer, JsonLines(corpus), "Q: {instruction}\n", **sizes)
    refused(
        cache,
        other,
        r"lacks 28 of 28 train samples, .* it was made with the prompt template 'plain', this run's is 'Q: .*': run",
    )
    same = InstructionDataModule(tokenizer, JsonLines(corpus), "{instruction}\n", **sizes)
    assert same.template_digest != read_manifest(cache)["template"]["digest"]
    train(module(f"cache:{cache}"), same, epochs=1)


def test_another_teacher(cache: Path, data: InstructionDataModule) -> None:
    with pytest.raises(UsageError, match=r"has another teacher \('GPT2.*' with weights \w{8} there, .*give another pa"):
        write(gpt2(32), cache, data)


def shard(cache: Path) -> Path:
    return sorted(cache.glob("shard-*"))[1]


def test_a_flipped_bit(cache: Path, data: InstructionDataModule) -> None:
    for file in (shard(cache), cache / "head.safetensors"):
        content = bytearray(file.read_bytes())
        content[-20] ^= 4
        file.write_bytes(content)
        refused(cache, data, f"{file.name} is damaged, its checksum differs: copy it again")
        content[-20] ^= 4
        file.write_bytes(content)
    train(module(f"cache:{cache}"), data, epochs=1)


def test_a_truncated_shard(cache: Path, data: InstructionDataModule) -> None:
    content = shard(cache).read_bytes()
    shard(cache).write_bytes(content[:-1])
    refused(cache, data, rf"{shard(cache).name} is damaged, it has {len(content) - 1} bytes instead of {len(content)}")


def test_a_missing_shard(cache: Path, data: InstructionDataModule) -> None:
    name = shard(cache).name
    shard(cache).unlink()
    refused(cache, data, f"{name} is missing, which the manifest names")


def test_manifests_that_cannot_be_used(cache: Path, data: InstructionDataModule, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", data, "there is no teacher's cache in .*nothing: give the folder that akl cache")
    path = cache / "manifest.json"
    manifest = json.loads(path.read_text())

    def with_(**changed: Any) -> str:
        changed = {name: value for name, value in {**manifest, **changed}.items() if name != "checksum"}
        return json.dumps({**changed, "checksum": manifest_checksum(changed)})

    path.write_text(with_(complete=False))
    refused(cache, data, "is unfinished: run the same akl cache again")
    path.write_text(with_(format=9))
    refused(cache, data, "has format 9, this version reads 1")
    path.write_text(with_(codec="mine"))
    refused(cache, data, "unknown codec 'mine': use one of bfloat16")
    path.write_text(json.dumps({**manifest, "soft_cap": 30.0}))
    refused(cache, data, "manifest.json is damaged, its checksum differs")
    path.write_text(path.read_text()[:100])
    refused(cache, data, "manifest.json is damaged .*JSONDecodeError")


def test_the_students_tokenizer_must_be_the_datas(
    cache: Path, data: InstructionDataModule, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<extra>"])
    other.save_pretrained(tmp_path / "student")
    gpt2(16, vocab_size=310).save_pretrained(tmp_path / "student")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "student")) == 301
    with pytest.raises(UsageError, match="student and data disagree on the vocabulary"):
        train(module(f"cache:{cache}", student=str(tmp_path / "student")), data)
