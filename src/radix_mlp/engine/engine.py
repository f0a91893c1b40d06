"""`Engine`: texts in; embeddings, relevance, labels or log-probabilities out, in the caller's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from radix_mlp.arguments import items_of
from radix_mlp.engine.execution.job import JobStats, Progress
from radix_mlp.engine.execution.job_engine import JobEngine
from radix_mlp.engine.tasks.classify import ClassifyOptions, Label, Labels, classify_request
from radix_mlp.engine.tasks.decide import Decided, DecideOptions, decide_request, state_texts, with_questions
from radix_mlp.engine.tasks.embed import EmbedOptions, EmbedTokensOptions, embed_request, embed_tokens_request
from radix_mlp.engine.tasks.rerank import Ranked, RerankOptions, check_top_n, document_pairs, ranked, rerank_request
from radix_mlp.engine.tasks.score import (
    Score,
    ScoreOptions,
    TokenScores,
    TokenScoresOptions,
    score_request,
    token_scores_request,
)
from radix_mlp.engine.tokenization.decision_prompts import Questions, State
from radix_mlp.engine.tokenization.token_ids import TextOrIds
from radix_mlp.engine.tokenization.tokenize_chats import Chat
from radix_mlp.engine.tokenization.tokenize_messages import Message

if TYPE_CHECKING:
    from transformers import DecisionConfig

__all__ = [
    "Decided",
    "Engine",
    "JobStats",
    "Label",
    "Labels",
    "Progress",
    "Ranked",
    "Score",
    "TextOrIds",
    "TokenScores",
]


class Engine(JobEngine):
    """Runs texts through a model so that tokens which texts share are computed once.

    Args:
        model: a hub id, a folder (of transformers or sentence-transformers), a loaded transformers model (also in
            PEFT's class), `"small"` (an embedder that comes with the package), or `"tiny"` (also `"tiny-reranker"`,
            `"tiny-classifier"`, `"tiny-decider"`).
        tokenizer: needed with a loaded model; else the model's own. One that is handed in is copied. A processor brings
            its own, and reads images.
        device: CUDA where there is one, else the CPU; a loaded model stays where it is.
        dtype: the checkpoint's own unless given, as `torch.float32` or `"float32"`.
        max_batch_tokens: budget of a batch, in compact tokens; at most 4096 for a model that computes attention itself,
            with a dense mask (`docs/models.md`).
        max_length: longest request, in tokens; what model and tokenizer allow unless given.
        threshold: 0 never folds and runs padded batches through the unmodified model; 1 or more always folds;
            between, batches whose compression is below it; `"auto"` those where it pays.
        impl: the way to run attention.
        kind: load the checkpoint as `"causal"`, `"classifier"`, `"decision"` or `"trunk"` (no head), whatever its
            configuration says.
        compile: `"auto"`: on CUDA, fused layers where the architecture has them, and CUDA graphs for small batches.
            True: where it has none, modules compiled by torch (about a minute, once a machine). False: the model's own.
        trust_remote_code: run code that comes with the model.
        control_tokens: what becomes of control tokens, as `<|im_end|>`, that stand in texts, queries, documents and
            messages: `"model"` reads them as the model does, `"text"` as the letters that they are written with, so
            that no document can end the user's turn. Those of prompts, instructions and templates stay control tokens.
        tensor_parallel_size: shard the model over this many GPUs, with a process for each (`docs/multi-gpu.md`).
        share: False computes every token of every text, on packed rows: the same forward with folding off, to compare
            with. Batches are those of `share=True`, and so hold more tokens than `max_batch_tokens`.

    Jobs put a loaded model that is passed in into evaluation mode, and enable it for folding, or disable it when
    `threshold` is 0. `close` leaves it as it was.

    Raises:
        InvalidInputError: a wrong argument.
        UnsupportedModelError: the model cannot be folded exactly (`threshold=0` runs it unfolded).

    Examples:
        >>> engine = Engine("tiny")
        >>> engine.embed(["Query: what is a radix? Text: a root.", "Query: what is a radix? Text: a vegetable."]).shape
        (2, 64)
        >>> engine.stats.num_tokens, engine.stats.num_compact
        (79, 47)
    """

    def embed(
        self,
        texts: Sequence[TextOrIds | Mapping[str, Any] | Sequence[Message]],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        pooling: Literal["last", "mean", "weighted_mean", "cls"] | None = None,
        truncate: bool = False,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """One vector a text, `[n, d]` float32.

        A sentence-transformers folder brings its pooling, dense layers, default prompt, length limit and dimensions.

        Args:
            texts: texts, or lists of token ids, which are taken as they are: no prompt before them. With a model that
                reads images: dictionaries `{"image": ..., "text": ...}`, or lists of messages with such parts.
            prompt: put before every text, as one string with it; the model's default prompt unless given. Of
                dictionaries and messages it is the system message.
            prompt_name: use the model's prompt of this name.
            normalize: scale every vector to length 1.
            dimensions: keep this many leading dimensions (before scaling), for models trained to allow it.
            pooling: which hidden states make the vector; unless given, as the model's files say, or the last.
            truncate: cut texts longer than `max_length` instead of refusing them.
            progress: called as texts are done.

        Raises:
            RejectedItemsError: texts that are empty or too long; `.rejected` lists all of them.
            UnsupportedModelError: the folder has a module that is not supported.
        """
        options = EmbedOptions(
            prompt=prompt,
            prompt_name=prompt_name,
            normalize=normalize,
            dimensions=dimensions,
            pooling=pooling,
            truncate=truncate,
        )
        return self._answer(embed_request, options, items_of(texts, "texts"), progress)

    def embed_tokens(
        self,
        texts: Sequence[TextOrIds],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate: bool = False,
        progress: Progress | None = None,
    ) -> list[NDArray[np.float32]]:
        """The vectors of every token of every text, `[tokens, hidden]` float32 each: neither pooled nor scaled.

        These are the hidden states after the model's last norm, the tokens of a prompt among them; arguments and
        errors as in `embed`.

        Examples:
            >>> [vectors.shape for vectors in Engine("tiny").embed_tokens(["ab", "abc"])]
            [(2, 64), (3, 64)]
        """
        options = EmbedTokensOptions(prompt=prompt, prompt_name=prompt_name, truncate=truncate)
        return self._answer(embed_tokens_request, options, items_of(texts, "texts"), progress)

    def rerank(
        self,
        query: str | Mapping[str, Any],
        documents: Sequence[str | Mapping[str, Any]],
        *,
        instruction: str | None = None,
        top_n: int | None = None,
        prompt_name: str | None = None,
        template: Literal["auto", "qwen3", "chat", "pair"] = "auto",
        raw_scores: bool = False,
        truncate: bool = False,
        progress: Progress | None = None,
    ) -> list[Ranked]:
        """The documents as `(index, score, document)`, the most relevant to the query first, ties by index.

        The score is a probability: of "yes" against "no" as the next token, or of a classifier's label; a model whose
        files say that its scores are used as they are keeps them so.

        Args:
            query: a text; with a model that reads images also `{"image": ..., "text": ...}`.
            documents: as the query.
            instruction: what relevant means, in words; the model's default unless given.
            top_n: return this many.
            prompt_name: take the model's prompt of this name as the instruction.
            template: how the model reads query and document: `"qwen3"` as Qwen3-Reranker, `"chat"` through the
                tokenizer's chat template with the roles query and document, `"pair"` as the tokenizer joins two texts.
            raw_scores: log-odds (or what else the model gives) instead of probabilities.
            truncate: cut documents at their end where they are too long, instead of refusing them.
            progress: called as documents are done.

        Raises:
            RejectedItemsError: documents that are too long; `.rejected` lists all of them.
            UnsupportedModelError: not a reranker, or it is not known how this one reads query and document.

        Examples:
            >>> engine = Engine("tiny-reranker")
            >>> [place.index for place in engine.rerank("what is a radix?", ["a root", "a fruit"], top_n=1)]
            [0]
        """
        check_top_n(top_n)
        options = RerankOptions(
            instruction=instruction,
            prompt_name=prompt_name,
            template=template,
            raw_scores=raw_scores,
            truncate=truncate,
        )
        given = items_of(documents, "documents")
        scores = self._answer(rerank_request, options, document_pairs(query, given), progress, what="documents")
        return ranked(given, scores, top_n)

    def rerank_pairs(
        self,
        pairs: Sequence[tuple[str | Mapping[str, Any], str | Mapping[str, Any]]],
        *,
        instruction: str | None = None,
        prompt_name: str | None = None,
        template: Literal["auto", "qwen3", "chat", "pair"] = "auto",
        raw_scores: bool = False,
        truncate: bool = False,
        progress: Progress | None = None,
    ) -> NDArray[np.float64]:
        """The relevance of every (query, document), `[n]` float64 in the caller's order; arguments as in `rerank`.

        Examples:
            >>> Engine("tiny-reranker").rerank_pairs([("a radix?", "a root"), ("an orange?", "a fruit")]).shape
            (2,)
        """
        options = RerankOptions(
            instruction=instruction,
            prompt_name=prompt_name,
            template=template,
            raw_scores=raw_scores,
            truncate=truncate,
        )
        return self._answer(rerank_request, options, items_of(pairs, "pairs"), progress)

    def classify(
        self,
        inputs: Sequence[TextOrIds | tuple[str, str] | Chat],
        *,
        template: Literal["plain", "chat"] = "plain",
        raw_scores: bool = False,
        truncate: bool = False,
        progress: Progress | None = None,
    ) -> list[Labels]:
        """For every text, or pair of texts, all `(label, score)` of the model, the highest score first.

        Each answer's `.scores` are the scores in the model's order, `[L]` float64, which tell labels of equal names
        apart. Scores are probabilities: over all labels together, or of each alone where the configuration says
        `multi_label_classification`. A single label (a reward model) and a regression have raw scores.

        Args:
            inputs: texts, pairs of texts, or lists of token ids, which are taken as they are; with `template="chat"`,
                (question, answer) or lists of messages `{"role": ..., "content": ...}`.
            template: `"plain"` joins the texts of a pair as the tokenizer does. `"chat"` writes question and answer
                as the turns of user and assistant through the tokenizer's chat template, as reward models want them.
            raw_scores: what the model itself gives instead of probabilities.
            truncate: cut inputs longer than `max_length` instead of refusing them.
            progress: called as inputs are done.

        Raises:
            RejectedItemsError: inputs that are empty or too long; `.rejected` lists all of them.
            UnsupportedModelError: the model has no classification head.

        Examples:
            >>> [label for label, _ in Engine("tiny-classifier").classify(["a text"])[0]]
            ['negative', 'positive', 'neutral']
        """
        options = ClassifyOptions(template=template, raw_scores=raw_scores, truncate=truncate)
        return self._answer(classify_request, options, items_of(inputs, "inputs"), progress)

    def decide(
        self,
        state: State,
        questions: Questions,
        *,
        decision_config: DecisionConfig | str | None = None,
        progress: Progress | None = None,
    ) -> Decided:
        """Answers to typed questions about one state; arguments and errors as in `decide_many`.

        Examples:
            >>> engine = Engine("tiny-decider")
            >>> answers = engine.decide(
            ...     "I was charged twice and want a refund.",
            ...     {
            ...         "refund": {"type": "noul", "instructions": "Is a refund requested?"},
            ...         "tone": {"type": "choice", "criteria": {"calm": "A polite message", "angry": None}},
            ...         "urgency": {"type": "score", "criteria": ["Can wait", "This week", "Today"]},
            ...     },
            ... )
            >>> sorted(answers["tone"]["probabilities"]), answers["urgency"]["legend"]["2"]
            (['angry', 'calm'], 'Today')
            >>> answers.num_tokens, answers.num_computed
            (419, 324)
        """
        return self.decide_many([state], questions, decision_config=decision_config, progress=progress)[0]

    def decide_many(
        self,
        states: Sequence[State],
        questions: Questions | Sequence[Questions],
        *,
        decision_config: DecisionConfig | str | None = None,
        progress: Progress | None = None,
    ) -> list[Decided]:
        """The answers to typed questions about every state, a probability for each option, without writing a word.

        Every question is a prompt of its own unless the model's template asks all at once. Prompts and answers are
        those of transformers' `pipeline("decision")`, in its System One format: `{"type": "noul", "noul": p}`,
        `{"type": "choice", "choice", "confidence", "probabilities"}`, `{"type": "score", "score", "legend",
        "confidence", "probabilities"}`. The prompts of all states are one job: what they share is computed once.

        Args:
            states: texts, or anything that JSON has.
            questions: name -> `{"type", "instructions", "criteria"}`, the same for all states, or a list with those of
                each. `"noul"` asks whether a statement is true, `"choice"` for one of the options that `criteria` maps
                to descriptions, `"score"` for a level of the list `criteria`, lowest first.
            decision_config: how the model reads questions: transformers' `DecisionConfig`, or a folder with one; the
                model's own unless given. Without one, a chat model answers by the logits of labels (Yes, No, A, B, …).
            progress: called as prompts are done.

        Returns:
            One `Decided` a state: a dictionary of the answers by name, with `num_tokens` of all its prompts and
            `num_computed`, those that are left when they share their beginnings.

        Raises:
            InvalidInputError: questions of an unknown type, without options, with more options than the model has
                labels, or labels that are not single tokens.
            RejectedItemsError: states that are no JSON or too long; `.rejected` lists all of them.
            UnsupportedModelError: the model has no head for it, or this transformers no decisions.
        """
        options = DecideOptions(decision_config=decision_config)
        states = items_of(states, "states")
        given = with_questions(states, questions)
        return self._answer(decide_request, options, given, progress, texts=state_texts(states))

    def score(
        self,
        pairs: Sequence[tuple[TextOrIds, TextOrIds]],
        *,
        add_bos: bool | None = None,
        truncate: bool = False,
        progress: Progress | None = None,
    ) -> list[Score]:
        """Log-probability of every continuation after its context, as lm-evaluation-harness counts it.

        Context and continuation are encoded as one string, spaces at the end of the context moved to the
        continuation, and the continuation is what follows the first `len(encode(context))` tokens.

        Args:
            pairs: (context, continuation), texts or lists of token ids; an empty context stands for the begin (or
                end) token.
            add_bos: unless given, a text starts with what the tokenizer adds before it, as Gemma's and Llama's do; True
                adds a begin token in any case, False none. A text that starts with one gets no second.
            truncate: drop tokens from the left of pairs longer than `max_length` instead of refusing them.
            progress: called as pairs are done.

        Raises:
            RejectedItemsError: pairs that are too long or have no continuation; `.rejected` lists all of them.
            UnsupportedModelError: the model has no language-model head.
        """
        options = ScoreOptions(add_bos=add_bos, truncate=truncate)
        return self._answer(score_request, options, items_of(pairs, "pairs"), progress)

    def token_scores(
        self,
        texts: Sequence[TextOrIds],
        *,
        top: int = 1,
        truncate: bool = False,
        progress: Progress | None = None,
    ) -> list[TokenScores]:
        """Log-probability of every token of every text after all tokens before it, and the `top` likeliest ones.

        The first token has nothing before it, and None. Special tokens are the tokenizer's own; a text that starts
        with the begin token gets none, as in `score`.

        Args:
            texts: texts, or lists of token ids, which are taken as they are.
            top: how many of the likeliest tokens to tell in every place.
            truncate: cut texts longer than `max_length` instead of refusing them.
            progress: called as texts are done.

        Raises:
            RejectedItemsError: texts that are empty or too long; `.rejected` lists all of them.
            UnsupportedModelError: the model has no language-model head.

        Examples:
            >>> found = Engine("tiny").token_scores([[72, 105]], top=2)[0]
            >>> found.logprobs[0], len(found.top_ids[1])
            (None, 2)
        """
        options = TokenScoresOptions(top=top, truncate=truncate)
        return self._answer(token_scores_request, options, items_of(texts, "texts"), progress)
