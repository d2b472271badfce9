"""The site's own search, typed into: a page that answers is among the first three."""

import html
import json
import re

import pytest
from tests.pages.questions import QUESTIONS
from tests.pages.shown import ROOT

TABLE = ROOT / "benchmarks" / "results" / "questions.md"
INPUT = "document.querySelector('[data-md-component=search-query]')"
#: Of each page that is found: the links that are shown, and those behind "more on this page".
ITEMS = """[...document.querySelectorAll('.md-search-result__item')].map(item => [
  [...item.querySelectorAll(':scope > a')].map(a => a.href),
  [...item.querySelectorAll('details a')].map(a => a.href)])"""
META = "document.querySelector('.md-search-result__meta').textContent.trim()"


@pytest.fixture(scope="module")
def searching(browser, address):
    """Finds words as a user does: the links of each page, the best first."""
    browser.screen(1280, 800, dark=False)
    browser.open(address)
    browser.run(f"{INPUT}.focus()")
    browser.until(f"!{META}.startsWith('Initializing')")

    def find(words):
        browser.run(f"{INPUT}.focus(); {INPUT}.value = ''; {_typed()}")
        browser.until(f"!document.querySelector('.md-search-result__item') && {META} != ''")
        browser.type(words)
        browser.run(_typed())
        browser.until("document.querySelector('.md-search-result__item')")
        found = browser.run(ITEMS)
        return [[[_place(url, address) for url in urls] for urls in item] for item in found]

    return find


def _typed():
    return f"{INPUT}.dispatchEvent(new Event('keyup', {{bubbles: true}}))"


def _place(url, address):
    """``page/#section`` of a result's link."""
    page, _, section = url.removeprefix(address).partition("#")
    return page.partition("?")[0] + (f"#{section}" if section else "")


@pytest.fixture(scope="module")
def sections(site):
    """The searched text of each section."""
    index = json.loads((site / "search" / "search_index.json").read_text())
    return {d["location"]: html.unescape(re.sub("<[^>]+>", "", d["text"])) for d in index["docs"]}


@pytest.fixture(scope="module")
def answers(searching, sections):
    """For every question: the answering page, its place among the results, and clicks."""
    return [answer(searching(words), pages, text, sections) for _, words, pages, text in QUESTIONS]


def answer(items, pages, text, sections):
    """The first page that answers; a link behind "more on this page" costs a click more."""
    for place, (shown, _) in enumerate(items, 1):
        page = shown[0].partition("#")[0]
        if page.rstrip("/") in pages:
            holding = {at for at, said in sections.items()
                       if at.partition("#")[0] == page and text in said}  # fmt: skip
            if holding & set(shown):
                return page, place, 1
            if holding:  # the page's contents are beside it, too
                return page, place, 2
    return None


@pytest.mark.parametrize("number", range(len(QUESTIONS)), ids=[q[1] for q in QUESTIONS])
def test_a_question_is_answered_among_the_first_three(answers, number):
    found = answers[number]
    assert found is not None, QUESTIONS[number]
    _, place, clicks = found
    assert place <= 3, (QUESTIONS[number], found)
    assert clicks <= 2


def test_words_that_no_page_has_find_nothing(browser, searching):
    searching("codec")
    browser.run(f"{INPUT}.value = 'zzyzzx'; {_typed()}")
    browser.until(f"{META} == 'No matching documents'")


def test_the_committed_table_is_todays(answers, request):
    text = table(answers)
    if request.config.getoption("--write-tables"):
        TABLE.write_text(text)
    assert TABLE.read_text() == text, "make test-pages TABLES=1"


def table(answers):
    """The questions with their answers, as committed."""
    rows = [
        "# Questions typed into the documentation's search",
        "",
        "`make test-pages` types the words into the built site's own search, in Chromium. Place: "
        "of the page that answers, among the\nresults. Clicks: from the results to the section "
        'that holds the answer; 2 where it is behind "more on this page".',
        "",
        "| question | typed | answered by | place | clicks |",
        "|---|---|---|---:|---:|",
    ]
    for (question, words, _, text), found in zip(QUESTIONS, answers, strict=True):
        page, place, clicks = found or ("–", "–", "–")
        shown = f"`{page.rstrip('/')}`: `{text}`"
        rows.append(f"| {question} | {words} | {shown} | {place} | {clicks} |")
    return "\n".join(rows) + "\n"
