import torch
from torch import nn


class M(nn.Linear):
    def forward(self, x):
        return super().forward(x) * x.sum().item()


def build():
    return M(8, 8), (torch.zeros(4, 8),)
