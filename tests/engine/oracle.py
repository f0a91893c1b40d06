"""What the unmodified model says, one text at a time, and lm-eval's way to cut pairs: written out once more."""

import torch


def hidden_of(model, ids):
    with torch.no_grad():
        return model.model(torch.tensor([ids])).last_hidden_state[0]


def embedding(model, ids, pooling="last"):
    hidden = hidden_of(model, ids)
    weights = torch.arange(1, len(ids) + 1, dtype=hidden.dtype)[:, None]
    pooled = {
        "last": hidden[-1],
        "cls": hidden[0],
        "mean": hidden.mean(0),
        "weighted_mean": (hidden * weights).sum(0) / weights.sum(),
    }
    return pooled[pooling]


def score(model, context_ids, continuation_ids):
    with torch.no_grad():
        logits = model(torch.tensor([context_ids + continuation_ids])).logits[0, :-1]
    logprobs = logits.log_softmax(-1)[-len(continuation_ids) :]
    tokens = torch.tensor(continuation_ids)
    return logprobs[torch.arange(len(tokens)), tokens], bool((logprobs.argmax(-1) == tokens).all())


def relevance(model, ids, yes, no):
    """The probability of yes among yes and no."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    return float(logits[[yes, no]].softmax(-1)[0])


def label_scores(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]
