"""What README.md, deploy/README.md and bench/README.md say is so."""

import re
import subprocess
from pathlib import Path

import pytest

import chat
import guards

HERE = Path(chat.__file__).parent
README = (HERE / "README.md").read_text()
PAGES = ["README.md", "deploy/README.md", "bench/README.md"]
CONFIGS = [f"deploy/{path.name}" for path in (HERE / "deploy").iterdir() if path.suffix != ".md"]
SOURCE = (HERE / "chat.py").read_text()


def commands(page: str) -> list[str]:
    """Return the lines of its blocks of code."""
    return re.findall(r"^    (.+)$", (HERE / page).read_text(), re.MULTILINE)


def test_the_readme_is_read_in_five_minutes_and_begins_with_how_to_start():
    lines = README.splitlines()
    assert len(lines) <= 160
    assert "git clone" in "".join(lines[:15]) and "uv run chat.py" in "".join(lines[:15])
    assert "pip install -r requirements.txt && python chat.py" in "".join(lines[:15])


def test_the_first_test_command_works_on_a_bare_clone():
    """It is the one that .ci/run calls."""
    first = next(line for line in README.splitlines() if "python -m pytest" in line)
    assert first.strip() == (
        "python3 -m venv .venv && . .venv/bin/activate && "
        "pip install -r requirements-dev.txt && python -m pytest"
    )


def test_the_readme_counts_the_lines_of_each_file():
    table = dict(re.findall(r"^\| `(\S+\.\w+)` \| (\d+) \|", README, re.MULTILINE))
    counted = {name: str(len((HERE / name).read_text().splitlines())) for name in table}
    assert table == counted
    assert len(table) == 8
    scripts = sum(len(path.read_text().splitlines()) for path in (HERE / "static").glob("*.js"))
    assert f"{counted['chat.py']} lines of Python" in README
    assert f"{scripts} lines of JavaScript" in README


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_is_there(page):
    text = (HERE / page).read_text()
    named = {
        *re.findall(r"`([\w./-]+\.(?:py|js|html|conf|service|md|txt)|[\w./-]+/)`", text),
        *re.findall(r"\]\((?!https?:)([^)#]+)\)", text),
        *re.findall(r"\bsrc(?:set)?=\"(.+?)\"", text),
        *re.findall(r"requirements[\w-]*\.txt|(?:deploy|tests)/[\w-]+\.\w+", text),
    }
    for name in named:
        assert (HERE / name).exists() or ((HERE / page).parent / name).exists(), name
    assert page.startswith("bench") or len(named) > 5


@pytest.mark.parametrize("page", PAGES)
def test_every_program_and_option_that_is_named_is_there(page):
    text = (HERE / page).read_text()
    ran = re.findall(r"python (-m bench\.\w+|chat\.py)([^\n`&|#]*)", text)
    assert ran
    for program, options in ran:
        file = program.removeprefix("-m ").replace(".", "/") if "-m" in program else "chat"
        source = (HERE / f"{file}.py").read_text()
        for option in re.findall(r"--[a-z]\w*", options):
            assert f'"{option}"' in source or option == "--help", f"{program} {option}"


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS])
def test_every_setting_that_is_named_exists(page):
    named = set(re.findall(r"CHAT_([A-Z_]+)", (HERE / page).read_text()))
    assert named <= chat.SETTINGS.keys()


def test_the_steps_of_a_message_are_functions_of_the_server():
    path = README.split("## How a message travels")[1].split("###")[0]
    for step, awaits in {"receive": True, "post": False, "hand_out": False, "relay": True}.items():
        assert f"▶ {step} ─" in path and f"`{step}`" in path
        kind = re.search(rf"^(async def|def) {step}\(", SOURCE, re.MULTILINE)
        assert kind and kind[1] == ("async def" if awaits else "def"), step


def test_the_readme_lists_every_verb_and_every_target():
    protocol = README.split("## The protocol")[1].split("## What is promised")[0]
    verbs = set(re.findall(r'\{"(\w+)": ', protocol.replace('{"name"', "").replace('{"token"', "")))
    cases = "".join(re.findall(r"^ +case .*", SOURCE, re.MULTILINE))
    assert verbs == set(re.findall(r'\{"(\w+)": (?!str\(name|str\(token)', cases))
    targets = set(re.findall(r"`(#\w+)`", protocol))
    fragments = (HERE / "templates" / "fragments.html").read_text()
    assert targets == set(re.findall(r'hx-target="(#\w+)"', fragments))
    for attribute in set(re.findall(r"data-\w+", protocol)):
        assert attribute in fragments
    verdicts = set(re.findall(r"`(refused|confirmed|later)`", protocol))
    assert verdicts == set(re.findall(r'"(refused|confirmed|later)"', SOURCE))


def test_the_times_in_the_readme_are_those_of_the_settings():
    assert chat.SETTINGS["GRACE"][0] == 120 and "within two minutes" in README
    assert f"a heartbeat, every {chat.SETTINGS['BEAT'][0]:g} s" in README


def test_the_buttons_in_the_readme_are_those_of_the_page():
    page = "".join(path.read_text() for path in (HERE / "templates").iterdir())
    told = " ".join(README.split("### The wire view")[1].split("## Reading")[0].split())
    buttons = re.findall(r"\*(.+?)\*", told)
    assert len(buttons) == 4
    for button in buttons:
        assert f">{button}</button>" in page, button


def test_every_close_code_that_is_used_is_explained():
    source = SOURCE + (HERE / "guards.py").read_text()
    used = set(re.findall(r"(?:Close|hang_up|report)\((?:[\w.]+, )?(\d{4})", source))
    assert {int(code) for code in used} == chat.CLOSE_CODES.keys()


def test_the_figures_of_the_readme_are_those_of_the_bench():
    figures = README.split("## Figures")[1].split("## ")[0]
    measured = (HERE / "bench" / "README.md").read_text()
    lines = [line for line in figures.splitlines() if line.startswith("    ")]
    assert len(lines) == 5
    for number in re.findall(r"\d[\d,]*\.?\d*", "".join(lines)):
        bare = number.replace(",", "")
        assert re.search(rf"(?<![\d.,])({number}|{bare})(?![\d])", measured), number


def test_every_change_that_the_pages_make_to_a_file_of_deploy_applies(tmp_path):
    """Run each `sed`, on a copy of what it changes; nginx.conf in /etc is that of Debian 12."""
    lines = [line for line in commands("deploy/README.md") if line.startswith("sed ")]
    assert len(lines) == 5
    for line in lines:
        sed = re.match(r"sed .+?(?= &&| >|$)", line)[0]
        file = Path(sed.split()[-1])
        before = (HERE / "deploy" / file.name).read_text()
        if file == Path("/etc/nginx/nginx.conf"):
            before = "events {\n\tworker_connections 768;\n}\n"
        copy = tmp_path / "copy"
        copy.write_text(before)
        command = sed.replace(str(file), str(copy)).replace("sed -i", "sed")
        after = subprocess.check_output(["bash", "-c", command], text=True)
        for old, new in re.findall(r"\bs/([^/]+)/([^/]+)/", sed):
            assert old in before and old not in after and new in after, line


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_the_proxies_send_the_headers_of_the_guards(name):
    config = (HERE / "deploy" / name).read_text()
    for header, value in guards.HEADERS.items():
        assert re.search(rf"\b{header} \"?{re.escape(value)}\"?;?$", config, re.MULTILINE), header
    for kind in guards.KINDS:
        assert re.search(rf"\([\w|]*\b{kind[1:]}\b[\w|]*\)\$", config), kind
