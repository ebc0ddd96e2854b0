"""A causal language model as a body, which gives hidden states, and a head, which projects them."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from akl_lightning.batch import Batch
from akl_lightning.compat import compile_errors, is_recurrent
from akl_lightning.errors import UsageError
from akl_lightning.models.generation import ending, plain_decoding, stop_tokens
from akl_lightning.models.inputs import check_inputs, known_inputs, lay_out
from akl_lightning.models.layers import PROBE_TOKENS, evaluating, outputs_differ, text_config
from akl_lightning.models.lora import virtual_tokens
from akl_lightning.models.packing import Packed, pack
from akl_lightning.models.router import router_loss, wants_router_loss
from akl_lightning.projection import Logits, Projection
from akl_lightning.rank_zero import rank_zero_warn


class SplitModel(nn.Module):
    """A language model as body and head.

    A ``transformers`` causal language model is split: its body runs without the head, and the criterion projects only
    the positions it needs, a chunk at a time. Whether head and hidden states give the model's own logits is looked at
    once, at the first batch; where they do not, and for any other module, the model's own logits are taken, all of
    them. Such a module is called with the whole batch and gives logits ``[batch, length, vocab]``, alone or as
    ``.logits``.

    Args:
        model: the language model; one that PEFT has wrapped, too.
        packing: run the body on samples laid into fewer rows, :func:`~akl_lightning.packing.pack`; for a
            ``transformers`` model that splits and tells packed samples apart, which is looked at, too.
    """

    model: Any

    def __init__(self, model: nn.Module, packing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.packing = packing
        self._splits: bool | None = None
        """Whether head and hidden states give the model's logits; None before it was looked at."""
        self._tells_apart = False
        """Whether it was looked at that samples in one row see nothing of each other."""
        self._compiled = False
        self._router_loss: Tensor | None = None

    @property
    def causal_lm(self) -> "transformers.PreTrainedModel | None":
        """The ``transformers`` model, without what PEFT has wrapped around it, or None."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return model if isinstance(model, transformers.PreTrainedModel) else None

    @property
    def head(self) -> nn.Module | None:
        """The layer that projects hidden states onto the vocabulary, or None where the body cannot run without it."""
        model = self.causal_lm
        return None if model is None or model.base_model is model else model.get_output_embeddings()

    @property
    def has_router_loss(self) -> bool:
        """Whether this is a mixture of experts whose config asks for its router's loss."""
        return wants_router_loss(self.causal_lm)

    def take_router_loss(self) -> Tensor | None:
        """The weighted loss of the router in the last forward, once; None where the config does not ask for it."""
        loss, self._router_loss = self._router_loss, None
        return loss

    @property
    def config(self) -> Any:
        """The ``transformers`` config, or None."""
        return getattr(self.model, "config", None)

    @property
    def description(self) -> str:
        """Class of the model, and where its weights came from if that is known."""
        model = self.causal_lm if self.causal_lm is not None else self.model
        name = getattr(model, "name_or_path", "")
        return f"{type(model).__name__} {name}".strip()

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model has positions for, or None where it does not say.

        Without those that the virtual tokens of a prompt take.
        """
        positions = getattr(text_config(self.config), "max_position_embeddings", None)
        return None if positions is None else positions - virtual_tokens(self.model)

    @property
    def vocab_size(self) -> int | None:
        """Width of the head, padding included, or None where the model does not say."""
        weight = getattr(self.head, "weight", None)
        return getattr(text_config(self.config), "vocab_size", None) if weight is None else weight.shape[0]

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of the layers, and run them again in the backward pass.

        Raises:
            UsageError: a model that has no such mode.
        """
        if self.causal_lm is None or not self.causal_lm.supports_gradient_checkpointing:
            raise UsageError(
                f"{type(self.model).__name__} has no activation checkpointing: turn activation_checkpointing off."
            )
        self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})

    def compile_body(self) -> None:
        """Run the body, or a model that does not split, through ``torch.compile``; the weights keep their names.

        Answers are generated without: each of their lengths would be compiled anew.
        """
        body = self.model if self.causal_lm is None else self.causal_lm.base_model
        body.compile(dynamic=True)
        self._compiled = True

    def eagerly(self) -> Any:
        """A context without what :meth:`compile_body` has asked for."""
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def check_fits(self, name: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> None:
        """Raise :class:`UsageError` unless the model has a position and an output for all that the data may hold.

        Args:
            name: what the message calls the model.
            tokenizer: the data's, where there is one.
            max_length: tokens of the longest sequence, where it is known.
        """
        if max_length and self.max_positions and max_length > self.max_positions:
            raise UsageError(
                f"data.max_length = {max_length} is beyond the {self.max_positions} positions of the {name}: "
                f"set it to {self.max_positions} or less."
            )
        if tokenizer is not None and self.vocab_size and len(tokenizer) > self.vocab_size:
            token = tokenizer.convert_ids_to_tokens(self.vocab_size)
            raise UsageError(
                f"the {name} has no output for the token {token!r} (id {self.vocab_size}) of the data's tokenizer, "
                f"which has {len(tokenizer)} tokens: give the {name} vocab_size {len(tokenizer)} or more."
            )

    def stop_tokens(
        self, tokenizer: PreTrainedTokenizerBase | None, end_tokens: Sequence[int] | None = None
    ) -> list[int]:
        """Tokens with which an answer of the model ends, see :func:`~akl_lightning.models.generation.stop_tokens`."""
        return stop_tokens(self.model if self.causal_lm is None else self.causal_lm, tokenizer, end_tokens)

    def generate(
        self,
        prompts: Batch,
        tokenizer: PreTrainedTokenizerBase | None,
        end_tokens: Sequence[int] | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Answers to left-padded prompts: token ids ``[batch, new_tokens]``; greedy unless it is said otherwise.

        Of the generation config of a ``transformers`` model the stop tokens count, and nothing else.

        Args:
            prompts: ``input_ids`` and ``attention_mask``, each ``[batch, length]``.
            tokenizer: the data's, with whose end-of-text token an answer ends, too.
            end_tokens: with which a turn of the data ends, and so an answer.
            arguments: of ``transformers``' ``generate``.

        Raises:
            UsageError: the model has no such method.
        """
        generate = getattr(self.model, "generate", None)
        if generate is None:
            raise UsageError(
                f"{type(self.model).__name__} has no generate method: override the module's generate to answer with it."
            )
        # A module of the user's own may know less of this, and have a config all the same.
        settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        settings |= ending(self.stop_tokens(tokenizer, end_tokens), tokenizer)
        inputs = {name: prompts[name] for name in ("input_ids", "attention_mask")}
        with self.eagerly(), nullcontext() if self.causal_lm is None else plain_decoding(self.causal_lm):
            tokens = generate(**inputs, **{**settings, **arguments})
        return tokens[:, prompts["input_ids"].shape[1] :]

    def logits(self, batch: Batch) -> Tensor:
        """The model's own logits, ``[batch, length, vocab]``."""
        if self.causal_lm is None:
            output = self.model(batch)
            return getattr(output, "logits", output)
        output = self._run(self.model, self._inputs(batch), batch["attention_mask"])
        return output.logits[:, -batch["input_ids"].shape[1] :]  # a prompt's virtual tokens stand before the others

    def check_inputs(self, batch: Batch, role: str) -> None:
        """Raise :class:`UsageError` for what a batch carries and a ``transformers`` model could not be given.

        Args:
            batch: as a DataLoader gives it.
            role: what the message calls the model.
        """
        if self.causal_lm is not None:
            check_inputs(self.causal_lm, batch, role, self.packing)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """What a ``transformers`` model is called with on a batch that is not packed."""
        assert self.causal_lm is not None
        layout, known = batch.get("layout") or lay_out(batch), known_inputs(self.causal_lm)
        inputs = {name: value for name, value in batch.items() if name in {"input_ids", "attention_mask", *known}}
        if layout.position_ids is not None and "position_ids" in known:
            inputs["position_ids"] = layout.position_ids
        if layout.segments is not None:
            inputs["attention_mask"] = self._mask(layout.segments)
        return inputs

    def _run(self, model: Any, inputs: dict[str, Any], counts: Tensor) -> Any:
        """Call the model or its body, and keep its router's loss over the tokens that count."""
        if not self.has_router_loss:
            return model(**inputs, use_cache=False)
        assert self.causal_lm is not None
        output = model(**inputs, output_router_logits=True, use_cache=False)
        self._router_loss = router_loss(self.causal_lm, output, counts)
        return output

    def _mask(self, position_ids: Tensor) -> Any:
        """A mask for each kind of layer, by which samples in a row see nothing of each other.

        A model makes it from positions itself only where it gets no mask, and some models never do.
        """
        from transformers.masking_utils import create_masks_for_generate  # as heavy as the models

        assert self.causal_lm is not None
        like = torch.empty(*position_ids.shape, 0, dtype=self.causal_lm.dtype, device=position_ids.device)
        return create_masks_for_generate(
            text_config(self.causal_lm.config), like, None, None, position_ids=position_ids
        )

    def projection(self, batch: Batch, positions: Tensor, packed: Packed | None = None) -> Projection:
        """The logits at ``positions``, as hidden states and head.

        Args:
            batch: as for :meth:`forward`.
            positions: indices into the flattened batch, ``[tokens]``.
            packed: the same samples laid into fewer rows, on which the body is run instead.
        """
        assert self.causal_lm is not None and self.head is not None
        config = text_config(self.causal_lm.config)
        if packed is None:
            inputs, counts = self._inputs(batch), batch["attention_mask"]
        else:
            mask, counts = self._mask(packed.position_ids), packed.mask
            inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "attention_mask": mask}
            positions = packed.places.flatten()[positions]
        output = self._run(self.causal_lm.base_model, inputs, counts)
        hidden = output[0].flatten(0, 1)[positions]
        if getattr(config, "logit_scale", None) is not None:  # Cohere
            hidden = hidden * config.logit_scale
        if getattr(config, "logits_scaling", None) is not None:  # Granite
            hidden = hidden / config.logits_scaling
        return Projection(hidden, self.head, getattr(config, "final_logit_softcapping", None))  # Gemma 2

    def forward(self, batch: Batch, positions: Tensor | None = None) -> Logits:
        """Logits, or what gives them.

        Args:
            batch: ``input_ids`` and ``attention_mask``, each ``[batch, length]``, and whatever else the model knows;
                where samples are packed, ``packed`` too, if :func:`~akl_lightning.models.packing.pack` was called
                before the batch went to its device, and so ``layout``, of :func:`~akl_lightning.models.inputs.lay_out`.
            positions: only these are asked for: indices into the flattened batch, ``[tokens]``.

        Returns:
            Logits ``[batch, length, vocab]``; with ``positions`` logits ``[tokens, vocab]`` or the projection that
            gives them. Where FSDP2 shards the model, the head's weight stays at hand until ``reshard``.

        Raises:
            UsageError: packed samples that this model does not tell apart, a body that torch.compile cannot compile.
        """
        if positions is not None and self._splits is None:
            # The body alone knows nothing of a prompt.
            whole = self.head is None or virtual_tokens(self.model) > 0
            self._splits = not whole and self._gives_own_logits(batch)
        if positions is not None and not self._tells_apart and self._shares_rows(batch):
            self._check_packing(batch)
            self._tells_apart = True
        try:
            if positions is None:
                logits = self.logits(batch)
                self.take_router_loss()  # nobody asks for it, and it holds on to the whole forward
                return logits
            if not self._splits:
                return self.logits(batch).flatten(0, 1)[positions]
            packed = (batch.get("packed") or pack(batch)) if self.packing else None
            return self.projection(batch, positions, packed)
        except compile_errors() as error:
            raise UsageError(
                f"torch.compile cannot compile {type(self.model).__name__} here ({str(error).splitlines()[0]}): set "
                "model.compile to false."
            ) from error

    @torch.no_grad()
    def _gives_own_logits(self, batch: Batch) -> bool:
        """Compare head and hidden states with the model's own logits on a few tokens of the batch."""
        tokens = _longest(batch)[None, :PROBE_TOKENS]
        row = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with evaluating(self.model), self.eagerly():
            own, own_router_loss = self.logits(row)[0], self.take_router_loss()
            projection = self.projection(row, torch.arange(tokens.numel(), device=tokens.device))
            logits, loss = projection.head(projection.hidden), self.take_router_loss()
        if (cap := projection.soft_cap) is not None:
            logits = torch.tanh(logits / cap) * cap
        torch.clear_autocast_cache()  # what it has cast without a gradient here must not serve the step
        if own_router_loss is not None and (loss is None or outputs_differ(own_router_loss[None], loss[None])):
            fault = "the loss of its router cannot be told from what its body gives"
        elif own.shape != logits.shape or outputs_differ(own, logits):
            fault = "its output layer on its hidden states does not give its logits"
        else:
            return True
        rank_zero_warn(
            f"{type(self.causal_lm).__name__}: {fault}; taking all of its logits instead, which is slower and needs "
            "memory for [batch, length, vocab]."
        )
        return False

    def _shares_rows(self, batch: Batch) -> bool:
        """Whether several samples lie in a row, by the package or by the batch's own positions."""
        own = self.causal_lm is not None and (batch.get("layout") or lay_out(batch)).segments is not None
        return self.packing or own

    @torch.no_grad()
    def _check_packing(self, batch: Batch) -> None:
        """Compare a sample behind another one in a row with the same sample alone."""
        tokens = _longest(batch)
        first, second = tokens.split((len(tokens) + 1) // 2) if len(tokens) > 1 else (tokens, tokens)
        rows = {"input_ids": pad_sequence([tokens, first, second], batch_first=True)}
        rows["attention_mask"] = pad_sequence([torch.ones_like(row) for row in (tokens, first, second)], True)
        alone = {name: row[2:, : len(second)] for name, row in rows.items()}
        positions = torch.arange(len(second), device=tokens.device)
        among_all = 2 * len(tokens) + positions
        # Recurrent layers know no mask.
        behaves = bool(self._splits) and not is_recurrent(self.causal_lm)
        if behaves:
            exact = torch.autocast(tokens.device.type, enabled=False)
            with evaluating(self.model), self.eagerly(), exact:
                packed = self.projection(rows, among_all, pack(rows)).hidden
                own = self.projection(alone, positions).hidden
            behaves = not outputs_differ(own, packed, coarse=5e-2)
        if not behaves:
            way_out = "set model.packing to false" if self.packing else "give each sample of the batch a row of its own"
            raise UsageError(
                f"{type(self.causal_lm or self.model).__name__} does not tell samples in one row apart: {way_out}."
            )


def _longest(batch: Batch) -> Tensor:
    """Tokens of the longest sample, ``[tokens]``."""
    longest = batch["attention_mask"].sum(-1).argmax()
    return batch["input_ids"][longest][batch["attention_mask"][longest].bool()]
