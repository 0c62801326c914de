"""What the README and the page of measurements name exists: commands, flags, links, tables."""

import dataclasses
import importlib
import inspect
import re
import shlex

import pytest
from conftest import ROOT

import claims
import common

PAGES = {ROOT / name: (ROOT / name).read_text() for name in ("README.md", "tests/README.md")}
TEXT = "\n".join(PAGES.values())
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S))
COMMANDS = [command.strip() for line in BLOCKS.splitlines() for command in line.split("#")[0].split("&&")]
COMMANDS += re.findall(r"`(python [^`]*)`", TEXT)
SCRIPTS = {name: importlib.import_module(name) for name in ("sdft", "sdpo", "srt", "sdzero", "distill")}
FIELDS = {field.name for script in SCRIPTS.values() for field in dataclasses.fields(script.Args)}


def test_the_test_command_is_what_ci_runs():
    assert "pytest" in COMMANDS and "\npytest\n" in (ROOT / ".ci" / "run").read_text()
    assert any(c.startswith("python sdft.py") for c in COMMANDS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if re.search(r"\b\w+\.py\b", command)])
def test_commands_parse(command):
    """Every script exists and takes every flag that the README gives it."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[at]).exists()
    if words[at] == "tests/claims.py":
        assert {*words[at + 1:]} <= {*claims.TABLES}
    if not words[at].startswith("tests/"):
        module = SCRIPTS[words[at].removesuffix(".py")]
        assert common.parse_args(module.Args, module.PRESETS, words[at + 1:])


def test_flags_in_the_text_exist():
    named = {name.removeprefix("no-").replace("-", "_") for name in re.findall(r"`--([a-z][a-z-]+)", TEXT)}
    assert named <= FIELDS


def test_links_point_to_files():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#h][^)#]*)", text):
            assert (page.parent / target).exists(), target


def test_flags_are_read_and_documented():
    """No flag that nothing reads; each has help that says more than its name."""
    for script in SCRIPTS.values():
        source = inspect.getsource(script) + inspect.getsource(common)
        for field in dataclasses.fields(script.Args):
            assert re.search(rf'args(_type\(\))?\.{field.name}\b|"{field.name}"', source), field.name
            assert re.search(rf'^    {field.name}: .*\n(?:.*\n){{0,4}}?    """(?s:.{{6,600}}?)"""', source, re.M), field.name


@pytest.mark.parametrize("name", claims.TABLES)
def test_the_tables_of_the_laptop_world_are_those_of_the_record(name, monkeypatch):
    monkeypatch.setattr(claims, "run", lambda command: pytest.fail(f"not in tests/claims.jsonl: {command}; python tests/claims.py measures it"))
    assert claims.TABLES[name]() in PAGES[ROOT / "tests" / "README.md"], f"python tests/claims.py {name} prints the table that belongs there"


def test_the_count_of_verdicts():
    count = lambda word: sum(line.endswith(f"| {word} |") for line in claims.verdicts().splitlines())
    shows, not_shown, opposite = map(count, ("shows", "**does not show**", "**the opposite shows**"))
    assert f"Of the {shows + not_shown + opposite} claims that can be tested there, {shows} show, {not_shown} do not, and for {opposite} the opposite shows." in " ".join(TEXT.split())
