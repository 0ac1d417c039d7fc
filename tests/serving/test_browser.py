"""The page in a real browser, if there is one: keyboard only, a phone, and passages with markup."""

import shutil
import threading
import time

import pytest
import uvicorn

from hf_kd_ranking.serving.app import SearchPage, make_app

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with chromedriver on this machine"),
    pytest.mark.parametrize("model", ["colbert"], indirect=True),
    pytest.mark.slow,
]


@pytest.fixture
def address(engine):
    """Address of a server in a thread."""
    about = {"title": "Toy", "documents": 41, "examples": ["cat & dog"], "name": "<i>one</i>", "line": "ColBERT"}
    server = uvicorn.Server(uvicorn.Config(make_app(SearchPage(engine, about)), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def texts_of(browser, selector):
    return browser.execute_script(f"return [...document.querySelectorAll('{selector}')].map(e => e.textContent)")


def wait_for_results(browser):
    WebDriverWait(browser, 20).until(lambda _: texts_of(browser, ".hits > li"))


def focused(browser):
    return browser.execute_script(
        "return document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
    )


def press(browser, *keys):
    ActionChains(browser).send_keys(*keys).perform()


def test_keyboard_search_shows_markup_as_text(browser, address, hostile):
    browser.get(address)
    WebDriverWait(browser, 20).until(lambda _: texts_of(browser, "#examples li"))
    assert focused(browser) == "query"
    press(browser, "script king", Keys.ENTER)
    wait_for_results(browser)
    assert browser.current_url.endswith("?q=script%20king")
    assert browser.title == "script king · Toy"
    assert texts_of(browser, "#results h2") == ["<i>one</i>"]
    assert hostile in texts_of(browser, ".passage")
    assert "id <b>41</b>" in texts_of(browser, ".details span")
    assert texts_of(browser, ".passage script, .passage img, #results i, .details b") == []
    assert browser.execute_script("return window.ran") is None
    assert texts_of(browser, ".passage mark")
    assert any("query encoding" in text for text in texts_of(browser, ".stages li"))
    assert any(text.startswith("BM25 #1") for text in texts_of(browser, ".details span"))
    assert texts_of(browser, "[role=status]")[0].startswith("Passages: ")
    press(browser, Keys.TAB)
    if focused(browser) == "query":  # the button that empties a search field, in some versions
        press(browser, Keys.TAB)
    assert focused(browser) == "BUTTON"
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert browser.get_log("browser") == []


def test_matched_words_can_be_read_by_keyboard(browser, address):
    browser.get(f"{address}/?q=script%20king")
    wait_for_results(browser)
    first = browser.find_element("css selector", ".matches summary")
    browser.execute_script("arguments[0].focus()", first)
    assert texts_of(browser, ".matches[open] li") == []
    press(browser, Keys.ENTER)
    shown = texts_of(browser, ".matches[open] li")
    passage = first.find_element("xpath", "../../p[contains(@class, 'passage')]")
    marks = {mark.text.strip(): mark.get_attribute("title") for mark in passage.find_elements("css selector", "mark")}
    assert shown and len(shown) == len(passage.find_elements("css selector", "mark"))
    strengths = []
    for line in shown:
        text, _, rest = line.partition(" for “")
        word, _, strength = rest.partition("”, ")
        assert marks[text] == f"“{word}”, strength {strength}"
        strengths.append(float(strength))
    assert strengths == sorted(strengths, reverse=True)


def test_back_button_and_shared_address_repeat_the_search(browser, address):
    browser.get(f"{address}/?q=%3Cimg%20src%3Dx%3E%20apple")
    wait_for_results(browser)
    assert browser.execute_script("return document.getElementById('query').value") == "<img src=x> apple"
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).perform()
    press(browser, "zzz", Keys.ENTER)
    WebDriverWait(browser, 20).until(lambda _: texts_of(browser, ".none"))
    assert texts_of(browser, ".none")[0] == "No passage contains a word of this query."
    browser.back()
    wait_for_results(browser)
    assert browser.execute_script("return document.getElementById('query').value") == "<img src=x> apple"
    browser.get(f"{address}/?q=")
    WebDriverWait(browser, 20).until(lambda _: texts_of(browser, "#error")[0])
    assert texts_of(browser, "[role=alert]") == ["The query is empty; type a few words."]


def test_phone_shows_results_without_sideways_scrolling(browser, address):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(f"{address}/?q=apple")
    wait_for_results(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
