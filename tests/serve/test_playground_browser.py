"""The playground in headless Chromium: what a person sees and types, with nothing but the keyboard where it matters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.serve.conftest import start_servers, wait_for_addresses

pytestmark = pytest.mark.slow

KEY = "a-key-for-tests"
EVIL = [
    "<img src=x onerror=\"window.hurt='img'\">",
    "<script>window.hurt='script'</script>",
    "\"><svg onload=window.hurt='svg'>",
    "javascript:window.hurt='url'",
    "</textarea><iframe srcdoc=\"<script>parent.hurt='frame'</script>\">",
]
LONG = [f"Guide, part {number // 10}: section {number % 10 // 3}, note {number} on queues." for number in range(100)]


def chromium(playwright: Any) -> Any:
    """A started browser, wherever it is; None where there is none."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chrome")]
    paths = [playwright.chromium.executable_path, *found]
    for path in paths:
        if path and Path(path).exists():
            return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    return None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = chromium(playwright)
        if browser is None:
            pytest.skip("no Chromium: `playwright install chromium`, or the system's package")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a reranker behind a key that takes 128 documents."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    settings = f"model_id=tiny-reranker,api_key={KEY},max_client_batch_size=128"
    process = start_servers(log, settings)
    try:
        yield wait_for_addresses(log, process, 1)["tiny-reranker"]
    finally:
        process.kill()
        process.communicate()


Opened = Callable[..., Any]


@pytest.fixture
def opened(browser: Any) -> Iterator[Opened]:
    """`opened(address)`: a page of its own, which must not have met an error or left its server by the end."""
    contexts: list[Any] = []
    problems: list[str] = []

    def opened(address: str, width: int = 1280, scheme: str = "light", prepare: Any = None, ready: bool = True) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
        page.on("console", lambda message: problems.append(message.text) if is_problem(message) else None)
        page.on("request", lambda request: None if request.url.startswith(address) else problems.append(request.url))
        if prepare is not None:
            prepare(page)
        page.goto(f"{address}/playground")
        if ready:
            page.wait_for_selector(".node")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def is_problem(message: Any) -> bool:
    # the answers that tests ask for, and connections that they cut
    return message.type in ("error", "warning") and "Failed to load resource" not in message.text


def answer_with(route: Any, request: Any, **answer: Any) -> None:
    route.fulfill(**answer)


def texts(page: Any, selector: str) -> list[str]:
    found: list[str] = page.locator(selector).all_inner_texts()
    return found


def settled(page: Any) -> None:
    """Wait until what is shown is the answer to what is typed."""
    page.wait_for_selector("body:not(.busy):not(.stale)")


def type_documents(page: Any, documents: list[str]) -> None:
    page.fill("#documents", "\n".join(documents))
    settled(page)
    assert page.locator(".bar").count() == len(documents)


def test_the_example_is_ranked_at_once(addresses: dict[str, str], opened: Opened) -> None:
    page = opened(addresses["tiny-reranker"])
    assert len(texts(page, ".bars li")) == 8
    scores = [float(score) for score in texts(page, ".bar .value")]
    assert scores == sorted(scores, reverse=True)
    widths = page.eval_on_selector_all(".bar .fill", "fills => fills.map(fill => parseFloat(fill.style.width))")
    assert widths == pytest.approx([100 * score for score in scores], abs=0.1)

    computed, saved = (int(text.split()[0].replace(",", "")) for text in texts(page, ".meter span"))
    boxes = page.eval_on_selector_all(".node b", "all => all.map(node => Number(node.textContent.replace(',', '')))")
    assert sum(boxes) == computed
    assert saved > computed
    assert "computed once for 8 documents" in page.inner_text("#detail")
    assert "tiny-reranker" in page.inner_text("#model")
    root = page.locator(".node").first.bounding_box()
    tails = [node.bounding_box() for node in page.locator(".node.own").all()]
    assert len(tails) == 8
    assert root["height"] > 6 * max(tail["height"] for tail in tails)
    assert all(tail["x"] >= root["x"] + root["width"] for tail in tails)


def test_nothing_typed_is_lost(addresses: dict[str, str], opened: Opened) -> None:
    bodies: list[Any] = []
    under_way, most = 0, 0

    def prepare(page: Any) -> None:
        page.on("request", begins)
        page.on("requestfinished", ends)

    def begins(request: Any) -> None:
        nonlocal under_way, most
        if request.method == "POST":
            bodies.append(json.loads(request.post_data))
            under_way += 1
            most = max(most, under_way)

    def ends(request: Any) -> None:
        nonlocal under_way
        under_way -= request.method == "POST"

    page = opened(addresses["tiny-reranker"], prepare=prepare)
    words = "which of these tells a night shift what to do first, and why is it so"
    page.fill("#query", "")
    page.click("#query")
    for place, character in enumerate(words):
        page.keyboard.type(character)
        if place % 9 == 0:
            # these do not wait until typing has stopped
            page.keyboard.press("Control+Enter")
    settled(page)
    assert bodies[-1]["query"] == words
    assert most == 1
    assert 2 < len(bodies) < len(words)
    assert words in page.inner_text("#detail").replace("\n", " ")


def test_what_is_typed_during_an_answer_is_asked_for_after_it(addresses: dict[str, str], opened: Opened) -> None:
    page = opened(addresses["tiny-reranker"])
    held: list[Any] = []
    page.route("**/playground/run", lambda route, request: held.append(route))
    for query in ("the first", "the second", "the third"):
        page.fill("#query", query)
        page.keyboard.press("Control+Enter")
        # longer than the pause after which typing counts as done
        page.wait_for_timeout(500)
    assert [json.loads(route.request.post_data)["query"] for route in held] == ["the first"]
    held[0].continue_()
    for _ in range(50):
        page.wait_for_timeout(100)
        if len(held) == 2:
            break
    assert page.locator("body.stale").count() == 1
    assert json.loads(held[1].request.post_data)["query"] == "the third"
    held[1].continue_()
    settled(page)
    assert "the third" in page.inner_text("#detail")
    assert len(held) == 2


def test_text_stays_text(addresses: dict[str, str], opened: Opened) -> None:
    for model, task in (("tiny-reranker", "rerank"), ("tiny-reranker", "score"), ("tiny", "embed")):
        page = opened(addresses[model])
        page.locator(f"input[value={task}]").check(force=True)
        if task != "embed":
            page.fill("#query", EVIL[0])
        if task != "score":
            page.fill("#instruction", EVIL[1])
        page.fill("#documents", "\n".join(EVIL))
        settled(page)
        shown = page.inner_text("#results") + page.inner_text("#tree-section")
        assert EVIL[0] in shown.replace("\n", "")
        assert page.evaluate("window.hurt") is None
        inside = "main :is(script, iframe, img, svg)"
        assert page.locator(inside).count() == 0
    page = opened(addresses["tiny-classifier"])
    page.fill("#documents", "\n".join(EVIL))
    settled(page)
    assert texts(page, "tbody th") == EVIL
    assert page.evaluate("window.hurt") is None


def test_the_policy_holds(addresses: dict[str, str], browser: Any) -> None:
    page = browser.new_page()
    page.goto(f"{addresses['tiny']}/playground")
    page.wait_for_selector(".node")
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    with pytest.raises(Exception, match="TrustedScript"):
        page.evaluate("document.body.setAttribute('onclick', 'window.hurt = 1')")
    page.close()


def test_the_keyboard_alone_is_enough(addresses: dict[str, str], opened: Opened) -> None:
    page = opened(addresses["tiny-reranker"])
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        described = page.evaluate("""() => {
            const node = document.activeElement, style = getComputedStyle(node);
            const ring = node.matches("#tasks input") ? getComputedStyle(node.nextElementSibling) : style;
            const name = node.getAttribute("aria-label") || node.labels?.[0]?.textContent || node.textContent;
            return [node.id || node.dataset.zoom || node.className || node.name, name.trim(), ring.outlineStyle];
        }""")
        reached.append(described[0])
        assert described[1], f"{described} has no name"
        assert described[2] != "none", f"{described} shows no focus"
        if "node" in described[0].split():
            break
    order = [name for name in reached if name in ("key", "query", "instruction", "documents", "run", "example")]
    assert order == ["key", "query", "instruction", "documents", "run", "example"]
    assert reached.index("example") < reached.index("out") < len(reached) - 1

    def held() -> tuple[str, str]:
        found: list[str] = page.evaluate("""() => {
            const node = document.activeElement;
            return [node.getAttribute("aria-level"), node.getAttribute("aria-label")];
        }""")
        return found[0], found[1]

    assert held()[0] == "1"
    assert held()[1].startswith("shared by 8 documents")
    page.keyboard.press("ArrowRight")
    assert held()[0] == "2"
    assert "Operations guide" in page.inner_text("#detail")
    assert page.locator(".bar.lit").count() == 4
    page.keyboard.press("ArrowDown")
    assert "Release notes" in held()[1]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("End")
    assert held()[1].startswith("of document")
    width = page.evaluate("document.activeElement.getBoundingClientRect().width")
    page.keyboard.press("+")
    assert page.evaluate("document.activeElement.getBoundingClientRect().width") > 1.2 * width
    page.keyboard.press("0")
    assert page.evaluate("document.activeElement.getBoundingClientRect().width") == pytest.approx(width, abs=1)

    # from the ranking to the tree
    page.locator(".bar >> nth=2").focus()
    index = page.evaluate("document.activeElement.dataset.document")
    page.keyboard.press("Enter")
    assert held()[1].startswith(f"of document {int(index) + 1},")


def test_a_heat_map_is_walked_with_arrows(addresses: dict[str, str], opened: Opened) -> None:
    page = opened(addresses["tiny"])
    page.locator(".heat-frame").focus()
    for _ in range(9):
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowLeft")
    assert page.inner_text(".readout b") == "1.000"
    page.keyboard.press("ArrowRight")
    value, first, second = page.inner_text(".readout b"), *texts(page, ".readout q")
    assert (first, second) == (
        "How do I reset my password?",
        "How do I reset my password if I no longer have the phone?",
    )
    answer = page.request.post(
        addresses["tiny"] + "/similarity",
        data={
            "inputs": {
                "source_sentence": page.input_value("#instruction") + first,
                "sentences": [page.input_value("#instruction") + second],
            }
        },
    ).json()
    assert float(value) == pytest.approx(answer[0], abs=2e-3)


def test_a_key_is_asked_for_and_kept_nowhere(guarded: str, opened: Opened) -> None:
    headers: list[str | None] = []
    urls: list[str] = []

    def prepare(page: Any) -> None:
        page.on(
            "request", lambda request: (headers.append(request.headers.get("authorization")), urls.append(request.url))
        )

    page = opened(guarded, prepare=prepare, ready=False)
    page.wait_for_selector("#error")
    assert "401" in page.inner_text("#error")
    assert page.evaluate("document.activeElement.id") == "key"
    assert headers == [None] * len(headers)
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(".node")
    assert page.locator("#error").is_hidden()
    assert f"Bearer {KEY}" in headers
    assert not [url for url in [*urls, page.url] if KEY in url]
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert kept == '[{},{},""]'
    page.reload()
    page.wait_for_selector("#error")
    assert page.input_value("#key") == ""


def test_errors_are_shown_as_they_are(addresses: dict[str, str], opened: Opened) -> None:
    page = opened(addresses["tiny-reranker"])
    page.fill("#documents", "\n".join("document" for _ in range(33)))
    page.wait_for_selector("#error")
    assert "batch size 33 > maximum allowed batch size 32" in page.inner_text("#error")
    assert "422" in page.inner_text("#error")
    assert page.locator("#count").inner_text() == "33 given, 32 at most"
    # what was there stays, marked as old
    assert page.locator(".bar").count() == 8
    assert page.locator("body.stale").count() == 1
    type_documents(page, ["one", "two"])
    page.wait_for_selector("#error", state="hidden")
    assert page.locator(".bar").count() == 2

    page.route("**/playground/run", lambda route: route.abort())
    page.fill("#query", "anything")
    page.wait_for_selector("#error")
    assert "not reached" in page.inner_text("#error")
    page.unroute("**/playground/run")
    page.click("#error button")
    page.wait_for_selector("#error", state="hidden")

    for status, kind, body, says in (
        (429, "application/json", '{"message": "Model is overloaded", "type": "Overloaded"}', "429 Overloaded"),
        (500, "text/html", "<h1>Bad <img src=x onerror=window.hurt=1> gateway</h1>", "<h1>Bad <img"),
        (503, "application/json", '{"error": "no engine", "error_type": "Unhealthy"}', "no engine"),
    ):
        page.route("**/playground/run", partial(answer_with, status=status, content_type=kind, body=body))
        page.fill("#query", f"anything {status}")
        page.wait_for_selector(f"#error:has-text('{status}')")
        assert says in page.inner_text("#error").replace("\n", " ")
        page.unroute("**/playground/run")
    assert page.evaluate("window.hurt") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_hundred_documents_fit(guarded: str, opened: Opened, scheme: str, width: int) -> None:
    page = opened(guarded, width=width, scheme=scheme, ready=False)
    page.fill("#key", KEY)
    page.wait_for_selector(".node")
    type_documents(page, LONG)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    frame = page.locator("#tree-frame")
    assert frame.evaluate("node => node.scrollHeight > node.clientHeight")
    page.click("[data-zoom=all]")
    assert frame.evaluate("node => node.scrollHeight - node.clientHeight") <= 0
    assert frame.evaluate("node => node.scrollWidth - node.clientWidth") <= 0
    page.click("[data-zoom=reset]")
    page.keyboard.press("Tab")
    ratios = page.evaluate(CONTRASTS)
    assert len(ratios) > 100
    assert min(ratios) >= 4.5


# WCAG's contrast of the text in each box with the box
CONTRASTS = """() => {
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const light = (color) => {
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255)
            .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    return [...document.querySelectorAll(".node")].map((node) => {
        const style = getComputedStyle(node);
        const both = [light(style.color), light(style.backgroundColor)].sort((a, b) => b - a);
        return (both[0] + 0.05) / (both[1] + 0.05);
    });
}"""
