"""A hook of MkDocs: pages that are made at each build, and links that lead out of `docs/`.

The site shows pages of the repository that lie elsewhere (README, the TPU guide, …), the fields of
the config as `emor3_jax/config.py` comments them, and each source file that a page links to. None
of it is kept in the repository.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from emor3_jax import config as configs

ROOT = Path(__file__).parents[1]

PAGES = {
    "index.md": "README.md",
    "tpu.md": "tpu/README.md",
    "notebook.md": "notebooks/method.ipynb",
    "configuration.md": "emor3_jax/config.py",
    "security.md": "SECURITY.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page of the site → file of the repository that it is made from; other pages are `docs/`."""

FUNCTIONS = {
    "default": "Every program but `emor3_jax.embedded.base_policy`.",
    "dataset": "`dataset(…)`, of `data.train`, `data.mix` and `evaluate.sets`.",
    "reward_term": "`reward_term(…)`, of `reward.terms` ([your reward](your_reward.md)).",
    "base_policy": "`emor3_jax.embedded.base_policy`.",
}
"""Function of `emor3_jax/config.py` → whose fields it returns."""

_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
_LANGUAGES = {".py": "python", ".sh": "bash", ".ipynb": "json", ".yml": "yaml"}


class Fields(NamedTuple):
    """Fields of a config that one comment describes, with their sections in front."""

    names: tuple[str, ...]
    meaning: str


class Section(NamedTuple):
    """A section of a config; the fields that are in none have the name ""."""

    name: str
    meaning: str
    fields: list[Fields]


def config_sections(source: str, function: str, values: ConfigDict) -> list[Section]:
    """Returns the fields that a function of `emor3_jax/config.py` sets, in its order.

    A comment describes the fields below it, up to the next comment or empty line.

    Args:
      source: text of the module.
      function: name of one that returns a ConfigDict.
      values: what it returns.
    """
    (body,) = re.findall(rf"^def {function}\(.*?(?=^def |\Z)", source, re.S | re.M)
    sections = [Section("", "", [])]
    comment, names = "", []
    for line in map(str.strip, [*body.split("\n"), ""]):
        field = re.match(r"config\.([\w.]+)(\[name\])? = ", line)
        opens = field and re.search(rf"config\.{re.escape(field[1])}[.\[]", body)
        if names and (not field or (opens and not field[2])):
            sections[-1].fields.append(Fields(tuple(names), comment))
            comment, names = "", []
        if line.startswith("# "):
            comment = f"{comment} {line.removeprefix('# ')}".strip()
        elif not line:
            comment = ""
        elif field and field[2]:
            # A loop sets the keys that have no line of their own.
            own = re.findall(rf"config\.{re.escape(field[1])}\.(\w+) = ", body)
            keys = configs.field_value(values, field[1])
            row = [f"{field[1]}.{key}" for key in keys if key not in own]
            above = sections[-1].fields.pop() if not names else Fields(tuple(names), comment)
            sections[-1].fields.append(Fields((*above.names, *row), above.meaning))
            names = []
        elif field and opens and "." not in field[1]:
            sections.append(Section(field[1], comment, []))
            comment = ""
        elif field and not opens:
            if "." not in field[1] and sections[-1].name:
                sections.append(Section("", "", []))
            names.append(field[1])
    return sections


def config_reference() -> str:
    """Returns the page of all fields of the config, with their defaults."""
    source = (ROOT / PAGES["configuration.md"]).read_text()
    lines = [
        "# Configuration",
        "",
        "A file in `configs/` starts from `default()` and sets what differs; "
        "`--config.section.field=value` overrides it on the command line. An unknown field is "
        "refused with the nearest one. This page is made from the comments of "
        "`emor3_jax/config.py` at each build.",
    ]
    for function, whose in FUNCTIONS.items():
        values: ConfigDict = getattr(configs, function)()
        lines += ["", f"## {function}", "", whose]
        for section in config_sections(source, function, values):
            if not section.fields:
                continue
            if section.name:
                lines += ["", f"### {section.name}", "", section.meaning]
            lines += ["", "| field | default | meaning |", "|---|---|---|"]
            for names, meaning in section.fields:
                shown = (_default(configs.field_value(values, name)) for name in names)
                cells = ("<br>".join(f"`{x}`" for x in each) for each in (names, shown))
                meaning = re.sub(r"\bdocs/([\w/]+\.md)", r"[\1](\1)", meaning)
                lines.append(f"| {' | '.join(cells)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if isinstance(value, ConfigDict):
        return "dataset()" if value else "{}"
    return repr(value)


def notebook_page(text: str) -> str:
    """Returns the cells of a notebook as Markdown: text, and code without its outputs."""
    cells = ((cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"])
    parts = (code if kind == "markdown" else f"```python\n{code}\n```" for kind, code in cells)
    return "\n\n".join(parts) + "\n"


def source_page(path: Path) -> str:
    """Returns a page with the text of a source file, or with the names in a folder."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if not each.name.startswith(("_", ".")))
        return f"# {name}\n\n" + "\n".join(f"* `{each}`" for each in names) + "\n"
    language = _LANGUAGES.get(path.suffix, "text")
    return f"# {name}\n\n````{language}\n{path.read_text()}\n````\n"


def page_of(path: str) -> str | None:
    """Returns the page of the site that shows a file of the repository; None if there is none.

    Args:
      path: from the repository's root, with "/".
    """
    for page, file in PAGES.items():
        if path == file:
            return page
    if path == "docs" or not (ROOT / path).exists():
        return None
    if path.startswith("docs/"):
        inner = path.removeprefix("docs/")
        return f"{inner}/README.md" if (ROOT / path).is_dir() else inner
    return f"source/{path}.md"


def linked(markdown: str, file: str) -> Iterator[tuple[str, str]]:
    """Yields the relative links of a page, each with the path that it leads to from the root.

    Args:
      markdown: text of the page.
      file: path of the page in the repository.
    """
    for link in dict.fromkeys(_LINK.findall(markdown)):
        if not re.match(r"[a-z]+:|/", link):
            yield link, posixpath.normpath(posixpath.join(posixpath.dirname(file), link))


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie outside of `docs/`, and those of the sources that pages link to."""
    from mkdocs.structure.files import File

    texts = {page: (ROOT / file).read_text() for page, file in PAGES.items()}
    texts["notebook.md"] = notebook_page(texts["notebook.md"])
    texts["configuration.md"] = config_reference()
    pages = texts | {
        file.src_uri: file.content_string for file in files if file.src_uri.endswith(".md")
    }
    for page, text in pages.items():
        for _, path in linked(text, file_of(page)):
            target = page_of(path)
            if target and target.startswith("source/"):
                texts[target] = source_page(ROOT / path)
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    return files


def file_of(page: str) -> str:
    """Returns the file of the repository that a page of the site shows."""
    if page == "configuration.md" or page.startswith("source/"):
        return f"docs/{page}"
    return PAGES.get(page, f"docs/{page}")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns the text of a page with its links to the repository as links to pages of the site."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    targets = {link: page_of(path) for link, path in linked(markdown, file_of(here))}
    folder = posixpath.dirname(here) or "."

    def on_the_site(link: re.Match[str]) -> str:
        target = targets.get(link[0])
        return posixpath.relpath(target, folder) if target else link[0]

    return _LINK.sub(on_the_site, markdown)
