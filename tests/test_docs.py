"""What is written about the zoo is true: links lead somewhere, commands and code are those of the zoo as it is."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from fsq.tokenizer import PRESETS
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from markdown_it import MarkdownIt
from omegaconf import OmegaConf

import zoo
from zoo import registry
from zoo.__main__ import COMMANDS
from zoo.commands import cli

ROOT = Path(__file__).parents[1]
PARTS = "*.md", "docs/**/*.md", "zoo/**/*.md", "checkpoints/*.md", "benchmarks/*.md", "examples/**/*.md"
PAGES = sorted({path.relative_to(ROOT).as_posix() for part in PARTS for path in ROOT.glob(part)})
BASH = "bash", "sh", "shell"
SHELL = {
    *("cd", "done", "eval", "exit", "export", "for", "git", "if", "mkdocs", "sbatch", "scancel", "scontrol", "squeue"),
    "tensorboard",
}
"""Other programs that a page may start."""
RUNNERS = {"srun", "torchrun", "nohup", "timeout", "mpirun"}
"""Programs that start what stands behind them."""


def fences(page, *languages):
    """Code blocks of a page in these languages: (number of the line, text)."""
    tokens = MarkdownIt().parse((ROOT / page).read_text())
    return [(t.map[0] + 2, t.content) for t in tokens if t.type == "fence" and t.info.strip() in languages]


def command_lines(page):
    """(number of the line where its block begins, words) of every command in the bash blocks of a page."""
    for number, block in fences(page, *BASH):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$\w+", "0", line)  # variables of the shell
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):  # variables for the command
                words.pop(0)
            if words:
                yield number, words


def build(folder, site):
    """`mkdocs build --strict`."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=folder, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def test_every_page_is_on_the_site_and_every_link_anchor_and_picture_leads_somewhere(tmp_path):
    """Pages have on the site the paths that they have in the repository, and anchors are made as GitHub makes them."""
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    for page in map(Path, PAGES):
        made = page.parent if page.name == "README.md" else page.with_suffix("")
        assert (tmp_path / made / "index.html").is_file(), page
    api = (tmp_path / "docs/reference/tokenizer/index.html").read_text()
    assert "zoo.tokenizer.Tokenizer.encode" in api
    assert "Images (B, C, H, W) in [0, 1] to Tokens" in api
    adding = (tmp_path / "docs/adding/index.html").read_text()
    assert "class ScalarQuantizer(nn.Module):" in re.sub("<[^>]+>", "", adding)


def test_a_link_anchor_or_picture_that_leads_nowhere_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/site.py").write_text((ROOT / "docs/site.py").read_text())
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {ROOT}/mkdocs.yml\nnav: [README.md]\nplugins: [search]\n")
    page = tmp_path / "README.md"
    page.write_text("# Title\n\n[fine](#title)\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0
    page.write_text("# Title\n\n[a](none.md) [b](#none) ![c](pictures/none.png) [d](zoo)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for broken in ("'none.md'", "'#none'", "'pictures/none.png'", "'zoo'"):
        assert broken in done.stderr
    page.write_text('# Title\n\n```python\n--8<-- "none.py"\n```\n')
    assert build(tmp_path, tmp_path / "site").returncode != 0


@pytest.fixture(scope="module")
def with_example():
    """The tokenizer of examples/fsq has its name, as if it were installed; presets are stored for Hydra once."""
    added = {name: preset for name, preset in PRESETS.items() if name not in zoo.list_tokenizers()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry.tokenizers, "_registered", registry.tokenizers._registered | added)
        cli.store_presets()
        patch.setattr(cli, "store_presets", lambda: None)
        patch.setattr(cli, "run", lambda command, task, argv: compose(command, *argv))
        yield
    for name in added:
        del ConfigStore.instance().repo["tokenizer"][f"{name}.yaml"]


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, *BASH)])
def test_commands_are_of_the_zoo_as_it_is(page, with_example):
    """Sub-commands, experiments, names, fields and their types, modules, scripts and their options, extras, targets."""
    for number, words in command_lines(page):
        try:
            check_command(words)
        except Exception as error:
            raise AssertionError(f"{page}, block at line {number}: {shlex.join(words)}\n{error}") from error


def check_command(words):
    if words[0] in RUNNERS:
        words = words[next(i for i, word in enumerate(words) if word in ("zoo", "python", "-m")) :]
        words = ["python", *words] if words[0] == "-m" else words
    program, *rest = words
    if program == "python" and rest[:2] == ["-m", "zoo"]:
        program, rest = "zoo", rest[2:]
    if program == "python" and rest[0] in ("train.py", "evaluate.py"):
        program, rest = "zoo", [rest[0].removesuffix(".py"), *rest[1:]]
    if program == "zoo":
        check_zoo(*rest)
    elif program == "python" and rest[0] == "-m":
        found = importlib.util.find_spec(rest[1])
        assert found, f"there is no module {rest[1]}"
        check_options(Path(found.origin), rest[2:] if rest[1].startswith("zoo") else [])
    elif program == "python":
        check_options(ROOT / rest[0], rest[1:])
    elif program == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        for extra in re.findall(r"\[([\w,-]+)\]", " ".join(rest)):
            assert set(extra.split(",")) <= set(extras)
    elif program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in rest)
    else:
        assert program in SHELL, f"{program} is no program that this test knows"


def check_options(script, words):
    """Each --option stands in the source of the script, which exists."""
    for word in words:
        if word.startswith("--"):
            assert f'"{word.split("=")[0]}"' in script.read_text()
    assert script.is_file()


def check_zoo(command, *words):
    assert command in COMMANDS
    if not (ROOT / f"conf/{command}.yaml").is_file():
        if command == "info":
            assert any(words[0] in kind.presets() for kind in registry.KINDS)
        if command == "list":
            assert any(kind.list(*words) for kind in registry.KINDS)
        return
    words, overrides = list(words), []
    while words:
        word = words.pop(0)
        if word == "--config-dir":
            overrides.append(f"hydra.searchpath=[file://{ROOT / words.pop(0)}]")
        elif word not in ("-m", "..."):
            overrides.append(re.sub("^(output_dir|weights)=.*", r"\1=somewhere", word))
    importlib.import_module(f"zoo.commands.{command}").main(overrides)


@cache
def compose(command, *overrides):
    """As the command would; of a sweep its first run."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    one = [
        f"{o.get_key_element()}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else o.input_line
        for o in parsed
    ]
    cfg = cli.compose(command, one)
    if command == "compare":  # which takes the tokenizers one after the other
        cfg.tokenizer = {"image_size": 64}
    OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "python")])
def test_python_compiles(page):
    for number, block in fences(page, "python"):
        if "--8<--" not in block:
            compile("\n" * (number - 1) + block, page, "exec")


def test_readme_and_tour_run_and_the_pictures_are_those_that_it_makes(tmp_path):
    import numpy as np
    from PIL import Image

    page, script = "docs/tour.md", ["import importlib", *(block for _, block in fences("README.md", "python"))]
    shell = {number for number, _ in fences(page, "bash")}
    for number, block in fences(page, "python", "bash"):
        if number not in shell:
            script.append(block)
            continue
        for _, (program, command, *argv) in (line for line in command_lines(page) if line[0] == number):
            assert program == "zoo"
            script.append(f"assert importlib.import_module('zoo.commands.{command}').main({argv}) == 0")
    (tmp_path / "tour.py").write_text("\n".join(script))
    done = subprocess.run(
        [sys.executable, "tour.py"], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tour/report/metrics.json").is_file()
    made = sorted(path.name for path in tmp_path.glob("*.png"))
    assert made == sorted(path.name for path in (ROOT / "pictures").glob("tour-*.png"))
    for name in made:
        with Image.open(tmp_path / name) as new, Image.open(ROOT / "pictures" / name) as shown:
            assert new.size == shown.size
            difference = np.abs(np.asarray(new.convert("RGB"), float) - np.asarray(shown.convert("RGB"), float))
        assert difference.mean() < 8, name  # of 255: another machine draws other digits, and another scene is 20 away
