"""Decisions of Alg. 1 on a table of known latencies; random architectures."""

import pytest
from latency_inputs import MS, known_table

from snapfusion.evolution import random_architectures
from snapfusion.evolution.random_architectures import random_architecture
from snapfusion.evolution.search import BlockScore, EvolutionError, decide, min_latency_ms, next_action
from snapfusion.evolution.settings import RoundLimits
from snapfusion.mini import models
from snapfusion.models.unet import architecture_of


@pytest.fixture(scope="module")
def origin():
    return architecture_of(models.unet())


@pytest.fixture(scope="module")
def table(origin):
    return known_table(origin)


def scored(architecture, table, losses, *, otherwise=1.0):
    """Scores by named losses; other blocks lose `otherwise`, None for no valid image."""

    def score(block):
        lost = losses.get(block.name, otherwise)
        return BlockScore(
            block=block.name,
            kind=block.kind,
            clip=None if lost is None else 0.9 - lost,
            delta_clip=None if lost is None else (lost, lost - 0.01, lost + 0.01),
            delta_ms=table.block_ms(architecture, block.name),
            captions=100,
        )

    return [score(block) for block in architecture.blocks]


def removed(architecture, table, losses, *, objective_ms, limits, otherwise=1.0):
    scores = scored(architecture, table, losses, otherwise=otherwise)
    return decide("remove", architecture, scores, table=table, objective_ms=objective_ms, limits=limits)


def test_blocks_of_least_value_go_first(origin, table):
    # The attention loses more CLIP than the ResNet block, but less per millisecond.
    losses = {
        "down_blocks.0.resnets.1": 0.03,
        "down_blocks.0.attentions.0": 0.04,
        "mid_block.attentions.0": -0.01,
    }
    before = table.predict_ms(origin)
    decision = removed(origin, table, losses, objective_ms=before / 2, limits=RoundLimits(removed=2))
    assert decision.action == "remove"
    assert decision.blocks == ("mid_block.attentions.0", "down_blocks.0.attentions.0")
    assert decision.architecture == origin.without(decision.blocks[0]).without(decision.blocks[1])
    assert (decision.before_ms, decision.after_ms) == (before, before - 8.0)


def test_removal_stops_at_the_objective(origin, table):
    losses = {"mid_block.attentions.0": 0.0, "down_blocks.0.attentions.0": 0.01}
    before = table.predict_ms(origin)
    decision = removed(origin, table, losses, objective_ms=before - 3.0, limits=RoundLimits(removed=5))
    assert decision.blocks == ("mid_block.attentions.0",)


def test_shortcut_latency_is_not_saved(origin, table):
    changing = "up_blocks.0.resnets.0"
    (score,) = [score for score in scored(origin, table, {}) if score.block == changing]
    assert score.delta_ms == pytest.approx(MS["resnet"] - MS["shortcut"])
    assert score.value == pytest.approx(1.0 / 1.5)


def test_block_needed_for_valid_images_stays(origin, table):
    losses = {"mid_block.attentions.0": None}
    limits = RoundLimits(removed=100)
    decision = removed(
        origin, table, losses, objective_ms=min_latency_ms(origin, table=table) + 4.0, limits=limits
    )
    assert "mid_block.attentions.0" not in decision.blocks
    with pytest.raises(EvolutionError, match="no block can be removed"):
        removed(origin, table, {}, objective_ms=5.0, limits=limits, otherwise=None)


def test_most_valued_copyable_blocks_are_copied(origin, table):
    losses = {"up_blocks.0.resnets.0": 9.0, "mid_block.attentions.0": 8.0, "mid_block.resnets.0": 3.0}
    scores = scored(origin, table, losses)
    now = table.predict_ms(origin)
    decision = decide("copy", origin, scores, table=table, objective_ms=now, limits=RoundLimits(copied=2))
    # The first changes the number of channels, so it cannot be copied.
    assert decision.blocks == ("mid_block.attentions.0", "mid_block.resnets.0")
    assert decision.after_ms == now + 6.0
    assert "mid_block.attentions.0+1" in {block.name for block in decision.architecture.blocks}


def test_actions_follow_objective_and_growth(origin, table):
    now, limits = table.predict_ms(origin), RoundLimits(growths=1)
    assert next_action(origin, table=table, objective_ms=now - 1, limits=limits, growths=0) == "remove"
    assert next_action(origin, table=table, objective_ms=now, limits=limits, growths=0) == "copy"
    assert next_action(origin, table=table, objective_ms=now, limits=limits, growths=1) == "stop"
    stopped = decide("stop", origin, [], table=table, objective_ms=now, limits=limits)
    assert (stopped.action, stopped.blocks, stopped.architecture) == ("stop", (), origin)


def test_unreachable_objective_names_the_fastest(origin, table):
    fastest = min_latency_ms(origin, table=table)
    assert 0.0 < fastest < table.predict_ms(origin)
    with pytest.raises(EvolutionError, match=f"no architecture takes 1 ms .* {fastest:.4g} ms of"):
        next_action(origin, table=table, objective_ms=1.0, limits=RoundLimits(), growths=0)


def test_random_architectures_meet_the_range_and_differ(origin, table, monkeypatch):
    now = table.predict_ms(origin)

    def draw(seed, low_ms=0.58 * now, high_ms=0.6 * now):
        return random_architecture(origin, table=table, low_ms=low_ms, high_ms=high_ms, seed=seed)

    found = [draw(seed) for seed in range(4)]
    assert all(0.58 * now <= table.predict_ms(one) <= 0.6 * now for one in found)
    assert len({one.digest() for one in found}) == 4
    assert found[3] == draw(3)
    with pytest.raises(EvolutionError, match="no architecture takes 1 ms"):
        draw(0, low_ms=0.0, high_ms=1.0)
    monkeypatch.setattr(random_architectures, "_MAX_ATTEMPTS", 10)
    with pytest.raises(ValueError, match="none of 10 random architectures takes"):
        draw(0, low_ms=0.6 * now - 0.01)
