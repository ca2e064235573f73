"""The documentation site: it is built without a warning, and each of its links leads to something."""

import os
import re
import shutil
import subprocess
import sys
from html import unescape
from urllib.parse import unquote

import pytest

from scripts.site_hooks import ELSEWHERE
from tests.helpers.docs_commands import ROOT

NEEDED = ["mkdocs.yml", "docs", "scripts", "alignprop", "rewards", "config", *ELSEWHERE]


def build(source, target):
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # the theme's own advertisement
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", target]
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    done = build(ROOT, target)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return target


def test_every_link_and_picture_is_there(site):
    pages, checked = list(site.rglob("*.html")), 0
    for page in pages:
        for kind, link in re.findall(r'\b(href|src)="([^"]+)"', page.read_text()):
            path, _, anchor = unquote(unescape(link)).partition("#")
            if re.match(r"[a-z]+:", path) or page.name == "404.html":
                continue
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(site)}: {kind} {link}"
            if anchor and target.suffix == ".html" and anchor != "__skip":
                assert f'id="{anchor}"' in target.read_text(), f"{page.relative_to(site)}: {link}"
            checked += 1
    assert len(pages) > 20
    assert checked > 500


def test_no_page_loads_anything_from_another_server(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="(?:https?:)?//[^"]+"', page.read_text())
        loaded += re.findall(
            r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(?:https?:)?//[^"]+"', page.read_text()
        )
        assert not loaded, page


def test_the_library_page_shows_signatures_and_docstrings(site):
    page = re.sub(r"<[^>]+>", "", (site / "api" / "index.html").read_text())
    for text in ("AlignPropTrainer(", "DDPOTrainer", "get_config(", "ConfigError", "RewardError", "plain_endings("):
        assert text in page


def test_a_broken_link_fails(tmp_path):
    for name in NEEDED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "pipeline", "clip", "judge")
            shutil.copytree(source, tmp_path / name, dirs_exist_ok=True, ignore=ignore)
        else:
            shutil.copy(source, tmp_path / name)
    page = tmp_path / "docs" / "results.md"
    page.write_text(page.read_text() + "\n[nowhere](no_such_page.md)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "no_such_page.md" in done.stderr
