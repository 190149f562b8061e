import torch
from torch import nn


class MLP(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.up_proj = nn.Linear(d, 2 * d, bias=False)
        self.down_proj = nn.Linear(2 * d, d, bias=False)

    def forward(self, x):
        return self.down_proj(torch.relu(self.up_proj(x)))


class L(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.mlp = MLP(d)

    def forward(self, x):
        return x + self.mlp(x)


class Inner(nn.Module):
    def __init__(self, d, n):
        super().__init__()
        self.layers = nn.ModuleList([L(d) for _ in range(n)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class M(nn.Module):
    def __init__(self, d, n):
        super().__init__()
        self.model = Inner(d, n)

    def forward(self, x):
        return self.model(x).square().mean()


def build(batch=8, seq=64, dtype="float32"):
    with torch.device("meta"):
        return M(32, 2).to(getattr(torch, dtype)), (torch.zeros(batch, seq, 32, dtype=getattr(torch, dtype)),)
