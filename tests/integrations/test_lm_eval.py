"""lm-evaluation-harness: RadixLM against its own HFLM, request by request and through whole tasks."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

import radix_mlp
from radix_mlp.errors import InvalidInputError, UnsupportedModelError
from radix_mlp.integrations.lm_eval import RadixLM
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

SHOTS = "Q: Is a radix a root?\nA: yes\n\nQ: Is a radix a fruit?\nA: no\n\n"
QUESTIONS = [f"{SHOTS}Q: {question}\nA:" for question in ("Is it so?", "Is it?", "And this one, is it?")]
PAIRS = [(question, answer) for question in QUESTIONS for answer in (" yes", " no", "n", "y")]
PAIRS += [
    # spaces that move to the continuation, no context, a pair that occurs twice, one token
    (QUESTIONS[0] + "  ", "yes"),
    ("", "roots grow"),
    ("", "<|bos|>roots"),
    PAIRS[1],
    ("a", "b"),
    ("<|bos|>tree", " grows"),
]
CHAT = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}[assistant]{% endif %}"


def tokenizer_with_bos():
    """One that puts the begin token first, as Llama's and Gemma's do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 257)]
    )
    return tokenizer


def both(tokenizer=None, **options):
    tokenizer = tokenizer or tiny_tokenizer()
    stock = HFLM(tiny_model(), tokenizer=tokenizer, batch_size=4, **options)
    return stock, RadixLM(tiny_model(), tokenizer=tokenizer, batch_size=4, threshold=1, max_batch_tokens=90, **options)


def requests(kind, arguments):
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def close(found, expected):
    np.testing.assert_allclose([logprob for logprob, _ in found], [logprob for logprob, _ in expected], atol=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def greedy_pairs(count):
    """Contexts and what the model says next, where that is a letter, so that some answers are greedy."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pairs = []
    for context in (f"{first}{second}" for first in "abcdefgh" for second in "abcdefgh"):
        (token,) = model(torch.tensor([tokenizer(context)["input_ids"]])).logits[:, -1].argmax(-1)
        if chr(token).isascii():
            pairs.append((context, chr(token)))
    return pairs[:count]


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_length": 30}, {"add_bos_token": True}, {"prefix_token_id": 65}], ids=str)
def test_loglikelihood(with_bos, options):
    stock, ours = both(tokenizer_with_bos() if with_bos else None, **options)
    asked = requests("loglikelihood", PAIRS)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    close(found, stock.loglikelihood(asked, disable_tqdm=True))
    # a comparison that would notice answers of other requests
    assert len({round(logprob, 2) for logprob, _ in found}) > 10
    if not options:
        assert ours.stats.num_compact < 0.4 * ours.stats.num_tokens
        assert ours.stats.num_batches > 1


def test_greedy_continuations_are_told():
    pairs = greedy_pairs(3)
    stock, ours = both()
    asked = requests("loglikelihood", [*pairs, *PAIRS])
    found = ours.loglikelihood(asked, disable_tqdm=True)
    close(found, stock.loglikelihood(asked, disable_tqdm=True))
    assert len(pairs) == 3
    assert all(greedy for _, greedy in found[: len(pairs)])


def test_one_text_cut_in_two_ways():
    # the harness's cache of logits gives the shorter continuation numbers of the wrong places, so it is off here
    asked = requests("loglikelihood", [("", "roots grow"), ("<|bos|>roots", " grow")])
    expected = both(logits_cache=False)[0].loglikelihood(asked, disable_tqdm=True)
    close(both()[1].loglikelihood(asked, disable_tqdm=True), expected)


@pytest.mark.parametrize("options", [{}, {"max_length": 16}], ids=str)
def test_loglikelihood_rolling(options):
    stock, ours = both(**options)
    texts = [(text,) for text in (SHOTS, SHOTS + "more", "a", QUESTIONS[0])]
    asked = requests("loglikelihood_rolling", texts)
    expected = stock.loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(asked, disable_tqdm=True), expected, rtol=1e-5)


def test_generation():
    stock, ours = both()
    arguments = [(question, {"until": ["\n"], "max_gen_toks": 8}) for question in QUESTIONS]
    arguments += [("a", {"until": ["Q"], "max_gen_toks": 5, "do_sample": False})]
    asked = requests("generate_until", arguments)
    assert ours.generate_until(asked, disable_tqdm=True) == stock.generate_until(asked, disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [3, "auto"])
def test_generation_from_prompts_that_share(batch_size):
    """Two heads in turn and two kinds of options: batches are made of one head each, and answers keep their order."""
    heads = [SHOTS, SHOTS[:50] + SHOTS[::-1]]
    options = [{"until": ["\n"], "max_gen_toks": 6}, {"until": ["e"], "max_gen_toks": 4}]
    arguments = [
        (heads[i % 2] + question, options[i // 6]) for i, question in enumerate([*QUESTIONS, *"abcdefghij"][:12])
    ]
    asked = requests("generate_until", arguments)
    stock = HFLM(tiny_model(), tokenizer=tiny_tokenizer(), batch_size=1)
    ours = RadixLM(tiny_model(), tokenizer=tiny_tokenizer(), batch_size=batch_size, max_batch_size=3)
    calls = []
    generate = ours.model.generate

    def generate_and_note(**given):
        found = generate(**given)
        calls.append(radix_mlp.last_call(ours.model))
        return found

    ours.model.generate = generate_and_note
    found = ours.generate_until(asked, disable_tqdm=True)
    assert found == stock.generate_until(asked, disable_tqdm=True)
    assert len(set(found)) > 4
    assert [call.folded for call in calls] == [True] * 4, calls
    assert ours.batch_size == batch_size
    assert all(call.num_compact < 0.7 * call.num_tokens for call in calls)
    # log-likelihoods after it are the engine's again
    pairs = requests("loglikelihood", PAIRS)
    close(ours.loglikelihood(pairs, disable_tqdm=True), stock.loglikelihood(pairs, disable_tqdm=True))


def test_answers_are_cached(tmp_path):
    _, ours = both()
    asked = requests("loglikelihood", PAIRS)
    cached = CachingLM(ours, str(tmp_path / "cache.db"))
    first = cached.loglikelihood(asked)
    ours._engine = None
    assert cached.loglikelihood(asked) == first
    rolling = CachingLM(both()[1], str(tmp_path / "rolling.db"))
    expected = rolling.loglikelihood_rolling(requests("loglikelihood_rolling", [(SHOTS,)]))
    rolling.lm._engine = None
    assert rolling.loglikelihood_rolling(requests("loglikelihood_rolling", [(SHOTS,)])) == expected


def test_lora_adapters():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    asked = requests("loglikelihood", PAIRS)
    expected = HFLM(model, tokenizer=tiny_tokenizer()).loglikelihood(asked, disable_tqdm=True)
    plain = both()[0].loglikelihood(asked, disable_tqdm=True)
    assert max(abs(a - b) for (a, _), (b, _) in zip(expected, plain, strict=True)) > 0.1
    ours = RadixLM(model, tokenizer=tiny_tokenizer(), threshold=1)
    close(ours.loglikelihood(asked, disable_tqdm=True), expected)
    with model.disable_adapter():
        close(ours.loglikelihood(asked, disable_tqdm=True), plain)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedModelError, match="learnt prompt"):
        RadixLM(get_peft_model(tiny_model(), prompt), tokenizer=tiny_tokenizer())


def test_what_is_refused():
    for options in ({"parallelize": True}, {"mixed_precision_dtype": "float16"}, {"softmax_dtype": "float64"}):
        with pytest.raises(InvalidInputError, match=next(iter(options))):
            RadixLM(tiny_model(), tokenizer=tiny_tokenizer(), **options)
    bidirectional = tiny_model()
    bidirectional.config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="both directions"):
        RadixLM(bidirectional, tokenizer=tiny_tokenizer())
    ours = both(max_length=4)[1]
    with pytest.raises(InvalidInputError, match="5 of continuation"):
        ours.loglikelihood(requests("loglikelihood", [("abc", "defgh")]), disable_tqdm=True)


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    """A multiple-choice task, one of generation and one of perplexity over local JSON."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"Is {n} more than 3?", "answer": int(n > 3), "text": f"{n} roots"} for n in range(8)]
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.json}}, cache_dir: {tmp_path}/cache}}
test_split: test
"""
    choice = """
task: choice
output_type: multiple_choice
fewshot_split: test
num_fewshot: 3
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: ["no", "yes"]
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
    words = """
task: words
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""
    perplexity = """
task: perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
    for task in (choice, words, perplexity):
        name = task.split()[1]
        (folder / f"{name}.yaml").write_text(common + task)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_whole_tasks(task_folder, chat):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT if chat else None
    tasks = ["choice", "words", "perplexity"]
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    results = [
        simple_evaluate(
            model,
            tasks=tasks,
            task_manager=manager,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
        for model in both(tokenizer)
    ]
    stock, ours = (result["results"] for result in results)
    for task in tasks:
        for metric, value in stock[task].items():
            if isinstance(value, float):
                assert ours[task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
    samples = [[sample["resps"] for sample in result["samples"]["choice"]] for result in results]
    close(
        [pair for row in samples[1] for ((pair,),) in [row[:1]]],
        [pair for row in samples[0] for ((pair,),) in [row[:1]]],
    )


@pytest.mark.slow
def test_command_line(task_folder, tmp_path):
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    command = (
        f"--model radix-mlp --model_args pretrained={model},threshold=1 --tasks choice --include_path {task_folder}"
    )
    command += f" --device cpu --output_path {tmp_path}/out"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run = [sys.executable, "-m", "radix_mlp.integrations.lm_eval", *command.split()]
    result = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "radix-mlp" in result.stdout
    (found,) = (tmp_path / "out").rglob("results_*.json")
    stock = HFLM(str(model), device="cpu")
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    expected = simple_evaluate(stock, tasks=["choice"], task_manager=manager, bootstrap_iters=0)
    assert json.loads(found.read_text())["results"]["choice"]["acc,none"] == expected["results"]["choice"]["acc,none"]
