"""The page in a real browser, if there is one: keyboard only, a phone, and passages with markup."""

import shutil
import threading
import time

import pytest
import uvicorn

from hf_kd_ranking.serving.app import make_app
from hf_kd_ranking.serving.model import ServedModel
from hf_kd_ranking.serving.service import Service

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support import expected_conditions  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with chromedriver on this machine"),
    pytest.mark.parametrize("model", ["colbert"], indirect=True),
    pytest.mark.slow,
]


@pytest.fixture
def start(engine):
    """start(load=None, **settings): address of a server in a thread; `load` is called before the model is there."""
    servers = []

    def run(load=lambda progress: None, **settings):
        def load_model(progress):
            load(progress)
            return ServedModel("<i>one</i>", engine.pipeline.ranker, search=engine)

        app = make_app(Service(load_model), {"title": "Toy", "examples": ["cat & dog"]}, **settings)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield run
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def address(start):
    return start()


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
    assert any("query encoding" in text for text in texts_of(browser, ".stages li"))
    assert any(text.startswith("BM25 #1") for text in texts_of(browser, ".details span"))
    assert texts_of(browser, "[role=status]")[0].startswith("Passages: ")
    press(browser, Keys.TAB)
    if focused(browser) == "query":  # the button that empties a search field, in some versions
        press(browser, Keys.TAB)
    assert focused(browser) == "BUTTON"
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert browser.get_log("browser") == []


def test_start_shows_its_progress(browser, start):
    go = threading.Event()

    def load(progress):
        progress.begin("building the BM25 index", 4_000)
        progress.done = 1_000
        assert go.wait(30)

    browser.get(f"{start(load)}/?q=apple")
    wanted = "The server is starting: building the BM25 index, 1,000 of 4,000 …"
    WebDriverWait(browser, 20).until(lambda _: texts_of(browser, "#status") == [wanted])
    assert browser.execute_script("return document.getElementById('progress').position") == 0.25
    go.set()
    wait_for_results(browser)
    assert not browser.find_element("id", "progress").is_displayed()
    assert browser.get_log("browser") == []


def test_page_asks_for_the_key_once(browser, start):
    address = start(key="s3cret")
    browser.get(f"{address}/?q=apple")
    WebDriverWait(browser, 20).until(expected_conditions.alert_is_present()).send_keys("s3cret")
    browser.switch_to.alert.accept()
    wait_for_results(browser)
    browser.get(f"{address}/?q=bread")
    wait_for_results(browser)


def test_description_of_the_api_is_readable_in_dark_and_light(browser, address):
    colours = set()
    for scheme in ("dark", "light"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(f"{address}/docs")
        WebDriverWait(browser, 20).until(lambda _: "POST /v2/rerank" in texts_of(browser, "#endpoints h2"))
        colours.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
    rows = texts_of(browser, "#endpoints tr")
    assert "top_ninteger or nullNumber of results; all if it is left out." in rows
    assert browser.get_log("browser") == []


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
    assert texts_of(browser, "[role=alert]") == ["query is empty; send a text."]


def test_phone_shows_results_without_sideways_scrolling(browser, address):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(f"{address}/?q=apple")
    wait_for_results(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
