"""The chat page as a person uses it: in headless Chromium, by labels and roles."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from dsv3.data.tokenizer import train
from dsv3.serve import page as chat_page
from dsv3.serve.api.settings import Settings
from tests.serve.api.conftest import Api
from tests.serve.fake_api import FakeApi

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect
expect.set_options(timeout=15_000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server() -> Iterator[FakeApi]:
    found = FakeApi()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def page(browser: Any, server: FakeApi) -> Iterator[Any]:
    """A fresh visitor. The page may not log an error, nor ask another origin for anything."""
    server.requests.clear()
    server.gone.clear()
    server.key = ""
    context = browser.new_context()
    opened = context.new_page()
    errors: list[str] = []
    asked: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.errors = errors
    opened.goto(server.url)
    expect(opened.locator("#model-name")).to_have_text("fake")
    yield opened
    foreign = [url for url in asked if not url.startswith((server.url, "data:"))]
    assert foreign == []
    assert errors == []
    context.close()


def say(page: Any, text: str) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible()  # the answer before has ended
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def answer(page: Any) -> Any:
    return page.get_by_role("article", name="Model").last


def test_an_answer_streams_in_and_has_figures(page: Any, server: FakeApi) -> None:
    say(page, "hello there")
    expect(page.get_by_role("article", name="You")).to_have_text("hello there")
    expect(answer(page)).to_have_text("Answer 1 to hello.", use_inner_text=True)
    meter = page.get_by_label("Figures of the last answer")
    expect(meter).to_contain_text("tokens/s")
    expect(meter).to_contain_text("3 of 4, 75 %")
    expect(meter).to_contain_text("16 of 30 tokens")
    body = server.requests[0]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert body["messages"] == [{"role": "user", "content": "hello there"}]
    say(page, "more")
    expect(answer(page)).to_have_text("Answer 2 to more.", use_inner_text=True)
    assert [message["role"] for message in server.requests[1]["messages"]] == ["user", "assistant", "user"]


def test_text_is_seen_before_the_answer_ends_and_stop_hangs_up(page: Any, server: FakeApi) -> None:
    say(page, "slow")
    expect(answer(page)).to_contain_text("w3 ")
    page.get_by_role("button", name="Stop").click()
    expect(answer(page)).to_contain_text("Stopped.")
    assert server.gone.wait(10)
    assert "w399" not in answer(page).inner_text()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    say(page, "slow")
    expect(answer(page)).to_contain_text("w1 ")
    page.keyboard.press("Escape")
    expect(answer(page)).to_contain_text("Stopped.")


def test_regenerate_asks_the_same_again(page: Any, server: FakeApi) -> None:
    say(page, "hello")
    expect(answer(page)).to_have_text("Answer 1 to hello.", use_inner_text=True)
    page.get_by_role("button", name="Regenerate").click()
    expect(answer(page)).to_have_text("Answer 2 to hello.", use_inner_text=True)
    assert page.get_by_role("article").count() == 2
    assert server.requests[0] == server.requests[1]


def test_a_reload_keeps_the_conversation_and_new_chat_forgets_it(page: Any) -> None:
    say(page, "hello")
    expect(answer(page)).to_have_text("Answer 1 to hello.", use_inner_text=True)
    page.reload()
    expect(answer(page)).to_have_text("Answer 1 to hello.", use_inner_text=True)
    expect(page.get_by_label("Figures of the last answer")).to_contain_text("75 %")
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("article")).to_have_count(0)
    page.reload()
    expect(page.get_by_text("Write a message to begin.")).to_be_visible()


def test_new_chat_in_the_middle(page: Any, server: FakeApi) -> None:
    say(page, "slow")
    expect(answer(page)).to_contain_text("w3 ")
    page.get_by_role("button", name="New chat").click()
    assert server.gone.wait(10)
    expect(page.get_by_role("article")).to_have_count(0)
    say(page, "hello")
    expect(answer(page)).to_have_text("Answer 2 to hello.", use_inner_text=True)
    assert server.requests[1]["messages"] == [{"role": "user", "content": "hello"}]


def test_an_answer_is_copied(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    say(page, "code")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()  # nothing is redrawn any more
    answer(page).get_by_role("button", name="Copy").click()
    expect(answer(page)).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "def f(__init__):\n    return 1"


def test_a_reload_in_the_middle_keeps_what_was_written(page: Any) -> None:
    say(page, "slow")
    expect(answer(page)).to_contain_text("w3 ")
    page.reload()
    expect(answer(page)).to_contain_text("w3 ")
    expect(answer(page)).to_contain_text("Not finished.")


def test_hostile_output_stays_text(page: Any) -> None:
    say(page, "hostile")
    expect(answer(page)).to_contain_text("x.png")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert page.title() == "dsv3 chat"
    assert answer(page).locator("img, script, svg, b, a, iframe").count() == 0
    assert "<script>document.title='owned'</script>" in answer(page).locator("figure code").inner_text()
    assert "<img src=x onerror=" in answer(page).inner_text()


def test_markdown_becomes_elements(page: Any) -> None:
    say(page, "code")
    expect(answer(page).locator("figure code")).to_have_text("def f(__init__):\n    return 1")
    expect(answer(page).locator("strong")).to_have_text("list")
    expect(answer(page).locator("ul ul li")).to_have_text("inner")
    expect(answer(page).locator("li > code")).to_have_text("x")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Answers as plain text").check()
    expect(answer(page).locator("figure")).to_have_count(0)
    expect(answer(page)).to_contain_text("```python")


def test_settings_are_sent_and_kept(page: Any, server: FakeApi) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    for label, value in (
        ("Temperature", "0"),
        ("Top-p", ""),
        ("Top-k", "5"),
        ("Max tokens", "7"),
        ("Seed", "3"),
    ):
        page.get_by_label(label, exact=True).fill(value)
    page.reload()
    say(page, "hello")
    expect(answer(page)).to_contain_text("Answer")
    body = server.requests[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body.get(name) for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")} == {
        "temperature": 0, "top_p": None, "top_k": 5, "max_tokens": 7, "seed": 3,
    }  # fmt: skip
    page.get_by_label("Top-p").fill("7")
    say(page, "again")
    expect(page.get_by_role("alert")).to_contain_text("Top-p")
    assert len(server.requests) == 1
    expect(page.get_by_label("Message")).to_have_value("again")  # nothing typed is lost


def test_reasoning_is_folded(page: Any) -> None:
    say(page, "think")
    expect(answer(page)).to_contain_text("Seen.")
    expect(page.get_by_text("Let me see.")).to_be_hidden()
    page.get_by_text("Reasoning", exact=True).click()
    expect(page.get_by_text("Let me see.")).to_be_visible()
    expect(page.get_by_label("Figures of the last answer")).to_contain_text("5 of them reasoning")


@pytest.mark.parametrize(
    ("said", "told", "articles"),
    [
        ("busy", "Too many requests at once. Try again in 7 s.", 1),
        ("fails", "the model gave up", 2),
        ("cut", "The answer broke off", 2),
    ],
)
def test_errors_are_told(page: Any, said: str, told: str, articles: int) -> None:
    say(page, said)
    expect(page.get_by_role("alert")).to_contain_text(told)
    expect(page.get_by_role("article")).to_have_count(articles)
    again = page.get_by_role("button", name="Answer" if articles == 1 else "Regenerate")
    expect(again).to_be_visible()
    page.errors.clear()  # the browser writes its own word on a failed request


def test_a_key_is_asked_for_and_forgotten_with_the_tab(page: Any, server: FakeApi, browser: Any) -> None:
    server.key = "secret"
    say(page, "hello")
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Use key").click()
    expect(page.get_by_role("alert")).to_contain_text("does not know this key")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Use key").click()
    expect(answer(page)).to_contain_text("to hello.")
    page.reload()
    say(page, "again")
    expect(answer(page)).to_contain_text("to again.")
    assert page.evaluate("JSON.stringify(localStorage)").count("secret") == 0
    page.errors.clear()


def test_a_key_given_while_a_wrong_one_is_still_being_tried(page: Any, server: FakeApi) -> None:
    server.key = "secret"
    held: list[Any] = []
    say(page, "hello")
    page.get_by_label("API key").fill("wrong")
    page.route("**/v1/chat/completions", lambda route: held.append(route), times=1)
    page.get_by_role("button", name="Use key").click()
    expect(page.get_by_role("alert")).to_contain_text("does not know this key")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Use key").click()
    assert len(held) == 1
    held[0].continue_()
    expect(answer(page)).to_contain_text("to hello.")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.errors.clear()


def test_a_server_that_is_gone(page: Any, server: FakeApi) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Answer").click()
    expect(answer(page)).to_have_text("Answer 1 to hello.", use_inner_text=True)
    expect(page.get_by_role("alert")).to_be_hidden()
    page.errors.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Any, server: FakeApi, scheme: str) -> None:
    context = browser.new_context(
        viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True, color_scheme=scheme
    )
    opened = context.new_page()
    opened.goto(server.url)
    opened.get_by_label("Message").fill("code")
    opened.get_by_role("button", name="Send").tap()
    expect(opened.get_by_role("button", name="Regenerate")).to_be_visible()
    wide = "document.documentElement.scrollWidth"
    assert opened.evaluate(wide) == 360
    assert opened.evaluate("document.getElementById('scroll').scrollWidth") <= 360
    background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(background.split("(")[1].split(",")[0]) < 128) == (scheme == "dark")
    opened.get_by_role("button", name="Settings").tap()
    expect(opened.get_by_label("Temperature")).to_be_in_viewport()
    assert opened.evaluate(wide) == 360
    opened.get_by_role("button", name="Close").tap()
    expect(opened.get_by_label("Message")).to_be_in_viewport()
    context.close()


def test_the_files_need_nothing_from_elsewhere() -> None:
    files = chat_page.files()
    assert set(files) == {"/", "/page.css", "/page.js", "/api.js", "/markdown.js"}
    for path, (_, content) in files.items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert "http:" not in text and "https:" not in text, path
        assert "innerHTML" not in text and "eval(" not in text, path


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    """The real server over a tiny random model."""
    tokenizer = train(["some words to learn from and to say again, Paris or Rome"] * 9, 340)
    found = Api(tokenizer, Settings(model_name="tiny"))
    yield found
    found.end()


@pytest.fixture
def real(browser: Any, api: Api) -> Iterator[Any]:
    """The page as the real server hands it out, with the policy it sends in force."""
    context = browser.new_context()
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text))
    opened.errors = errors
    opened.goto(api.url)
    expect(opened.locator("#model-name")).to_have_text("tiny")
    yield opened
    assert errors == []
    context.close()


def test_the_real_server_answers(real: Any, api: Api) -> None:
    real.get_by_role("button", name="Settings").click()
    for label, value in (("Temperature", "0"), ("Max tokens", "24")):
        real.get_by_label(label).fill(value)
    say(real, "some words to learn from, and to say again " * 4)
    meter = real.get_by_label("Figures of the last answer")
    expect(meter).to_contain_text("Prompt from cache")
    first = answer(real).inner_text()
    assert first.strip()
    expect(meter).to_contain_text("cache0 of ")
    real.get_by_role("button", name="Regenerate").click()
    expect(meter).to_contain_text("Prompt from cache")
    assert answer(real).inner_text() == first  # greedy
    expect(meter).not_to_contain_text("cache0 of ")  # the prompt is in the cache now
    api.idle()


def test_stop_frees_the_real_server(real: Any, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.slow(monkeypatch)
    say(real, "some words")
    api.until(lambda: api.engine.busy)
    expect(real.get_by_role("button", name="Stop")).to_be_visible()
    real.keyboard.press("Escape")
    expect(answer(real)).to_contain_text("Stopped.")
    api.idle()


def test_a_request_that_is_too_long_is_told(real: Any, api: Api) -> None:
    say(real, "words " * 600)
    expect(real.get_by_role("alert")).to_contain_text("512")
    real.errors.clear()
    api.idle()


def test_the_page_is_served_under_a_policy(api: Api) -> None:
    for path, (_, content) in chat_page.files().items():
        found = api.http.get(path)
        assert found.content == content
        assert "script-src 'self'" in found.headers["Content-Security-Policy"]
