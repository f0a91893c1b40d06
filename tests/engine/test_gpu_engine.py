"""The engine on CUDA: jobs and the online front against the model one text at a time, and memory that runs out."""

import asyncio

import numpy as np
import pytest
import torch
from tests.engine.faults import InjectedForward
from tests.engine.test_engine import PAIRS, TEXTS

from radix_mlp import AsyncEngine, Engine, disable
from radix_mlp.errors import DeviceMemoryError
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

APART = [f"{place} {'and so on ' * 40}" for place in range(12)]
"""Nothing shared, so that half of them takes half of the memory."""
LONG = [f"{TEXTS[0]} {'and so on ' * 40} {place}" for place in range(12)] + TEXTS


@pytest.fixture(scope="module")
def model():
    return tiny_model(hidden_size=256, num_layers=3).cuda()


def alone(model, texts):
    """Hidden states of every text in float64 on the CPU, one at a time."""
    disable(model)
    twin = tiny_model(dtype=torch.float64, hidden_size=256, num_layers=3)
    with torch.no_grad():
        return [twin.model(torch.tensor([list(text.encode())])).last_hidden_state[0] for text in texts]


def close(found, expected, bound=2e-3):
    found, expected = torch.as_tensor(np.asarray(found)).double(), torch.as_tensor(np.asarray(expected)).double()
    assert float((found - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("threshold", ["auto", 1.0, 0])
@pytest.mark.parametrize("max_batch_tokens", [16384, 600])
def test_jobs(model, threshold, max_batch_tokens):
    hidden = alone(model, LONG)
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold, max_batch_tokens=max_batch_tokens)
    close(engine.embed(LONG, normalize=False), torch.stack([rows[-1] for rows in hidden]))
    close(engine.embed(LONG, normalize=False, pooling="mean"), torch.stack([rows.mean(0) for rows in hidden]))
    for found, rows in zip(engine.embed_tokens(LONG), hidden, strict=True):
        close(found, rows)


@pytest.mark.parametrize("max_batch_tokens", [16384, 600])
def test_tasks_at_once(model, max_batch_tokens):
    hidden = alone(model, LONG)
    engine = Engine(model, tokenizer=tiny_tokenizer(), max_batch_tokens=max_batch_tokens)
    scores, token_scores = engine.score(PAIRS), engine.token_scores(LONG, top=3)
    reports = []

    async def main():
        async with AsyncEngine(engine, max_wait=0.2, on_batch=reports.append) as front, asyncio.timeout(120):
            calls = [front.embed([text], normalize=False) for text in LONG]
            return await asyncio.gather(
                front.embed_tokens(LONG), front.score(PAIRS), front.token_scores(LONG, top=3), *calls
            )

    tokens, pairs, texts, *singles = [answer.value for answer in asyncio.run(main())]
    for found, rows in zip(tokens, hidden, strict=True):
        close(found, rows)
    close(np.concatenate(singles), torch.stack([rows[-1] for rows in hidden]))
    for found, expected in zip(pairs, scores, strict=True):
        assert found.token_logprobs == pytest.approx(expected.token_logprobs, abs=2e-2)
    for found, expected in zip(texts, token_scores, strict=True):
        assert found.logprobs[1:] == pytest.approx(expected.logprobs[1:], abs=2e-2)
    assert all(report.error is None for report in reports)


def test_many_calls_in_flight_keep_their_answers(model):
    """Results are copied to the host behind the device: none may be read too early, or written over."""
    engine = Engine(model, tokenizer=tiny_tokenizer(), max_batch_tokens=900)
    texts = [f"text {place}: {'word ' * (place % 50)}" for place in range(200)]
    expected = torch.stack([rows[-1] for rows in alone(model, texts)])

    async def main():
        async with AsyncEngine(engine, max_concurrent_requests=200) as front, asyncio.timeout(300):
            return await asyncio.gather(*(front.embed([text], normalize=False) for text in texts))

    found = np.concatenate([answer.value for answer in asyncio.run(main())])
    errors = (torch.from_numpy(found).double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.max()) < 2e-3


def hungry(engine, bytes_per_row):
    """A forward that also takes memory for every row, in vain."""
    asked = []

    def before(plan, rows):
        asked.append(plan.num_compact)
        torch.empty(plan.num_compact * bytes_per_row, dtype=torch.uint8, device="cuda")

    engine.loaded.forward = InjectedForward(engine, before)
    return asked


def test_out_of_memory_halves_batches(model):
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=1.0)
    expected = engine.embed(APART)
    whole = engine.stats.num_compact
    memory = torch.cuda.get_device_properties(0).total_memory
    # the whole batch does not fit, half of it does
    asked = hungry(engine, int(1.2 * memory / whole))
    close(engine.embed(APART), expected)
    assert asked[0] == whole
    assert engine.stats.num_batches > 1

    async def main():
        async with AsyncEngine(engine, max_wait=0.3) as front, asyncio.timeout(120):
            found = await front.embed(APART)
            return found.value, front.is_healthy

    found, is_healthy = asyncio.run(main())
    close(found, expected)
    assert is_healthy


def test_what_does_not_fit_alone_is_a_typed_error(model):
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=1.0)
    memory = torch.cuda.get_device_properties(0).total_memory
    hungry(engine, int(2 * memory / 100))

    async def main():
        async with AsyncEngine(engine, max_wait=0.2) as front, asyncio.timeout(120):
            calls = [front.embed(["short"]), front.embed([LONG[0]]), front.embed(["other"])]
            return await asyncio.gather(*calls, return_exceptions=True), front.is_healthy

    (first, long, last), is_healthy = asyncio.run(main())
    assert first.value.shape == last.value.shape == (1, 256)
    assert type(long) is DeviceMemoryError
    assert "max_length" in str(long)
    assert is_healthy


def test_half_precision(model):
    hidden = alone(model, LONG)
    engine = Engine(tiny_model(dtype=torch.bfloat16, hidden_size=256, num_layers=3).cuda(), tokenizer=tiny_tokenizer())

    async def main():
        async with AsyncEngine(engine) as front, asyncio.timeout(120):
            return (await front.embed(LONG, normalize=False)).value

    close(asyncio.run(main()), torch.stack([rows[-1] for rows in hidden]), bound=0.1)


def test_jobs_on_a_stream_of_the_callers(model):
    """Plans are copied by another thread, and must be there before the model reads them."""
    hidden = alone(model, LONG)
    engine = Engine(model, tokenizer=tiny_tokenizer(), max_batch_tokens=600)
    engine.embed(LONG)
    torch.cuda.synchronize()
    # whatever is on the default stream now comes a second later
    torch.cuda._sleep(2_000_000_000)
    with torch.cuda.stream(torch.cuda.Stream()):
        found = engine.embed(LONG, normalize=False)
    close(found, torch.stack([rows[-1] for rows in hidden]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_device_than_the_current():
    hidden = alone(tiny_model(), LONG)
    first, second = (tiny_model(hidden_size=256, num_layers=3).to(f"cuda:{index}") for index in range(2))
    for model in (first, second):
        engine = Engine(model, tokenizer=tiny_tokenizer(), max_batch_tokens=900)
        # a size that comes again is a graph
        for _ in range(3):
            close(engine.embed(LONG, normalize=False), torch.stack([rows[-1] for rows in hidden]))

    async def main():
        async with AsyncEngine(engine) as front, asyncio.timeout(120):
            return await asyncio.gather(*(front.embed([text], normalize=False) for text in LONG))

    found = np.concatenate([answer.value for answer in asyncio.run(main())])
    close(found, torch.stack([rows[-1] for rows in hidden]))
