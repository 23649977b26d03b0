"""The explorer: what its page holds, and what it does in a real browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import itemkit
from itemkit import explorer, schema
from itemkit.errors import InputError, MissingExtra
from itemkit.explorer import write_explorer
from itemkit.features import Features
from itemkit.misalignment import cosines

from synthetic import make_features

NASTY = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'&$$x$$ {{data}} \u202efdp"
GENERATORS = ("real", "vae", "gan")


def coloured(tmp_path: Path, each: int = 6) -> tuple[Features, pd.DataFrame]:
    """Images of one colour each, on a grid; the colour and the place tell which image it is."""
    features = make_features(each, each, generators=GENERATORS[1:])
    table, n = features.table.copy(), len(features)
    table[schema.PATH] = [str(tmp_path / "photos" / f"img{i:03d}.png") for i in range(n)]
    table[schema.CAPTION] = [f"a cat number{i}" if i % 2 else f"scattered dogs number{i}" for i in range(n)]
    (tmp_path / "photos").mkdir()
    for i, path in enumerate(table[schema.PATH]):
        Image.new("RGB", (30, 20), colour_of(i)).save(path)
    grid = pd.DataFrame({"across": np.arange(n) % 6, "up": np.arange(n) // 6})
    rng = np.random.default_rng(0)
    return dataclasses.replace(features, table=table), grid.assign(
        p_fake=rng.random(n) * 0.5 + features.labels / 2
    )


def colour_of(i: int) -> tuple[int, int, int]:
    return (i * 37 % 256, i * 91 % 256, 255 - i * 37 % 256)


def contents(page: Path) -> dict[str, Any]:
    text = page.read_text("utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_holds_every_image_and_what_made_it(tmp_path: Path) -> None:
    features, numbers = coloured(tmp_path)
    features.run = {"config": {"name": "mini"}, "fingerprint_hash": "0123456789abcdef"}
    Path(features.table[schema.PATH][3]).unlink()
    Path(features.table[schema.PATH][4]).write_bytes(b"no picture")
    page = write_explorer(features, tmp_path / "new" / "page.html", numbers)
    got = contents(page)
    assert "preset mini; models 0123456789abcdef" in got["made"] and "numbers mean nothing" in got["note"]
    assert list(got["numbers"]) == [*numbers, *(name.replace("_", " ") for name in cosines(features))]
    assert (got["x"], got["y"], got["score"]) == ("across", "up", "p_fake")
    assert got["numbers"]["p_fake"] == pytest.approx(numbers["p_fake"], abs=1e-5)
    assert [got["groups"][g]["name"] for g in got["group"]] == list(features.table[schema.GENERATOR])
    for i, objects in enumerate(got["objects"]):
        mine = features.owner == i
        assert sorted(phrase for phrase, _ in objects) == sorted(features.objects["phrase"][mine])
        assert [cosine for _, cosine in objects] == sorted(cosine for _, cosine in objects)
        if objects:
            worst = float((features.region_emb[mine] * features.phrase_emb[mine]).sum(1).min())
            assert objects[0][1] == pytest.approx(worst, abs=1e-3)
    assert set(got["missing"]) == {"3", "4"} and got["thumb"][3] == got["thumb"][4] == ""
    picture = Image.open(io.BytesIO(base64.b64decode(got["thumb"][5])))
    assert picture.size == (30, 20), "small images stay as they are"
    np.testing.assert_allclose(picture.convert("RGB").getpixel((15, 10)), colour_of(5), atol=6)
    assert got["missing"] == {"3": "missing", "4": "not an image"}
    assert got["file"][5] == "photos/img005.png" and str(tmp_path) not in page.read_text("utf-8")


def test_data_ends_no_element_and_only_our_scripts_are_allowed(tmp_path: Path) -> None:
    features, numbers = coloured(tmp_path)
    features.table[schema.CAPTION] = features.table[schema.GENERATOR] = "</script><!-- \u2028" + NASTY
    text = write_explorer(features, tmp_path / "page.html", numbers).read_text("utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    allowed = re.search(r"script-src (.*?);", text)[1]
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in allowed
    assert len(scripts) == allowed.count("sha256-") and text.count("<script") == len(scripts) + 1
    assert "default-src 'none'" in text and "unsafe-inline" not in allowed and "\u202e" not in text


def test_thumbnails_become_smaller_until_all_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, paths = np.random.default_rng(0), []
    for i in range(20):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (200, 300, 3), np.uint8)).save(paths[-1])
    sizes = []
    for most in (10**9, 120_000, 40_000):
        monkeypatch.setattr(explorer, "PICTURE_BYTES", most)
        made, missing = explorer._thumbnails([str(path) for path in paths])
        raw = [base64.b64decode(one) for one in made]
        sizes.append(Image.open(io.BytesIO(raw[0])).size[0])
        assert not missing and sum(map(len, raw)) <= 1.1 * most
    assert sizes[0] == explorer.LOOKS[0][0] > sizes[1] > sizes[2]


def test_an_explorer_is_refused_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, page = make_features(4, 4), tmp_path / "page.html"
    few = pd.DataFrame({"p_fake": [0.5]})
    with pytest.raises(InputError, match=r"numbers has 1 rows, features 12 images"):
        write_explorer(features, page, few)
    with pytest.raises(InputError, match=r"column 'word' of numbers holds no numbers"):
        write_explorer(features, page, pd.DataFrame({"word": ["a"] * 12}))
    with pytest.raises(InputError, match=r"no column 'global cosin'. Did you mean 'global cosine'\?"):
        write_explorer(features, page, score="global cosin")
    with (
        monkeypatch.context() as small,
        pytest.raises(InputError, match=r"got 12 images, a page holds 1 to 11: select\(\) some"),
    ):
        small.setattr(explorer, "MOST_IMAGES", 11)
        write_explorer(features, page)
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)
    with pytest.raises(MissingExtra, match=r'pip install "itemkit\[explore\]"'):
        write_explorer(features, page)
    assert not page.exists()


def test_the_command_adds_a_map_and_a_detector_s_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    features, page = make_features(20, 10), tmp_path / "out" / "page.html"
    judge = SimpleNamespace(score=lambda features: features.labels * 0.5)
    monkeypatch.setattr(itemkit, "load_features", lambda store: features, raising=False)
    monkeypatch.setattr(itemkit, "Detector", SimpleNamespace(load=lambda *_: judge), raising=False)
    assert itemkit.cli.main(["explore", "store", "--out", str(page), "--detector", "folder"]) == 0
    got = contents(page)
    assert list(got["numbers"])[:3] == ["UMAP 1", "UMAP 2", "p_fake"] and got["score"] == "p_fake"
    assert got["numbers"]["p_fake"] == list(features.labels * 0.5)
    assert str(page) in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra dev")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "--headless=new --no-sandbox --disable-dev-shm-usage --enable-unsafe-swiftshader"
    for flag in (*flags.split(), "--disable-background-networking", "--window-size=1400,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    started = webdriver.Chrome(options=options, service=service)
    started.set_script_timeout(120)
    yield started
    started.quit()


def wait_for(browser: Any, condition: str, *values: Any) -> Any:
    """Value of a JavaScript expression as soon as it is true; pytest's own patience is the only limit."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 120, 0.05).until(
        lambda driver: driver.execute_script(f"return {condition}", *values), condition
    )


def opened(browser: Any, page: Path) -> None:
    browser.get_log("browser")
    browser.get(page.as_uri())
    wait_for(browser, "document.body.dataset.ready")
    settle(browser)


def settle(browser: Any) -> None:
    """Wait until two frames are drawn."""
    wait = "requestAnimationFrame(() => requestAnimationFrame(() => done()))"
    browser.execute_async_script(f"const done = arguments[0]; {wait}")


PLACE = """
const view = [...Bokeh.index.roots][0], at = $("plot").firstChild.getBoundingClientRect();
return [at.left + view.frame.x_scale.compute(source.data.x[arguments[0]]),
        at.top + view.frame.y_scale.compute(source.data.y[arguments[0]])]
"""


def point_at(browser: Any, x: float, y: float, click: bool = False) -> None:
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionBuilder(browser, duration=0)
    actions.pointer_action.move_to_location(round(x), round(y))
    if click:
        actions.pointer_action.click()
    actions.perform()
    settle(browser)


def choose(browser: Any, element: str, value: object, event: str) -> None:
    script = "$(arguments[0]).value = arguments[1]; $(arguments[0]).dispatchEvent(new Event(arguments[2]))"
    browser.execute_script(script, element, str(value), event)
    settle(browser)


def text(browser: Any, element: str) -> str:
    return browser.execute_script("return $(arguments[0]).textContent", element)


def test_hovering_shows_the_right_picture(browser: Any, tmp_path: Path) -> None:
    features, numbers = coloured(tmp_path)
    Path(features.table[schema.PATH][4]).unlink()
    opened(browser, write_explorer(features, tmp_path / "page.html", numbers))
    pixel = """
    const done = arguments[0], image = document.querySelector("#picture img");
    image.decode().then(() => {
      const canvas = document.createElement("canvas").getContext("2d");
      canvas.drawImage(image, 0, 0);
      done([...canvas.getImageData(15, 10, 1, 1).data]);
    })"""
    for i in (0, 7, 17, 11):
        point_at(browser, *browser.execute_script(PLACE, i))
        assert wait_for(browser, "$('card').dataset.row === arguments[0]", str(i))
        np.testing.assert_allclose(browser.execute_async_script(pixel)[:3], colour_of(i), atol=6)
        assert text(browser, "caption") == features.table[schema.CAPTION][i]
        assert text(browser, "file") == f"photos/img{i:03d}.png"
        assert text(browser, "class") == features.table[schema.GENERATOR][i]
        for phrase in features.objects["phrase"][features.owner == i]:
            assert phrase in text(browser, "objects")
    point_at(browser, *browser.execute_script(PLACE, 4))
    assert wait_for(browser, "$('card').dataset.row === '4'")
    assert text(browser, "picture") == "no picture: the file is missing"
    # a click keeps an image while the pointer goes on, a click beside the points lets it go
    point_at(browser, *browser.execute_script(PLACE, 7), click=True)
    point_at(browser, *browser.execute_script(PLACE, 17))
    assert wait_for(browser, "$('card').dataset.row === '7' && !$('pinned').hidden")
    one, other = (browser.execute_script(PLACE, i) for i in (7, 14))
    point_at(browser, (one[0] + other[0]) / 2, (one[1] + other[1]) / 2, click=True)
    point_at(browser, *browser.execute_script(PLACE, 17))
    assert wait_for(browser, "$('card').dataset.row === '17' && $('pinned').hidden")
    # so does a click on a small picture, with nothing selected in the plot
    choose(browser, "search", "number14", "input")
    browser.execute_script("$('gallery').querySelector('button').click()")
    point_at(browser, *browser.execute_script(PLACE, 17))
    assert wait_for(browser, "$('card').dataset.row === '14' && !$('pinned').hidden")
    one, other = (browser.execute_script(PLACE, i) for i in (7, 14))
    point_at(browser, (one[0] + other[0]) / 2, (one[1] + other[1]) / 2, click=True)
    assert wait_for(browser, "$('pinned').hidden")
    assert browser.execute_script("return [...Bokeh.index.roots][0].canvas_view.webgl !== null")
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_what_data_says_does_nothing(browser: Any, tmp_path: Path) -> None:
    features, numbers = coloured(tmp_path)
    features.table[schema.CAPTION] = NASTY
    features.table.loc[features.labels == 1, schema.GENERATOR] = NASTY
    features.objects["phrase"] = NASTY
    features.owner[-1] = 17
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "<img src=x onerror=window.hacked=1>.png")
    features.table.loc[17, schema.PATH] = str(tmp_path / "photos" / "<img src=x onerror=window.hacked=1>.png")
    features.run = {"config": {"name": NASTY}, "fingerprint_hash": NASTY}
    page = write_explorer(features, tmp_path / "page.html", numbers.rename(columns={"across": NASTY}))
    opened(browser, page)
    point_at(browser, *browser.execute_script(PLACE, 17))
    wait_for(browser, "$('card').dataset.row === '17'")
    choose(browser, "search", "onerror", "input")
    assert text(browser, "found") == "18 match"
    shown = NASTY.replace("\u202e", "\\u202e")
    assert text(browser, "caption") == text(browser, "class") == shown
    assert text(browser, "file") == "photos/<img src=x onerror=window.hacked=1>.png"
    assert all(shown in text(browser, element) for element in ("made", "x", "numbers", "legend"))
    assert text(browser, "objects").count(shown) == (features.owner == 17).sum()
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return [...document.images].every((i) => i.src.startsWith('data:'))")
    # and if a text became HTML one day, the page's policy would still stop it
    browser.execute_script("$('caption').innerHTML = arguments[0]", NASTY)
    script = (
        "const s = document.createElement('script'); s.text = 'window.hacked = 1'; document.body.append(s)"
    )
    browser.execute_script(script)
    settle(browser)
    assert browser.execute_script("return window.hacked") is None


def test_the_page_asks_the_network_for_nothing(browser: Any, tmp_path: Path) -> None:
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        opened(browser, write_explorer(*coloured(tmp_path)[:1], tmp_path / "page.html"))
        assert browser.execute_script("return performance.getEntriesByType('resource')") == []
        refused = browser.execute_async_script(
            """const [url, done] = arguments, image = new Image();
            image.onload = () => done("loaded");
            image.onerror = () => fetch(url + "fetched").then(() => done("fetched"), () => done("refused"));
            image.src = url + "image";""",
            f"http://127.0.0.1:{server.server_port}/",
        )
    finally:
        server.shutdown()
    assert (refused, asked) == ("refused", [])


def test_threshold_search_and_legend_count_what_numpy_counts(browser: Any, tmp_path: Path) -> None:
    features, numbers = coloured(tmp_path)
    opened(browser, write_explorer(features, tmp_path / "page.html", numbers))
    p, y = numbers["p_fake"].to_numpy(), features.labels
    name = features.table[schema.GENERATOR].to_numpy()
    for place in (0, 9, 17):
        choose(browser, "slider", place, "input")
        called = p.round(5) >= np.sort(p.round(5))[place]
        for label, who in ((0, "real"), (1, "fake")):
            among = called[y == label]
            assert text(browser, f"{who}-count") == f"{among.sum()} of {len(among)}"
            assert text(browser, f"{who}-share") == f"{100 * among.mean():.1f} %"
        rows = browser.execute_script(
            "return [...$('legend').children].map((row) => row.lastChild.textContent)"
        )
        assert rows == [f"{called[name == g].sum()} / {(name == g).sum()}" for g in GENERATORS]
        fill = np.array(browser.execute_script("return [...source.data.fill]"))
        np.testing.assert_array_equal(fill > 0.5, called)
    # a word is found from its beginning: no cat in "scattered"
    choose(browser, "search", "CAT", "input")
    assert text(browser, "found") == "9 match"
    line = np.array(browser.execute_script("return [...source.data.line]"))
    np.testing.assert_array_equal(line > 0.5, np.arange(18) % 2 == 1)
    assert browser.execute_script("return $('gallery').querySelectorAll('img').length") == 9
    for query, matches in (
        ("scattered dogs, number4", 1),
        ("img012", 1),
        ("vae", 6),
        ("dogs cat", 0),
        ("", 18),
    ):
        choose(browser, "search", query, "input")
        assert (np.array(browser.execute_script("return [...source.data.line]")) > 0.5).sum() == matches
    # a generator that is hidden is neither drawn nor met by the pointer
    where = browser.execute_script(PLACE, 7)
    browser.execute_script("$('legend').children[1].click()")
    settle(browser)
    point_at(browser, *where)
    assert "row" not in browser.execute_script("return {...$('card').dataset}")
    browser.execute_script("$('legend').children[1].click()")
    settle(browser)
    # of a cosine, fakes are called by having little
    choose(browser, "score", "global cosine", "change")
    assert browser.execute_script("return $('side').value") == "-1"
    choose(browser, "score", "no threshold", "change")
    assert text(browser, "fake-count") == "no threshold"


def test_a_lasso_lists_what_is_inside(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    features, numbers = coloured(tmp_path)
    opened(browser, write_explorer(features, tmp_path / "page.html", numbers))
    browser.execute_script("plot.toolbar.tools.find((t) => t.type === 'LassoSelectTool').active = true")
    one, other = (browser.execute_script(PLACE, i) for i in (7, 14))
    half = (other[0] - one[0]) / 2
    left, right, low, high = one[0] - half, other[0] + half, one[1] + 30, other[1] - 10
    actions = ActionBuilder(browser, duration=20)
    actions.pointer_action.move_to_location(round(left), round(low)).pointer_down()
    for x, y in ((right, low), (right, high), (left, high), (left, low)):
        actions.pointer_action.move_to_location(round(x), round(y))
    actions.pointer_action.pointer_up()
    actions.perform()
    assert wait_for(browser, "source.selected.indices.length") == 4
    assert sorted(browser.execute_script("return source.selected.indices")) == [7, 8, 13, 14]
    assert wait_for(browser, "$('gallery').querySelectorAll('img').length") == 4
    assert browser.execute_script("return $('gallery').children[0].textContent") == "4 selected"


def test_with_ten_thousand_images_a_step_stays_small(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, n = make_features(5000, 2500), 10_000
    picture = Image.new("RGB", (16, 16), "red")
    monkeypatch.setattr(explorer, "load_image", lambda path, **_: picture.copy())
    rng = np.random.default_rng(0)
    numbers = pd.DataFrame({"a": np.arange(n) % 100, "b": np.arange(n) // 100, "p_fake": rng.random(n)})
    page = write_explorer(features, tmp_path / "page.html", numbers)
    # beside the pictures, whose bytes have a bound of their own
    assert page.stat().st_size + explorer.PICTURE_BYTES * 4 / 3 < 25e6
    opened(browser, page)
    everything = browser.execute_script("return document.querySelectorAll('*').length")
    assert everything < 400, "points are no elements"
    browser.execute_script(
        """window.made = 0; window.drawn = 0;
        new MutationObserver((all) => { for (const one of all) made += one.addedNodes.length; })
          .observe(document.body, {subtree: true, childList: true});
        source.properties.data.change.connect(() => drawn++);"""
    )
    point_at(browser, *browser.execute_script(PLACE, 5050))
    wait_for(browser, "$('card').dataset.row === '5050'")
    assert browser.execute_script("return [drawn, made < 60]") == [0, True], "hovering draws no points anew"
    # as a dragged slider does: forty events within a frame, one drawing
    browser.execute_script(
        "for (let k = 0; k < 40; k++) { $('slider').value = 200 * k; $('slider').oninput(); }"
    )
    settle(browser)
    assert browser.execute_script("return drawn") == 1
    choose(browser, "search", "thing 1", "input")
    assert browser.execute_script("return [drawn, made < 500, found.length]") == [2, True, n]
    pictures = browser.execute_script("return $('gallery').querySelectorAll('img').length")
    assert pictures == browser.execute_script("return MOST")
