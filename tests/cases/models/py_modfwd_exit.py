import sys

import torch
from torch import nn


class M(nn.Linear):
    def forward(self, x):
        sys.exit(0)


def build():
    return M(8, 8), (torch.zeros(4, 8),)
