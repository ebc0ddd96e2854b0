"""Shard a model over devices, from outside and block by block, and the ``fsdp2`` strategy that asks for it."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from lightning_utilities import apply_to_collection
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, TensorStorageMetadata, load
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from akl_lightning.compat import mark_as_read, replicate_data_over_all
from akl_lightning.errors import UsageError
from akl_lightning.frozen import LEFT_OUT
from akl_lightning.hub import out_of_reach
from akl_lightning.models.layers import decoder_layers
from akl_lightning.models.load import Precision, outline_causal_lm
from akl_lightning.teachers.fingerprint import whole

T = TypeVar("T")
Wrapped = TypeVar("Wrapped", bound=nn.Module)

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What can be read as it stands; narrower ones come with scales that a model class has to know."""


def shard(
    model: nn.Module, mesh: DeviceMesh, language_model: nn.Module, param_dtype: torch.dtype | None = None
) -> None:
    """Shard every parameter over the devices of a mesh with FSDP2, in place.

    Each decoder layer is gathered when its turn comes. All the rest, a head that is tied to the embedding included, is
    gathered for a forward of ``model`` and stays at hand until its backward, or until ``model.reshard()``.

    Args:
        model: what is sharded; whose forward is called.
        mesh: one-dimensional.
        language_model: the part of it that may have decoder layers.
        param_dtype: in which parameters are gathered and products run; gradients are reduced in float32. None for
            the parameters' own.
    """
    reduce_dtype = None if param_dtype is None else torch.float32
    for layer in decoder_layers(language_model)[1]:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype, reduce_dtype))
    # What a step is called with, a batch, stays as it is.
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def load_sharded(
    source: str,
    mesh: DeviceMesh,
    wrap: Callable[[nn.Module], Wrapped],
    trust_remote_code: bool = False,
    role: str = "model",
    precision: Precision = "float32",
    attn_implementation: str | None = None,
) -> Wrapped | None:
    """Load a frozen model so that each rank reads no more of the weights than its own shard.

    Args:
        source: hub name or local folder.
        mesh: one-dimensional.
        wrap: puts the frozen model into the module whose forward is called.
        trust_remote_code: run Python code that comes with the model.
        role: what an error calls it.
        precision: of the weights.
        attn_implementation: as for :func:`akl_lightning.models.load.load_causal_lm`.

    Returns:
        What ``wrap`` made; None where the weights are no plain safetensors under the model's own names.

    Raises:
        UsageError: weights that are damaged, or to be quantised.
    """
    if precision in ("8bit", "4bit"):
        raise UsageError(f"a {role} in {precision} is not sharded: use the strategy ddp, or another precision.")
    model = outline_causal_lm(source, trust_remote_code, role, precision, attn_implementation)
    patterns = ["model.safetensors", "model-*.safetensors", "*.json"]
    folder = source
    if not Path(source).is_dir():
        folder = snapshot_download(source, allow_patterns=patterns, local_files_only=out_of_reach(source))
    reader = HuggingFaceStorageReader(folder)
    try:
        stored = reader.read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise UsageError(f"cannot read the weights in {folder}, they are damaged: {error}.") from error
    tied = set(model.all_tied_weights_keys)
    plain = {
        name
        for name, tensor in stored.items()
        if isinstance(tensor, TensorStorageMetadata) and tensor.properties.dtype in PLAIN_DTYPES
    }
    files = {path.name for path in Path(folder).glob("*.safetensors")}
    others = {name for name in files if name != "model.safetensors" and not name.startswith("model-")}
    if others or len(plain) < len(stored) or not set(model.state_dict()) - tied <= plain:
        return None
    wrapped = wrap(model)
    shard(wrapped, mesh, model)
    model.to_empty(device=mesh.device_type)
    model.tie_weights()
    load({name: tensor for name, tensor in model.state_dict().items() if name in stored}, storage_reader=reader)
    # Buffers that no file holds (rotary frequencies) are computed; what has been read stays.
    mark_as_read(model.state_dict(keep_vars=True).values())
    model.initialize_weights()
    return wrapped


def gather_objects(trainer: Trainer, mine: T) -> list[T]:
    """What each rank has, by rank; called on all of them."""
    parts = [mine] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(parts, mine)
    return parts


@contextmanager
def ending_together(trainer: Trainer) -> Iterator[None]:
    """Let a mistake or a full disk that one rank alone meets end all of them, with one sentence.

    Called on every rank; what is done meanwhile must not wait for other ranks.

    Raises:
        UsageError: on rank 0; the others end without a word.
    """
    mine: UsageError | OSError | None = None
    try:
        yield
    except (UsageError, OSError) as error:
        mine = error
    errors = [error for error in gather_objects(trainer, None if mine is None else str(mine)) if error is not None]
    if errors and trainer.is_global_zero:
        raise mine or UsageError(errors[0])
    if errors:
        sys.exit(0)  # a launcher that sees another one fail kills rank 0 before it has said why


def data_parallel_mesh(strategy: Strategy | None) -> DeviceMesh | None:
    """The devices over which a strategy shards, or None where it does not."""
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.device_mesh["data_parallel"]
    if isinstance(strategy, FSDPStrategy):
        return init_device_mesh(strategy.root_device.type, (strategy.world_size,))
    return None


def check_no_averages(trainer: Trainer) -> None:
    """Raise :class:`UsageError` for a callback that averages weights, of which a strategy that shards has parts."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            name = type(callback).__name__
            raise UsageError(f"{name} cannot average a sharded student: use the strategy ddp, or remove it.")


def shard_module(
    module: LightningModule,
    language_model: nn.Module,
    strategy: Strategy | None,
    mesh: DeviceMesh | None,
    steps: Sequence[str],
) -> None:
    """Shard a module as its strategy does, in place; nothing where it does not, or where it is sharded already.

    Args:
        module: what is trained.
        language_model: the part of it that may have decoder layers.
        strategy: of the Trainer.
        mesh: its devices, see :func:`data_parallel_mesh`.
        steps: names of the methods that need the parameters at hand, as ``forward`` does.
    """
    if isinstance(strategy, FSDPStrategy):  # which wraps the module itself
        strategy.kwargs.setdefault("auto_wrap_policy", wrapping_policy(language_model))
    elif mesh is not None and not isinstance(module, FSDPModule):
        shard(module, mesh, language_model, getattr(strategy, "param_dtype", None))
        for step in steps:
            register_fsdp_forward_method(module, step)


def clip_gradients(
    module: LightningModule, optimizer: Optimizer, value: int | float | None, algorithm: str | None
) -> None:
    """Clip, by the norm over all shards under FSDP too."""
    strategy = module.trainer.strategy
    if value is not None and algorithm in (None, "norm") and isinstance(strategy, FSDPStrategy):
        strategy.model.clip_grad_norm_(value)  # type: ignore[operator, union-attr]  # its precision plugin refuses
    else:
        module.clip_gradients(optimizer, value, algorithm)


def wrapping_policy(language_model: nn.Module) -> ModuleWrapPolicy:
    """What FSDP (version 1) wraps: the decoder layers."""
    return ModuleWrapPolicy({type(layer) for layer in decoder_layers(language_model)[1]})


@StrategyRegistry.register("fsdp2", description="FSDP2: parameters, gradients and optimizer sharded over all devices")
class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all devices: ``--trainer.strategy fsdp2``.

    A checkpoint is one file, the same as that of one device: it resumes on any number of devices.

    Args:
        timeout: of the communication between processes.
    """

    def __init__(self, timeout: timedelta | None = default_pg_timeout) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    @property
    def param_dtype(self) -> torch.dtype | None:
        """In which the student's parameters are gathered, by the Trainer's precision."""
        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(self.precision_plugin.precision))

    def setup_environment(self) -> None:
        """Let every device have samples of its own; refuse, before they are set up, callbacks that cannot work."""
        assert self.lightning_module is not None
        check_no_averages(self.lightning_module.trainer)
        replicate_data_over_all(self)
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Evaluate under ``no_grad``: what is gathered in inference mode could not be trained with afterwards."""
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    # The base class writes and reads optimizer states by position among *all* parameters, frozen ones included; from
    # here on they go the way of any other strategy.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let the Trainer restore the optimizers."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file on every rank; what is not this rank's is never looked at."""
        return self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path), weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's shard of each weight."""
        # Those that a checkpoint leaves out are there; which they are, the module has looked at.
        options = StateDictOptions(full_state_dict=True, strict=strict and LEFT_OUT not in checkpoint)
        assert self.lightning_module is not None
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather the state; on ranks other than 0 it is empty."""
        state = optimizer.state_dict()
        state["state"] = apply_to_collection(state["state"], torch.Tensor, self._gather)
        return state if self.is_global_zero else {}

    def _gather(self, value: torch.Tensor) -> torch.Tensor:
        value = whole(value)
        return value.cpu() if self.is_global_zero else value

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's shard of each state."""
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            own = {}
            for name, of in state["state"].items():  # or position
                parameter = order[name] if isinstance(name, int) else parameters[name]
                own[name] = {key: _like(parameter, value) for key, value in of.items()}
            optimizer.load_state_dict({**state, "state": own})


def _like(parameter: torch.Tensor, value: Any) -> Any:
    """Shard a state as its parameter is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
