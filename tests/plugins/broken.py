"""Rows that each break one law: what `spiralformer verify` must find, and say why."""

import random

import torch
from torch import nn

from builder import FeedForwardRow, NormRow, feed_forward, operation, pool, topology
from builder.graph.ops import BOX
from builder.graph.row import Kind, part
from searchspace import Plugin
from searchspace.tables import options
from spiralformer.feedforward import GeluFeedForward
from spiralformer.pooling import Pool, PoolMemory, assign, mean_of_members
from studies import AddedMetric, Format, Sampler


class AheadPool(Pool):
    """A chunk's mean, and the next one's."""

    def reduce(self, *chunks, missing):
        z_BMD = mean_of_members(chunks[0], missing)
        return z_BMD + torch.cat((z_BMD[:, 1:], z_BMD[:, -1:]), dim=1)


class PricedPool(Pool):
    """A linear map of the mean, said to have no work."""

    def __init__(self, chunk, offset, d_model):
        super().__init__(chunk, offset)
        self.mix = nn.Linear(d_model, d_model, bias=False)

    def reduce(self, *chunks, missing):
        return self.mix(mean_of_members(chunks[0], missing))


class FromTheEndPool(Pool):
    """Chunks counted from the last token, so that their borders move with the length."""

    def forward(self, x_BLD):
        latents = (x_BLD.shape[1] + self.offset) // self.chunk
        first = x_BLD.shape[1] - latents * self.chunk
        padded_BLD = nn.functional.pad(x_BLD, (0, 0, max(0, -first), 0))[:, max(0, first) :]
        return padded_BLD.unflatten(1, (latents, self.chunk)).mean(2)


class MixingPool(Pool):
    """A chunk's mean, less the mean over the batch."""

    def reduce(self, *chunks, missing):
        z_BMD = mean_of_members(chunks[0], missing)
        return z_BMD - 0.5 * z_BMD.mean(0, keepdim=True)


class ForgetfulMemory(PoolMemory):
    def give(self, rows):
        return 0.9 * super().give(rows)


class ForgetfulPool(Pool):
    """A mean, but not token by token."""

    def reduce(self, *chunks, missing):
        return mean_of_members(chunks[0], missing)

    def open(self, opening):
        return ForgetfulMemory(self, opening)


class HomeboundPool(Pool):
    """Needs a package that no export has."""

    def reduce(self, *chunks, missing):
        assert options is not None
        return mean_of_members(chunks[0], missing)


class NeverPool(Pool):
    """Gives what is no number."""

    def reduce(self, *chunks, missing):
        return chunks[0].mean(2) / 0.0


class SummingFeedForward(GeluFeedForward):
    """Sees all positions so far, of which decoding shows it one."""

    def forward(self, x_BLD):
        return super().forward(x_BLD.cumsum(1))


class OversizedFeedForward(GeluFeedForward):
    def __init__(self, d_model, hidden, bias):
        super().__init__(d_model, hidden, bias)
        self.idle = nn.Parameter(torch.zeros(3))


class PositionNorm(nn.Module):
    """Normalises over positions: the future, and another row's length, reach it."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x_BLD):
        return x_BLD / (x_BLD.square().mean((1, 2), keepdim=True) + self.eps).sqrt() * self.weight


def last_two(loop):
    """Swaps iterations' names, so that two are called the same."""
    state = loop.start
    for _ in loop.iterations:
        state = loop.iterate(0, state)
    return state


def wrong_way(logits, targets):
    asked = targets != -100
    return ((logits.argmax(-1) != targets) & asked).sum() / asked.sum()


def not_a_mean(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).exp()


class Dice:
    def __init__(self):
        import optuna

        self._own = optuna.samplers.RandomSampler(seed=random.SystemRandom().randrange(2**31))

    def __getattr__(self, name):
        return getattr(self._own, name)


def elsewhere(bundle, out):
    place = out.with_name("elsewhere")
    place.write_text("written")
    return place


def square(chunk, d):
    return d * d


class TrainingLeak(Pool):
    """Looks at the whole batch, in training alone."""

    def reduce(self, *chunks, missing):
        z_BMD = mean_of_members(chunks[0], missing)
        return z_BMD + 0.1 * z_BMD.mean((0, 1), keepdim=True) if self.training else z_BMD


class RunningPool(Pool):
    """Keeps what it has seen where no state dict finds it."""

    def __init__(self, chunk, offset):
        super().__init__(chunk, offset)
        self.seen = 0.0

    def reduce(self, *chunks, missing):
        z_BMD = mean_of_members(chunks[0], missing)
        if self.training:
            self.seen += 1.0
        return z_BMD * (1 + self.seen)


class BufferedPool(Pool):
    """Has a buffer that nothing fills."""

    def __init__(self, chunk, offset):
        super().__init__(chunk, offset)
        self.register_buffer("gain", torch.tensor(1.5))

    def reduce(self, *chunks, missing):
        return mean_of_members(chunks[0], missing) * self.gain


class LeavingPool(Pool):
    def reduce(self, *chunks, missing):
        raise SystemExit(0)


class NoLoss(nn.Module):
    def forward(self, logits):
        raise RuntimeError("never works")


def counts_all(logits, targets):
    return ((logits.argmax(-1) == targets) & (targets != -100)).float().mean()


def changes(logits, targets):
    logits.mul_(0)
    return torch.tensor(0.5)


def of_one_width(chunk, d):
    return 16 * d


def same_seed(asked):
    import optuna

    return optuna.samplers.RandomSampler(seed=7)


def writes_nothing(bundle, out):
    return out


PLUGIN = Plugin(
    name="broken",
    version="0",
    api=1,
    rows=(
        pool("ahead", AheadPool),
        pool("priced", PricedPool, width=True, params=square, init="small"),
        pool("from_the_end", FromTheEndPool),
        pool("mixing", MixingPool),
        pool("forgetful", ForgetfulPool),
        pool("homebound", HomeboundPool),
        pool("never", NeverPool),
        pool("empty", PricedPool, width=True, params=square, at_latent=square, init="nothing"),
        pool("training_leak", TrainingLeak),
        pool("running", RunningPool),
        pool("buffered", BufferedPool),
        pool("leaving", LeavingPool),
        pool("one_width", PricedPool, width=True, params=of_one_width, at_latent=of_one_width, init="small"),
        pool("unsaid", PricedPool, width=True, params=square, at_latent=square, init="own"),
        operation(
            "loss.never",
            {"logits": Kind.LOGITS},
            lambda graph, node, levels: part(NoLoss),
            BOX,
            gives=Kind.LOSS,
            attrs={"weight": float},
        ),
        feed_forward("summing", SummingFeedForward),
        FeedForwardRow("oversized", OversizedFeedForward, lambda d: 4 * d, lambda d, f, b: 0, lambda d, f: 0),
        NormRow("position", PositionNorm, lambda d: d),
        topology("same_name", last_two),
        AddedMetric("wrong_way", "wrong", "share that is wrong", "higher", "text_lm", wrong_way),
        AddedMetric("not_a_mean", "ppl", "perplexity", "lower", "text_lm", not_a_mean),
        AddedMetric("counts_all", "all", "share right", "higher", "text_lm", counts_all),
        AddedMetric("changes", "half", "a half", "higher", "text_lm", changes),
        Sampler("same_seed", "draws with one seed", same_seed),
        Format("nothing", "nothing", ".txt", writes_nothing),
        Sampler("dice", "draws from the system's entropy", lambda asked: Dice()),
        Format("elsewhere", "a text in another place", ".txt", elsewhere),
    ),
)
assert assign  # what it imports and does not use
