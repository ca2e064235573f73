"""What README.md and docs/ tell a person to type: commands, flags and Python, found by their look alone."""

import re
import shlex
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CALL = r"(\S+=\S+ )*(accelerate launch|torchrun|python3?|bash|\S*bin/python) |scripts/\S+\.(py|sh) --"
FLAG = r'--config\.[\w.]+=(?:"[^"]*"|[^\s,;`]+(?:,[^\s,;`]+)*)?'
SCRIPT = r"scripts/\S+\.(py|sh)$"


def text_of(page: Path) -> str:
    """Its text, with the lines of a command that is broken by backslashes as one."""
    return re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str = r"\w*") -> list[str]:
    """Its blocks of code: fenced ones, of that language, and where any will do indented ones, without indentation."""
    text, fence = text_of(page), re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    found = fence.findall(text)
    if language == r"\w*":
        found += re.findall(r"(?<=\n\n)(?:(?: {4}.*)?\n)+", fence.sub("", text) + "\n")
    return [block for one in found if (block := textwrap.dedent(one).strip("\n"))]


def inline(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text_of(page))


def lines(page: Path) -> list[str]:
    return [line for block in blocks(page) for line in block.splitlines()] + inline(page)


def commands(page: Path) -> list[tuple[str, ...]]:
    """The words of each command in a block of code or inline. "…" stands for flags of the reader's own."""
    called = [line for line in lines(page) if re.match(CALL, line)]
    return [tuple(word for word in shlex.split(line, comments=True) if word != "…") for line in called]


def installed(page: Path) -> list[tuple[str, ...]]:
    """The words behind `alignprop` of each call of the installed command that has arguments."""
    return [tuple(shlex.split(line)[1:]) for line in lines(page) if re.match(r"alignprop \w+ \S", line)]


def overlooked(page: Path) -> list[str]:
    """Lines that call something of the project's, and are no commands by their look."""
    calls = r"(?<![\w/])(main\.py|scripts/\S+\.(py|sh)) -"
    return [line for line in lines(page) if re.search(calls, line) and not re.match(CALL, line)]


def flags_of(code: str) -> list[tuple[str, ...]]:
    """The flags of main.py in a piece of code that begins with one. Where a field comes again, it is an alternative."""
    found = [{}]
    for flag in re.findall(FLAG, code) if code.startswith("--config.") and "=<" not in code else ():
        (word,) = shlex.split(flag)
        field = word.partition("=")[0]
        if field in found[-1]:
            found.append({})
        found[-1][field] = word
    groups = [tuple(group.values()) for group in found if group]
    return [group for group in groups if not group[-1].endswith("=")]  # whose value is said in the words behind it


def snippets(page: Path) -> list[str]:
    """Blocks of Python: those that say so, and those that begin by importing something."""
    others = [block for block in blocks(page) if re.match(r"from \S+ import |import ", block)]
    return unique(blocks(page, "python") + others)


def unique(found) -> list:
    return list(dict.fromkeys(found))


def covering(commands: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Commands that together have every preset and every flag of all of them; those with the most flags come first."""
    chosen, known = [], set()
    for words in sorted(commands, key=len, reverse=True):
        has = {word if ":" in word else word.partition("=")[0] for word in words}
        if has - known:
            chosen.append(words)
            known |= has
    return chosen


COMMANDS = unique(words for page in PAGES for words in commands(page))
MAIN = unique(words[words.index("main.py") + 1 :] for words in COMMANDS if "main.py" in words)
SCRIPTS = unique((word, words[i + 1 :]) for words in COMMANDS for i, word in enumerate(words) if re.match(SCRIPT, word))
INSTALLED = unique(words for page in PAGES for words in installed(page))
FLAG_BLOCKS = unique(group for page in PAGES for block in blocks(page) for group in flags_of(block))
FLAGS = unique(group for page in PAGES for code in inline(page) for group in flags_of(code))
SNIPPETS = [(page.name, code) for page in PAGES for code in snippets(page)]
