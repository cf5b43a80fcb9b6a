"""Command lines of every kind, through the functions that the commands are."""

import contextlib
import functools
import importlib
import io

import lightning as L
import pytest
from fuzz_helpers import fuzz, is_a_sentence
from hypothesis import Phase, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, ListConfig

from zoo.commands import cli
from zoo.training.module import TrainingModule

COMMANDS = {
    "aurora": (
        "train",
        *("experiment=aurora-tiny", "trainer=tiny-debug", "data.batch_size=2", "data.num_workers=0"),
        *("tokenizer.hidden_dim=4", "tokenizer.codebook_dim=8", "tokenizer.codebook_size=16"),
    ),
    "gan": ("train", "experiment=vqgan-tiny", "trainer=tiny-debug", "data.batch_size=2", "data.num_workers=0"),
    "encoder": ("train", "experiment=siglip-tiny", "trainer=tiny-debug", "data.batch_size=2", "data.num_workers=0"),
    "generator": ("train", "experiment=xar-tiny", "trainer=tiny-debug", "data.batch_size=2", "data.num_workers=0"),
    "lm": ("train", "experiment=seed-lm-tiny", "trainer=tiny-debug", "data.batch_size=2", "data.num_workers=0"),
    "evaluate": ("evaluate", "limit=2", "batch_size=2", "data.num_workers=0", "pictures=1"),
    "sweep": ("evaluate", "tokenizer=karl-tiny", "limit=2", "batch_size=2", "data.num_workers=0", "pictures=1"),
    "probe": ("evaluate", "task=probe", "tokenizer=mingtok-tiny", "limit=4", "batch_size=4", "data.num_workers=0"),
    "zeroshot": ("evaluate", "task=zeroshot", "encoder=siglip-tiny", "limit=4", "batch_size=4", "data.num_workers=0"),
    "generate": ("generate", "num_images=1", "num_steps=2", "npz=false"),
    "pretokenize": ("pretokenize", "data=photos", "split=val", "num_shards=1", "data.num_workers=0"),
}
WRONG = (
    *("null", "true", "1.5", "-1", "0", "nan", "inf", "-inf", "many", "''", "1e999", "-3.7", "é", "1_000"),
    *("[]", "{}", "[1,x]", "[null]", "{a:1}", "[[]]", "???", "${nothing}", "${seed}", "${oc.env:NO_SUCH}", "${.x}"),
)
BROKEN = (
    *("", "=", "a", "a=", "=a", "a=[", "a={", "a='", "+", "~", "++", "~~a", "a.b.c=1", "+a.b=1", "seed.x=1", "~seed"),
    *("experiment=", "experiment=nothing", "experiment=[aurora-tiny,kl-tiny]", "+experiment=kl-tiny", "tokenizer=none"),
    *("tokenizer=null", "data=null", "data=nothing", "~data", "trainer=null", "~trainer", "~module", "module=null"),
    *("optimizer=nothing", "schedule=9", "callbacks=none", "~callbacks", "logger=nothing", "~logger", "metrics=depth"),
    *("weights=nowhere.pt", "weights=.", "weights=3", "weights=[a]", "+weights=a", "encoder=aurora-tiny", "é=é", "a b"),
    *("labels=nothing", "generator=kl-tiny", "data.path=nowhere", "data=folder", "hydra.run.dir=", "a:b=c", "\x00=1"),
    *("callbacks.best.monitor=nothing", "encode.quality=x", "encode.nothing=1", "encode={}", "encode=[1]", "a=${a}"),
    *(
        "seed=${seed}",
        "seed=${limit}",
        "data.batch_size=${data.batch_size}",
        "resume=true",
        "task=nothing",
        "fresh=[x]",
    ),
)
FEW = "devices", "num_nodes", "num_workers", "output_dir"
"""Fields of which a right value starts processes, or writes elsewhere."""


class Enough(Exception):
    """A training has made its first step."""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Trainings end with their first step, of one process."""
    fit, training_step = L.Trainer.fit, TrainingModule.training_step

    def first_step(trainer, *args, **options):
        if trainer.num_devices * trainer.num_nodes == 1:
            with contextlib.suppress(Enough):
                fit(trainer, *args, **options)

    def step(module, *args):
        training_step(module, *args)
        raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L.Trainer, "fit", first_step)
        patch.setattr(TrainingModule, "training_step", step)
        patch.chdir(tmp_path_factory.mktemp("commands"))
        yield tmp_path_factory.mktemp("runs")


def leaves(node, key=""):
    """The dotted names of all values."""
    if isinstance(node, DictConfig):
        children = [(name, node._get_node(name)) for name in node]
    elif isinstance(node, ListConfig):
        children = [(str(i), node._get_node(i)) for i in range(len(node))]
    else:
        return [key]
    return [leaf for name, child in children for leaf in leaves(child, f"{key}.{name}".strip("."))] or [key]


@pytest.fixture(scope="module")
def fields():
    """The names of all values of a command line above."""

    @functools.cache
    def found(name):
        command, *overrides = COMMANDS[name]
        return [leaf for leaf in leaves(cli.compose(command, overrides)) if not leaf.endswith(FEW)]

    return found


number = iter(range(10**9))
as_drawn = settings(phases=[Phase.explicit, Phase.generate])
"""A case is a run of a command: one that fails is short enough."""


def run(folder, command, *overrides):
    """What a command line prints on stderr, and its exit code. A traceback is a defect."""
    out, err = io.StringIO(), io.StringIO()
    main = importlib.import_module(f"zoo.commands.{command}").main
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([*overrides, f"output_dir={folder}/{next(number)}"])
        except SystemExit as error:  # of argparse, for options that there are not
            code = error.code
            assert code in (0, 2)
            return code, err.getvalue()
    assert code in (0, 2)
    if code:
        lines = [line for line in err.getvalue().splitlines() if line.startswith(f"zoo {command}: ")]
        assert len(lines) == 1, err.getvalue()
        is_a_sentence(lines[0].partition(": ")[2])
    return code, err.getvalue()


@as_drawn
@fuzz(data=st.data(), name=st.sampled_from(sorted(COMMANDS)))
def test_a_value_of_any_type_is_taken_or_refused(folder, fields, name, data):
    changes = st.tuples(st.sampled_from(fields(name)), st.sampled_from(WRONG))
    chosen = data.draw(st.lists(changes, min_size=1, max_size=2))
    run(folder, *COMMANDS[name], *(f"{field}={value}" for field, value in chosen))


@as_drawn
@fuzz(
    name=st.sampled_from(sorted(COMMANDS)),
    words=st.lists(st.sampled_from(BROKEN) | st.text("ab=.[]{}~+$:,'\"1 ", max_size=6), min_size=1, max_size=2),
)
def test_a_broken_line_is_refused(folder, name, words):
    run(folder, *COMMANDS[name], *(word for word in words if not word.startswith("-")))


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("evaluate", ["metrics.auto.pixels.ssim._target_=-1"], "_target_ must name a class or function"),
        ("evaluate", ["tokenizer.value_range=[{},1]"], "AuroraConfig.value_range holds float alone"),
        ("evaluate", ["encode=-1"], "encode must be fields"),
        ("generate", ["generator.class_names=[{a:1}]"], "XARConfig.class_names holds str alone"),
        ("generate", ["dtype=[]"], "dtype must be"),
        ("aurora", ["experiment=[aurora-tiny,kl-tiny]"], "Could not override"),
        ("aurora", ["module=null"], "module must be fields"),
        ("aurora", ["callbacks=null"], "override must be a string or a list"),
        ("aurora", ["seed=null"], "seed must be"),
        ("aurora", ["hydra.run.dir=/dev/null/x"], "the command line is not possible"),
        ("aurora", ["trainer.limit_train_batches=1", "trainer.val_check_interval=2"], "the training made no step"),
    ],
)
def test_mistakes_that_were_tracebacks_are_sentences(folder, name, words, says):
    code, told = run(folder, *COMMANDS[name], *words)
    assert code == 2
    assert says in told
