"""The order in which public images are shown."""

import numpy as np

from models.public.batches import public_batches


def shown(*arguments, **options) -> dict[int, list[int]]:
    return {step: batch.tolist() for step, batch in public_batches("stage", *arguments, **options)}


def test_each_pass_shows_every_image_once_in_an_order_of_its_own():
    steps = shown(12, 4, 3, 0)
    assert list(steps) == list(range(9)) and all(batch == sorted(batch) for batch in steps.values())
    passes = [np.concatenate([steps[3 * epoch + part] for part in range(3)]) for epoch in range(3)]
    assert all(sorted(images) == list(range(12)) for images in passes)
    assert not np.array_equal(passes[0], passes[1])


def test_the_incomplete_last_batch_is_dropped_and_a_small_set_is_one_batch():
    assert [len(batch) for batch in shown(11, 4, 2, 0).values()] == [4, 4, 4, 4]
    assert shown(3, 4, 2, 0) == {0: [0, 1, 2], 1: [0, 1, 2]}
    assert shown(12, 4, 0, 0) == {}


def test_seed_and_stage_decide():
    assert shown(12, 4, 2, 5) == shown(12, 4, 2, 5) != shown(12, 4, 2, 6)
    other = {step: batch.tolist() for step, batch in public_batches("other", 12, 4, 2, 5)}
    assert other != shown(12, 4, 2, 5)


def test_a_later_start_shows_what_would_have_come():
    whole = shown(12, 4, 4, 1)
    assert shown(12, 4, 4, 1, start=5) == {step: whole[step] for step in range(5, 12)}
    assert shown(12, 4, 2, 1, start=6, before=6) == {step: whole[step] for step in range(6, 12)}


def test_so_few_steps_that_a_network_learns_nothing_are_announced(caplog):
    with caplog.at_level("INFO", "dpib"):
        shown(60, 6, 10, 0)
        assert not caplog.messages
        shown(60, 6, 9, 0)
    assert ["90" in message for message in caplog.messages] == [True]
