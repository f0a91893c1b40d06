"""The forward of a causal language model in training: the loss of its labels without the logits of the batch."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from radix_mlp.hf.enabled import Enabled
from radix_mlp.hf.foldable_call import selects_logits
from radix_mlp.hf.names_in_forward import calls_loss_function
from radix_mlp.hf.origin import foreign_function, is_stock
from radix_mlp.integrations.edge_forward import EdgeForward
from radix_mlp.train import cross_entropy, head_logprobs, tree_hidden

__all__ = ["LossForward", "has_usual_loss"]


class LossForward(EdgeForward):
    """In training, a call with labels returns the loss and no logits; every other call is that of an enabled model."""

    def __init__(self, usual: Enabled) -> None:
        super().__init__(usual.module, usual.settings)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Fold the call if that is exact and pays."""
        arguments = self._named(args, kwargs)
        # options of the loss (shift_labels) are for transformers' own function
        is_usual = arguments.get("shift_labels") is None and not selects_logits(arguments)
        is_usual = is_usual and has_usual_loss(self.module)
        # hidden states come back in the caller's layout, which is the usual call's business
        if arguments.get("output_hidden_states", getattr(self.module.config, "output_hidden_states", False)):
            is_usual = False
        if arguments.get("labels") is None or not self.module.training or not is_usual:
            return super().call(*args, **kwargs)
        batch = self.read_batch(args, kwargs, ())
        if batch is None:
            return self.run_unfolded(args, kwargs)
        with self.autocast():
            hidden = tree_hidden(self.module, batch.plan)
            logprob = head_logprobs(self.module, hidden, batch.edges).logprob
        loss = cross_entropy(logprob, batch, num_items_in_batch=arguments.get("num_items_in_batch"))
        outputs = CausalLMOutputWithPast(loss=loss)
        wants_dict = arguments.get("return_dict")
        return outputs if (self.module.config.return_dict if wants_dict is None else wants_dict) else (loss,)


def has_usual_loss(model: PreTrainedModel) -> bool:
    """Whether what the model makes of labels is the mean over next tokens, as far as its code and settings tell."""
    # a forward around ours reads logits, perhaps
    is_own = not is_stock(type(model)) or foreign_function(vars(model).get("forward")) is not None
    is_own = is_own or not calls_loss_function(model)
    return not is_own and model.get_output_embeddings() is not None and model.loss_function is ForCausalLMLoss
