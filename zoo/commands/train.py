"""`zoo train`: compose conf/train.yaml, build the parts, fit, save the tokenizer."""

from __future__ import annotations

import pickle
import signal
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

import zoo
from zoo.commands import cli
from zoo.errors import ZooError
from zoo.files import discard_parts, writing
from zoo.hub import HubModel
from zoo.registry import resource
from zoo.training.callbacks import ResumingCSVLogger

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
    step, row = progress(resume_from) if resume_from else (0, {})

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
    data = instantiate(cfg.data)
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values() if callback]
    loggers = [instantiate(logger) for logger in cfg.logger.values() if logger]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)

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
        print(f"ended by SIGTERM after {trainer.global_step} steps; resume=true goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    if resume_from and trainer.global_step == step:  # killed behind its last step: Lightning then ends nothing
        for callback in callbacks:
            if isinstance(callback, WeightAveraging):
                callback.on_train_end(trainer, module)
    if trainer.is_global_zero:
        for part in module.optimized().values():
            if isinstance(part, HubModel):
                part.about = about_run(cfg, trainer.global_step)
        path = module.save(output)
        print(f"trained {trainer.global_step} steps; {path.stem}, metrics and pictures are in {output}")
    return trainer


def about_run(cfg: DictConfig, steps: int) -> dict[str, str]:
    """What the weights of a run say of themselves: no paths and no times, so that a resumed run says the same."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    recipe = choices.get("experiment") or cfg.module._target_
    return {"recipe": f"zoo train, {recipe}, {steps} steps", "data": choices.get("data") or cfg.data._target_}


def resume_point(output: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from. Raises ZooError when an earlier run would be overwritten, or has no checkpoint."""
    last = output / "checkpoints" / "last.ckpt"
    if resume:
        if not last.is_file():
            raise ZooError(f"resume=true needs {last}, which does not exist; check output_dir or leave resume out.")
        return last
    if last.is_file():
        raise ZooError(f"{output} holds an earlier run; add resume=true to go on, or choose another output_dir.")
    return None


def progress(checkpoint: Path) -> tuple[int, dict[str, float]]:
    """The step of a checkpoint, and what was logged at it. Raises ZooError when the file is not whole."""
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return content["global_step"], content["train_row"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise ZooError(
            f"{checkpoint} is not a whole checkpoint of zoo train ({reason}), and a training leaves no other; copy it "
            "again, or put best.ckpt of the same folder in its place."
        ) from error


def main(argv: list[str] | None = None) -> int:
    return cli.run("train", train, argv)
