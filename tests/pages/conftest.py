import importlib.util

import pytest
from tests.pages import browser as browsers
from tests.pages import shown


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == shown.ROOT / "tests" / "pages":
            item.add_marker(pytest.mark.pages)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: `make test-pages` installs the extra docs")
    if browsers.installed() is None:
        pytest.skip(f"none of {', '.join(browsers.NAMES)} is installed")
    folder = tmp_path_factory.mktemp("pages") / "site"
    shown.build(folder)
    return folder


@pytest.fixture(scope="session")
def address(site):
    with shown.served(site) as url:
        yield url


@pytest.fixture(scope="session")
def browser(site):
    opened = browsers.Browser()
    yield opened
    opened.close()
