"""`zoo train`: compose conf/train.yaml, build the parts, fit, save the tokenizer."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

import zoo
from zoo.commands import cli
from zoo.commands.common import expect_started
from zoo.errors import ZooError, one_line
from zoo.files import discard_parts, writing
from zoo.registry import resource
from zoo.training.callbacks import ResumingCSVLogger
from zoo.training.precision import CPUPrecision
from zoo.weights import expect_fit, read_torch

HARMLESS = (
    "Detected call of `lr_scheduler.step\\(\\)` before",  # of an optimizer that has no step on every batch
    "Using ModelCheckpoint with manual optimization",  # the state after the step is the one to go on from
    "`isinstance\\(treespec, LeafSpec\\)`",  # Lightning's own
)


def train(cfg: DictConfig) -> L.Trainer:
    """Run an experiment. output_dir receives config.yaml, metrics, checkpoints, pictures and tokenizer.safetensors."""
    if OmegaConf.is_missing(cfg.module, "_target_"):
        names = sorted(path.stem for path in (resource("conf") / "experiment").glob("*.yaml"))
        raise ZooError(f"say what to train with experiment=NAME; there are: {', '.join(names)}.")
    output = Path(cfg.output_dir)
    resume_from = resume_point(output, cfg.resume)
    saved = progress(resume_from) if resume_from else {"global_step": 0, "train_row": {}}
    step, row = saved["global_step"], saved["train_row"]

    for message in HARMLESS:
        warnings.filterwarnings("ignore", f".*{message}")
    L.seed_everything(cfg.seed, verbose=False)
    tokenizer = instantiate(cfg.get("tokenizer"))  # an encoder needs none
    if cfg.needs_weights and cfg.weights is None and not resume_from:
        raise ZooError(
            "this experiment goes on from an earlier one; add weights=path/to/its/tokenizer.safetensors, or "
            "needs_weights=false to start from nothing."
        )
    if cfg.weights is not None:
        if tokenizer is None:
            raise ZooError(
                "weights is a file of a tokenizer, and this experiment has none; use module.encoder_weights."
            )
        changed = cli.changed_fields(cfg.tokenizer)
        tokenizer = zoo.load_tokenizer(tokenizer.info.name, cfg.weights, fresh=cfg.fresh, **changed).train()
    module = instantiate(cfg.module, tokenizer=tokenizer)
    if resume_from:
        expect_fit(module, saved["state_dict"], resume_from)
    data = instantiate(cfg.data)
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values() if callback]
    loggers = [instantiate(logger) for logger in cfg.logger.values() if logger]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, **precision(cfg.trainer))
    expect_started(trainer.num_devices, trainer.num_nodes)

    if trainer.is_global_zero:
        discard_parts(output)
        with writing(output / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(cfg, resolve=True).encode())
        last = row if step % trainer.log_every_n_steps == 0 else None
        for logger in loggers:
            if isinstance(logger, ResumingCSVLogger):
                logger.continue_from(step, last)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    except SIGTERMException:  # whose exit code would say that all went well
        if trainer.is_global_zero:
            print(f"ended by a signal after {trainer.global_step} steps; resume=true goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except ZooError:
        raise
    except Exception as error:
        if trainer.global_step > step:
            raise
        # what libraries find wrong in a configuration when they use it
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ZooError(f"the training made no step ({reason}); HYDRA_FULL_ERROR=1 shows where it stopped.") from error
    if resume_from and trainer.global_step == step:  # killed behind its last step: Lightning then ends nothing
        for callback in callbacks:
            if isinstance(callback, WeightAveraging):
                callback.on_train_end(trainer, module)
    if trainer.is_global_zero:
        path = module.save(output)
        print(f"trained {trainer.global_step} steps; {path.stem}, metrics and pictures are in {output}")
    return trainer


def precision(cfg: DictConfig) -> dict:
    """Settings of the trainer for half precision on the CPU, see CPUPrecision."""
    name = {"16": "16-mixed", "bf16": "bf16-mixed"}.get(str(cfg.precision), cfg.precision)
    if cfg.accelerator != "cpu" or name not in ("16-mixed", "bf16-mixed"):
        return {}
    return {"precision": None, "plugins": [*(instantiate(plugin) for plugin in cfg.plugins), CPUPrecision(name)]}


def resume_point(output: Path, resume: bool | str) -> Path | None:
    """The checkpoint to go on from; None: begin. resume: True, False, or "auto", which goes on if there is one.

    Raises ZooError when an earlier run would be overwritten, or has no checkpoint.
    """
    if resume not in (True, False, "auto"):
        raise ZooError(f"resume must be true, false or auto, got {resume!r}.")
    last = output / "checkpoints" / "last.ckpt"
    if resume == "auto":
        return last if last.is_file() else None
    if resume:
        if not last.is_file():
            raise ZooError(f"resume=true needs {last}, which does not exist; check output_dir or leave resume out.")
        return last
    if last.is_file():
        raise ZooError(f"{output} holds an earlier run; add resume=true to go on, or choose another output_dir.")
    return None


SAVED = {"global_step": int, "train_row": dict, "state_dict": dict}
"""What is read of a checkpoint before Lightning goes on from it."""


def progress(checkpoint: Path) -> dict:
    """Of a checkpoint its step, what was logged at it, and its weights. Raises ZooError when the file is not whole."""
    try:
        content = read_torch(checkpoint, mmap=True)
        wrong = [name for name, kind in SAVED.items() if not isinstance(content[name], kind)]
        if wrong:
            raise ZooError(f"wrong {' and '.join(wrong)}")
        return {name: content[name] for name in SAVED}
    except (ZooError, KeyError, TypeError) as error:
        raise ZooError(
            f"{checkpoint} is not a whole checkpoint of zoo train ({one_line(error)}), and a training leaves no other; "
            "copy it again, or put best.ckpt of the same folder in its place."
        ) from error


def main(argv: list[str] | None = None) -> int:
    return cli.run("train", train, argv)
