"""The page, in a real browser."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import PATIENCE_S

from common.image import decode
from common.spec import ImageSpec
from export.graphs.graph import to_onnx
from export.runtimes.onnx_session import OnnxSession
from fold.graph import fold
from serve.request.access import EVERYBODY, Access
from serve.request.app import make_app
from serve.request.limits import Limits

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed here"),
]
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1100,900"
)
PROVENANCE = {
    "training": {"dataset": "digits", "epochs_done": 4, "seed": 7, "test_accuracy": 0.9889},
    "fold": {
        "dirac_parameters": 342738,
        "logits": [
            {"images": "real", "precision": "float64", "num_images": 64, "relative": 2e-15, "top1_changes": 0},
            {"images": "real", "precision": "float32", "num_images": 64, "relative": 1.1e-6, "top1_changes": 0},
        ],
    },
    "export": {"precision": "fp32", "lowering": "shared"},
    "parity": [
        {"images": "real", "num_images": 359, "relative": 9.6e-7, "top1_agreement": 1.0, "within_tolerance": True},
        {"images": "random", "num_images": 64, "relative": 5e-7, "top1_agreement": 1.0, "within_tolerance": True},
    ],
}

# The answer to the first prediction arrives once `release` is called.
LATE_ANSWER = """
const fetched = window.fetch, late = new Promise((resolve) => { window.release = resolve; });
window.num_predictions = 0;
window.fetch = async (path, options) => {
  const isFirst = path.startsWith("/predict") && ++window.num_predictions === 1;
  const response = await fetched(path, options);
  if (isFirst) await late;
  return response;
};
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*QUIET.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def page(live, make_net, make_spec, tmp_path, browser):
    """`page()` opens the page of a small net in the browser; the fields are those of its spec."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def page(*, api_key=None, size=28, channels=1, **fields):
            path = tmp_path / "plain.onnx"
            spec = {"size": size, "channels": channels, **fields}
            model = to_onnx(fold(make_net(**spec)), make_spec(**spec), PROVENANCE)
            path.write_bytes(model.SerializeToString())
            access = Access(api_key=api_key.encode()) if api_key else EVERYBODY
            url = stack.enter_context(live(make_app(OnnxSession(path), Limits(), access=access)))
            browser.get(url)
            return url

        yield page


def text(browser, name):
    return browser.find_element("id", name).text


def wait(browser, condition):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, PATIENCE_S, poll_frequency=0.05).until(condition)


def wait_for(browser, name, part):
    """Until the element `name` shows `part`; what it shows then."""
    return wait(browser, lambda browser: shown if part in (shown := text(browser, name)) else False)


def choose(browser, path):
    browser.find_element("id", "file").send_keys(str(path))


def write_image(path):
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return path


def requested_hosts(browser):
    """Every address that pages of this browser asked for since the last look."""
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}


def test_a_chosen_image_is_classified_and_its_time_told(page, browser, tmp_path):
    url = page()
    requested_hosts(browser)
    choose(browser, write_image(tmp_path / "image.png"))
    status = wait_for(browser, "status", "ms from sending")
    assert "label " in status
    assert re.search(r"in the server: decode [0-9.]+ ms, queue [0-9.]+ ms, model [0-9.]+ ms, total [0-9.]+ ms", status)
    rows = browser.find_elements("css selector", "#bars li")
    assert len(rows) == 5
    shares = [float(row.text.split("\n")[-1].removesuffix(" %")) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert rows[0].text.split("\n")[0] in status
    assert browser.find_element("id", "shown").is_displayed()
    assert all(address.startswith((url, "blob:", "data:")) for address in requested_hosts(browser))


def test_the_card_tells_how_the_model_came_to_be(page, browser):
    page()
    card = wait_for(browser, "facts", "Digest")
    for fact in (
        "DiracNet-10-0.25: 10 layers, cifar, width 0.25, ncrelu, dirac",
        "28×28, grey",
        "342,738 before folding",
        "fp32",
        "shared",
        "digits, 4 epochs, seed 7",
        "98.89 %",
        "2.0e-15 of the largest logit, no class changed on 64 real images; in float32 1.1e-6",
        "9.6e-7 of the largest logit, the same, top-1 agreement 100.0 % on 359 real images",
    ):
        assert fact in card


def test_what_the_model_does_not_tell_is_left_out(page, browser, monkeypatch):
    monkeypatch.setitem(globals(), "PROVENANCE", {})
    page()
    card = wait_for(browser, "facts", "Digest")
    assert "Input" in card
    assert not any(term in card for term in ("Parameters", "Fold", "Parity", "accuracy", "undefined"))


def test_an_unreadable_file_is_a_problem_in_words(page, browser, tmp_path):
    page()
    (tmp_path / "text.png").write_text("hello")
    choose(browser, tmp_path / "text.png")
    status = wait_for(browser, "status", "cannot be decoded")
    assert "not a PNG, JPEG" in status
    assert not browser.find_elements("css selector", "#bars li")


def ink(browser):
    """Pixels of the pad that are not black."""
    script = "return brush.getImageData(0, 0, pad.width, pad.height).data.filter((v, i) => i % 4 === 0 && v > 0).length"
    return browser.execute_script(script)


def test_a_drawing_is_white_on_black_and_classified(page, browser):
    from selenium.webdriver import ActionChains

    page()
    wait_for(browser, "facts", "Digest")
    pad = browser.find_element("id", "pad")
    assert ink(browser) == 0
    ActionChains(browser).move_to_element(pad).click_and_hold().move_by_offset(50, 60).release().perform()
    wait_for(browser, "status", "ms from sending")
    assert 1000 < ink(browser) < 10_000
    assert not browser.find_element("id", "shown").is_displayed()
    browser.find_element("id", "clear").click()
    assert ink(browser) == 0
    assert "empty" in text(browser, "status")


def test_keys_draw_too_in_the_order_of_the_page(page, browser):
    from selenium.webdriver import ActionChains, Keys

    page()
    wait_for(browser, "facts", "Digest")
    order = []
    for _ in range(6):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        order.append(browser.switch_to.active_element.get_attribute("id") or "docs")
    assert order == ["file", "clear", "pad", "curl", "docs", "copy"]
    browser.execute_script("pad.focus()")
    ActionChains(browser).send_keys(Keys.ARROW_LEFT).perform()
    assert ink(browser) == 0
    ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN).key_up(Keys.SHIFT).perform()
    wait_for(browser, "status", "ms from sending")
    assert ink(browser) > 0
    ActionChains(browser).send_keys(Keys.DELETE).perform()
    assert ink(browser) == 0


@pytest.mark.parametrize("fields", [{"channels": 3}, {"size": 96, "family": "pooled"}])
def test_no_pad_is_offered_for_photographs(page, browser, fields):
    page(**fields)
    wait_for(browser, "facts", "Digest")
    assert not browser.find_element("id", "pad").is_displayed()


def test_a_key_is_asked_for_and_then_sent(page, browser, tmp_path):
    page(api_key="open")
    wait_for(browser, "status", "The API key is missing or wrong")
    choose(browser, write_image(tmp_path / "image.png"))
    browser.find_element("id", "secret").send_keys("open\n")
    wait_for(browser, "facts", "Digest")
    wait_for(browser, "status", "ms from sending")
    assert not browser.find_element("id", "key").is_displayed()
    assert 'Authorization: Bearer $DIRACNET_API_KEY"' in text(browser, "curl")


def test_a_refusal_that_comes_after_the_key_was_given_is_forgotten(page, browser, tmp_path):
    page(api_key="open")
    wait_for(browser, "status", "The API key is missing or wrong")
    browser.execute_script(LATE_ANSWER)
    choose(browser, write_image(tmp_path / "image.png"))
    browser.find_element("id", "secret").send_keys("open\n")
    wait_for(browser, "facts", "Digest")
    wait_for(browser, "status", "ms from sending")
    browser.execute_script("release()")
    wait(browser, lambda browser: browser.execute_script("return num_predictions") == 3)
    assert not browser.find_element("id", "key").is_displayed()


def test_the_command_for_the_shell_is_copied(page, browser):
    url = page()
    browser.find_element("id", "copy").click()
    wait(browser, lambda browser: text(browser, "copy") != "Copy")
    assert text(browser, "curl") == f"curl --data-binary @image.png {url}/predict"


def test_photographs_are_named_in_their_owners_words(page, browser, monkeypatch):
    training = PROVENANCE["training"] | {"dataset": "folder", "folder": "Meine Blumen"}
    training["split"] = {"train": 1178, "validation": 25, "test": 44, "sha256": "0" * 64}
    monkeypatch.setitem(globals(), "PROVENANCE", PROVENANCE | {"training": training})
    page()
    card = wait_for(browser, "facts", "Digest")
    assert "the images of the folder “Meine Blumen” (1,178 to learn from, 25 to choose by, 44 to test on)" in card
    assert "98.89 % of 44 images" in card
    assert text(browser, "name") == browser.title == "Meine Blumen"
    assert text(browser, "about").startswith("DiracNet-10-0.25, ")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_part_of_the_image_that_the_net_sees_is_shown(page, browser, tmp_path, channels):
    page(size=24, channels=channels)
    wait_for(browser, "facts", "Digest")
    smooth = np.linspace(0, 255, 96)[:, None, None] * np.ones((1, 60, 3)) * [1, 0.5, 0.25]
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "image.png")
    choose(browser, tmp_path / "image.png")
    wait_for(browser, "pictures", "the net sees 24×24")
    frame = browser.find_element("id", "frame")
    shares = [frame.value_of_css_property(name) for name in ("left", "top", "width", "height")]
    whole = browser.find_element("id", "shown").size
    # The middle 60 of 96 rows.
    assert [float(share.removesuffix("px")) for share in shares] == pytest.approx(
        [0, 18 / 96 * whole["height"], whole["width"], 60 / 96 * whole["height"]], abs=0.5
    )
    drawn = browser.execute_script(
        "return [...document.getElementById('seen').getContext('2d').getImageData(0, 0, 24, 24).data]"
    )
    drawn = np.array(drawn).reshape(24, 24, 4)[..., :3]
    pixels = decode(
        (tmp_path / "image.png").read_bytes(), ImageSpec(24, 24, channels, (0,) * channels, (1,) * channels, 24)
    )
    # Grey is weighted for linear light or not, and resampling differs, by a few of 255 levels.
    assert np.abs(drawn.astype(int) - pixels).max() <= 12


def test_the_answer_stays_in_sight_on_a_small_screen(page, browser):
    browser.set_window_size(360, 500)
    try:
        page()
        wait_for(browser, "facts", "Digest")
        browser.execute_script("document.getElementById('drop').scrollIntoView()")
        bottom, height = browser.execute_script(
            "return [document.getElementById('result').getBoundingClientRect().bottom, innerHeight]"
        )
        assert bottom == pytest.approx(height, abs=1)
    finally:
        browser.set_window_size(1100, 900)


def test_a_narrow_screen_needs_no_sideways_scrolling(page, browser, tmp_path):
    browser.set_window_size(320, 700)
    try:
        page()
        choose(browser, write_image(tmp_path / "image.png"))
        wait_for(browser, "status", "ms from sending")
        root = "document.documentElement"
        assert browser.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
    finally:
        browser.set_window_size(1100, 900)


def test_every_control_and_region_has_a_name(page, browser):
    page()
    wait_for(browser, "facts", "Digest")
    for element in browser.find_elements("css selector", "input, button, canvas, section, ol, [role=status]"):
        if element.is_displayed():
            assert element.accessible_name or element.aria_role == "status", element.get_attribute("outerHTML")
    assert browser.find_element("id", "status").aria_role == "status"


@pytest.mark.parametrize(("address", "name", "part"), [("/", "facts", "Digest"), ("/docs", "main", "GET /model")])
def test_the_console_stays_empty(page, browser, address, name, part):
    browser.get_log("browser")
    url = page()
    wait_for(browser, "facts", "Digest")  # what it asks for is not cut off by the next page
    browser.get(url + address)
    wait_for(browser, name, part)
    assert "DiracNet" in browser.title
    assert browser.get_log("browser") == []


def test_the_docs_tell_of_every_address(page, browser):
    url = page()
    browser.get(f"{url}/docs")
    wait_for(browser, "main", "GET /model")
    docs = browser.find_element("id", "main").get_attribute("textContent")
    for part in ("POST /predict", "urn:diracnet:problem:undecodable", "top_k = 5"):
        assert part in docs
    assert "undefined" not in docs


def test_the_docs_fit_a_phone_and_have_contents(page, browser):
    browser.set_window_size(360, 700)
    try:
        url = page()
        browser.get(f"{url}/docs")
        wait_for(browser, "main", "GET /model")
        root = "document.documentElement"
        assert browser.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
        links = browser.find_elements("css selector", "nav a")
        heads = browser.find_elements("css selector", "h2")
        assert [link.text for link in links] == [head.text for head in heads]
        links[-1].click()
        inside = (
            "const top = Math.round(arguments[0].getBoundingClientRect().top);"
            "return scrollY > 0 && top >= 0 && top < innerHeight"
        )
        wait(browser, lambda browser: browser.execute_script(inside, heads[-1]))
    finally:
        browser.set_window_size(1100, 900)


def test_the_page_is_one_file_that_a_reader_can_follow():
    page = Path(__file__).resolve().parents[3] / "serve" / "request" / "page.html"
    assert len(page.read_text().splitlines()) <= 400
