"""Train a tokenizer from Python, with Lightning and without a configuration file.

python examples/train_from_python.py --steps 200
"""

import argparse
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torchvision.utils import save_image

import zoo
from zoo.data import ZooDataModule, scenes
from zoo.tokenizers.vqgan.training import VQGANTraining
from zoo.training.schedules import cosine

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--output", type=Path, default=Path("outputs/examples"))
args = parser.parse_args()

L.seed_everything(0, verbose=False)
tokenizer = zoo.create_tokenizer("vqgan-tiny", codebook_size=256)  # untrained, any field of the preset overridden
module = VQGANTraining(
    tokenizer,
    optimizers={"tokenizer": partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.99))},
    schedules={"tokenizer": partial(cosine, warmup_steps=20)},
    loss="mse",
    gradient_clip=1.0,
)
data = ZooDataModule(scenes("train"), scenes("val"), batch_size=args.batch_size, image_size=tokenizer.config.image_size)
trainer = L.Trainer(
    max_steps=args.steps,
    accelerator="auto",
    devices=1,
    use_distributed_sampler=False,  # the data divides itself among ranks
    limit_val_batches=1,
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
    default_root_dir=args.output,
)
trainer.fit(module, data)
(scores,) = trainer.validate(module, data, verbose=False)

args.output.mkdir(parents=True, exist_ok=True)
zoo.save_tokenizer(tokenizer, args.output / "trained.safetensors")
loaded = zoo.load_tokenizer("vqgan-tiny", weights=args.output / "trained.safetensors")  # its sizes are in the file
images = next(iter(data.val_dataloader()))["image"][:8]
save_image(torch.cat([images, loaded.reconstruct(images)]), args.output / "trained.png", nrow=len(images))
print(f"{scores['val/psnr']:.1f} dB after {args.steps} steps; trained.safetensors and trained.png are in {args.output}")
