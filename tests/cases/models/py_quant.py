import torch
from torch import nn


def build():
    return nn.Linear(8, 8), (torch.quantize_per_tensor(torch.zeros(4, 8), 1.0, 0, torch.quint8),)
