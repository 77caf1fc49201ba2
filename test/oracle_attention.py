"""Every attention once more, dense and one token at a time where that is clearest.

Written from the papers for one scene and one head at a time, in float64; nothing here shares
code with feedforward_recon.model.attention.
"""

import numpy as np
import torch


def softmax_rows(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def softmax(q, k, v):
    """[T, d] each."""
    return softmax_rows(q @ k.T / np.sqrt(q.shape[-1])) @ v


def objective(weights, k, v, rate):
    """Sum over tokens of rate * <f_W(k), v>: what a fast weight climbs, [T, d] torch tensors."""
    w0, w1, w2 = weights
    gate = k @ w0
    return (rate * ((gate * torch.sigmoid(gate) * (k @ w2)) @ w1 * v)).sum()


def fast_step(weights, initial, k, v, rates, iterations=5):
    """One update by automatic differentiation and a singular value decomposition."""
    updated = []
    for index, (weight, first) in enumerate(zip(weights, initial, strict=True)):
        leaf = weight.clone().requires_grad_()
        others = [leaf if i == index else w for i, w in enumerate(weights)]
        (gradient,) = torch.autograd.grad(objective(others, k, v, rates[index]), leaf)
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        values = values / (gradient.norm() + 1e-7)
        for _ in range(iterations):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        moved = weight + left @ torch.diag(values) @ right
        updated.append(moved / (moved.norm(dim=0) + 1e-5) * first.norm(dim=0))
    return updated


def anchored(q, k, v, scores, count, tau):
    """Softmax over the ``count`` tokens of the highest scores and an empty answer; scores [T]."""
    best = np.argsort(-scores)[:count]
    logits = tau * q @ k[best].T
    return softmax_rows(np.concatenate((np.zeros((len(q), 1)), logits), 1))[:, 1:] @ v[best]


def linear(q, k, v):
    """Kernel attention with phi = ELU + 1, by its normalised sum."""
    def phi(x):
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    weights = phi(q) @ phi(k).T
    return weights @ v / (weights.sum(-1, keepdims=True) + 1e-6)


def blockwise(q, k, v, scores, blocks, kept):
    """Each block of queries reads the tokens of its ``kept`` best blocks of keys.

    scores: [query blocks, key blocks]; blocks: the block of each token, [T].
    """
    out = np.zeros_like(q)
    for block in np.unique(blocks):
        best = np.argsort(-scores[block], kind='stable')[:kept]
        chosen = np.isin(blocks, best)
        out[blocks == block] = softmax(q[blocks == block], k[chosen], v[chosen])
    return out


def block_means(x, blocks):
    """[blocks, d] of tokens [T, d]."""
    return np.stack([x[blocks == block].mean(0) for block in np.unique(blocks)])
