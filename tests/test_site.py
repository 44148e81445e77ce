"""The site: links lead somewhere, the config's page is whole, and files for GitHub parse."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ml_collections import ConfigDict

from docs import hooks
from emor3_jax import config as configs

ROOT = hooks.ROOT
PAGES = [
    *("README.md", "tpu/README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")),
]


class _Loader(yaml.SafeLoader):
    """Reads `mkdocs.yml`, where a tag names a function."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def site() -> dict:
    return yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


def entries(nav: list) -> Iterator[str]:
    """Yields the pages of a navigation."""
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else entries(value)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(page: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)", without_code((ROOT / page).read_text()), re.M)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_page_is_in_the_navigation_once() -> None:
    found = list(entries(site()["nav"]))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert len(set(found)) == len(found)
    assert set(found) == pages | set(hooks.PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    text = without_code((ROOT / page).read_text())
    for link, path in hooks.linked(text, page):
        assert (ROOT / path).exists(), f"{link} of {page}"
        assert hooks.page_of(path), f"{link} of {page}"
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
        if "://" not in link:
            path = dict(hooks.linked(text, page))[link] if link else page
            assert anchor in anchors(path), f"{link}#{anchor} of {page}"


def test_the_page_of_the_config_has_every_field_with_its_default_and_a_meaning() -> None:
    page = hooks.config_reference()
    source = (ROOT / "emor3_jax/config.py").read_text()

    def fields(config: ConfigDict, prefix: str = "") -> Iterator[str]:
        for key, value in config.items():
            if isinstance(value, ConfigDict) and value and f"{prefix}{key}" != "data.train":
                yield from fields(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    for function in hooks.FUNCTIONS:
        values = getattr(configs, function)()
        sections = hooks.config_sections(source, function, values)
        rows = [row for section in sections for row in section.fields]
        names = [name for row in rows for name in row.names]
        assert sorted(names) == sorted(fields(values))
        assert all(row.meaning for row in rows)
    assert "| `data.prompt_lengths`<br>`data.image_windows` | `(512, 1024, 2048)`<br>" in page
    assert "| `policy_update.kl_ratio` | `False` | Multiply each token's KL by its ratio" in page
    assert "([method.md](method.md))" in page


class _Page:
    """What MkDocs hands to the hook of a page."""

    def __init__(self, uri: str) -> None:
        self.file = self
        self.src_uri = uri


@pytest.mark.parametrize(
    ("uri", "link", "target"),
    [
        ("index.md", "docs/method.md#the-step", "method.md#the-step"),
        ("index.md", "docs/results/README.md", "results/README.md"),
        ("index.md", "docs/step.svg", "step.svg"),
        ("index.md", "emor3_jax/config.py", "configuration.md"),
        ("results/time.md", "../../emor3_jax/flops/seconds.py", None),
        ("tpu.md", "../docs/train_3b.md", "train_3b.md"),
        ("method.md", "../SECURITY.md", "security.md"),
        ("method.md", "#metrics", "#metrics"),
        ("method.md", "https://arxiv.org/abs/1", "https://arxiv.org/abs/1"),
    ],
)
def test_links_are_those_of_the_site(uri: str, link: str, target: str | None) -> None:
    target = target or "../source/emor3_jax/flops/seconds.py.md"
    found = hooks.on_page_markdown(f"a [b]({link}), c", page=_Page(uri))
    assert found == f"a [b]({target}), c"


def test_nothing_of_the_site_comes_from_the_network() -> None:
    found = site()
    assert found["theme"]["font"] is False and found["strict"] is True
    assert found["plugins"] == ["search"] and "extra_javascript" not in found
    picture = ElementTree.parse(ROOT / "docs/step.svg").getroot()
    assert not any("href" in key for element in picture.iter() for key in element.attrib)
    assert "prefers-color-scheme: dark" in (ROOT / "docs/step.svg").read_text()


def test_continuous_integration_runs_what_is_run_here() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = {
        name: "\n".join(step.get("run", "") for step in job["steps"])
        for name, job in workflow["jobs"].items()
    }
    assert ".ci/run" in steps["test"] and (ROOT / ".ci/run").exists()
    assert "make docs" in steps["docs"] and "python -m build" in steps["package"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").iterdir()))
def test_issue_forms_have_what_github_asks_for(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    fields = [each for each in form["body"] if each["type"] != "markdown"]
    assert fields and len({each["id"] for each in fields}) == len(fields)
    assert all(each["attributes"]["label"] for each in fields)


def test_the_citation_names_the_version_and_the_paper() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version="{found["version"]}"' in (ROOT / "setup.py").read_text()
    (paper,) = found["references"]
    assert paper["url"] in (ROOT / "README.md").read_text()
