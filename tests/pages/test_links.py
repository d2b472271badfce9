"""Links of the built site, those to results and notebooks outside of docs as well."""

import posixpath
import re
from urllib.parse import unquote

_LINK = re.compile(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]*)"')
_ID = re.compile(r'\b(?:id|name)="([^"]+)"')


def dead(site):
    """Links to no file of the site, and to no section of its page."""
    texts = {p.relative_to(site).as_posix(): p.read_text() for p in site.rglob("*.html")}
    ids = {name: set(_ID.findall(text)) for name, text in texts.items()}
    for name, text in texts.items():
        for link in set(_LINK.findall(text)):
            path, _, section = unquote(link).partition("#")
            if re.match(r"\w+:|//", path) or name == "404.html":
                continue
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
            if not path:
                target = name
            elif (site / target).is_dir():
                target = posixpath.normpath(f"{target}/index.html")
            there = (site / target).is_file()
            if not there or (section and section not in ids.get(target, {section})):
                yield name, link


def test_every_link_leads_somewhere(site):
    assert not sorted(dead(site))


def test_a_dead_link_is_seen(tmp_path):
    (tmp_path / "index.html").write_text('<p id="a"><a href="#a"><a href="#b"><a href="gone.md">')
    assert sorted(dead(tmp_path)) == [("index.html", "#b"), ("index.html", "gone.md")]


def test_results_and_notebooks_are_linked_from_pages_that_speak_of_them(site):
    for page, link in {
        "choosing": "../benchmarks/results/paper/wide-cifar10-vgg16/",
        "convert": "../benchmarks/results/truncation/",
        "examples": "notebooks/finetune/",
        "examples/notebooks/personalize": "../../../benchmarks/RESULTS/",
    }.items():
        assert f'href="{link}"' in (site / page / "index.html").read_text()


def test_a_notebooks_page_has_its_tables_and_pictures(site):
    text = (site / "examples" / "notebooks" / "personalize" / "index.html").read_text()
    assert text.count("<table>") == 4  # summary, plan, history, trainer
    assert "client_accuracy_mean" in text
    assert 'src="data:image/png;base64,' in text
