"""What does a loss mean? The units that people quote it in."""

from __future__ import annotations

import math


def perplexity(loss_nats: float) -> float:
    """exp(L), L the mean of -ln p over tokens: as many equally likely tokens would be as hard to guess."""
    return math.exp(loss_nats)


def bits_per_token(loss_nats: float) -> float:
    """L / ln 2."""
    return loss_nats / math.log(2)


def bits_per_byte(loss_nats: float, bytes_per_token: float) -> float:
    """L / (b ln 2), which compares tokenizers; b bytes of text per token."""
    return bits_per_token(loss_nats) / bytes_per_token
