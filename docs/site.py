"""The pages of the site: files of the repository, each at its own path, so that one link serves both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PARTS = (
    *("*.md", "LICENSE", "docs/**/*.md", "zoo/**/*.md", "checkpoints/*.md", "benchmarks/*.md", "examples/**/*.md"),
    *("pictures/**/*.png", "zoo/**/*.py", "conf/**/*.yaml", "benchmarks/*.py", "examples/**/*.py"),
    *("examples/**/*.yaml", "examples/**/*.toml", "tests/**/*.py"),
)
"""Pages, and what they link to."""


def on_config(config: MkDocsConfig) -> None:
    """Put in place of each pattern of the nav what matches it and is named nowhere else."""
    named = {entry for entry in flat(config.nav) if "*" not in entry}

    def matches(pattern: str) -> list[str]:
        return sorted({path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)} - named)

    def expanded(entries: list) -> list:
        found = []
        for entry in entries:
            if isinstance(entry, dict):
                found.append({title: expanded(one) if isinstance(one, list) else one for title, one in entry.items()})
            elif "*" in entry:
                found += matches(entry)
            else:
                found.append(entry)
        return found

    config.nav = expanded(config.nav)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Replace the files of docs/ by those of the repository."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted({path for part in PARTS for path in ROOT.glob(part) if path.is_file()}):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))


def flat(entries: list | dict | str) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    return [leaf for one in (entries.values() if isinstance(entries, dict) else entries) for leaf in flat(one)]
