"""The walkthrough as one self-contained HTML page, without scripts or network access."""

import base64
from html import escape
from pathlib import Path

from posenc_jax.walkthrough.story import LANGUAGES, Part, Picture, Section, Shapes, Slip, Table, Text

NARROW = "40rem"  # screens up to this width, such as phones, show the narrow form of a picture
STYLE = """
body { max-width: 52rem; margin: 2.5rem auto; padding: 0 1.2rem; background: #fff; color: #1a1a1a;
  font: 17px/1.65 system-ui, "Helvetica Neue", Arial, "Noto Sans CJK KR", "Noto Sans KR", "Apple SD Gothic Neo",
  "Malgun Gothic", sans-serif; overflow-wrap: break-word; word-break: keep-all; }
h1 { font-size: 1.75rem; line-height: 1.3; }
h2 { font-size: 1.25rem; margin: 3rem 0 .8rem; padding-top: 1rem; border-top: 1px solid #ddd; }
pre, table { font-family: "DejaVu Sans Mono", Menlo, Consolas, "Noto Sans Mono CJK KR", "Noto Sans CJK KR", monospace;
  font-size: .82rem; }
pre { padding: .8rem 1rem; background: #f4f4f4; border-radius: 6px; overflow-x: auto; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { font-weight: 600; border-bottom-color: #999; white-space: normal; }
.slip { margin: 1.4rem 0; padding: .8rem 1.1rem; background: #fdf1ea; border-left: 4px solid #d55e00; }
.slip p { margin: .3rem 0; }
.slip strong { color: #a34700; }
figure { margin: 1.6rem 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { margin-top: .5rem; font-size: .88rem; line-height: 1.5; color: #555; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid #ddd; font-size: .88rem; color: #555; }
"""


def page(title: str, sections: tuple[Section, ...], folder: Path, language: str, command: str) -> str:
    """The HTML of the page. Its pictures are read from `folder` and embedded."""
    words = LANGUAGES[language]
    body = "\n".join(
        (f"<h2>{escape(section.title)}</h2>\n" if section.title else "")
        + "\n".join(_element(part, folder, words) for part in section.parts)
        for section in sections
    )
    return f"""<!DOCTYPE html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1 dir="auto">{escape(title)}</h1>
{body}
<footer>{words["footer"]}: <code>{escape(command)}</code></footer>
</body>
</html>
"""


def _element(part: Part, folder: Path, words: dict[str, str]) -> str:
    match part:
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Shapes(text):
            return f"<pre>{escape(text)}</pre>"
        case Table(header, rows):
            head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
            cells = ("".join(f"<td><bdi>{escape(cell)}</bdi></td>" for cell in row) for row in rows)
            body = "\n".join(f"<tr>{row}</tr>" for row in cells)
            return f'<div class="table"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'
        case Slip(told, truth):
            return (
                f'<div class="slip">\n<p><strong>{words["slip.heading"]}:</strong> {escape(told)}</p>\n'
                f"<p><strong>{words['slip.truth']}:</strong> {escape(truth)}</p>\n</div>"
            )
        case Picture(file, caption, narrow):
            image = f'<img src="{_embedded(folder / file)}" alt="{file.split(".")[0]}">'
            if narrow is not None:
                source = f'<source media="(max-width: {NARROW})" srcset="{_embedded(folder / narrow)}">'
                image = f"<picture>{source}{image}</picture>"
            return f"<figure>{image}\n<figcaption>{escape(caption)}</figcaption></figure>"


def _embedded(picture: Path) -> str:
    """The URL of a picture that holds its data."""
    return f"data:image/{picture.suffix[1:]};base64,{base64.b64encode(picture.read_bytes()).decode()}"
