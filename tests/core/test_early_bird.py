"""Early-bird tickets: when a mask has settled, and that the cut comes then."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.early_bird import EarlyBird, distance
from secateur.core.recipe import Recipe
from secateur.core.select import top_k
from secateur.errors import InvalidRecipe

SIZE, STEPS, LR = 12, 40, 0.05
CUT = {"name": "one-shot", "at": 0.5}
RECOVERY = {"name": "fine-tune", "epochs": STEPS, "lr": LR, "lr_schedule": "constant", "weight_decay": 0}
BIRD = {"name": "early-bird", "distance": 0.04, "window": 3, "looks": STEPS // 2}


def mask(*kept):
    return torch.tensor(kept, dtype=torch.bool)


def test_the_distance_by_hand():
    first = {"a": mask(1, 1, 0, 0), "b": mask([1, 0])}
    second = {"a": mask(1, 0, 1, 0), "b": mask([1, 0])}
    assert distance(first, second) == distance(second, first) == pytest.approx(2 / 6)
    assert distance(first, first) == 0


def test_the_newest_mask_must_be_close_to_all_others_of_a_full_window():
    bird = EarlyBird(distance=0.25, window=3)
    a, b, c = ({"w": mask(*kept)} for kept in ((1, 1, 0, 0), (1, 0, 1, 0), (0, 0, 1, 1)))
    same = {"w": mask(1, 0, 0, 0)}  # one unit from a, one from b
    assert not bird.settled([a, a]) and bird.settled([a, a, a]) and bird.settled([c, a, a, a])
    assert bird.settled([a, b, same]) and not bird.settled([a, same, b]) and not bird.settled([c, a, a])
    assert not bird.settled([a, a, a, c])


# --------------------------------------------------------------------------------------------------- planted training


def planted():
    """A network whose weights go to a target by a linear recursion: the loss is |W - target|² / 2, once per epoch."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(SIZE, SIZE, bias=False)
    net.weight.data = torch.randn(SIZE, SIZE, generator=generator)
    data = [(torch.eye(SIZE), torch.randn(SIZE, SIZE, generator=generator))]
    return net, data, lambda output, target: (output - target).square().sum() / 2


def masks_of_the_recursion():
    """Return the mask after each step of gradient descent with Nesterov's momentum, worked out without a network."""
    net, ((_, target),), _ = planted()
    weight, velocity = net.weight.detach().double(), torch.zeros(SIZE, SIZE, dtype=torch.float64)
    masks = []
    for _ in range(STEPS):
        slope = weight - target.double().T
        velocity = 0.9 * velocity + slope
        weight = weight - LR * (slope + 0.9 * velocity)
        masks.append(top_k({"weight": weight.abs()}, SIZE**2 // 2)["weight"])
    return masks


def settling_step(masks, share=BIRD["distance"]):
    """Return the first step whose mask differs from each of the two before in at most `share` of the weights."""
    far = [max(int((masks[i] != masks[i - k]).sum()) for k in (1, 2)) for i in range(2, len(masks))]
    return 3 + next(i for i, count in enumerate(far) if count <= share * SIZE**2)


def prune(sparsity=0.5, **options):
    net, data, loss = planted()
    options = {"mask_from": BIRD, "schedule": CUT, "recovery": RECOVERY, "method": "magnitude", **options}
    return sc.prune(net, torch.zeros(1, SIZE), budget=sc.Budget(sparsity=sparsity), data=data, loss=loss, **options)


def test_the_mask_is_taken_when_it_has_settled():
    masks = masks_of_the_recursion()
    step = settling_step(masks)
    assert 5 < step < STEPS // 2 - 2  # neither at once nor when the schedule says
    found = prune()
    assert torch.equal(found.masks["weight"], masks[step - 1])
    assert not torch.equal(found.masks["weight"], masks[STEPS // 2 - 1])
    assert found.history[-1]["step"] == step + STEPS // 2  # what comes after the cut is as long as ever
    late = prune(mask_from="end")
    assert torch.equal(late.masks["weight"], masks[STEPS // 2 - 1]) and late.history[-1]["step"] == STEPS


def test_a_ticket_of_the_early_bird_begins_where_the_network_began():
    net, masks = planted()[0], masks_of_the_recursion()
    seen = []
    prune(
        method="lottery",
        on_step=lambda state: seen.append((state.step, state.model.weight.detach().clone())),
    )
    step, first = seen[settling_step(masks)]
    assert step == settling_step(masks) + 1  # the first step of the ticket
    kept = masks[step - 2]
    (_, target), start = planted()[1][0], net.weight.detach() * kept
    slope = (start - target.T) * kept
    assert torch.allclose(first, start - LR * 1.9 * slope, atol=1e-5)


def test_a_mask_that_does_not_settle_is_taken_when_the_schedule_says():
    masks = masks_of_the_recursion()
    found = prune(mask_from={**BIRD, "distance": 0, "window": STEPS // 2})
    assert torch.equal(found.masks["weight"], masks[STEPS // 2 - 1]) and found.history[-1]["step"] == STEPS


def test_random_masks_of_one_seed_settle_as_soon_as_the_window_is_full():
    assert prune(method="random", mask_from={**BIRD, "window": 7}).history[-1]["step"] == 7 + STEPS // 2
    assert prune(method="random", mask_from={**BIRD, "window": 2, "looks": 5}).history[-1]["step"] == 8 + STEPS // 2


def test_each_stretch_before_a_cut_has_its_own_early_bird():
    cubic = {"name": "cubic", "steps": 2, "start": 0.25, "end": 0.5}
    found = prune(method="random", schedule=cubic, mask_from={**BIRD, "looks": 10, "window": 2})
    assert [round(e["step"]) for e in found.history if e["step"] in (2, 4, 24)] == [2, 4, 24]
    assert found.history[-1]["step"] == 24


def in_a_loop_of_ones_own(interrupted_at=0):
    net, ((x, target),), loss = planted()
    make = lambda model: torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True)  # noqa: E731
    settings = {"total_steps": STEPS, "mask_from": BIRD, "schedule": CUT, "budget": sc.Budget(sparsity=0.5)}
    sgd = make(net)
    pruner = sc.Pruner(net, torch.zeros(1, SIZE), optimizers=sgd, **settings)
    cut = None
    for step in range(1, STEPS + 1):
        sgd.zero_grad()
        loss(net(x), target).backward()
        sgd.step()
        if pruner.step() is not None:
            cut = step
        if step == interrupted_at:
            states = copy.deepcopy((net.state_dict(), sgd.state_dict(), pruner.state_dict()))
            net = planted()[0]
            sgd = make(net)
            pruner = sc.Pruner(net, torch.zeros(1, SIZE), optimizers=sgd, **settings)
            pruner.load_state_dict(states[2])
            net.load_state_dict(states[0])
            sgd.load_state_dict(states[1])
    return cut, pruner.result()


@pytest.mark.parametrize("interrupted_at", [0, 5, 30])
def test_in_a_loop_of_ones_own_also_after_an_interruption(interrupted_at):
    masks = masks_of_the_recursion()
    cut, found = in_a_loop_of_ones_own(interrupted_at)
    assert torch.equal(found.masks["weight"], masks[settling_step(masks) - 1])
    assert cut == settling_step(masks)


def test_channels_settle_too():
    """The paper's form: scales of batch normalization under a penalty, and channels."""
    from secateur.testing.toys import toy, toy_batches

    model, x = toy("resnet20")
    found = sc.prune(
        model, x, method="slimming", granularity="channel", budget=sc.Budget(macs=0.7), data=toy_batches("resnet20"),
        mask_from={"name": "early-bird", "distance": 0.2, "window": 2, "looks": 4}, schedule=CUT,
        recovery={"name": "fine-tune", "epochs": 4, "lr": 0.01},
    )  # fmt: skip
    assert found.after.macs < 0.71 * found.before.macs


# ------------------------------------------------------------------------------------------------------------- recipes


def test_it_is_written_as_a_name_or_with_settings():
    by_name = Recipe(criterion="magnitude", mask_from="early-bird")
    assert by_name.mask_from == EarlyBird() and by_name == Recipe(criterion="magnitude", mask_from=EarlyBird())
    other = by_name.but(mask_from={"name": "early-bird", "window": 3})
    assert len({by_name.hash, other.hash, Recipe(criterion="magnitude").hash}) == 3
    assert Recipe.model_validate_json(other.model_dump_json()) == other and not other.checkpoints
    assert by_name.but(weights_from=3).checkpoints == {3} and Recipe(criterion="magnitude").checkpoints == set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_from": {"name": "early-bird", "looks": 4}}, "4 looks never fill a window of 5 masks"),
        ({"mask_from": {"name": "early-bird", "distanse": 1}}, "distanse: Extra inputs"),
        ({"schedule": "one-shot"}, "all cuts of this schedule come before any"),
        ({"mask_from": {**BIRD, "distance": 0.1}, "sparsity": 0.95}, r"at most 9.72%, .*Give a smaller one.*0.0097"),
        ({"recovery": "none"}, "'early-bird' works while the network trains, and this recipe trains nothing"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(InvalidRecipe, match=message) as error:
        prune(**settings)
    assert "\n" not in str(error.value)
