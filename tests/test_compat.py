"""What the package takes from inside other libraries is still there, and still means the same.

A failure here says which library has changed; the function of :mod:`akl_lightning.compat` that it names is the one
place to mend.
"""

import argparse
import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser, lazy_instance
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import akl_lightning
from akl_lightning import compat
from akl_lightning.parallel import FSDP2Strategy
from tests.conftest import QUIET, gpt2

TINY = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)


@contextmanager
def relies_on(sentence: str) -> Iterator[None]:
    """Whatever goes wrong, say what the package relies on."""
    try:
        yield
    except Exception as error:
        pytest.fail(f"{sentence} ({error!r}): see akl_lightning/compat.py.", pytrace=False)


def test_every_function_has_its_test_here_and_nothing_else_is_private() -> None:
    functions = [node.name for node in ast.parse(Path(compat.__file__).read_text()).body if hasattr(node, "args")]
    here = Path(__file__).read_text()
    assert len(functions) > 10
    assert [name for name in functions if not re.search(rf"compat\.{name}\b", here)] == []
    # Of what is not the package's own: a name that begins with one underscore, behind a dot that self does not precede.
    for path in Path(akl_lightning.__file__).parent.rglob("*.py"):
        if path.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                named_tuple = node.attr in ("_make", "_fields", "_replace", "_asdict")
                defined = re.search(rf"\b{node.attr}\b *[:=(]", path.read_text())
                assert own or named_tuple or defined, f"{path.name} uses {ast.unparse(node)}: put it into compat.py"


def test_hooks() -> None:
    with relies_on("torch keeps the hooks of a module in _forward_hooks and _forward_pre_hooks"):
        layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
        assert not compat.has_forward_hooks(layer)
        layer.register_forward_hook(lambda *_: None)
        other.register_forward_pre_hook(lambda *_: None)
        assert compat.has_forward_hooks(layer) and compat.has_forward_hooks(other)


def test_multiplication_in_one_call() -> None:
    with relies_on("torch has _foreach_mul_, which multiplies a list of tensors by a scalar in place"):
        tensors = [torch.ones(2), torch.full((3,), 2.0)]
        compat.multiply_all(tensors, torch.tensor(3.0))
        assert [tensor.tolist() for tensor in tensors] == [[3, 3], [6, 6, 6]]


def test_what_the_compiler_raises() -> None:
    with relies_on("torch.compile raises a TorchDynamoException where it cannot compile"):

        @torch.compile(fullgraph=True, backend="eager")
        def breaks(x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x

        with pytest.raises(compat.compile_errors()):
            breaks(torch.ones(1))


def test_a_model_of_a_class() -> None:
    with relies_on("transformers' models have _from_config, which keeps rotary frequencies in float32"):
        model = compat.new_model(LlamaForCausalLM, TINY, torch.bfloat16)
        assert type(model) is LlamaForCausalLM and model.lm_head.weight.dtype == torch.bfloat16
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_recurrent_models() -> None:
    with relies_on("transformers says _is_stateful of models that carry a state"):
        config = MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=20, state_size=4)
        assert compat.is_recurrent(MambaForCausalLM(config))
        assert not compat.is_recurrent(gpt2()) and not compat.is_recurrent(None)


def test_what_continuous_batching_keeps() -> None:
    with relies_on("transformers keeps the manager of continuous batching as an attribute of the model"):
        model = LlamaForCausalLM(TINY)
        settings = GenerationConfig(eos_token_id=0), ContinuousBatchingConfig(num_blocks=2, max_requests_per_batch=1)
        manager = model.init_continuous_batching(*settings)
        assert compat.take_batching_manager(model) is None
        compat.put_batching_manager(model, manager)
        assert model.init_continuous_batching(*settings) is manager
        assert compat.take_batching_manager(model) is manager
        assert model.init_continuous_batching(*settings) is not manager


def test_compiled_chat_templates() -> None:
    with relies_on("transformers compiles chat templates by _compile_jinja_template, in an environment of Jinja's"):
        template = compat.compiled_chat_template("{% for m in messages %}\n{{ m['content'] }}\n{% endfor %}")
        assert template.render(messages=[{"content": "a"}, {"content": "b"}]) == "a\nb\n"
        assert template.environment.trim_blocks and template.environment.parse("a").body


def test_weights_that_were_read() -> None:
    with relies_on("transformers' initialize_weights leaves tensors alone that have _is_hf_initialized"):
        model = gpt2()
        kept, drawn = model.transformer.wte.weight, model.transformer.wpe.weight
        with torch.no_grad():
            kept.fill_(7.0)
            drawn.fill_(7.0)
        for module in model.modules():
            module._is_hf_initialized = False
        compat.mark_as_read([kept])
        drawn._is_hf_initialized = False
        model.initialize_weights()
        assert (kept == 7).all() and not (drawn == 7).all()


def test_adapters_that_are_left_out() -> None:
    with relies_on("PEFT's layers do without their adapters where _disable_adapters is true"):
        ids = torch.arange(5)[None]
        for config in (LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"]), IA3Config()):
            plain = gpt2().eval()
            expected = plain(ids).logits
            model = get_peft_model(plain, config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(1.0)
            adapted = model(ids).logits
            with compat.without_adapters(model):
                assert torch.equal(model(ids).logits, expected)
                with compat.without_adapters(model):  # those that are off already stay so
                    pass
                assert torch.equal(model(ids).logits, expected)
            assert torch.equal(model(ids).logits, adapted) and not torch.equal(adapted, expected)


def test_the_trainer_of_a_module() -> None:
    with relies_on("Lightning keeps a module's Trainer in _trainer, None without one"):
        module, trainer = BoringModel(), Trainer(**QUIET)
        assert compat.trainer_of(module) is None
        module.trainer = trainer
        assert compat.trainer_of(module) is trainer


def test_all_devices_have_samples_of_their_own() -> None:
    with relies_on("ModelParallelStrategy builds its mesh from _data_parallel_size"):
        strategy = FSDP2Strategy()
        strategy.parallel_devices = [torch.device("cpu")] * 4
        strategy.cluster_environment = LightningEnvironment()
        compat.replicate_data_over_all(strategy)
        assert strategy._data_parallel_size == 4
        assert "self._data_parallel_size" in inspect.getsource(ModelParallelStrategy.setup_environment)


def test_data_that_were_loaded_are_forgotten() -> None:
    with relies_on("Lightning's fit loop keeps loaded data in _combined_loader, and loads them where it is None"):
        module, trainer = BoringModel(), Trainer(**QUIET, max_epochs=1, limit_train_batches=2)
        loaded = []

        class Forgets(Callback):
            def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
                trainer.estimated_stepping_batches  # noqa: B018 (which loads them)
                loaded.append(trainer.fit_loop._combined_loader is not None)
                compat.forget_loaded_data(trainer)

            def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
                loaded.append(trainer.fit_loop._combined_loader is not None)

        trainer.callbacks.append(Forgets())
        trainer.fit(module)
        assert loaded == [True, True] and trainer.global_step == 2


def test_loaders_of_an_evaluation() -> None:
    with relies_on("Lightning's evaluation loops keep their loaders in _combined_loader"):
        seen: list[Any] = []

        class Looks(BoringModel):
            def on_validation_epoch_end(self) -> None:
                seen.append(compat.evaluated_loaders(self.trainer))

        trainer, module = Trainer(**QUIET, max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0), Looks()
        one, other = BoringModel().val_dataloader(), {"a": BoringModel().val_dataloader()}
        trainer.fit(module, val_dataloaders=one)
        trainer.validate(module, other, verbose=False)
        assert seen == [one, other]


def test_a_step_is_logged_at_once(tmp_path: Path) -> None:
    with relies_on("Lightning's logger connector logs a step by update_train_step_metrics"):
        logged: list[int] = []

        class Logger(CSVLogger):
            def log_metrics(self, *args: Any, **kwargs: Any) -> None:
                logged.append(1)

        class Logs(BoringModel):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("figure", 1.0)
                return super().training_step(batch, batch_idx)

            def on_train_batch_end(self, *_: Any) -> None:
                assert logged == []
                compat.log_step_now(self.trainer)
                assert logged == [1]

        settings = {**QUIET, "logger": Logger(tmp_path)}
        Trainer(**settings, max_steps=1, log_every_n_steps=1, limit_val_batches=0).fit(Logs())
        assert logged


def test_the_description_of_an_epoch() -> None:
    with relies_on("Lightning's RichProgressBar describes an epoch in _get_train_description, as 0/-2 without an end"):

        class Bar(RichProgressBar):
            pass

        bar = Bar()
        bar._trainer = Trainer(**QUIET, max_epochs=-1)
        assert bar._get_train_description(0).strip() == "Epoch 0/-2"
        compat.counts_epochs_without_end(Bar)
        assert bar._get_train_description(0).strip() == "Epoch 0"
        assert len(bar._get_train_description(0)) == len(RichProgressBar._get_train_description(bar, 0))


def test_torchmetrics_without_signals() -> None:
    script = """
import os
import sys
import torch
if os.fork() == 0:
    import torchmetrics
    print("scipy.signal" in sys.modules, flush=True)
    os._exit(0)
os.wait()
from akl_lightning import compat
compat.import_torchmetrics()
print("scipy.signal" in sys.modules, sys.modules["torchmetrics"].MeanMetric.__name__)
import scipy.signal
print(scipy.signal.windows.hamming(3)[1], "scipy.signal" in sys.modules)
"""
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    with relies_on("torchmetrics imports scipy.signal when it is imported itself, for one name in it"):
        assert said == "True\nFalse MeanMetric\n1.0 True\n"


def test_options_and_arguments_of_a_parser() -> None:
    with relies_on("argparse keeps its options in _option_string_actions and its arguments in _actions"):
        parser = argparse.ArgumentParser()
        parser.add_argument("--name", "-n", dest="place")
        assert {"--name", "-n"} <= set(compat.options_of(parser))
        assert "place" in [action.dest for action in compat.actions_of(parser)]


def test_subcommands_of_a_parser() -> None:
    with relies_on("jsonargparse keeps its subcommands in _subcommands_action"):
        parser = ArgumentParser()
        parser.add_subcommands()
        compat.subcommands_of(parser).add_subcommand("more", ArgumentParser())
        assert parser.parse_args(["more"]).subcommand == "more"


def test_the_attention_of_a_model() -> None:
    with relies_on("transformers keeps a model's attention in config._attn_implementation"):
        model = LlamaForCausalLM(TINY)
        model.set_attn_implementation("eager")
        assert compat.attention_of(model) == "eager"


def test_stand_ins_for_defaults() -> None:
    with relies_on("jsonargparse names what lazy_instance makes of a class LazyInstance_ and its name"):
        assert compat.is_stand_in(type(lazy_instance(BoringModel))) and not compat.is_stand_in(BoringModel)


def test_settings_that_are_given_stay() -> None:
    with relies_on("LightningCLI reads what a checkpoint remembers of its settings in _parse_ckpt_path"):
        assert "hyper_parameters" in inspect.getsource(LightningCLI._parse_ckpt_path)

        @compat.keeps_given_settings
        class Keeps(LightningCLI):
            pass

        assert Keeps._parse_ckpt_path is not LightningCLI._parse_ckpt_path
        assert Keeps._parse_ckpt_path(object()) is None  # type: ignore[arg-type]
