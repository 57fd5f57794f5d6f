from __future__ import annotations

import hashlib
import itertools
import random

import numpy as np
import pytest

from infra.errors import Refused
from pipelines.shapes import world
from pipelines.shapes.world import Object, Scene

EVERY_SCENE = [
    *world.singles(),
    *(
        Scene((a, b), background, relation)
        for a, relation, b in world.arrangements()
        for background in ("white", "pink")
    ),
]


def test_scenes_words_and_pixels_are_the_same_for_ever() -> None:
    told = "\n".join(world.scene_of(index, seed=7)[1] for index in range(200))
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "3ab0734eb9f9bc9d"
    shown = b"".join(world.picture_of(index, seed=7).tobytes() for index in range(20))
    assert hashlib.sha256(shown).hexdigest()[:16] == "6dbc31474b780413"


def test_there_are_as_many_combinations_as_the_attributes_make() -> None:
    assert len(world.singles()) == 4 * 6 * 2 * 4
    assert len(world.arrangements()) == (4 * 6) * 4 * (3 * 5)  # the second object differs in shape and in colour


def test_every_caption_is_parsed_back_to_its_scene() -> None:
    rng = random.Random(0)
    for scene in EVERY_SCENE:
        assert world.parse(world.caption(scene)) == scene
        assert world.parse(world.caption(scene, rng)) == scene


def test_the_canonical_form_is_the_documented_one_and_most_captions_have_it() -> None:
    one = Scene((Object("circle", "red", "large"),), "white")
    two = Scene((Object("circle", "red"), Object("square", "blue")), "white", "left of")
    assert world.caption(one) == "a large red circle on a white background"
    assert world.caption(two) == "a red circle to the left of a blue square on a white background"
    rng = random.Random(0)
    canonical = [world.caption(one, rng) == world.caption(one) for _ in range(2000)]
    assert 0.8 < np.mean(canonical) < 0.9


@pytest.mark.parametrize("text", ["a dog", "a large red circle", "a large mauve circle on a white background", ""])
def test_a_caption_outside_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="no caption of the shapes world"):
        world.parse(text)


def test_impossible_scenes_are_refused() -> None:
    red = Object("circle", "red")
    with pytest.raises(Refused, match="share neither"):
        Scene((red, Object("square", "red")), "white", "above")
    with pytest.raises(Refused, match="one object with a size"):
        Scene((red,), "white")
    with pytest.raises(Refused, match="background"):
        Scene((Object("circle", "red", "large"),), "mauve")
    with pytest.raises(Refused, match="mauve circle"):
        Scene((Object("circle", "mauve", "large"),), "white")


def test_the_held_out_file_lists_exactly_what_is_held_out() -> None:
    listed = [line for line in world.HELD_OUT_FILE.read_text().splitlines() if not line.startswith("#")]
    assert listed == world.held_out_lines()
    singles = [line for line in listed if line.startswith("single: ")]
    assert len(singles) >= 0.15 * len(world.singles())
    assert len(listed) - len(singles) >= 0.15 * len(world.arrangements())


def test_training_never_shows_nor_tells_a_held_out_scene() -> None:
    listed = set(world.HELD_OUT_FILE.read_text().splitlines())
    for index in range(5000):
        scene, told, _ = world.scene_of(index, seed=3, pairs=0.5)
        assert world.parse(told) == scene
        if scene.relation is None:
            (one,) = scene.objects
            assert f"single: {one.size} {one.colour} {one.shape}, {scene.background}" not in listed
        else:
            for (a, b), relation in (
                (scene.objects, scene.relation),
                (scene.objects[::-1], world.CONVERSE[scene.relation]),
            ):
                assert f"pair: {a.colour} {a.shape} {relation} {b.colour} {b.shape}" not in listed


def test_training_sees_every_value_and_every_pair_of_values() -> None:
    def values(scene: Scene) -> list[tuple[str, str | None]]:
        return [(name, value) for name, value in scene.attributes.items()]

    def value_pairs(scenes: list[Scene]) -> set[tuple[object, ...]]:
        return {pair for scene in scenes for pair in itertools.combinations(values(scene), 2)}

    assert value_pairs([s for s in world.singles() if not world.held_out(s)]) == value_pairs(list(world.singles()))


def test_training_sees_every_object_in_every_place_of_a_pair() -> None:
    seen = {
        (place, (a, b)[place], relation)
        for a, relation, b in world.arrangements()
        if not world.held_out(Scene((a, b), "white", relation))
        for place in (0, 1)
    }
    assert len(seen) == 2 * 24 * 4


def test_the_share_of_pairs_is_what_was_asked_for() -> None:
    share = np.mean([world.scene_of(index, seed=0, pairs=0.3)[0].relation is not None for index in range(4000)])
    assert share == pytest.approx(0.3, abs=0.03)
    assert all(world.scene_of(index, seed=0, pairs=0)[0].relation is None for index in range(200))


def _objects_pixels(scene: Scene, rng: random.Random) -> tuple[np.ndarray, list[np.ndarray]]:
    picture = world.render(scene, rng).astype(int)
    return picture, [np.argwhere((picture == world.COLOURS[one.colour]).all(axis=2)) for one in scene.objects]


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("size", world.SIZES)
def test_a_single_object_moves_by_more_than_a_tenth_of_the_side_and_stays_whole(shape: str, size: str) -> None:
    rng = random.Random(1)
    scene = Scene((Object(shape, "blue", size),), "white")
    drawn = [_objects_pixels(scene, rng)[1][0] for _ in range(150)]
    centres = np.array([(pixels.min(axis=0) + pixels.max(axis=0)) / 2 for pixels in drawn])
    assert (np.ptp(centres, axis=0) > 0.1 * 128).all()
    areas = np.array([len(pixels) for pixels in drawn])
    assert np.ptp(areas) < 0.12 * areas.mean()  # the edge's share differs with the place, a cut would cost more
    assert np.concatenate(drawn).min() >= 1
    assert np.concatenate(drawn).max() <= 126


@pytest.mark.parametrize("relation", world.CONVERSE)
def test_the_objects_of_a_pair_lie_as_told_and_apart(relation: str) -> None:
    rng = random.Random(2)
    axis = 1 if relation in ("left of", "right of") else 0
    for a, b in itertools.permutations(world.SHAPES, 2):
        scene = Scene((Object(a, "red"), Object(b, "cyan")), "black", relation)
        for _ in range(20):
            _, (first, second) = _objects_pixels(scene, rng)
            if relation in ("right of", "below"):
                first, second = second, first
            assert second[:, axis].min() - first[:, axis].max() >= 4


def test_smaller_sides_show_the_same_scene() -> None:
    scene = Scene((Object("cross", "green", "large"),), "pink")
    large, small = (world.render(scene, random.Random(5), side).astype(float) for side in (128, 32))
    assert np.abs(large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3)) - small).mean() < 3


def test_prompts_are_held_out_and_evenly_spread() -> None:
    for kind, n, different in (("single", 500, 32), ("pair", 300, 300)):
        drawn = world.prompts(kind, n, seed=1)
        assert drawn == world.prompts(kind, n, seed=1)
        assert drawn != world.prompts(kind, n, seed=2)
        told = [one["prompt"] for one in drawn]
        assert len(set(told)) == different
        assert max(map(told.count, told)) <= -(-n // different)
        for one in drawn:
            scene = world.parse(one["prompt"])
            assert world.held_out(scene)
            assert one == {"prompt": world.caption(scene), "kind": kind, "expected": scene.attributes}


def test_an_unknown_kind_of_prompt_is_refused() -> None:
    with pytest.raises(Refused, match="triple"):
        world.prompts("triple", 1, 0)
