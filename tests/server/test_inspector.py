"""The inspector's page in headless Chromium, against the real server."""

from __future__ import annotations

import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api")

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        running = tool.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda told: wrong.append(told.text) if "Content Security Policy" in told.text else None)
    page.goto(f"{server.root}/align_spec/")
    playwright.expect(page.locator("#state")).to_contain_text("base, vllm_align_spec")
    yield page
    context.close()
    assert not wrong


def run(page, method, **options):
    page.locator("#method").select_option(method)
    for name, value in options.items():
        field = page.locator(f"#options [name={name}]")
        field.select_option(value) if field.evaluate("e => e.tagName") == "SELECT" else field.fill(value)
    page.locator("#max_tokens").fill("32")
    page.locator("#max_tokens").fill("32")
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    playwright.expect(page.locator("#stop")).to_be_disabled(timeout=60_000)


def origins(page):
    return page.locator("#aligned .text .token").evaluate_all("spans => spans.map(span => span.token.origin)")


def test_both_answers_arrive_and_tokens_tell_where_they_came_from(page, server, scheme, tmp_path):
    page.emulate_media(color_scheme=scheme)
    run(page, "wsd", wsd="shared", wsd_gamma="0.3")
    prompt = [{"role": "user", "content": page.locator("#prompt").input_value()}]
    for article, xargs in (("#plain", None), ("#aligned", {"wsd": "shared", "wsd_gamma": 0.3})):
        expected = server.chat(prompt, xargs=xargs, max_tokens=32, seed=0).choices[0].message.content
        assert page.locator(f"{article} .text").inner_text() == expected
        playwright.expect(page.locator(f"{article} .told")).to_contain_text("tokens in")
    found = origins(page)
    assert {"opening", "base"} <= set(found) <= {"opening", "draft", "base"}
    assert found[0] == "opening"
    assert '"method": "wsd"' in page.locator("#aligned pre").text_content()
    page.screenshot(path=tmp_path / f"{scheme}.png")
    assert (tmp_path / f"{scheme}.png").stat().st_size > 10_000


def test_tokens_are_read_with_the_keyboard_and_the_mouse(page):
    page.locator("#temperature").fill("1")
    run(page, "cards", cards_reward="short", cards_threshold="-1", cards_entropy="0.5")
    page.locator("#aligned .text").focus()
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("#token")).to_contain_text("token 1 ·")
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("#token")).to_contain_text("token 2 ·")
    playwright.expect(page.locator("#token")).to_contain_text("probability")
    playwright.expect(page.locator("#token")).to_contain_text("reward")
    page.locator("#plain .text .token").nth(4).hover()
    playwright.expect(page.locator("#token")).to_contain_text("token 5 ·")


SLOW = ("args", "dera", "bon", "deal")


def test_a_refusal_is_shown_as_the_server_words_it(page):
    page.locator("#method").select_option("wsd")
    page.locator("#options [name=wsd_gamma]").evaluate("field => { field.removeAttribute('max'); field.value = '2'; }")
    page.locator("#form button[type=submit]").click()
    playwright.expect(page.locator("#stop")).to_be_disabled(timeout=60_000)
    playwright.expect(page.locator("#aligned .told.wrong")).to_contain_text("wsd_gamma=2")


@pytest.mark.parametrize("method", ["asap", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_kind_of_method_runs(page, method):
    if method == "asap":
        page.locator("#grammar").fill("[01]{6}")
    given = {"args": {"args_reward": "judge"}, "bon": {"bon_reward": "short"}, "deal": {"deal_top_k": "2"}}
    more = {"deal_lookahead": "2", "deal_reward": "short"} if method == "deal" else {}
    page.locator("#temperature").fill("1" if method in ("asap", "bon") else "0")
    run(page, method, **given.get(method, {}), **more)
    playwright.expect(page.locator("#aligned .told")).to_contain_text("ended:")
    assert origins(page)
