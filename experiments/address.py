"""Writes the address of the repository into README's badge, the Colab notebook and CITATION.cff.

python -m experiments.address

The address is `Repository` in `[project.urls]` of pyproject.toml, such as "https://github.com/OWNER/posenc_jax". A fork
changes it there. Without it there is no badge, and the notebook asks for the project.
"""

import re
import tomllib
from pathlib import Path

from posenc_jax import command
from posenc_jax.files import atomic_write_text

ROOT = Path(__file__).parent.parent
TITLE = "# posenc_jax"
NOTEBOOK = "experiments/colab.ipynb"
CITED = "license: Apache-2.0\n"  # the line of CITATION.cff before the address


def address(root: Path) -> str:
    """The address in pyproject.toml, or "" if it has none."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "").rstrip("/")


def readme(text: str, url: str) -> str:
    """README with a badge beside its title that opens the notebook in Colab."""
    page = url.replace("https://github.com/", "https://colab.research.google.com/github/")
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    title = f"{TITLE} [![Open in Colab]({badge})]({page}/blob/main/{NOTEBOOK})" if url else TITLE
    return re.sub(rf"^{TITLE}.*", lambda _: title, text, count=1)


def notebook(text: str, url: str) -> str:
    """The notebook with the address that it clones."""
    return re.sub(r'REPOSITORY = \\".*?\\"', lambda _: rf"REPOSITORY = \"{url}\"", text, count=1)


def citation(text: str, url: str) -> str:
    """CITATION.cff with the address."""
    line = f'repository-code: "{url}"\n' if url else ""
    return re.sub("^repository-code: .*\n", "", text, flags=re.MULTILINE).replace(CITED, CITED + line)


FILES = {"README.md": readme, NOTEBOOK: notebook, "CITATION.cff": citation}


def main(root: Path = ROOT) -> None:
    for name, write in FILES.items():
        text = (root / name).read_text(encoding="utf-8")
        atomic_write_text(root / name, write(text, address(root)))


if __name__ == "__main__":
    command.run(main)
