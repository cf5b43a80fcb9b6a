"""`zoo compare`: many tokenizers on one data set, measured one after the other, and a page to read it all on."""

from __future__ import annotations

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from zoo.commands import cli
from zoo.commands.common import DTYPES, claim, decisive, expect_one_of, preparation, start
from zoo.commands.compare.measuring import compress, encode_of, groups, measure, of_task
from zoo.commands.compare.report import gathered
from zoo.commands.compare.writing import write
from zoo.commands.understanding import TASKS, asked
from zoo.commands.understanding import check as check_understanding
from zoo.errors import ZooError, expect_integer, nearest
from zoo.files import discard_parts
from zoo.metrics.codecs import NAMES as CODECS
from zoo.registry import is_here, tokenizers, weights_path
from zoo.weights import sha256_of


def compare(cfg: DictConfig) -> dict:
    """Measure the tokenizers, then codecs that have as many bits, and write the page; returns what is in compare.json.

    What is measured is kept in output_dir/NAME/TASK.json and is not measured again; what failed is tried again. Raises
    ZooError for what is wrong in the configuration, where output_dir holds results of another protocol, and where no
    tokenizer could be measured.
    """
    check(cfg)
    names, absent = chosen(cfg)
    fabric, folder = start(cfg), Path(cfg.output_dir)
    console = Console(highlight=False, quiet=not fabric.is_global_zero)
    claim(fabric, folder, protocol(cfg))
    for name in names:
        if begun := of_tokenizer(cfg, name):
            claim(fabric, folder / name, begun)
    if fabric.is_global_zero:
        discard_parts(folder)
    failures = {}
    for number, name in enumerate(names, 1):
        console.print(f"{number} of {len(names)}: {name}")
        failures[name] = measure(cfg, fabric, name, folder / name)
        for reason in failures[name].values():
            console.print(f"    failed: {reason}", soft_wrap=True, markup=False)
    for group in fabric.broadcast(groups(cfg, names)):
        console.print(f"codecs: {group}")
        compress(cfg, fabric, folder, group)
    report = None
    if fabric.is_global_zero:
        report = gathered(cfg, fabric, protocol(cfg), names, absent, failures)
        write(report, folder, console)
    report = fabric.broadcast(report)
    if not any(one["measured"] for one in report["tokenizers"]):
        raise ZooError(f"no tokenizer could be measured; {names[0]}: {next(iter(failures[names[0]].values()))}")
    return report


def check(cfg: DictConfig) -> None:
    """Raise ZooError where a field of conf/compare.yaml is not of its kind."""
    expect_one_of(cfg, "dtype", DTYPES)
    for name, known in (("tasks", ("reconstruction", *TASKS)), ("codecs", CODECS)):
        for one in cfg[name]:
            if one not in known:
                raise ZooError(f"{name} has '{one}'{nearest(str(one), known)}")
    if not cfg.tasks:
        raise ZooError("tasks is an empty list; give at least one of reconstruction, probe, zeroshot.")
    for rate in cfg.rates:
        if type(rate) not in (int, float) or not rate > 0:
            raise ZooError(f"rates are bits per pixel above 0, got {rate!r}.")
    expect_integer("pictures", cfg.pictures, 0)
    if cfg.limit is not None:
        expect_integer("limit", cfg.limit, 1)
    expect_integer("save_every", cfg.save_every, 0)
    for field in ("weights", "encode"):
        for name in cfg[field]:
            tokenizers.preset(name)
    for task in cfg.tasks:
        if task in TASKS:
            check_understanding(of_task(cfg, task))
            asked(instantiate(cfg.labels), task)


def chosen(cfg: DictConfig) -> tuple[list[str], list[str]]:
    """Names to be measured, and those that `all` leaves out since their weights are not on this machine."""
    if cfg.tokenizers == "all":
        names = sorted(name for name, one in tokenizers.presets().items() if name in cfg.weights or is_here(one))
        if not names:
            raise ZooError("no tokenizer has its weights on this machine; give some by weights.NAME=FILE.")
        return names, sorted(tokenizers.presets().keys() - names)
    names = list(cfg.tokenizers) if OmegaConf.is_list(cfg.tokenizers) else [cfg.tokenizers]
    if not names:
        raise ZooError("tokenizers is an empty list; give names of `zoo list`, or all.")
    for name in names:
        tokenizers.preset(name)
    return list(dict.fromkeys(names)), []


def protocol(cfg: DictConfig) -> dict:
    """All that decides the numbers, but for the tokenizers."""
    cfg = cfg.copy()
    cfg.tokenizer = {"image_size": "that of each tokenizer"}
    cfg = OmegaConf.to_container(cfg, resolve=True)
    data = decisive(cfg["data"])
    return {
        "data": data,
        **preparation(data),
        "scored": "the crop that went into the tokenizer against its reconstruction, clamped to [0, 1]",
        "codecs": "at most as many bits an image in the mean: whole files with their headers, of one quality for all "
        "images, which are made smaller first where that gives a higher PSNR; thumbnails of 8 bits a number; scored "
        "against the crop in 8 bits",
        **{name: cfg.get(name) for name in ("metrics", "labels", "pool", "limit", "pictures", "dtype", "seed")},
    }


def of_tokenizer(cfg: DictConfig, name: str) -> dict | None:
    """What decides the numbers of a tokenizer; None where it has no weights here, which measuring it will say."""
    try:
        path = weights_path(name, cfg.weights.get(name))
    except ZooError:
        return None
    if not path.is_file():
        return None
    return {"weights": path.name, "sha256": sha256_of(path), "encode": encode_of(cfg, name)}


def main(argv: list[str] | None = None) -> int:
    return cli.run("compare", compare, cli.with_open_fields(argv, "encode", "weights"))
