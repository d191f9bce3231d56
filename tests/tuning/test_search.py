"""The greedy search finds what it should, and never does anything twice."""

from __future__ import annotations

import math
import os
import signal
import statistics
from pathlib import Path

import pytest

from kd_det.core.errors import KDError
from kd_det.tuning import greedy_search
from kd_det.tuning.runs import RunError
from kd_det.tuning.space import make_space
from tests.tuning.toy import DECADES, Quiet, Toy


@pytest.fixture
def search(tmp_path):
    def start(run, spaces=None, seeds=(1,), progress=None, **options):
        spaces = spaces or {key: make_space(DECADES) for key in ("a", "b")}
        return greedy_search(
            spaces,
            run,
            tmp_path / "search",
            seeds=seeds,
            settings=options.pop("settings", lambda fixed: {"fixed": dict(fixed)}),
            progress=progress or Quiet(),
            **options,
        )

    return start


def test_the_second_key_is_searched_with_the_best_value_of_the_first(search):
    toy = Toy()
    first, second = search(toy)
    assert [call for call, _ in toy.calls[:4]] == [{"a": value} for value in DECADES]
    assert [call for call, _ in toy.calls[4:]] == [{"a": 0.1, "b": value} for value in DECADES]
    assert (first.key, first.best.value) == ("a", 0.1)
    assert (second.key, second.best.value) == ("b", 0.1)
    assert second.best.mean == 80


def test_the_order_of_the_keys_decides(search):
    toy = Toy()
    spaces = {key: make_space(DECADES) for key in ("b", "a")}
    first, second = search(toy, spaces)
    assert [call for call, _ in toy.calls[4:]] == [{"b": 10.0, "a": v} for v in DECADES]
    assert (first.best.value, second.best.value) == (10.0, 0.1)


def test_a_score_is_the_mean_over_the_seeds(search):
    toy = Toy(noise=0.5)
    first, _ = search(toy, seeds=(1, 2, 4))
    assert [seed for _, seed in toy.calls[:6]] == [1, 2, 4, 1, 2, 4]
    scores = [Toy()({"a": 0.1}, seed, Path(f"seed_{seed}")) + 0.5 * seed for seed in (1, 2, 4)]
    assert first.best.scores == pytest.approx(scores)
    assert first.best.mean == pytest.approx(statistics.mean(scores))
    assert first.best.deviation == pytest.approx(statistics.stdev(scores))


def test_a_finished_search_is_only_read(search):
    before = search(Toy())
    again, quiet = Toy(), Quiet()
    assert search(again, progress=quiet) == before
    assert again.calls == []
    assert quiet.begun == [("a", 4), ("b", 4)]


def cut_off_after(number, error=KeyboardInterrupt):
    class Cut(Toy):
        def __call__(self, values, seed, folder):
            if len(self.calls) == number:
                raise error
            return super().__call__(values, seed, folder)

    return Cut()


@pytest.mark.parametrize("number", range(8))
def test_a_search_that_was_cut_off_continues_and_repeats_no_finished_trial(search, number):
    cut, rest = cut_off_after(number), Toy()
    with pytest.raises(KeyboardInterrupt):
        search(cut)
    found = search(rest)
    assert len(cut.calls) == number
    calls = [call for call, _ in cut.calls + rest.calls]
    assert calls == [{"a": v} for v in DECADES] + [{"a": 0.1, "b": v} for v in DECADES]
    assert [sweep.best.value for sweep in found] == [0.1, 0.1]


@pytest.mark.parametrize(
    "space",
    [make_space(DECADES), make_space(low=1, high=9, trials=4, sampler="random")],
    ids=["grid", "range"],
)
def test_a_search_whose_process_was_killed_continues_with_the_same_value(search, space, tmp_path):
    class Killed(Toy):
        def __call__(self, values, seed, folder):
            if len(self.calls) == 2:
                (tmp_path / "last").write_text(repr(values["a"]))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(values, seed, folder)

    child = os.fork()
    if child == 0:
        try:
            search(Killed(), {"a": space})
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    toy = Toy()
    (found,) = search(toy, {"a": space})
    assert toy.calls[0][0]["a"] == float((tmp_path / "last").read_text())
    assert len(toy.calls) == 2
    assert len(found.points) == 4


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_range_is_searched_with_the_trials_asked_for_and_draws_nothing_twice(search, sampler):
    spaces = {"a": make_space(low=1e-3, high=10, log=True, trials=12, sampler=sampler)}
    cut, rest = cut_off_after(7), Toy()
    with pytest.raises(KeyboardInterrupt):
        search(cut, spaces)
    (found,) = search(rest, spaces)
    values = [call["a"] for call, _ in cut.calls + rest.calls]
    assert len(values) == len(set(values)) == len(found.points) == 12
    assert all(1e-3 <= value <= 10 for value in values)
    assert found.best.mean == max(point.mean for point in found.points)
    assert abs(math.log10(found.best.value) + 1) < 0.7


def test_tpe_comes_closer_with_the_trials(search):
    spaces = {"a": make_space(low=1e-3, high=10, log=True, trials=24)}
    toy = Toy()
    search(toy, spaces)
    errors = [abs(math.log10(call["a"]) + 1) for call, _ in toy.calls]
    assert statistics.mean(errors[12:]) < statistics.mean(errors[:12])
    assert min(errors) < 0.05


def test_a_value_that_was_cut_off_in_a_range_is_taken_up_first(search):
    spaces = {"a": make_space(low=1, high=9, trials=3, sampler="random")}
    asked = []

    def broken(values, seed, folder):
        asked.append(values["a"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(broken, spaces)
    toy = Toy()
    search(toy, spaces)
    assert toy.calls[0][0] == {"a": asked[0]}
    assert len(toy.calls) == 3


def test_more_values_extend_a_finished_search(search):
    search(Toy(), {"a": make_space(DECADES)})
    toy = Toy()
    (found,) = search(toy, {"a": make_space([0.05, *DECADES, 0.2])})
    assert [call for call, _ in toy.calls] == [{"a": 0.05}, {"a": 0.2}]
    assert [point.value for point in found.points] == [0.01, 0.05, 0.1, 0.2, 1.0, 10.0]


def test_a_value_taken_off_the_list_before_it_was_tried_is_not_tried(search):
    with pytest.raises(KeyboardInterrupt):
        search(cut_off_after(1), {"a": make_space(DECADES)})
    toy = Toy()
    (found,) = search(toy, {"a": make_space([0.01, 10.0])})
    assert [call for call, _ in toy.calls] == [{"a": 10.0}]
    assert [point.value for point in found.points] == [0.01, 10.0]


def test_several_jobs_find_the_same_and_train_nothing_twice(search):
    toy = Toy()
    found = search(toy, jobs=3)
    assert [sweep.best.value for sweep in found] == [0.1, 0.1]
    assert sorted(call["a"] for call, _ in toy.calls if "b" not in call) == DECADES
    assert sorted(call["b"] for call, _ in toy.calls if "b" in call) == DECADES


class Diverging(Toy):
    def __call__(self, values, seed, folder):
        if values["a"] == 10.0 or values.get("b") == 10.0:
            self.calls.append((dict(values), seed))
            raise RunError(f"it diverged; read {folder}/screen.txt")
        return super().__call__(values, seed, folder)


def test_a_run_that_fails_leaves_the_other_values_and_is_tried_again_next_time(search):
    quiet = Quiet()
    first, second = search(Diverging(), seeds=(1, 2), progress=quiet)
    assert [sweep.best.value for sweep in (first, second)] == [0.1, 0.1]
    assert [point.value for point in first.points if point.scores] == DECADES[:3]
    assert "screen.txt" in first.points[-1].failure
    assert quiet.runs == 2 * 8  # the runs that were left out count as over
    again = Diverging()
    search(again, seeds=(1, 2))
    assert again.calls == [({"a": 10.0}, 1), ({"a": 0.1, "b": 10.0}, 1)]
    healed = Toy()
    first, _ = search(healed, seeds=(1, 2))
    assert len(healed.calls) == 4
    assert first.points[-1].scores == pytest.approx([Toy()({"a": 10.0}, 1, Path("seed_1"))] * 2)
    assert not first.points[-1].failure


def test_where_every_value_fails_the_search_ends_in_one_error(search, refuses):
    def broken(values, seed, folder):
        raise RunError("no luck")

    with refuses("at least one value of a to train to the end", "no luck"):
        search(broken)


def test_a_run_that_refuses_its_input_ends_the_search_at_once(search):
    toy = cut_off_after(1, KDError("wrong weights"))
    with pytest.raises(KDError, match="wrong weights"):
        search(toy)
    assert len(toy.calls) == 1
    rest = Toy()
    search(rest)
    assert len(rest.calls) == 7


def test_a_search_is_not_continued_with_other_settings(search, refuses):
    search(Toy(), {"a": make_space(DECADES)}, settings=lambda fixed: {"SOLVER.MAX_ITER": 600})
    with refuses("continue as it began", "SOLVER.MAX_ITER 900, was 600", "another output"):
        search(Toy(), {"a": make_space(DECADES)}, settings=lambda fixed: {"SOLVER.MAX_ITER": 900})
    with refuses("seeds [1, 2], was [1]"):
        search(Toy(), seeds=(1, 2), settings=lambda fixed: {"SOLVER.MAX_ITER": 600})


def test_a_later_key_is_not_continued_after_another_best_value_of_an_earlier_one(search, refuses):
    search(Toy())
    with refuses("fixed {'a': 0.05}, was {'a': 0.1}"):
        search(
            lambda values, seed, folder: 99.0,
            {"a": make_space([0.05, *DECADES]), "b": make_space(DECADES)},
        )


def test_runs_without_their_record_are_not_reused(search, tmp_path, refuses):
    (tmp_path / "search/runs/a/0.1/seed_1").mkdir(parents=True)
    with refuses("to be recorded in", "runs without a record"):
        search(Toy())


def test_of_equal_values_the_smaller_is_the_best(search):
    first, second = search(lambda values, seed, folder: 50.0)
    assert (first.best.value, second.best.value) == (0.01, 0.01)
