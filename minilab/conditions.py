"""What a generator is asked for: a scene's facts as a small set of embedded tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from minilab.grammar import COLOURS, KINDS, MAX_OBJECTS, SETTINGS, Facts

N_FIELDS = 2 * MAX_OBJECTS + 1


def encode_facts(facts: list[Facts]) -> Tensor:
    """Turn facts into integers.

    Parameters
    ----------
    facts : list of Facts, length n

    Returns
    -------
    int64 tensor, shape (n, 7)
        Colour and kind of the things from left to right, then the setting; 0 means nothing there.
    """
    rows = np.zeros((len(facts), N_FIELDS), dtype=np.int64)
    for i, f in enumerate(facts):
        for j, (colour, kind) in enumerate(f.things[:MAX_OBJECTS]):
            rows[i, 2 * j] = 1 + COLOURS.index(colour)
            rows[i, 2 * j + 1] = 1 + KINDS.index(kind)
        if f.setting is not None:
            rows[i, -1] = 1 + SETTINGS.index(f.setting)
    return torch.from_numpy(rows)


class Condition(nn.Module):
    """Embed facts: one token for each thing and one for the setting, and one vector for all of them."""

    def __init__(self, width: int):
        super().__init__()
        self.colour = nn.Embedding(len(COLOURS) + 1, width)
        self.kind = nn.Embedding(len(KINDS) + 1, width)
        self.setting = nn.Embedding(len(SETTINGS) + 1, width)
        self.place = nn.Parameter(0.5 * torch.randn(MAX_OBJECTS * 4, width))
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.pool = nn.Linear((MAX_OBJECTS + 1) * width, width)

    def forward(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """Embed encoded facts.

        Parameters
        ----------
        fields : int64 tensor, shape (n, 7)

        Returns
        -------
        tokens : float tensor, shape (n, 4, width)
        vector : float tensor, shape (n, width)
        """
        things = self.colour(fields[:, 0:-1:2]) + self.kind(fields[:, 1:-1:2])
        count = (fields[:, 0:-1:2] > 0).sum(1)  # the middle of three stands elsewhere than the last of two
        place = self.place.view(4, MAX_OBJECTS, -1)[count]
        tokens = torch.cat([things + place, self.setting(fields[:, -1:])], dim=1)
        tokens = tokens + self.mix(tokens)
        return tokens, self.pool(tokens.flatten(1))
