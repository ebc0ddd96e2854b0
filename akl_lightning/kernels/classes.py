"""Stub."""
from typing import NamedTuple
import torch
from torch import Tensor
class Classes(NamedTuple):
    student: Tensor
    teacher: Tensor
    count: int
    def to(self, device):
        return Classes(self.student.to(device), self.teacher.to(device), self.count)
def merge(logits, classes, count):
    m = logits.max(-1, keepdim=True).values.detach()
    e = torch.full((len(logits), count), 1e-30, dtype=logits.dtype).index_add(1, classes, (logits - m).exp())
    return e.log() + m
