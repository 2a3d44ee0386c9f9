"""The page, as text and in a browser."""

import base64
import html
import json
import re
import shutil
import subprocess

import pytest

from posenc_jax.walkthrough import story
from posenc_jax.walkthrough.page import NARROW, page
from tests.walkthrough.test_fonts import needs_korean

# Inserted into a copy of the page. Reports the sizes of pictures, and whether syllables differ when drawn in its font.
PROBE = """<script>
addEventListener("load", () => {
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  canvas.width = canvas.height = 48;
  const family = getComputedStyle(document.body).fontFamily;
  const drawn = text => {
    context.clearRect(0, 0, 48, 48);
    context.font = "32px " + family;
    context.fillText(text, 4, 36);
    return canvas.toDataURL();
  };
  const syllables = [...new Set(document.body.innerText.match(/[가-힣]/g) || [])];
  const result = {
    images: [...document.images].map(image => [image.alt, image.naturalWidth]),
    syllables: syllables.length,
    shapes: new Set(syllables.map(drawn)).size,
    language: document.documentElement.lang,
    wider: document.documentElement.scrollWidth > innerWidth,
  };
  const pre = document.createElement("pre");
  pre.id = "result";
  pre.textContent = JSON.stringify(result);
  document.body.append(pre);
});
</script>"""


def browse(folder, text):
    """Open a page with the probe in headless Chromium. Returns the result of the probe, and the console messages."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: on Debian, apt-get install chromium")
    copy = folder / "probed.html"
    copy.write_text(text.replace("</head>", PROBE + "</head>"), encoding="utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--window-size=1000,1000"]
    command += ["--virtual-time-budget=5000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("name", ["english", "korean"])
def test_a_browser_shows_all_pictures_without_an_error(name, request, tmp_path):
    made = request.getfixturevalue(name)
    found, console = browse(tmp_path, made.page)
    assert console == []
    assert [name for name, _ in found["images"]] == [
        *("pipeline", "sinusoidal", "wavelengths", "sum", "rotation", "rotation", "products", "decay", "biases")
    ]
    assert all(width > 600 for _, width in found["images"])
    assert found["language"] == {"english": "en", "korean": "ko"}[name]
    assert not found["wider"]


def test_a_browser_draws_korean_and_not_boxes(korean, tmp_path):
    needs_korean()
    found, _ = browse(tmp_path, korean.page)
    assert found["syllables"] > 200
    assert found["shapes"] == found["syllables"]


def test_the_browser_would_tell_of_an_error(tmp_path):
    image, script = "<img alt='none' src='data:image/png;base64,AAAA'>", "<script>x.y</script>"
    broken = f"<html><head></head><body>{image}{script}</body></html>"
    found, console = browse(tmp_path, broken)
    assert found["images"] == [["none", 0]]
    assert len(console) == 1
    assert "x is not defined" in console[0]


@pytest.mark.parametrize("name", ["english", "korean"])
def test_the_page_needs_nothing_else(name, request):
    text = request.getfixturevalue(name).page
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert "://" not in text
    for source in re.findall(r'(?:src|srcset|href)="([^"]*)"', text):
        assert source.startswith("data:")


def test_pictures_in_the_page_are_the_files(english):
    sources = re.findall(r'src="data:image/(png|gif);base64,([^"]*)" alt="([^"]*)"', english.page)
    assert len(sources) == 9
    for kind, data, name in sources:
        assert base64.b64decode(data) == (english.folder / f"{name}.{kind}").read_bytes()


def test_narrow_screens_get_the_diagram_with_one_path_below_the_other(english):
    media, data = re.findall(r'<source media="([^"]*)" srcset="data:image/png;base64,([^"]*)">', english.page)[0]
    assert media == f"(max-width: {NARROW})"
    narrow = base64.b64decode(data)
    assert narrow == (english.folder / "pipeline_narrow.png").read_bytes()
    width, height = (int.from_bytes(narrow[i : i + 4]) for i in (16, 20))  # of a PNG
    assert height > 2 * width


def test_text_of_the_user_is_escaped(tmp_path):
    bad = '<script>alert("1")</script> & $x$'
    sections = (
        story.Section(bad, (story.Text(bad), story.Shapes(bad), story.Table((bad,), ((bad,),)), story.Slip(bad, bad))),
    )
    text = page(bad, sections, tmp_path, "en", bad)
    assert "<script" not in text
    assert text.count(html.escape(bad)) == 10  # the title twice, section, five parts with six texts, command


@pytest.mark.parametrize("name", ["english", "korean"])
def test_sentences_of_the_story_are_on_the_page(name, request):
    made = request.getfixturevalue(name)
    language = {"english": "en", "korean": "ko"}[name]
    words = story.LANGUAGES[language]
    assert made.page.count(words["slip.heading"]) == 5
    for key in words:
        if key.endswith(".title") and key != "trained.title":  # which needs a model
            assert f"<h2>{words[key]}</h2>" in made.page
