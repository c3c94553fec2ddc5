"""What the pages for users say holds: links lead somewhere, commands parse, every option is described."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
import tomllib
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import sdrt.benchmarks.cli
import sdrt.export.cli.main
import sdrt.runtime
import sdrt.runtime.cli.main
from sdrt.export.checkpoint.single_file.published import FAMILIES
from sdrt.runtime import Pipeline, SdrtError
from sdrt.runtime.samplers.registry import SAMPLERS, find_sampler

ROOT: Final = Path(__file__).parents[1]
README, CLI, PYTHON = ROOT / "README.md", ROOT / "docs/cli.md", ROOT / "docs/python.md"
PAGES: Final = (README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
# Their links are checked, too; their commands are those of their day.
ELSEWHERE: Final = (ROOT / "benchmarks/NOTES.md", ROOT / "models/emoji/README.md")
MAX_README: Final = 7000  # bytes: what somebody reads who has not decided yet

MAINS: Final = {
    "sd-run": sdrt.runtime.cli.main.main,
    "sd-export": sdrt.export.cli.main.main,
    "sd-bench": sdrt.benchmarks.cli.main,
}
SUBCOMMANDS: Final = {"sd-run": [""], "sd-export": [""], "sd-bench": ["", "compare", "peers", "render"]}
# Other programs that a block of shell may start.
PROGRAMS: Final = (".", "cat", "cd", "do", "done", "echo", "for", "git", "make", "pip", "pip-audit", "pytest")
OF_OTHERS: Final = frozenset({"--require-hashes", "-m", "-s"})  # options of pip, pytest and pip-audit
SHELL: Final = ("sh", "bash")
OPTION: Final = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]*|-[a-zA-Z])(?![\w-])")
IN_REPOSITORY: Final = re.compile(
    r"(?<![\w/.])(?:benchmarks|docs|examples|export|kernels|models|requirements|runtime|tests|\.ci)/[\w./-]*"
)
EXTRAS: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS: Final = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def page_id(value: object) -> str | None:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else None


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    """Of a page, those inside of lines after the line that they are of."""
    found: list[Token] = []
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        found += [token, *(token.children or ())]
    return tuple(found)


def addresses(page: Path) -> list[str]:
    found = []
    for token in tokens(page):
        if token.type.startswith("html_"):
            found += re.findall(r'(?:src|href)="([^"]*)"', token.content)
        found += [str(token.attrs[name]) for name in ("href", "src") if name in token.attrs]
    return found


@cache
def anchors(page: Path) -> frozenset[str]:
    """Of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for heading, line in zip(tokens(page), tokens(page)[1:], strict=False):
        if heading.type == "heading_open":
            text = "".join(child.content for child in line.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return frozenset(found)


def broken(page: Path) -> list[str]:
    """Links of a page that lead to no file, or to no heading of it."""
    wrong = []
    for address in addresses(page):
        path, _, anchor = unquote(address).partition("#")
        if re.match(r"[a-z]+:", address):
            continue
        target = (page.parent / path).resolve() if path else page
        known = anchors(target) if target.suffix == ".md" and target.is_file() else ()
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in known):
            wrong.append(address)
    return wrong


def blocks(page: Path, *languages: str) -> list[str]:
    return [token.content for token in tokens(page) if token.type == "fence" and token.info in languages]


def inline_code(page: Path) -> list[str]:
    return [token.content for token in tokens(page) if token.type == "code_inline"]


def commands(shell: str) -> Iterator[list[str]]:
    """The commands of a block of shell, as lists of words without redirections and comments."""
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, words = True, list[str]()
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def shell_commands() -> list[Any]:
    found = []
    for page in PAGES:
        for block in blocks(page, *SHELL):
            found += [
                pytest.param(words, id=f"{page.name}: {shlex.join(words)}") for words in commands(block)
            ]
    return found


@cache
def options_of(command: str) -> frozenset[str]:
    """What a command and its subcommands say that they take."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "1000")  # an option's name must not be broken
        for words in SUBCOMMANDS[command]:
            with pytest.raises(SystemExit):
                MAINS[command]([*words.split(), "--help"])
    return frozenset(OPTION.findall(shown.getvalue()))


def section(page: Path, title: str) -> str:
    """A page's text from a heading to the next one of its level."""
    text = page.read_text(encoding="utf-8")
    mark = next(match for match in re.findall(r"^#+ .*$", text, re.MULTILINE) if match.lstrip("# ") == title)
    level = mark.split()[0]
    return re.split(rf"^{level} ", text.partition(f"{mark}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize("page", [*PAGES, *ELSEWHERE], ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`, three\n\n[a](#one-two-three) [b](#four) [c](page.md#one-two-three) [d](no.md)\n"
        '<img src="no.png"> ![e](../..) [f](https://example.com/no#no)\n'
    )
    assert broken(page) == ["#four", "no.md", "no.png", "../.."]


@pytest.mark.parametrize("page", [*PAGES, *ELSEWHERE], ids=page_id)
def test_files_and_targets_in_the_text_are_there(page: Path) -> None:
    assert {code.split()[1] for code in inline_code(page) if code.startswith("make ")} <= set(TARGETS)
    named = [path for code in inline_code(page) for path in IN_REPOSITORY.findall(code)]
    assert [path for path in named if not (ROOT / path).exists() and not (page.parent / path).exists()] == []


def test_the_readme_is_short() -> None:
    assert README.stat().st_size <= MAX_README


@pytest.mark.parametrize("words", shell_commands())
def test_commands_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = words[0].rpartition("/")[2], *words[1:]
    if program in MAINS:
        monkeypatch.chdir(tmp_path)
        assert parses(program, rest, monkeypatch)
        return
    assert program in PROGRAMS or program.startswith(("python", "uv"))
    for before, word in zip(words, rest, strict=False):
        if program == "make" and "=" not in word:
            assert word in TARGETS
        if extras := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(extras[1].split(",")) <= set(EXTRAS)
        if before in ("-r", "--constraint") or (program in ("python", "pytest") and "/" in word):
            assert "$" in word or (ROOT / word).exists()


def parses(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a command takes these words; nothing is done."""
    main = MAINS[program]
    if program == "sd-export" and "--engine" in words and "--architecture" not in words:
        names = words[: next(place for place, word in enumerate(words) if word.startswith("-"))]
        if len(names) == 1:  # where OUT is missing, MODEL must be a bundle
            Path(names[0]).mkdir()
            (Path(names[0]) / "manifest.json").touch()
    begun: list[str] = []

    def run_command(name: str, *_arguments: object, **_options: object) -> int:
        begun.append(name)
        return 0

    monkeypatch.setitem(main.__globals__, "run_command", run_command)
    try:
        return main(words) == 0 and begun == [program]
    except SystemExit:
        return False


@pytest.mark.parametrize(
    "line", ["sd-run a --stepz 3", "sd-export MODEL OUT --batch 4..1", "sd-bench compare one.json"]
)
def test_a_wrong_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = commands(line)
    assert not parses(words[0], words[1:], monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_blocks_say_their_language(page: Path) -> None:
    others = {token.info for token in tokens(page) if token.type == "fence"} - {*SHELL, "python"}
    assert others <= {"text", "json", "cpp", "c"}
    for block in blocks(page, *others):
        assert not re.search(rf"^\$? ?({'|'.join((*MAINS, 'make', 'pip'))}) ", block, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_blocks_use_what_there_is(page: Path) -> None:
    (unpacked,) = typing.get_args(typing.get_type_hints(Pipeline.__call__)["options"])
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "pipeline":
                given = {word.arg for word in node.keywords} - {None}
                assert given <= set(unpacked.__annotations__)
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "pipeline":
                assert hasattr(Pipeline, node.attr)


@pytest.mark.parametrize("command", MAINS)
def test_all_options_are_described(command: str) -> None:
    assert options_of(command) - set(OPTION.findall(section(CLI, command))) == set()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_options_in_the_text_are_there(page: Path) -> None:
    named = [code for code in inline_code(page) if code.startswith(("-", *MAINS))]
    used = {option for code in named for option in OPTION.findall(code.replace("_", "-"))}
    assert used - OF_OTHERS.union(*map(options_of, MAINS)) == set()


def test_all_samplers_are_in_the_table() -> None:
    rows = [line for line in section(CLI, "Samplers").splitlines() if line.startswith("| `")]
    names = [re.findall(r"`([^`]+)`", line.rpartition(" | ")[0]) for line in rows]
    assert [own for own, *_ in names] == sorted(SAMPLERS)
    assert [name for own, *others in names for name in others if find_sampler(name)[0] != own] == []
    assert f"| Samplers | {len(SAMPLERS)}," in README.read_text(encoding="utf-8")


def test_all_kinds_of_single_files_are_listed() -> None:
    (row,) = (line for line in CLI.read_text(encoding="utf-8").splitlines() if "| `--family NAME`" in line)
    assert set(re.findall(r"`([a-z0-9-]+)`", row)) == set(FAMILIES)


def test_all_arguments_and_public_names_are_described() -> None:
    (unpacked,) = typing.get_args(typing.get_type_hints(Pipeline.__call__)["options"])
    options, words = set(OPTION.findall(CLI.read_text())), " ".join(inline_code(PYTHON))
    names = [*unpacked.__annotations__, *sdrt.runtime.__all__]
    missing = [
        name
        for name in names
        if not re.search(rf"\b{name}\b", words) and f"--{name.replace('_', '-')}" not in options
    ]
    assert missing == []


def test_all_exit_statuses_are_described() -> None:
    def statuses(kind: type[SdrtError]) -> set[int]:
        return {kind.exit_status}.union(*map(statuses, kind.__subclasses__()))

    described = re.findall(r"^\| (\d+) \|", section(CLI, "Exit statuses"), re.MULTILINE)
    assert {int(number) for number in described} == {0, *statuses(SdrtError)}
