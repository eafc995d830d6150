"""Linear operations behind a block, against the modules themselves."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

from cvxdistill.adapters import FollowingMap, find_following, get_block  # noqa: E402

IMAGES = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


def frozen(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_(0, 1)
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def net(**parts: nn.Module) -> nn.Sequential:
    """A block (N, 3, 8, 8) -> (N, 5, 4, 4) and what follows it."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Tanh())
    return nn.Sequential(OrderedDict(block=block, **parts)).eval()


def by_torch(model: nn.Module, block: str, name: str, batch: torch.Tensor):
    """What the block gives and what the named module gives."""
    found = {}
    handles = [
        get_block(model, known).register_forward_hook(
            lambda _, args, output, known=known: found.__setitem__(known, output.clone())
        )
        for known in (block, name)
    ]
    with torch.no_grad():
        model.eval()(batch)
    for handle in handles:
        handle.remove()
    return found[block].numpy(), found[name].numpy()


def rows(outputs: np.ndarray) -> np.ndarray:
    """(N, c, ...) as one row for each position."""
    return np.moveaxis(outputs.reshape(*outputs.shape[:2], -1), 1, 2).reshape(-1, outputs.shape[1])


def check(model: nn.Module, name: str, pooled: bool, batch: torch.Tensor = IMAGES) -> FollowingMap:
    following = find_following(model, "block", f"after:{name}", batch[:2])
    given, wanted = by_torch(model, "block", name, batch)
    assert following.name == name and following.pooled is pooled
    np.testing.assert_allclose(following(given), rows(wanted), atol=1e-5)
    return following


def test_pooling_and_flattening():
    for pool in (nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((1, 1)), nn.AvgPool2d(4)):
        model = net(pool=pool, flatten=nn.Flatten(), fc=nn.Linear(5, 7))
        for name in ("pool", "flatten"):
            following = check(model, name, pooled=True)
            np.testing.assert_array_equal(following.matrix, np.eye(5))
            np.testing.assert_array_equal(following.offset, np.zeros(5))
        check(model, "fc", pooled=True)


def test_frozen_batch_norms_and_pointwise_convolutions_before_and_after_pooling():
    torch.manual_seed(1)
    model = net(
        norm=frozen(nn.BatchNorm2d(5)),
        conv=nn.Conv2d(5, 6, 1),
        drop=nn.Dropout(0.5),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(6, 4),
        last=frozen(nn.BatchNorm1d(4)),
        out=nn.Linear(4, 3, bias=False),
    )
    for name, pooled in (
        ("norm", False), ("conv", False), ("drop", False), ("pool", True), ("fc", True),
        ("last", True), ("out", True),
    ):  # fmt: skip
        check(model, name, pooled)
    # In training mode it is the frozen one that counts.
    model.train()
    find_following(model, "block", "after:last", IMAGES[:2])
    assert model.norm.training and model.drop.training
    check(model, "last", True)


def test_linear_layers_behind_a_block_of_vectors():
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            block=nn.Sequential(nn.Linear(6, 8), nn.ReLU()),
            norm=frozen(nn.BatchNorm1d(8)),
            fc=nn.Linear(8, 4),
            out=nn.Linear(4, 9),
        )
    )
    for name in ("norm", "fc", "out"):
        check(model, name, pooled=False, batch=VECTORS)


def test_a_flattening_and_names_of_the_models_own(resnet):
    resnet.eval()
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    for block, name in (("layer4", "avgpool"), ("layer4", "fc"), ("layer3:layer4", "fc")):
        following = find_following(resnet, block, f"after:{name}", images[:2])
        given, wanted = by_torch(resnet, "layer4", name, images)
        assert following.pooled and given.shape[2:] == (2, 2)
        np.testing.assert_allclose(following(given), rows(wanted), atol=1e-4)


def test_before_and_offset_before_invert_where_they_can():
    torch.manual_seed(1)
    rng = np.random.default_rng(0)
    # To fewer numbers: everything can be reached.
    model = net(norm=frozen(nn.BatchNorm2d(5)), conv=nn.Conv2d(5, 3, 1))
    following = check(model, "conv", pooled=False)
    W2, b = rng.standard_normal((4, 3)), rng.standard_normal(3)
    W2_before, b_before = following.before(W2), following.offset_before(b)
    assert W2_before.shape == (4, 5) and b_before.shape == (5,)
    np.testing.assert_allclose(W2_before @ following.matrix, W2, atol=1e-10)
    np.testing.assert_allclose(b_before @ following.matrix + following.offset, b, atol=1e-10)
    # Of all that do, the shortest.
    other = np.linalg.lstsq(following.matrix.T, W2.T, rcond=None)[0].T
    np.testing.assert_allclose(W2_before, other, atol=1e-10)
    # To more numbers: what the map makes of something comes back.
    model = net(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(5, 8))
    following = check(model, "fc", pooled=True)
    W2 = rng.standard_normal((4, 5))
    np.testing.assert_allclose(following.before(W2 @ following.matrix), W2, atol=1e-8)
    b = rng.standard_normal(5)
    made = b @ following.matrix + following.offset
    np.testing.assert_allclose(following.offset_before(made), b, atol=1e-8)


class OwnReLU(nn.Module):
    """The model itself computes between the block and what follows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Conv2d(3, 5, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.side = nn.Linear(5, 2)

    def forward(self, x):
        return self.pool(F.relu(self.block(x)))


class Before(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Conv2d(5, 5, 3)
        self.stem = nn.Conv2d(3, 5, 1)
        self.unused = nn.Linear(5, 5)

    def forward(self, x):
        return self.block(self.stem(x))


@pytest.mark.parametrize(
    ("model", "match", "message"),
    [
        (lambda: net(act=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1)), "after:pool", "'act' is a ReLU"),
        (lambda: net(pool=nn.MaxPool2d(4)), "after:pool", "is a MaxPool2d"),
        (lambda: net(pool=nn.AvgPool2d(2)), "after:pool", "only parts of the image"),
        (lambda: net(pool=nn.AdaptiveAvgPool2d((1, 2))), "after:pool", "only parts of the image"),
        (lambda: net(flatten=nn.Flatten()), "after:flatten", "not linear, or pools only parts"),
        (
            lambda: net(flatten=nn.Flatten(), fc=nn.Linear(80, 3)),
            "after:fc",
            "mixes positions",
        ),
        (lambda: net(conv=nn.Conv2d(5, 5, 3)), "after:conv", "is a Conv2d"),
        (lambda: net(conv=nn.Conv2d(5, 5, 1, padding=1)), "after:conv", "is a Conv2d"),
        (lambda: net(norm=nn.GroupNorm(1, 5)), "after:norm", "is a GroupNorm"),
        (
            lambda: net(norm=nn.BatchNorm2d(5, track_running_stats=False)),
            "after:norm",
            "running statistics",
        ),
        (OwnReLU, "after:pool", "no block of consecutive modules"),
        (OwnReLU, "after:side", "called not at all"),
        (Before, "after:stem", "runs before"),
        (Before, "after:unused", "called not at all"),
        (Before, "after:block", "names the block itself"),
        (Before, "after:nothing", "names no module"),
        (Before, "after:", "must be .*'after:NAME'"),
        (Before, "stem", "must be .*'after:NAME'"),
        (Before, "After:stem", "must be .*'after:NAME'"),
    ],
)  # fmt: skip
def test_what_is_not_linear_or_does_not_follow_is_refused(model, match, message):
    with pytest.raises(ValueError, match=message):
        find_following(model(), "block", match, IMAGES[:2])
