"""The site and the reports in Chromium: desktop and phone, light and dark (`make test-pages`)."""

import json

import pytest
from tests.pages.shown import ROOT

SCREENS = {"desktop": (1280, 800), "phone": (390, 844)}
SCHEMES = {"light": False, "dark": True}
TABLE = ROOT / "benchmarks" / "results" / "pages.md"

#: What is wider than the page: elements that reach out of it and that nothing cuts off or scrolls.
OVERFLOW = """(() => {
  if (document.documentElement.scrollWidth <= innerWidth) return [];
  const scrolled = e => { for (; e; e = e.parentElement)
    if (getComputedStyle(e).overflowX != 'visible' && e != document.body) return true; };
  return ['page: ' + document.documentElement.scrollWidth,
    ...[...document.querySelectorAll('body *')]
      .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolled(e.parentElement))
      .slice(0, 5).map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 60))];
})()"""

#: Words of code, and words of a report, in tables: each stands on one line, but that a hyphen or an
#: ellipsis may end it.
BROKEN = """(() => {
  const found = [], range = document.createRange();
  const cells = document.querySelectorAll('td code, th code, .wide td, .wide th');
  for (const cell of cells) {
    if (!cell.offsetParent) continue;
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    for (let node; node = walker.nextNode();)
      for (const word of node.data.matchAll(/[^\\s…-]*[…-]|[^\\s…-]+/g)) {
        range.setStart(node, word.index);
        range.setEnd(node, word.index + word[0].length);
        const tops = [...range.getClientRects()].filter(r => r.width).map(r => Math.round(r.top));
        if (new Set(tops).size > 1) found.push(word[0]);
      }
  }
  return found;
})()"""

#: Formulas and commands a reader must not have to scroll for: those of the first page.
SCROLLED = """[...document.querySelectorAll('article pre > code')]
  .filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent.slice(0, 60))"""


def pages(site):
    """Addresses of all pages of the site and of the two reports."""
    found = (path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))
    return [*sorted("" if name == "." else f"{name}/" for name in found), "report.html",
            "comparison.html"]  # fmt: skip


def is_table(page):
    """One of the committed tables, of which a few stand for all."""
    return page.startswith("benchmarks/results/")


def settled(browser, script):
    """The faults that stay: a page that was turned is laid out anew in its own time."""
    try:
        browser.until(f"{script}.length == 0", seconds=5)
    except TimeoutError:
        return browser.run(script)
    return []


def follows(browser, dark):
    """Whether the page becomes dark, or light, as the system is."""
    channels = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)"
    try:
        browser.until(f"{channels}.every(c => c < 80) == {json.dumps(dark)}", seconds=10)
    except TimeoutError:
        return False
    return True


@pytest.fixture(scope="module")
def checked(site, browser, address):
    """Every check's faults, by page, screen and scheme."""
    faults = {}
    for page in pages(site):
        browser.screen(*SCREENS["desktop"], dark=False)
        browser.open(address + page)
        for screen, size in SCREENS.items():
            for scheme, dark in SCHEMES.items():
                browser.screen(*size, dark)  # the page follows, as on a phone that is turned
                browser.run("new Promise(r => requestAnimationFrame(() => setTimeout(r, 50)))")
                light = faults.get((page, screen, "light"))
                faults[page, screen, scheme] = {  # colours move nothing
                    "overflow": light["overflow"] if dark else settled(browser, OVERFLOW),
                    "broken": light["broken"] if dark else settled(browser, BROKEN),
                    "colours": [] if follows(browser, dark) else ["not as the system's"],
                }
    return faults


def test_no_page_is_wider_than_its_screen(checked):
    assert not {at: found["overflow"] for at, found in checked.items() if found["overflow"]}


def test_no_word_of_code_is_broken_in_a_table(checked):
    assert not {at: found["broken"] for at, found in checked.items() if found["broken"]}


def test_pages_are_light_or_dark_as_the_system_is(checked):
    assert not [at for at, found in checked.items() if found["colours"]]


@pytest.mark.parametrize("screen", SCREENS)
def test_the_first_pages_formula_is_seen_whole(browser, address, screen):
    browser.screen(*SCREENS[screen], dark=False)
    browser.open(address)
    assert not [text for text in browser.run(SCROLLED) if text.startswith(("W =", "pip"))]


def test_a_page_that_is_too_wide_is_seen(browser, site, address):
    wide = '<meta name="viewport" content="width=device-width"><p style="width: 2000px">wide'
    (site / "wide.html").write_text(wide)
    broken = '<table><td style="width: 1em; word-break: break-all"><code>word</code></table>'
    (site / "broken.html").write_text(broken)
    browser.screen(*SCREENS["desktop"], dark=False)
    browser.open(f"{address}wide.html")
    assert browser.run(OVERFLOW)[1:]
    browser.open(f"{address}broken.html")
    assert browser.run(BROKEN) == ["word"]
    (site / "wide.html").unlink()
    (site / "broken.html").unlink()


@pytest.mark.parametrize("screen", SCREENS)
def test_the_theme_is_chosen_by_hand_and_kept(browser, address, screen):
    browser.screen(*SCREENS[screen], dark=False)
    browser.open(address)
    scheme = "document.body.getAttribute('data-md-color-scheme')"
    seen = []
    for _ in range(3):
        toggle = "document.querySelector('[data-md-component=palette] label:not([hidden])')"
        browser.until(f"{toggle}?.title")
        seen.append((browser.run(f"{toggle}.title"), browser.run(scheme)))
        browser.run(f"{toggle}.click()")
        browser.run("new Promise(r => setTimeout(r, 100))")
    # As the system has it (light), light, dark, and round again.
    assert seen == [("Light", "default"), ("Dark", "default"), ("As the system has it", "slate")]
    browser.run(f"{toggle}.click()")
    browser.run("new Promise(r => setTimeout(r, 100))")
    browser.run("document.querySelector('[data-md-component=palette] label:not([hidden])').click()")
    browser.until(f"{scheme} == 'slate'")
    browser.open(f"{address}recipes/")
    assert browser.run(scheme) == "slate"
    browser.run("localStorage.clear()")


def test_the_committed_list_is_todays(checked, site, request):
    text = listed(checked, site)
    if request.config.getoption("--write-tables"):
        TABLE.write_text(text)
    assert TABLE.read_text() == text, "make test-pages TABLES=1"


def listed(checked, site):
    """What was looked at, as a table."""
    rows = [
        "# Pages in a browser: what holds",
        "",
        "`make test-pages`: the site, a run's report and a comparison of three in headless "
        "Chromium, 1280 and 390 pixels wide,\nlight and dark. `tests/pages` has the checks; each "
        "was seen to fail on a page made for it.",
        "",
        "| page | desktop, light | desktop, dark | phone, light | phone, dark |",
        "|---|---|---|---|---|",
    ]
    names = [page for page in pages(site) if not is_table(page)]
    for name in names:
        cells = []
        for screen in SCREENS:
            for scheme in SCHEMES:
                found = checked[name, screen, scheme]
                cells.append("FAILS" if any(found.values()) else "passes")
        rows.append(f"| `{name or 'index'}` | {' | '.join(cells)} |")
    bad = sum(any(found.values()) for (page, *_), found in checked.items() if is_table(page))
    rows += [
        "",
        f"passes: no wider than its screen (tables and code scroll within themselves), and no word "
        "of code broken in a table;\nits colours follow the system's. "
        f"The committed tables likewise: {bad} fail.",
        "",
        "Further: the first page's formula and commands are seen whole; the switch goes through "
        "light, dark and the system's colours, and\nis kept on the next page; questions typed into "
        "the search find their answer "
        "([questions.md](questions.md)).",
    ]
    return "\n".join(rows) + "\n"
