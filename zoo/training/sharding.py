"""Training of models that are too large to be copied to each device: FSDP for modules that are no one function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from zoo.errors import ZooError


class ShardedStrategy(DDPStrategy):
    """Weights, gradients and optimizer states of all repeated blocks are divided among the ranks (FSDP2).

    A block is what stands in a ModuleList or Sequential, has a forward of its own and no such list within: a layer of a
    transformer, a residual block. Its weights are whole only while it runs. What lies outside of blocks, embeddings and
    codebooks that code reaches by name, is copied to each rank, and its gradients are averaged by DDP. Lightning's
    FSDPStrategy wraps the whole module instead, whose optimizers, called within its training_step, would move weights
    that are dropped afterwards.

    Checkpoints are whole files in the layout of one device: a run goes on from one under any strategy and number of
    ranks, and what a training saves is whole. Precisions: 32-true, bf16-mixed, bf16-true, 64-true.

    Args:
        options: of Lightning's DDPStrategy.
    """

    def setup(self, trainer) -> None:
        """Raises ZooError for a precision that scales losses, since a scaler cannot read divided gradients."""
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ZooError(
                "sharded training needs no scaled losses, got precision 16-mixed; use trainer.precision=bf16-mixed."
            )
        super().setup(trainer)

    def configure_ddp(self) -> None:
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for module in self._divided():
            shard(module, mesh)
        sharded = {name for name, p in self.model.named_parameters() if isinstance(p, DTensor)}
        if any(p.requires_grad and name not in sharded for name, p in self.model.named_parameters()):
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, sharded)
            super().configure_ddp()

    def save_checkpoint(self, checkpoint: dict, filepath, storage_options=None) -> None:
        super().save_checkpoint(whole(checkpoint), filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: dict) -> None:
        super().load_optimizer_state_dict(checkpoint)
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                if isinstance(parameter, DTensor):
                    for name, value in state.items():
                        if value.shape == parameter.shape:
                            state[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)

    def teardown(self) -> None:
        if self.lightning_module.trainer.state.status != TrainerStatus.INTERRUPTED:  # then others may be gone
            for module in self._divided():
                gather(module)
        super().teardown()

    def _divided(self) -> list[nn.Module]:
        """What is trained, and averages of it."""
        trainer = self.lightning_module.trainer
        averages = [c._average_model.module for c in trainer.callbacks if isinstance(c, WeightAveraging)]
        return [self.lightning_module, *averages]


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks whose weights can be divided: those with weights that nothing outside of them shares."""
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    yield from _blocks(module, uses)


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the blocks of a module among the ranks, in place, all with the weights of the first one.

    Methods beside forward that use a block's weights have to be named in its RUNS.
    """
    for block in list(blocks(module)):
        for parameter in block.parameters():
            dist.broadcast(parameter.detach(), src=0)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        for method in getattr(block, "RUNS", ()):
            register_fsdp_forward_method(block, method)


def gather(module: nn.Module) -> None:
    """Whole weights in the place of divided ones, in place, on the first rank's CPU; the others are left empty."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.__class__ = type(part).__mro__[2]  # of the block itself, behind FSDP's two
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                part._parameters[name] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)


def whole(state):
    """A nested state with whole tensors in the place of divided ones: on the first rank's CPU, elsewhere empty."""

    def gathered(value: DTensor) -> Tensor:
        full = value.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else full.new_empty(0, device="cpu")

    return tree_map_only(DTensor, gathered, state)


def split(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Those that are whole, and those that are divided, which no operation takes together; no empty list."""
    lists = [[t for t in tensors if isinstance(t, DTensor) == divided] for divided in (False, True)]
    return [one for one in lists if one]


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all elements of whole and divided tensors, the same on every rank."""
    norms = [torch.nn.utils.get_total_norm(part) for part in split(tensors) or [[]]]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _blocks(module: nn.Module, uses: Counter) -> Iterator[nn.Module]:
    for child in module.children():
        runs = type(child).forward is not nn.Module.forward and not isinstance(child, nn.Embedding)
        runs = runs and not any(isinstance(part, nn.ModuleList) for part in child.modules())
        inside = Counter(id(p) for _, p in child.named_parameters(remove_duplicate=False))
        alone = inside and all(uses[key] == count for key, count in inside.items())
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and runs and alone:
            yield child
        else:
            yield from _blocks(child, uses)
