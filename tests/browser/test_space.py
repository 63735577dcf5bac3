"""
The page of the Space in a real browser. Run by `make test-browser`, which needs chromium and chromium-driver of the
system. With REFTR_MODEL=folder and SCREENSHOT=file.png a screenshot of a trained model's answers is saved.
"""

import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from modeling_reftr.drawing_reftr import COLORS
from tests.helpers.space_app import EXPRESSIONS, copy_with_masks, import_app


GRAY = 128
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1100 --force-device-scale-factor=1"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*no_silent_downcasting", "ignore:The copy keyword is deprecated")


@pytest.fixture(scope="module")
def space():
    return import_app()


@pytest.fixture(scope="module")
def address(space, request, tmp_path_factory):
    """Serve the page with the model in REFTR_MODEL or a tiny one, and return its address."""
    folder = os.environ.get("REFTR_MODEL")
    if not folder:
        trained, _ = request.getfixturevalue("trained")
        folder = copy_with_masks(trained, tmp_path_factory.mktemp("space") / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        app = space.build_app(str(folder))
        yield space.launch(app, wait=False)
        app.close()


@pytest.fixture
def browser(address, tmp_path):
    """Open the page in a new browser."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.fail("These tests need a browser: install chromium and chromium-driver (their names in Debian).")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.get(address)
    wait(browser, lambda: find(browser, "textarea") and find(browser, "input[type=file]"))
    yield browser
    browser.quit()


def find(browser, selector) -> list:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def wait(browser, condition, seconds=30):
    return WebDriverWait(browser, seconds, poll_frequency=0.1).until(lambda _: condition())


def upload(browser, path):
    find(browser, "input[type=file]")[0].send_keys(str(path))


def is_loaded(browser, selector) -> bool:
    script = (
        "return [...document.querySelectorAll(arguments[0])].map(image => image.complete && image.naturalWidth > 0)"
    )
    loaded = browser.execute_script(script, selector)
    return bool(loaded) and all(loaded)


def ask(browser, text=None):
    if text is not None:
        (area,) = find(browser, "textarea")
        area.clear()
        area.send_keys(text)
    (button,) = (button for button in find(browser, "button") if button.text == "Locate")
    button.click()


def wait_for_answers(browser):
    wait(browser, lambda: is_loaded(browser, "#answers img"))


def upload_and_ask(browser, path, text):
    upload(browser, path)
    wait(browser, lambda: is_loaded(browser, "#picture img"))
    ask(browser, text)
    wait_for_answers(browser)


def pixels(element) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")).astype(int)


def share_of_color(screen, color) -> float:
    """Return the share of pixels with a color, up to changes by resizing."""
    return (np.abs(screen - np.array(color)).max(axis=-1) <= 20).mean()


def rgb(color: str) -> np.ndarray:
    return np.array(list(bytes.fromhex(color[1:])))


def copy_json(browser) -> list[dict]:
    """Press the copy button of the JSON and return the content of the clipboard."""
    browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    find(browser, "button[aria-label='Copy'], button[title='Copy'], button[title='copy']")[-1].click()
    return json.loads(browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])"))


def wait_for_message(browser) -> str:
    return wait(browser, lambda: " ".join(toast.text for toast in find(browser, ".toast-body")))


@pytest.fixture
def gray_image(tmp_path):
    Image.new("RGB", (64, 64), (GRAY, GRAY, GRAY)).save(tmp_path / "gray.png")
    return tmp_path / "gray.png"


def test_page_shows_answers_in_their_colors_and_copies_json(browser, gray_image):
    upload_and_ask(browser, gray_image, "\n".join(EXPRESSIONS))
    answers = copy_json(browser)
    assert [answer["phrase"] for answer in answers] == EXPRESSIONS
    assert [len(answer["box"]) for answer in answers] == [4, 4]
    (image,) = find(browser, "#answers img")
    screen = pixels(image)
    for color in COLORS[:2]:
        assert share_of_color(screen, rgb(color)) > 0.001  # frames and labels
    assert share_of_color(screen, np.full(3, GRAY)) < 0.5, "the image is dimmed outside of the masks"


def test_example_is_filled_in_by_one_click(browser):
    wait(browser, lambda: is_loaded(browser, ".gallery-item img, table img"))
    find(browser, ".gallery-item img, table img")[0].click()
    wait(browser, lambda: find(browser, "textarea")[0].get_attribute("value").count("\n") == 2)
    ask(browser)
    wait_for_answers(browser)
    wait(browser, lambda: find(browser, "#download")[0].is_enabled())
    if os.environ.get("SCREENSHOT"):
        browser.execute_script("scrollTo(0, 0)")
        browser.save_screenshot(os.environ["SCREENSHOT"])


def test_example_is_shown_with_one_expression_per_line(browser):
    wait(browser, lambda: find(browser, "#examples td"))
    text = find(browser, "#examples td")[-1].text
    assert text.splitlines() == import_app().EXAMPLES[0][1].splitlines()
    assert len(text.splitlines()) == 3


def test_drawing_is_downloaded_by_button(browser, gray_image, tmp_path):
    folder = tmp_path / "downloads"
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    assert not find(browser, "#download")[0].is_enabled()
    upload_and_ask(browser, gray_image, "\n".join(EXPRESSIONS))
    wait(browser, lambda: find(browser, "#download")[0].is_enabled())
    find(browser, "#download")[0].click()
    wait(browser, lambda: (folder / "answers.png").exists())
    with Image.open(folder / "answers.png") as drawing:
        assert drawing.format == "PNG"
        assert drawing.width >= 320


def test_expression_over_token_limit_shows_message(browser, gray_image):
    upload_and_ask(browser, gray_image, f"the star\n{'the star ' * 50}".strip())
    message = wait_for_message(browser)
    assert "Expression 2 is longer than the 40 tokens that the model reads" in message
    assert message.rstrip().endswith('the star".')


def test_page_requests_only_its_own_server(browser, address, gray_image):
    upload_and_ask(browser, gray_image, "the star")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = [url for url in urls if url.startswith(("http", "ws"))]
    assert len(urls) > 10
    assert [url for url in urls if not url.startswith(address)] == []


def test_unreadable_upload_shows_message(browser, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    upload(browser, tmp_path / "notes.png")
    wait(browser, lambda: find(browser, "#picture img"))
    ask(browser, "the star")
    assert "The file 'notes.png' cannot be read as an image" in wait_for_message(browser)
    assert not find(browser, "#answers img")


def test_upload_over_5_mb_shows_message(browser, tmp_path):
    Image.effect_noise((2600, 2600), 100).save(tmp_path / "large.png")
    upload(browser, tmp_path / "large.png")
    assert "exceed the maximum allowed size of 5.0 Mb" in wait_for_message(browser)


def test_question_without_image_shows_message(browser, gray_image):
    ask(browser, "the star")
    assert "There is no image: upload one, or use the example." in wait_for_message(browser)
