"""The chunked criterion inside DDP and FSDP2: two real processes on gloo against one that sees the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from akl_lightning.batch import Batch
from akl_lightning.criterion import DistillationCriterion
from akl_lightning.errors import UsageError
from akl_lightning.models.split import SplitModel
from akl_lightning.teachers.live import LiveTeacher
from tests.conftest import gpt2
from tests.distributed.training import launch

CRITERION = DistillationCriterion(chunk_size=5)


class Step(nn.Module):
    """A distillation step whose forward is the one that the hooks see, as a LightningModule's training step is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.student, self.teacher = SplitModel(gpt2(16)), LiveTeacher(gpt2(24))

    def forward(self, batch: Batch) -> Tensor:
        positions, labels = CRITERION.response_positions(batch["labels"])
        try:
            teacher = self.teacher(batch, positions)
            return CRITERION(self.student(batch, positions), teacher, labels).loss
        finally:
            self.teacher.release()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 300, (4, 20), generator=torch.Generator().manual_seed(8))
    labels = ids.clone()
    labels[0, 4:] = labels[1] = -100  # unequal, and a row without any response token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(step: Step) -> dict[str, Tensor]:
    grads = {name: parameter.grad for name, parameter in step.student.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def refuse() -> None:
    step = Step()
    step.student.model.lm_head = nn.Linear(16, 300, bias=False)  # not tied
    fully_shard(step.student.model.lm_head)
    with pytest.raises(UsageError, match="shard it together with the root module instead"):
        fully_shard(step)(batch())


def compare(rank: int, kind: str) -> None:
    whole = Step()
    whole(batch()).backward()
    step = Step()
    if kind == "ddp":
        run: nn.Module = DistributedDataParallel(step)
    else:
        for block in step.student.model.transformer.h:
            fully_shard(block)
        run = fully_shard(step)
        shards = [parameter.to_local().numel() for parameter in step.student.parameters()]
        assert 2 * sum(shards) <= 1.1 * sum(parameter.numel() for parameter in step.student.parameters())
    # Micro-batches of two rows: rank 0 has one of them without a response token.
    loss = run({key: value[2 * rank : 2 * rank + 2] for key, value in batch().items()})
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert torch.allclose(total, whole(batch()), rtol=1e-5)
    for name, expected in gradients(whole).items():
        ours = 2 * gradients(step)[name]  # both average over ranks
        assert (ours - expected).norm() <= 1e-5 * expected.norm(), name


def work(rank: int) -> None:
    dist.init_process_group("gloo")
    try:
        compare(rank, "ddp")
        compare(rank, "fsdp2")
        refuse()
    finally:
        dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one_and_a_head_sharded_on_its_own_is_refused() -> None:
    launch(work)
