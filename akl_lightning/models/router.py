"""The load-balancing loss of a mixture of experts, which its router needs beside what the tokens cost."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor

from akl_lightning.errors import UsageError


def wants_router_loss(model: "transformers.PreTrainedModel | None") -> bool:
    """Whether a model's config asks for the loss of its router (``output_router_logits``)."""
    if model is None:
        return False
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, "output_router_logits", False) for config in configs)


def router_loss(model: "transformers.PreTrainedModel", output: Any, mask: Tensor) -> Tensor | None:
    """The loss of the router, by the function and with the weight that ``transformers`` has for this model.

    Args:
        model: a mixture of experts with a head.
        output: of its body, with the router's logits; or its own, in which the loss is already.
        mask: which tokens count, ``[batch, length]``.

    Returns:
        A scalar, weighted; None where nobody knows how to compute it from the output of the body.

    Raises:
        UsageError: its weight is unknown.
    """
    loss = getattr(output, "aux_loss", None)
    if loss is None:
        function, logits = _load_balancing_loss(model), getattr(output, "router_logits", None)
        experts, chosen = (_setting(model, *names) for names in (_EXPERTS, ("num_experts_per_tok",)))
        if function is None or not logits or experts is None or chosen is None:
            return None
        loss = function(logits, num_experts=experts, top_k=chosen, attention_mask=mask)
    weight = _setting(model, "router_aux_loss_coef", "aux_loss_coef")
    if weight is None:
        raise UsageError(
            f"{type(model).__name__} does not say how much the loss of its router weighs (router_aux_loss_coef): set "
            "output_router_logits of its config to false."
        )
    return weight * loss


_EXPERTS = ("num_experts", "num_local_experts")


def _load_balancing_loss(model: "transformers.PreTrainedModel") -> Callable[..., Tensor] | None:
    """The public function of that name beside the model's class, or beside the one that it is made from.

    None where it takes other arguments than most.
    """
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    found = next((found for module in modules if (found := getattr(module, "load_balancing_loss_func", None))), None)
    usual = ["gate_logits", "num_experts", "top_k", "attention_mask"]
    return found if found is not None and list(inspect.signature(found).parameters) == usual else None


def _setting(model: "transformers.PreTrainedModel", *names: str) -> Any:
    """What the model says of it, else its config."""
    places = (model, model.config, model.config.get_text_config())
    return next((getattr(place, name) for place in places for name in names if hasattr(place, name)), None)
