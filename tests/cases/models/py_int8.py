import torch
from torch import nn


class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ self.w


def build():
    return M(), (torch.zeros(4, 8, dtype=torch.int8),)
