"""Hooks for mkdocs, which makes a site of pages that are also read in the repository.

Some pages live outside of docs/, such as those that people look for at the top of a repository. They are added to the
site under the names below. A link to a file that is not a page, such as a module, keeps only its text.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "alignprop/assets/tiny/README.md": "bundled_model.md",
}
PICTURES = {"alignprop/assets/tiny/samples.png": "images/bundled_model.png"}
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Adds the pages and pictures that live outside of docs/."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for source, page in PICTURES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links to where their targets are on the site. A link to a file that is not a page keeps only its text."""
    homes = {page: source for source, page in ELSEWHERE.items()}
    folder = (ROOT / homes.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def on_site(match):
        path = (folder / match[1]).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]  # mkdocs warns that this link leads nowhere
        inside = path.relative_to(ROOT).as_posix()
        if inside in ELSEWHERE or inside in PICTURES:
            return f"]({(ELSEWHERE | PICTURES)[inside]}{match[2] or ''})"
        if path.is_relative_to(ROOT / "docs"):
            return f"]({path.relative_to(ROOT / 'docs').as_posix()}{match[2] or ''})"
        return "]()"

    return re.sub(r"\[([^\]]*)\]\(\)", r"\1", LINK.sub(on_site, markdown))
