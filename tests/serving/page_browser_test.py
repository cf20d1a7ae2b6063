"""The playground in Chromium, against a server: what a user sees and does, by mouse and by keys.

Texts come from a batch without a model; the lens looks into a tiny model.
"""

import functools
import math
import re
import shutil

import pytest
from fake_batcher import FakeBatcher
from playwright.sync_api import Page, expect, sync_playwright
from running_server import chat_model, running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
KEY = "letmein"
EXPECTED = re.compile(r"status of (401|400) ")
MILLISECONDS = 60_000
TOKENS = ".tokens [role=button]"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    lm = chat_model(tmp_path_factory.mktemp("chat"))
    batcher = functools.partial(FakeBatcher, seconds_per_tick=0.002)
    options = {"rows": 4, "criteria": ("latent_diff", "kl"), "max_depth": 16, "cache_slots": 16}
    with running(lm, batcher, api_key=KEY, **options) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    # The lens compiles when it is first asked, as the batch has nothing to compile.
    expect.set_options(timeout=MILLISECONDS)
    with sync_playwright() as playwright:
        # A container has no name spaces of its own for the sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def without_ends(route):
    """Lets texts be as long as asked for; the batch without a model ends them at random."""
    body = route.request.post_data_json
    route.continue_(post_data={**body, "ignore_eos": True})


@pytest.fixture
def page(browser, server):
    """The page, once it has the API key; what goes wrong in it fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    problems, hosts = [], set()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: hosts.add(re.match(r"\w+://([^/]*)", request.url)[1]))
    page.route("**/v1/completions", without_ends)
    page.goto(server.url)
    expect(page.get_by_role("alert")).to_have_text("This server asks for an API key.")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    page.set_default_timeout(MILLISECONDS)
    yield page
    context.close()
    # The browser notes every answer that is an error.
    assert [problem for problem in problems if not EXPECTED.search(problem)] == []
    assert hosts == {server.url.removeprefix("http://")}


def generate(page: Page, prompt: str, count: int = 1):
    """Runs a prompt and waits for the ends of its texts."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".tokens .end")).to_have_count(count)


def test_a_text_is_coloured_by_depth_and_a_token_opens_its_iterations(page):
    page.locator("#depth-a").focus()
    page.keyboard.press("End")
    expect(page.locator("#depth-a-shown")).to_have_text("16")
    page.get_by_label("New tokens").fill("40")
    generate(page, "ab")
    tokens = page.locator(TOKENS)
    assert tokens.count() == 40
    look = "(spans) => spans.map((s) => [s.dataset.depth, getComputedStyle(s).backgroundColor])"
    depths, colours = zip(*tokens.evaluate_all(look), strict=True)
    assert len(set(depths)) > 5 and len(set(colours)) == len(set(depths))
    assert set(map(int, depths)) <= set(range(1, 17))
    # The histogram counts them, and shows one depth alone.
    bar = page.locator(".histogram button").first
    number = bar.inner_text().strip()
    bar.click()
    assert page.locator(".tokens .dimmed").count() == 40 - depths.count(number)
    bar.click()
    expect(page.locator(".meter")).to_contain_text("iterations/token")

    tokens.nth(7).click()
    expect(page.locator("#lens-chart circle[data-at]")).to_have_count(16)
    assert page.locator("#lens-table td").count() == 5 * 16
    expect(page.locator("#lens-summary")).to_contain_text(f"It took {depths[7]} of 16")


def test_the_threshold_is_dragged_or_moved_by_keys_and_taken_over(page):
    generate(page, "cd")
    page.locator(TOKENS).first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    handle = page.get_by_role("slider", name="Threshold of latent_diff")
    expect(handle).to_be_visible()
    assert page.locator(".tokens .chosen").get_attribute("data-number") == "1"

    def exit_depth():
        """After which iteration the first value lies below the line, as drawn."""
        line = handle.bounding_box()
        at = page.locator("#lens-table th.exit").inner_text()
        assert f"stops after {at} of" in handle.get_attribute("aria-valuetext")
        assert line is not None
        return int(at)

    before, value = exit_depth(), float(handle.get_attribute("aria-valuenow"))
    handle.focus()
    page.keyboard.press("PageUp")
    assert float(handle.get_attribute("aria-valuenow")) == pytest.approx(value * 1.15**5, rel=0.01)
    box = handle.locator(".area").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] - 2000, steps=3)
    page.mouse.up()
    assert exit_depth() == 1 < before
    page.get_by_role("button", name="Use this threshold").click()
    taken = float(page.locator("#threshold-a-shown").inner_text().removeprefix("< "))
    assert math.isclose(taken, float(handle.get_attribute("aria-valuenow")), rel_tol=0.01)
    page.get_by_role("radio", name="kl", exact=True).click()
    expect(page.get_by_role("slider", name="Threshold of kl")).to_be_visible()


def test_two_depths_side_by_side_and_a_strip_of_depths(page):
    page.get_by_label("New tokens").fill("20")
    page.get_by_text("Compare", exact=True).click()
    generate(page, "ef", count=2)
    titles = page.locator(".pane h3").all_inner_texts()
    assert titles == ["depth ≤ 3, latent_diff < 0.03", "depth 2"]
    assert set(
        page.locator(".pane")
        .nth(1)
        .locator(TOKENS)
        .evaluate_all("(spans) => spans.map((span) => span.dataset.depth)")
    ) == {"2"}
    page.get_by_text("Depth strip").click()
    generate(page, "ef", count=5)
    assert page.locator(".pane h3").all_inner_texts() == [f"depth {2**i}" for i in range(5)]
    # What the batch without a model writes does not depend on the depth.
    expect(page.locator(".note").first).to_have_text("100 % as the deepest")
    assert page.locator(".differs").count() == 0


def test_stop_drops_the_text_and_its_row_is_free(page, server):
    page.get_by_label("New tokens").fill("200")
    page.get_by_text("Rows of the server").click()
    page.get_by_label("Prompt").fill("qr")
    page.keyboard.press("Control+Enter")
    expect(page.locator(TOKENS).nth(3)).to_be_visible()
    expect(page.locator("#lanes tr.mine")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator(".tokens .end")).to_have_text("… stopped")
    assert page.locator(TOKENS).count() < 200
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    expect(page.locator("#lanes td", has_text="free")).to_have_count(4)
    assert server.engine.num_open == 0


def test_a_link_has_all_settings_and_errors_are_shown(page, server):
    page.get_by_text("Compare", exact=True).click()
    page.get_by_label("Seed").fill("5")
    page.get_by_label("New tokens").fill("20")
    page.locator("#criterion-b").select_option("kl")
    generate(page, "ij", count=2)
    assert "cb=kl" in page.url
    page.reload()
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Tab")
    expect(page.get_by_label("Prompt")).to_have_value("ij")
    expect(page.get_by_label("Seed")).to_have_value("5")
    expect(page.locator("#criterion-b")).to_have_value("kl")
    expect(page.get_by_role("radio", name="Compare")).to_be_checked()
    page.get_by_label("New tokens").fill("5000")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("max_tokens")
